"""Plain models of the field, none of which knows of ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    """Two convolutions and a way around them (He et al. 2016)."""

    def __init__(self, channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.around = nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.around(x))


class ResNet(nn.Module):
    """A stem, residual blocks and a classifier."""

    def __init__(self, width: int = 8, num_blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        widths = [width * 2**i for i in range(num_blocks + 1)]
        self.blocks = nn.Sequential(*(
            Residual(a, b, 2 if i else 1)
            for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
        ))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.flatten(self.pool(self.blocks(self.stem(x))), 1))


class Vgg(nn.Module):
    """Convolutions, pooling, and a classifier with dropout (Simonyan and Zisserman 2015)."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for out_channels in (width, 2 * width):
            for _ in range(2):
                layers += [nn.Conv2d(channels, out_channels, 3, padding=1), nn.ReLU()]
                channels = out_channels
            layers += [nn.MaxPool2d(2), nn.Dropout(0.2)]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.head = nn.Sequential(nn.Linear(9 * channels, 16), nn.ReLU(), nn.Linear(16, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.pool(self.features(x)).flatten(1))


class UNet(nn.Module):
    """Down and up again, with what was on the way down put beside (Ronneberger et al. 2015)."""

    def __init__(self, num_dims: int = 2, width: int = 4, upsamples: bool = False) -> None:
        super().__init__()
        conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.InstanceNorm3d))[num_dims - 2]
        pool = (nn.MaxPool2d, nn.MaxPool3d)[num_dims - 2]
        transposed = (nn.ConvTranspose2d, nn.ConvTranspose3d)[num_dims - 2]

        def block(channels: int, out_channels: int) -> nn.Sequential:
            return nn.Sequential(
                conv(channels, out_channels, 3, padding=1), norm(out_channels), nn.ReLU(),
                conv(out_channels, out_channels, 3, padding=1), nn.GroupNorm(2, out_channels),
                nn.SiLU(),
            )

        self.down1, self.down2, self.middle = (
            block(1, width), block(width, 2 * width), block(2 * width, 4 * width)
        )
        self.pool = pool(2)
        mode = ("bilinear", "trilinear")[num_dims - 2]

        def up(channels: int) -> nn.Module:
            if upsamples:
                return nn.Sequential(
                    nn.Upsample(scale_factor=2, mode=mode), conv(channels, channels // 2, 1)
                )
            return transposed(channels, channels // 2, 2, 2)

        self.up2, self.up1 = up(4 * width), up(2 * width)
        self.join2, self.join1 = block(4 * width, 2 * width), block(2 * width, width)
        self.head = conv(width, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.down1(x)
        two = self.down2(self.pool(one))
        up = self.up2(self.middle(self.pool(two)))
        up = self.up1(self.join2(torch.cat([two, up], 1)))
        return self.head(self.join1(torch.cat([one, up], 1)))


class SmallUNet(nn.Module):
    """One level of a U-Net."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.down = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
        )
        self.middle = nn.Sequential(
            nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 2, 2),
        )
        self.head = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.down(x)
        return self.head(torch.cat([one, self.middle(one)], 1))


class Gated(nn.Module):
    """Squeeze and excitation (Hu et al. 2018), depthwise, and a parameter of its own."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.depthwise = nn.Conv2d(
            channels, channels, 5, padding="same", groups=channels, padding_mode="reflect"
        )
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.excite = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1))
        self.norm = nn.LayerNorm(channels)
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))
        self.head = nn.Conv2d(channels, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.stem(x))
        y = self.depthwise(x)
        y = y * torch.sigmoid(self.excite(self.squeeze(y)))
        y = self.norm(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        one, other = (x + self.scale * y).chunk(2, dim=1)
        return self.head(torch.cat([one * torch.tanh(other), other], dim=1))
