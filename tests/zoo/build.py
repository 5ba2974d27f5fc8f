"""What the zoo's makers share: a family, a transformers model from a configuration, batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tests.models import Case, hf_loss


@dataclass(frozen=True)
class Family:
    """A kind of model that the zoo trains.

    Attributes:
        name: "gpt2", "swin".
        kind: "text", "vision", "own".
        make: dropout probability -> (model, batch, loss_fn), small, with random weights.
    """

    name: str
    kind: str
    make: Callable[[float], Case]


def transformer(class_name: str, dropout: float, **settings: Any) -> nn.Module:
    """Return a transformers model with random weights, all its dropouts set.

    Args:
        class_name: such as "GPT2LMHeadModel".
        dropout: probability of dropout and of dropped residual paths, 0 for none.
        **settings: of the model's configuration.
    """
    import transformers

    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**settings)
    set_dropout(config, dropout)
    model: nn.Module = model_class(config)
    return model


def set_dropout(config: Any, dropout: float) -> None:
    """Set every dropout and drop path of a configuration and of those inside it.

    Layer drop skips layers by Python's `if`, which cannot be one graph: it is set to 0.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            set_dropout(value, dropout)
        elif "drop" in name and not isinstance(value, bool):
            chosen = 0.0 if "layerdrop" in name or "layer_drop" in name else dropout
            # Past the configuration's own check, which lets some probabilities be integers only.
            if isinstance(value, int | float):
                vars(config)[name] = chosen
            elif isinstance(value, list | tuple) and all(isinstance(v, int | float) for v in value):
                vars(config)[name] = [chosen] * len(value)


def tokens(
    vocabulary: int = 512, batch_size: int = 4, length: int = 64, **more: Any
) -> dict[str, Any]:
    """Return a batch of tokens that are their own labels."""
    ids = torch.randint(3, vocabulary, (batch_size, length))
    return {"input_ids": ids, "labels": ids.clone(), **more}


def language_model(
    class_name: str, *, num_tokens: int = 64, **settings: Any
) -> Callable[[float], Case]:
    """Return a maker of a transformers model that is given sequences of tokens and labels."""

    def make(dropout: float) -> Case:
        return transformer(class_name, dropout, **settings), tokens(length=num_tokens), hf_loss

    return make


def without_dropout(make: Callable[[float], Case]) -> Callable[[float], Case]:
    """Return a maker for a model that refuses dropout."""
    return lambda dropout: make(0.0)
