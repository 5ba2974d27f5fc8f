"""All families of the zoo, by name."""

from __future__ import annotations

import torch

from tests.models import Case
from tests.zoo import moe, text
from tests.zoo.build import Family

MAKERS = {
    "text": {**text.DECODERS, **text.ENCODERS},
    "shared layers": text.SHARED,
    "mixture of experts": moe.EXPERTS,
    "state space": moe.STATE_SPACES,
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
