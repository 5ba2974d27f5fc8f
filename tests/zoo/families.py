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

# Families that cannot be trained as one planned step: the error's class and why it is right.
KNOWN: dict[str, str] = {}


def make(name: str, dropout: float = 0.0, seed: int = 0) -> Case:
    """Return a family's model in training mode, its batch and its loss, made with a seed."""
    torch.manual_seed(seed)
    model, batch, loss_fn = FAMILIES[name].make(dropout)
    return model.train(), batch, loss_fn
