"""Models in plain PyTorch over images, volumes and signals."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests import models
from tests.models import Case, classify
from tests.zoo.own import regress


def of_models(make: Callable[[], Case]) -> Callable[[float], Case]:
    """Return a maker of tests/models.py with its dropouts set."""

    def make_with(dropout: float) -> Case:
        model, batch, loss_fn = make()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        return model, batch, loss_fn

    return make_with


class Spectral(nn.Module):
    """Learned filters in the frequency domain, complex (FNO, Li et al. 2021)."""

    def __init__(self, width: int, num_modes: int) -> None:
        super().__init__()
        self.num_modes = num_modes
        weights = torch.randn(width, width, num_modes, dtype=torch.cfloat) / width
        self.weights, self.local = nn.Parameter(weights), nn.Conv1d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        spectrum = torch.fft.rfft(x)[..., : self.num_modes]
        mixed = torch.einsum("bim,iom->bom", spectrum, self.weights)
        return F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + self.local(x))


def spectral(dropout: float) -> Case:
    """A Fourier neural operator: complex parameters, FFTs."""
    model = nn.Sequential(
        nn.Conv1d(1, 16, 1), Spectral(16, 12), nn.Dropout(dropout), Spectral(16, 12),
        nn.Conv1d(16, 1, 1),
    )
    return model, (torch.randn(8, 1, 128), torch.randn(8, 1, 128)), regress


def volumes(dropout: float) -> Case:
    """Convolutions in three dimensions."""
    model = nn.Sequential(
        nn.Conv3d(1, 8, 3, 1, 1), nn.BatchNorm3d(8), nn.ReLU(inplace=True), nn.MaxPool3d(2),
        nn.Conv3d(8, 16, 3, 1, 1), nn.InstanceNorm3d(16, affine=True), nn.LeakyReLU(0.1),
        nn.Dropout3d(dropout), nn.AdaptiveAvgPool3d(2), nn.Flatten(), nn.Linear(128, 10),
    )
    return model, (torch.randn(4, 1, 16, 16, 16), torch.randint(0, 10, (4,))), classify


def group_norm(dropout: float) -> Case:
    """Group norm, channels last, bilinear upsampling."""
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, 1, 1), nn.GroupNorm(8, 32), nn.SiLU(), nn.AvgPool2d(2),
        nn.Conv2d(32, 32, 3, 1, 1), nn.GroupNorm(8, 32), nn.SiLU(), nn.Dropout2d(dropout),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(32, 4, 1),
    ).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
    return model, (images, torch.randint(0, 4, (4, 32, 32))), classify


class Gan(nn.Module):
    """A generator trained through a discriminator that is frozen."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.Linear(16, 512), nn.Unflatten(1, (32, 4, 4)), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            spectral_norm(nn.Conv2d(3, 16, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Dropout2d(dropout),
            weight_norm(nn.Conv2d(16, 32, 4, 2, 1)), nn.LeakyReLU(0.2), nn.Flatten(),
            nn.Linear(512, 1),
        ).requires_grad_(False)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        return F.softplus(-self.discriminator(self.generator(noise))).mean()


def gan_generator(dropout: float) -> Case:
    """A frozen judge with spectral norm (its power iteration mutates buffers) and weight norm."""
    return Gan(dropout), torch.randn(16, 16), lambda model, noise: model(noise)


class Diffusion(nn.Module):
    """Noise is drawn in the forward and predicted (DDPM, Ho et al. 2020)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.net, self.time = models.UNet(8), nn.Embedding(100, 3)
        self.net.head = nn.Conv2d(8, 3, 1)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("alpha", torch.linspace(1, 0.01, 100))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        steps = torch.randint(0, 100, (len(images),))
        noise = torch.randn_like(images)
        alpha = self.alpha[steps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * images + (1 - alpha).sqrt() * noise
        noisy = self.dropout(noisy + self.time(steps)[:, :, None, None])
        return F.mse_loss(self.net(noisy), noise)


def diffusion(dropout: float) -> Case:
    """A denoiser that draws its own steps and noise."""
    return Diffusion(dropout), torch.randn(2, 3, 32, 32), lambda model, images: model(images)


class Vae(nn.Module):
    """A variational autoencoder: sampled latents, two terms of loss."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(196, 128), nn.ReLU(), nn.Dropout(dropout))
        self.moments = nn.Linear(128, 32)
        self.decoder = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 196))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean, log_variance = self.moments(self.encoder(x)).chunk(2, 1)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(1).mean() / 2
        return F.binary_cross_entropy_with_logits(self.decoder(latent), x) + 1e-3 * divergence


def vae(dropout: float) -> Case:
    """Reparametrised noise inside the forward."""
    return Vae(dropout), torch.rand(64, 196), lambda model, x: model(x)


class GraphNet(nn.Module):
    """Messages along edges, gathered and scattered with indices."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed, self.dropout = nn.Linear(16, 64), nn.Dropout(dropout)
        self.messages = nn.ModuleList(nn.Linear(128, 64) for _ in range(3))
        self.head = nn.Linear(64, 10)

    def forward(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        nodes, edges = batch
        x = self.embed(nodes)
        for layer in self.messages:
            messages = F.relu(layer(torch.cat([x[edges[0]], x[edges[1]]], 1)))
            x = self.dropout(x.index_add(0, edges[1], messages))
            x = x + torch.zeros_like(x).scatter_reduce(
                0, edges[:1].T.expand(-1, 64), messages, "amax", include_self=False
            )
        return self.head(x)


def graph_net(dropout: float) -> Case:
    """A message-passing network over 200 nodes and 800 edges."""
    batch = (torch.randn(200, 16), torch.randint(0, 200, (2, 800))), torch.randint(0, 10, (200,))
    return GraphNet(dropout), batch, classify


OWN_IMAGES: dict[str, Callable[[float], Case]] = {
    "mlp": of_models(models.mlp),
    "wrn": of_models(models.wrn),
    "resnet50": of_models(models.resnet50),
    "unet": of_models(models.unet),
    "densenet": of_models(models.densenet),
    "inverted_residuals": of_models(models.mobilenet),
    "spectral": spectral,
    "volumes": volumes,
    "group_norm": group_norm,
    "gan_generator": gan_generator,
    "diffusion": diffusion,
    "vae": vae,
    "graph_net": graph_net,
}
