"""Small models of many families for tests: each maker returns (model, batch, loss_fn), seeded.

Written for the tests or built by transformers from a configuration with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Case = tuple[nn.Module, Any, Callable[[nn.Module, Any], torch.Tensor]]


def classify(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Cross entropy of a classifier."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets)


def mlp() -> Case:
    """Linear, GELU, dropout."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(128, 128), nn.GELU(), nn.Dropout(0.1)]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    return model, (torch.randn(256, 128), torch.randint(0, 10, (256,))), classify


class WideBlock(nn.Module):
    """Pre-activation residual block with dropout (Zagoruyko & Komodakis 2016)."""

    def __init__(self, wide_in: int, wide_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(wide_in), nn.BatchNorm2d(wide_out)
        self.conv1 = nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        same = wide_in == wide_out and stride == 1
        self.shortcut = None if same else nn.Conv2d(wide_in, wide_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(x), inplace=True)
        skip = x if self.shortcut is None else self.shortcut(y)
        y = F.relu(self.norm2(self.conv1(y)), inplace=True)
        return skip + self.conv2(self.dropout(y))


class WideResNet(nn.Module):
    """WRN-depth-widen for 32 x 32 images."""

    def __init__(self, depth: int = 28, widen: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        blocks = []
        for stage in range(3):
            for index in range((depth - 4) // 6):
                wide_in = widths[stage] if index == 0 else widths[stage + 1]
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(WideBlock(wide_in, widths[stage + 1], stride, dropout))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(widths[3])
        self.head = nn.Linear(widths[3], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.blocks(self.stem(x))), inplace=True)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def wrn(batch_size: int = 8) -> Case:
    """WRN-28-2."""
    batch = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))
    return WideResNet(), batch, classify


