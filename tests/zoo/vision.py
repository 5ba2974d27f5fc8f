"""Image models of transformers: classifiers, segmentation, detection, reconstruction, depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.models import Case, hf_loss
from tests.zoo.build import transformer

SIDE = 32
VIT = dict(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
    image_size=SIDE, patch_size=4,
)


def images(batch_size: int = 4, side: int = SIDE) -> torch.Tensor:
    """Return a batch of RGB images."""
    return torch.randn(batch_size, 3, side, side)


def classifier(class_name: str, side: int = SIDE, **settings: Any) -> Callable[[float], Case]:
    """Return a maker of a transformers classifier of images into ten classes."""

    def make(dropout: float) -> Case:
        model = transformer(class_name, dropout, num_labels=10, **settings)
        batch = {"pixel_values": images(side=side), "labels": torch.randint(0, 10, (4,))}
        return model, batch, hf_loss

    return make


def segmenter(class_name: str, side: int = 64, **settings: Any) -> Callable[[float], Case]:
    """Return a maker of a transformers model that gives each pixel one of ten classes."""

    def make(dropout: float) -> Case:
        model = transformer(class_name, dropout, num_labels=10, **settings)
        labels = torch.randint(0, 10, (2, side, side))
        return model, {"pixel_values": images(2, side), "labels": labels}, hf_loss

    return make


def vit_mae(dropout: float) -> Case:
    """A masked autoencoder: which patches are masked is drawn in the forward."""
    model = transformer(
        "ViTMAEForPreTraining", dropout, **VIT, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2, decoder_intermediate_size=64,
    )
    return model, {"pixel_values": images()}, hf_loss


def dpt(dropout: float) -> Case:
    """Depth of every pixel from four layers of a vision transformer."""
    model = transformer(
        "DPTForDepthEstimation", dropout, **(VIT | dict(num_hidden_layers=4, patch_size=8)),
        backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[16, 16, 32, 32],
        fusion_hidden_size=16, is_hybrid=False, reassemble_factors=[4, 2, 1, 0.5],
    )
    batch = images(2), torch.rand(2, 2 * SIDE, 2 * SIDE)

    def loss_fn(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.l1_loss(model(batch[0]).predicted_depth, batch[1])

    return model, batch, loss_fn


def detection(class_name: str, **settings: Any) -> Callable[[float], Case]:
    """Return a maker of a detector, whose loss matches boxes on the host (Hungarian method)."""

    def make(dropout: float) -> Case:
        from transformers import ResNetConfig

        backbone = ResNetConfig(
            depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], embedding_size=16,
            layer_type="basic", out_features=["stage4"],
        )
        model = transformer(
            class_name, dropout, use_timm_backbone=False, backbone_config=backbone,
            use_pretrained_backbone=False, num_labels=10, num_queries=8, d_model=32,
            encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, **settings,
        )
        labels = [
            {"class_labels": torch.randint(0, 10, (2,)), "boxes": torch.rand(2, 4) / 2 + 0.2}
            for _ in range(2)
        ]
        return model, {"pixel_values": images(2, 64), "labels": labels}, hf_loss

    return make


_RESNET = dict(depths=[2, 2, 2], hidden_sizes=[32, 64, 96], embedding_size=16, layer_type="basic")
_SWIN = dict(image_size=SIDE, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
             window_size=4)
_CONVNEXT = dict(depths=[2, 2, 2, 2], hidden_sizes=[16, 32, 64, 128], image_size=64)
_PYRAMID = dict(depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64])

IMAGES: dict[str, Callable[[float], Case]] = {
    "vit": classifier("ViTForImageClassification", **VIT),
    "deit": classifier("DeiTForImageClassification", **VIT),
    "beit": classifier("BeitForImageClassification", **VIT, use_relative_position_bias=True),
    "dinov2": classifier("Dinov2ForImageClassification", **VIT, mlp_ratio=2),
    "vit_mae": vit_mae,
    "swin": classifier("SwinForImageClassification", **_SWIN),
    "swinv2": classifier("Swinv2ForImageClassification", **_SWIN),
    "convnext": classifier("ConvNextForImageClassification", side=64, **_CONVNEXT),
    "convnextv2": classifier("ConvNextV2ForImageClassification", side=64, **_CONVNEXT),
    "resnet": classifier("ResNetForImageClassification", side=64, **_RESNET),
    "regnet": classifier(
        "RegNetForImageClassification", side=64, depths=[1, 2, 1], hidden_sizes=[32, 64, 96],
        embedding_size=16, groups_width=16, layer_type="y",
    ),
    "bit": classifier(
        "BitForImageClassification", side=64, depths=[1, 1, 1, 1], hidden_sizes=[32, 32, 64, 64],
        embedding_size=16, num_groups=8,
    ),
    "mobilenet_v1": classifier("MobileNetV1ForImageClassification", side=64, depth_multiplier=0.25),
    "mobilenet_v2": classifier(
        "MobileNetV2ForImageClassification", side=64, depth_multiplier=0.25, tf_padding=False
    ),
    "efficientnet": classifier(
        "EfficientNetForImageClassification", side=64, image_size=64, width_coefficient=0.25,
        depth_coefficient=0.4, hidden_dim=320,
    ),
    "segformer": segmenter(
        "SegformerForSemanticSegmentation", depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32],
        num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=32,
    ),
    "poolformer": classifier("PoolFormerForImageClassification", side=64, **_PYRAMID),
    "cvt": classifier(
        "CvtForImageClassification", side=64, embed_dim=[16, 32, 64], num_heads=[1, 2, 4],
        depth=[1, 2, 3],
    ),
    "levit": classifier(
        "LevitForImageClassification", side=64, image_size=64, hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[8, 8, 8],
    ),
    "pvt": classifier(
        "PvtForImageClassification", side=64, image_size=64, **_PYRAMID,
        num_attention_heads=[1, 2, 3, 4],
    ),
    "pvt_v2": classifier(
        "PvtV2ForImageClassification", side=64, image_size=64, **_PYRAMID,
        num_attention_heads=[1, 2, 3, 4],
    ),
    "mobilevit": classifier(
        "MobileViTForImageClassification", side=64, image_size=64, hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 16, 24, 24, 32, 40, 64],
    ),
    "mobilevitv2": classifier(
        "MobileViTV2ForImageClassification", side=64, image_size=64, width_multiplier=0.25
    ),
    "focalnet": classifier(
        "FocalNetForImageClassification", side=SIDE, image_size=SIDE, patch_size=2, embed_dim=16,
        hidden_sizes=[16, 32], depths=[2, 2], focal_levels=[2, 2], focal_windows=[3, 3],
    ),
    "hiera": classifier(
        "HieraForImageClassification", side=64, image_size=[64, 64], embed_dim=16,
        depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8],
    ),
    "swiftformer": classifier(
        "SwiftFormerForImageClassification", side=64, image_size=64, depths=[1, 1, 1, 1],
        embed_dims=[16, 24, 32, 48],
    ),
    "data2vec_vision": classifier("Data2VecVisionForImageClassification", **VIT),
    "dpt": dpt,
    "detr": detection("DetrForObjectDetection"),
    "conditional_detr": detection("ConditionalDetrForObjectDetection"),
}
