"""All families of the zoo, by name."""

from __future__ import annotations

import torch

from tests.models import Case
from tests.zoo import audio, moe, own, own_images, seq2seq, text, towers, vision
from tests.zoo.build import Family

MAKERS = {
    "text": {**text.DECODERS, **text.ENCODERS},
    "shared layers": text.SHARED,
    "encoder-decoder": seq2seq.ENCODER_DECODERS,
    "mixture of experts": moe.EXPERTS,
    "state space": moe.STATE_SPACES,
    "vision": vision.IMAGES,
    "audio": audio.AUDIO,
    "time series": audio.SERIES,
    "two towers": towers.TOWERS,
    "other inputs": towers.OTHERS,
    "recurrent": own.RECURRENT,
    "own": {**own.OWN, **own_images.OWN_IMAGES},
}
FAMILIES: dict[str, Family] = {
    name: Family(name, kind, maker)
    for kind, makers in MAKERS.items()
    for name, maker in makers.items()
}

# Families that cannot be captured as one step: the error's class, and why.
KNOWN: dict[str, str] = {
    "ctrl": "GraphBreakError: dynamo cannot trace an nn.Buffer that is assigned to itself",
    "longformer": "GraphBreakError: asks the attention mask's values whether a token is global",
    "led": "GraphBreakError: asks the attention mask's values whether a token is global",
    "big_bird": "GraphBreakError: draws its random blocks on the host, in the forward",
    "bigbird_pegasus": "GraphBreakError: draws its random blocks on the host, in the forward",
    "nystromformer": "UnsupportedModelError: fails with any attention mask, in eager PyTorch, too; "
    "traced, transformers makes one",
    "ibert": "GraphBreakError: asserts that activations are no NaNs",
    "yoso": "GraphBreakError: dynamo cannot trace an autograd.Function given one tensor twice",
    "reformer": "GraphBreakError: computes chunk lengths from tensors, by numpy",
    "switch_transformers": "GraphBreakError: loops over the experts that were hit",
    "nllb_moe": "GraphBreakError: loops over the experts that were hit",
    "detr": "GraphBreakError: asks activations for infinities; its loss matches boxes on the host",
    "conditional_detr": "GraphBreakError: as detr",
    "wav2vec2_ctc": "GraphBreakError: checks the labels' values; without that, dynamo cannot trace "
    "aten._ctc_loss, whose shape depends on them",
    "vilt": "GraphBreakError: sizes of images come from the values of a mask",
    "recurrent_gemma": "UnsupportedModelError, of fit only: keeps its recurrent states, with their "
    "gradients, in attributes",
    "autoformer": "GraphBreakError: rolls a series by delays that it computes",
}


def make(name: str, dropout: float = 0.0, seed: int = 0) -> Case:
    """Return a family's model in training mode, its batch and its loss, made with a seed."""
    torch.manual_seed(seed)
    model, batch, loss_fn = FAMILIES[name].make(dropout)
    return model.train(), batch, loss_fn