class Bottleneck(nn.Module):
    """ResNet's bottleneck, expansion 4, in-place activations."""

    def __init__(self, wide_in: int, wide: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(wide_in, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(inplace=True),
            nn.Conv2d(wide, 4 * wide, 1, bias=False),
            nn.BatchNorm2d(4 * wide),
        )
        self.down = None
        if stride != 1 or wide_in != 4 * wide:
            self.down = nn.Sequential(
                nn.Conv2d(wide_in, 4 * wide, 1, stride, bias=False), nn.BatchNorm2d(4 * wide)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        y += x if self.down is None else self.down(x)
        return F.relu(y, inplace=True)


class ResNet50(nn.Module):
    """ResNet-50 (He et al. 2015)."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        blocks, wide_in = [], 64
        for stage, depth in enumerate((3, 4, 6, 3)):
            wide = 64 * 2**stage
            for index in range(depth):
                blocks.append(Bottleneck(wide_in, wide, 2 if stage > 0 and index == 0 else 1))
                wide_in = 4 * wide
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(wide_in, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def resnet50(batch_size: int = 4, side: int = 64) -> Case:
    """ResNet-50 on small images."""
    batch = torch.randn(batch_size, 3, side, side), torch.randint(0, 1000, (batch_size,))
    return ResNet50(), batch, classify


def double_conv(wide_in: int, wide_out: int) -> nn.Sequential:
    """Two 3 x 3 convolutions with batch norm."""
    return nn.Sequential(
        nn.Conv2d(wide_in, wide_out, 3, 1, 1),
        nn.BatchNorm2d(wide_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(wide_out, wide_out, 3, 1, 1),
        nn.BatchNorm2d(wide_out),
        nn.ReLU(inplace=True),
    )


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) with four levels."""

    def __init__(self, wide: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            [double_conv(3 if i == 0 else wide * 2 ** (i - 1), wide * 2**i) for i in range(4)]
        )
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(wide * 2 ** (i + 1), wide * 2**i, 2, 2) for i in range(3)]
        )
        self.merge = nn.ModuleList(
            [double_conv(wide * 2 ** (i + 1), wide * 2**i) for i in range(3)]
        )
        self.head = nn.Conv2d(wide, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        for i in reversed(range(3)):
            x = self.merge[i](torch.cat([skips[i], self.up[i](x)], 1))
        return self.head(x)


def unet(batch_size: int = 2, side: int = 64, wide: int = 16) -> Case:
    """U-Net segmentation."""
    batch = torch.randn(batch_size, 3, side, side), torch.randint(0, 4, (batch_size, side, side))
    return UNet(wide), batch, classify


class DenseNet(nn.Module):
    """Dense connectivity (Huang et al. 2017): every layer reads all earlier ones of its block."""

    def __init__(self, growth: int = 12, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * growth, 3, 1, 1, bias=False)
        wide = 2 * growth
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            layers = nn.ModuleList()
            for _ in range(depth):
                layers.append(
                    nn.Sequential(
                        nn.BatchNorm2d(wide),
                        nn.ReLU(),
                        nn.Conv2d(wide, growth, 3, 1, 1, bias=False),
                    )
                )
                wide += growth
            self.stages.append(layers)
            self.transitions.append(
                nn.Sequential(
                    nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, wide // 2, 1), nn.AvgPool2d(2)
                )
            )
            wide //= 2
        self.head = nn.Linear(wide, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layers, transition in zip(self.stages, self.transitions, strict=True):
            features = [x]
            for layer in layers:
                features.append(layer(torch.cat(features, 1)))
            x = transition(torch.cat(features, 1))
        return self.head(x.mean((2, 3)))


def densenet() -> Case:
    """A DenseNet-like classifier."""
    return DenseNet(), (torch.randn(8, 3, 32, 32), torch.randint(0, 10, (8,))), classify


class InvertedResidual(nn.Module):
    """MobileNetV2's block with in-place ReLU6."""

    def __init__(self, wide_in: int, wide_out: int, stride: int, expand: int = 4) -> None:
        super().__init__()
        wide = wide_in * expand
        self.is_residual = stride == 1 and wide_in == wide_out
        self.body = nn.Sequential(
            nn.Conv2d(wide_in, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU6(inplace=True),
            nn.Conv2d(wide, wide_out, 1, bias=False),
            nn.BatchNorm2d(wide_out),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x) if self.is_residual else self.body(x)


def mobilenet() -> Case:
    """Inverted residuals."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1),
        *[InvertedResidual(16, 16, 1) for _ in range(2)],
        InvertedResidual(16, 32, 2),
        *[InvertedResidual(32, 32, 1) for _ in range(2)],
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(32, 10),
    )
    return model, (torch.randn(8, 3, 64, 64), torch.randint(0, 10, (8,))), classify


class LSTMTagger(nn.Module):
    """Embedding, LSTM, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.lstm = nn.LSTM(32, 64, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(64, 100)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embed(tokens))[0]).transpose(1, 2)


def lstm() -> Case:
    """A recurrent network."""
    tokens = torch.randint(0, 100, (8, 8))
    return LSTMTagger(), (tokens, tokens.roll(-1, 1)), classify


# -- transformers


def hf_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss that a transformers model computes from its labels."""
    return model(**batch).loss


def _tokens(vocabulary: int, batch_size: int, length: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, vocabulary, (batch_size, length))
    return {"input_ids": tokens, "labels": tokens.clone()}


def gpt2(
    layers: int = 3,
    width: int = 64,
    heads: int = 4,
    vocabulary: int = 512,
    batch_size: int = 4,
    length: int = 64,
    dropout: float = 0.1,
) -> Case:
    """GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=vocabulary,
        n_positions=length,
        use_cache=False,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config), _tokens(vocabulary, batch_size, length), hf_loss


def bert(
    layers: int = 3,
    width: int = 64,
    heads: int = 4,
    vocabulary: int = 512,
    batch_size: int = 4,
    length: int = 64,
) -> Case:
    """BERT with a padding mask."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=vocabulary,
        max_position_embeddings=max(64, length),
    )
    batch = _tokens(vocabulary, batch_size, length)
    batch["attention_mask"] = torch.ones(batch_size, length, dtype=torch.long)
    batch["attention_mask"][0, length // 2 :] = 0
    return BertForMaskedLM(config), batch, hf_loss


def roberta() -> Case:
    """RoBERTa, sequence classification."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        num_hidden_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=256,
        vocab_size=512,
        max_position_embeddings=80,
    )
    batch = {
        "input_ids": torch.randint(3, 512, (4, 64)),
        "labels": torch.randint(0, 2, (4,)),
        "attention_mask": torch.ones(4, 64, dtype=torch.long),
    }
    return RobertaForSequenceClassification(config), batch, hf_loss


