"""Models of transformers with two towers, several modalities, or inputs of a kind of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.models import Case, hf_loss
from tests.zoo.build import tokens, transformer

_TEXT = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    vocab_size=512, max_position_embeddings=32, projection_dim=32, eos_token_id=2, bos_token_id=1,
    pad_token_id=0,
)
_VISION = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    image_size=32, patch_size=8, projection_dim=32,
)


def _pairs() -> dict[str, Any]:
    return {
        "input_ids": torch.randint(3, 512, (4, 16)), "return_loss": True,
        "pixel_values": torch.randn(4, 3, 32, 32),
    }


def contrastive(class_name: str, **settings: Any) -> Callable[[float], Case]:
    """Return a maker of a model with a tower for texts and one for images."""

    def make(dropout: float) -> Case:
        model = transformer(
            class_name, dropout, text_config=_TEXT, vision_config=_VISION, **settings
        )
        return model, _pairs(), hf_loss

    return make


def clap(dropout: float) -> Case:
    """CLAP: sounds and texts."""
    audio = dict(
        spec_size=32, num_mel_bins=8, patch_size=2, patch_stride=[2, 2],
        patch_embeds_hidden_size=16, depths=[1, 1], num_attention_heads=[2, 4], window_size=4,
        hidden_size=32,
        projection_dim=32, enable_fusion=False, num_classes=10,
    )
    model = transformer(
        "ClapModel", dropout, text_config=_TEXT | dict(max_position_embeddings=40),
        audio_config=audio, projection_dim=32,
    )
    batch = {
        "input_ids": torch.randint(3, 512, (4, 16)), "return_loss": True,
        "input_features": torch.randn(4, 1, 128, 8),
    }
    return model, batch, hf_loss


def blip(dropout: float) -> Case:
    """BLIP: captions of images."""
    text = _TEXT | dict(encoder_hidden_size=64)
    model = transformer(
        "BlipForConditionalGeneration", dropout, text_config=text, vision_config=_VISION
    )
    ids = torch.randint(3, 512, (4, 16))
    batch = {"input_ids": ids, "labels": ids.clone(), "pixel_values": torch.randn(4, 3, 32, 32)}
    return model, batch, hf_loss


def llava(dropout: float) -> Case:
    """LLaVA: features of an image's patches in the place of tokens."""
    text = dict(
        model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=512, max_position_embeddings=64,
        use_cache=False,
    )
    vision = dict(model_type="clip_vision_model", **_VISION)
    model = transformer(
        "LlavaForConditionalGeneration", dropout, text_config=text, vision_config=vision,
        image_token_index=511, image_token_id=511, vision_feature_layer=-1,
        image_seq_length=16,
    )
    ids = torch.randint(3, 500, (4, 32))
    ids[:, :16] = 511
    labels = ids.clone()
    labels[:, :16] = -100
    batch = {"input_ids": ids, "labels": labels, "pixel_values": torch.randn(4, 3, 32, 32)}
    return model, batch, hf_loss


def vilt(dropout: float) -> Case:
    """ViLT: one transformer over tokens and patches."""
    model = transformer(
        "ViltForMaskedLM", dropout, **(_TEXT | dict(max_position_embeddings=64)), image_size=32,
        patch_size=8, max_image_length=-1, type_vocab_size=2,
    )
    batch = tokens(length=16, pixel_values=torch.randn(4, 3, 32, 32))
    batch["attention_mask"] = torch.ones(4, 16, dtype=torch.long)
    return model, batch, hf_loss


def git(dropout: float) -> Case:
    """GIT: a decoder over patches and tokens."""
    model = transformer(
        "GitForCausalLM", dropout, **(_TEXT | dict(max_position_embeddings=64)),
        vision_config=_VISION, use_cache=False,
    )
    return model, tokens(length=16, pixel_values=torch.randn(4, 3, 32, 32)), hf_loss


def perceiver(dropout: float) -> Case:
    """Perceiver: cross attention from few latents to many tokens."""
    model = transformer(
        "PerceiverForMaskedLM", dropout, num_latents=16, d_latents=64, d_model=32, num_blocks=1,
        num_self_attends_per_block=2, num_self_attention_heads=4, num_cross_attention_heads=4,
        qk_channels=32, v_channels=64, vocab_size=512, max_position_embeddings=64,
    )
    ids = torch.randint(3, 512, (4, 64))
    return model, {"inputs": ids, "labels": ids.clone()}, hf_loss


def decision_transformer(dropout: float) -> Case:
    """Actions from states, actions and returns to go."""
    model = transformer(
        "DecisionTransformerModel", dropout, state_dim=8, act_dim=4, hidden_size=64, n_layer=2,
        n_head=4, max_ep_len=64, n_positions=96, use_cache=False,
    )
    batch = {
        "states": torch.randn(4, 20, 8), "actions": torch.randn(4, 20, 4),
        "rewards": torch.randn(4, 20, 1), "returns_to_go": torch.randn(4, 20, 1),
        "timesteps": torch.arange(20).repeat(4, 1), "attention_mask": torch.ones(4, 20),
    }

    def loss_fn(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return nn.functional.mse_loss(model(**batch).action_preds, batch["actions"])

    return model, batch, loss_fn


TOWERS: dict[str, Callable[[float], Case]] = {
    "clip": contrastive("CLIPModel", projection_dim=32),
    "siglip": contrastive("SiglipModel"),
    "clap": clap,
    "blip": blip,
    "llava": llava,
    "vilt": vilt,
    "git": git,
}
OTHERS: dict[str, Callable[[float], Case]] = {
    "perceiver": perceiver,
    "decision_transformer": decision_transformer,
}
