"""Optimizers in fewer bytes: a rule, a way to store its state, a way to store weights.

    from packlight.optim import AdamW8bit, LowBit, adamw

    optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    optimizer = LowBit(model.parameters(), adamw(lr=1e-3), states="4bit", weights="bf16-stochastic")

They are `torch.optim.Optimizer`s like any other, for `packlight.fit` or for a loop of your own, and
know nothing of planning. A factored second moment is not among them, since `torch.optim.Adafactor`
has one, and `fit` steps that, too. Its state takes next to nothing (a row and a column of each
matrix), but its step holds four bytes per parameter for a moment, which those here do not.
"""

from packlight.optim.batches import NoiseScale, gradual_warmup, scaled_lr
from packlight.optim.formats import STATE_FORMATS, WEIGHT_FORMATS
from packlight.optim.low_bit import LowBit
from packlight.optim.names import AdamW4bit, AdamW8bit, Lion8bit, SGD8bit
from packlight.optim.rules import Rule, adam, adamw, lion, sgd
from packlight.optim.trust import lamb, larc, lars

__all__ = [
    "STATE_FORMATS",
    "WEIGHT_FORMATS",
    "AdamW4bit",
    "AdamW8bit",
    "Lion8bit",
    "LowBit",
    "NoiseScale",
    "Rule",
    "SGD8bit",
    "adam",
    "adamw",
    "gradual_warmup",
    "lamb",
    "larc",
    "lars",
    "lion",
    "scaled_lr",
    "sgd",
]
