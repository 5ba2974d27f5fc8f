"""Learning rates of their own for each parameter, in proportion to its norm: for large batches.

| | with | the gradient g, or the rate, is multiplied by |
| --- | --- | --- |
| LARS (You et al. 2017) | SGD | trust |w| / (|g| + l2 |w|), g counted with its weight decay |
| LARC (NVIDIA's Apex) | any rule with coupled weight decay | the same / lr; at most 1 if it clips |
| LAMB (You et al. 2020) | AdamW | |w| / |r + decay w|, r being Adam's direction |

A parameter that is zero, or whose gradient is, has the factor 1. All norms are of whole
parameters, so these rules are not elementwise: no parameter may be stepped in slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from packlight.errors import OptionError
from packlight.optim.rules import Rule, adamw, check_group, sgd

LARS, LARC_CLIP, LARC_SCALE, LAMB = "lars", "larc", "larc without clipping", "lamb"


def lars(
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    trust: float = 0.001,
) -> Rule:
    """Return LARS (You et al. 2017, "Large Batch Training of Convolutional Networks").

        f = trust |w| / (|g| + l2 |w|);  b <- momentum b + f (g + l2 w);  w <- w - lr b

    The learning rate multiplies the update, as torch's SGD does; in the paper it is in b, which
    differs where it changes.

    Args:
        lr: learning rate.
        momentum: 0 keeps no moment.
        nesterov: look ahead.
        weight_decay: l2, added to the gradient.
        trust: how far a step goes, as a share of the parameter's norm.

    Raises:
        OptionError: a number outside of its range.
    """
    return _with(sgd(lr, momentum, nesterov, weight_decay), LARS, trust)


def larc(rule: Rule, trust: float = 0.02, clip: bool = True) -> Rule:
    """Return a rule whose gradients are scaled by layer-wise adaptive rates (Apex's LARC).

        f = trust |w| / (|g| + l2 |w|) / lr;  g <- min(f, 1) (g + l2 w)

    Args:
        rule: `sgd` or `adam`; its weight decay is coupled, as l2 above.
        trust: how far a step goes, as a share of the parameter's norm.
        clip: only ever shorten; else the rate is `trust |w| / |g|`, whatever lr.

    Raises:
        OptionError: a number outside of its range, or a rule whose weight decay is decoupled.
    """
    is_decoupled = rule.name in ("adamw", "lion") or rule.hyperparameters.get(
        "decoupled_weight_decay"
    )
    if is_decoupled and rule.hyperparameters.get("weight_decay"):
        raise OptionError(
            f"LARC scales gradients together with their weight decay, and that of {rule.name} is "
            "decoupled\nhint: adam(...) or sgd(...), or weight_decay=0"
        )
    return _with(rule, LARC_CLIP if clip else LARC_SCALE, trust)


def lamb(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
) -> Rule:
    """Return LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2).

        r = m' / (sqrt(v') + eps) + weight_decay w;  w <- w - lr |w| / |r| r

    With weights in fp32 alone. A step holds four bytes for each element of one parameter, r.

    Args:
        lr: learning rate.
        betas: of Adam's averages.
        eps: added to the denominator.
        weight_decay: decoupled.

    Raises:
        OptionError: a number outside of its range.
    """
    return _with(adamw(lr, betas, eps, weight_decay), LAMB, 1.0)


def _with(rule: Rule, kind: str, trust: float) -> Rule:
    added = {"layer_rate": kind, "trust": trust}
    check_group({"rule": rule.name, **rule.hyperparameters, **added})
    return replace(rule, hyperparameters={**rule.hyperparameters, **added})


def check_layer_rate(group: Mapping[str, Any]) -> None:
    """Refuse what goes with no layer-wise rate.

    Raises:
        OptionError: a trust that is not above 0, or LAMB with weights that are not fp32.
    """
    if group.get("layer_rate") is None:
        return
    if not group["trust"] > 0:
        raise OptionError(f"trust={group['trust']!r}; it must be above 0")
    if group["layer_rate"] == LAMB and group["weights"] != "fp32":
        raise OptionError(
            f"LAMB steps weights in fp32, and weights={group['weights']!r}\n"
            "hint: weights='fp32'; states may have few bits"
        )


def gradient_factor(
    group: Mapping[str, Any], parameter: torch.Tensor, gradient: torch.Tensor
) -> float:
    """Return by what a gradient and its weight decay are multiplied."""
    kind = group.get("layer_rate")
    if kind not in (LARS, LARC_CLIP, LARC_SCALE):
        return 1.0
    weight, slope = _norm(parameter), _norm(gradient)
    if weight == 0.0 or slope == 0.0:
        return 1.0
    factor: float = group["trust"] * weight / (slope + group["weight_decay"] * weight)
    if kind == LARS:
        return factor
    lr = float(group["lr"])
    if lr == 0.0:
        return 1.0
    return min(factor / lr, 1.0) if kind == LARC_CLIP else factor / lr


def step_by_lamb(
    group: Mapping[str, Any], parameter: torch.Tensor, direction: torch.Tensor
) -> None:
    """Step a parameter against Adam's direction, which is overwritten.

    Args:
        group: the hyperparameters.
        parameter: float32.
        direction: -m' / (sqrt(v') + eps), float32.
    """
    direction.sub_(parameter, alpha=group["weight_decay"])
    weight, length = _norm(parameter), _norm(direction)
    ratio = weight / length if weight and length else 1.0
    parameter.add_(direction, alpha=float(group["lr"]) * ratio)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32))