def t5(
    layers: int = 2,
    width: int = 64,
    heads: int = 4,
    mlp_width: int = 128,
    vocabulary: int = 512,
    batch_size: int = 4,
    length: int = 48,
    target_length: int = 48,
    dropout: float = 0.1,
) -> Case:
    """T5, encoder-decoder."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        num_layers=layers,
        d_model=width,
        num_heads=heads,
        d_kv=width // heads,
        d_ff=mlp_width,
        vocab_size=vocabulary,
        dropout_rate=dropout,
        use_cache=False,
        decoder_start_token_id=0,
    )
    batch = _tokens(vocabulary, batch_size, length)
    batch["labels"] = batch["labels"][:, :target_length].clone()
    return T5ForConditionalGeneration(config), batch, hf_loss


def llama() -> Case:
    """Llama: rotary positions, gated MLP, grouped queries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=3,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        vocab_size=512,
        max_position_embeddings=64,
        use_cache=False,
    )
    return LlamaForCausalLM(config), _tokens(512, 4, 64), hf_loss


def vit(
    layers: int = 3,
    width: int = 64,
    heads: int = 4,
    side: int = 32,
    patch: int = 4,
    batch_size: int = 4,
    num_labels: int = 10,
    dropout: float = 0.1,
) -> Case:
    """Vision transformer."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=side,
        patch_size=patch,
        num_labels=num_labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    batch = {
        "pixel_values": torch.randn(batch_size, 3, side, side),
        "labels": torch.randint(0, num_labels, (batch_size,)),
    }
    return ViTForImageClassification(config), batch, hf_loss


def convnext() -> Case:
    """ConvNeXt with stochastic depth."""
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(
        depths=[2, 2, 2, 2],
        hidden_sizes=[16, 32, 64, 128],
        num_labels=10,
        image_size=64,
        drop_path_rate=0.1,
    )
    batch = {"pixel_values": torch.randn(4, 3, 64, 64), "labels": torch.randint(0, 10, (4,))}
    return ConvNextForImageClassification(config), batch, hf_loss


def clip() -> Case:
    """CLIP: two towers and a contrastive loss."""
    from transformers import CLIPConfig, CLIPModel

    text = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=32,
        projection_dim=32,
        eos_token_id=2,
    )
    vision = dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=32,
    )
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)
    batch = {
        "input_ids": torch.randint(3, 512, (4, 16)),
        "return_loss": True,
        "pixel_values": torch.randn(4, 3, 32, 32),
    }
    return CLIPModel(config), batch, hf_loss


class ReferenceGPT(nn.Module):
    """The 12-layer GPT that the peers' numbers in the documentation were measured on."""

    def __init__(
        self,
        layers: int = 12,
        width: int = 384,
        heads: int = 6,
        length: int = 256,
        vocabulary: int = 8192,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList([GPTBlock(width, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class GPTBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.dropout = heads, dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        y = self.proj(y.transpose(1, 2).reshape(batch, length, width))
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return x + F.dropout(y, self.dropout, self.training)


def call_pair(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """A model that takes (tokens, targets) and returns its loss."""
    return model(*batch)


def reference_gpt(
    layers: int = 12,
    width: int = 384,
    heads: int = 6,
    length: int = 256,
    vocabulary: int = 8192,
    batch_size: int = 8,
    dropout: float = 0.0,
) -> Case:
    """The reference GPT."""
    tokens = torch.randint(0, vocabulary, (batch_size, length))
    model = ReferenceGPT(layers, width, heads, length, vocabulary, dropout)
    return model, (tokens, tokens.roll(-1, 1)), call_pair


FAMILIES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "wrn": wrn,
    "resnet50": resnet50,
    "unet": unet,
    "densenet": densenet,
    "mobilenet": mobilenet,
    "lstm": lstm,
    "gpt2": gpt2,
    "bert": bert,
    "roberta": roberta,
    "t5": t5,
    "llama": llama,
    "vit": vit,
    "convnext": convnext,
    "clip": clip,
}


def make(name: str, seed: int = 0, **sizes: Any) -> Case:
    """Return a family's model in training mode, batch and loss, made with a seed."""
    torch.manual_seed(seed)
    maker = FAMILIES.get(name) or {"reference_gpt": reference_gpt}[name]
    model, batch, loss_fn = maker(**sizes)
    return model.train(), batch, loss_fn
