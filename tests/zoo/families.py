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

# Families that cannot be captured as one step, and why. They are trained in pieces.
BREAKING: dict[str, str] = {
    "ctrl": "dynamo cannot trace an nn.Buffer that is assigned to itself",
    "longformer": "asks the attention mask's values whether a token is global",
    "led": "asks the attention mask's values whether a token is global",
    "big_bird": "draws its random blocks on the host, in the forward",
    "bigbird_pegasus": "draws its random blocks on the host, in the forward",
    "ibert": "asserts that activations are no NaNs",
    "yoso": "dynamo cannot trace an autograd.Function given one tensor twice",
    "reformer": "computes chunk lengths from tensors, by numpy",
    "switch_transformers": "loops over the experts that were hit",
    "nllb_moe": "loops over the experts that were hit",
    "detr": "asks activations for infinities; its loss matches boxes on the host",
    "conditional_detr": "as detr",
    "wav2vec2_ctc": "checks the labels' values; without that, dynamo cannot trace "
    "aten._ctc_loss, whose shape depends on them",
    "vilt": "sizes of images come from the values of a mask",
    "autoformer": "rolls a series by delays that it computes",
}

# Families that fail somewhere: the error's class, and why.
KNOWN: dict[str, str] = {
    "nystromformer": "UnsupportedModelError: fails with any attention mask, in eager PyTorch, too; "
    "traced, transformers makes one",
    "recurrent_gemma": "UnsupportedModelError, of fit only: keeps its recurrent states, with their "
    "gradients, in attributes",
    "switch_transformers": "Measured as one graph only: GraphBreakError, it loops over the experts "
    "that were hit.",
}


def make(name: str, dropout: float = 0.0, seed: int = 0) -> Case:
    """Return a family's model in training mode, its batch and its loss, made with a seed."""
    torch.manual_seed(seed)
    model, batch, loss_fn = FAMILIES[name].make(dropout)
    return model.train(), batch, loss_fn
