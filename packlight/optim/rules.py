"""What an update computes: the moments that a rule keeps and the numbers that go into one step.

A rule says nothing of how moments or weights are stored. All are elementwise, in this form, with
g the gradient, w the weight and t the count of the parameter's steps:

    g <- g + l2 w                                     coupled weight decay
    moments, u <- rule(g, moments)
    w <- decay w - rate u                             decay = 1 - lr weight_decay if decoupled
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, NamedTuple

from packlight.errors import OptionError


class Coefficients(NamedTuple):
    """The numbers of one step, the same for all elements; what a rule does not use is 0."""

    decay: float
    l2: float
    rate: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    eps: float
    root_correction: float  # 1 / sqrt(1 - beta2^t)


@dataclass(frozen=True)
class Moment:
    """A tensor that a rule keeps for each parameter.

    Attributes:
        name: its key in the optimizer's state, torch's name for it.
        is_signed: whether it can be negative, which decides the levels that it is rounded to.
    """

    name: str
    is_signed: bool


@dataclass(frozen=True)
class Rule:
    """A rule with its hyperparameters; made by `sgd`, `adam`, `adamw` and `lion`.

    Attributes:
        name: "sgd", "adam", "adamw" or "lion".
        hyperparameters: initial values of the parameter groups' entries.
    """

    name: str
    hyperparameters: Mapping[str, Any] = field(hash=False)


# Numbers by which kernels know what to do.
PLAIN_SGD, MOMENTUM, NESTEROV, ADAM, LION = range(5)


def sgd(
    lr: float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
) -> Rule:
    """Return stochastic gradient descent: b <- momentum b + g, u = b (nesterov: g + momentum b).

    Args:
        lr: learning rate.
        momentum: 0 keeps no moment.
        nesterov: look ahead.
        weight_decay: added to the gradient, as torch does, unless it is decoupled.
        decoupled_weight_decay: shrink the weight instead (SGDW, Loshchilov and Hutter 2019).

    Raises:
        OptionError: a number outside of its range.
    """
    return _checked(
        "sgd", lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay,
        decoupled_weight_decay=decoupled_weight_decay,
    )


def adam(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> Rule:
    """Return Adam (Kingma and Ba 2015): m, v averages of g and g^2, u = m' / (sqrt(v') + eps).

    Args:
        lr: learning rate.
        betas: of the averages; m' = m / (1 - beta1^t), v' = v / (1 - beta2^t).
        eps: added to the denominator.
        weight_decay: added to the gradient.

    Raises:
        OptionError: a number outside of its range.
    """
    return _checked("adam", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def adamw(
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> Rule:
    """Return Adam with decoupled weight decay (Loshchilov and Hutter 2019); see `adam`."""
    return _checked("adamw", lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)


def lion(
    lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
) -> Rule:
    """Return Lion (Chen et al. 2023): u = sign(beta1 m + (1 - beta1) g), whose m averages by beta2.

    Args:
        lr: learning rate; a third to a tenth of Adam's.
        betas: see above.
        weight_decay: decoupled.

    Raises:
        OptionError: a number outside of its range.
    """
    return _checked("lion", lr=lr, betas=betas, weight_decay=weight_decay)


def moments_of(group: Mapping[str, Any]) -> tuple[Moment, ...]:
    """Return what the rule of a parameter group keeps."""
    name = group["rule"]
    if name == "sgd":
        return (Moment("momentum_buffer", True),) if group["momentum"] else ()
    first = Moment("exp_avg", True)
    return (first,) if name == "lion" else (first, Moment("exp_avg_sq", False))


def kind_of(group: Mapping[str, Any]) -> int:
    """Return the number by which kernels know the rule of a parameter group."""
    if group["rule"] != "sgd":
        return LION if group["rule"] == "lion" else ADAM
    if not group["momentum"]:
        return PLAIN_SGD
    return NESTEROV if group["nesterov"] else MOMENTUM


def coefficients(group: Mapping[str, Any], step: int) -> Coefficients:
    """Return the numbers of a parameter's step.

    Args:
        group: the hyperparameters; the learning rate may be a tensor.
        step: the parameter's own count, 1 for the first.
    """
    return _COEFFICIENTS[group["rule"]](group, float(group["lr"]), step)


def _of_sgd(group: Mapping[str, Any], lr: float, step: int) -> Coefficients:
    is_decoupled = group["decoupled_weight_decay"]
    l2 = 0.0 if is_decoupled else group["weight_decay"]
    decay = 1 - lr * group["weight_decay"] if is_decoupled else 1.0
    return Coefficients(decay, l2, lr, group["momentum"], 0.0, 0.0, 0.0, 0.0, 0.0)


def _of_adam(group: Mapping[str, Any], lr: float, step: int) -> Coefficients:
    beta1, beta2 = group["betas"]
    is_decoupled = group["rule"] == "adamw"
    return Coefficients(
        decay=1 - lr * group["weight_decay"] if is_decoupled else 1.0,
        l2=0.0 if is_decoupled else group["weight_decay"],
        rate=lr / (1 - beta1**step),
        beta1=beta1,
        one_minus_beta1=1 - beta1,
        beta2=beta2,
        one_minus_beta2=1 - beta2,
        eps=group["eps"],
        root_correction=1 / sqrt(1 - beta2**step),
    )


def _of_lion(group: Mapping[str, Any], lr: float, step: int) -> Coefficients:
    beta1, beta2 = group["betas"]
    decay = 1 - lr * group["weight_decay"]
    return Coefficients(decay, 0.0, lr, beta1, 1 - beta1, beta2, 1 - beta2, 0.0, 0.0)


_COEFFICIENTS: dict[str, Callable[[Mapping[str, Any], float, int], Coefficients]] = {
    "sgd": _of_sgd, "adam": _of_adam, "adamw": _of_adam, "lion": _of_lion,
}


def check_group(group: Mapping[str, Any]) -> None:
    """Refuse hyperparameters that no step can be made of.

    Raises:
        OptionError: an unknown rule, or a number outside of its range.
    """
    if group["rule"] not in _COEFFICIENTS:
        raise OptionError(f"unknown rule {group['rule']!r}; known: {', '.join(_COEFFICIENTS)}")
    for name in ("lr", "weight_decay", "eps"):
        if name in group and not float(group[name]) >= 0:
            raise OptionError(f"{name}={group[name]!r}; it must be 0 or larger")
    betas = {f"betas[{i}]": beta for i, beta in enumerate(group.get("betas", ()))}
    for name, value in {"momentum": group.get("momentum", 0.0), **betas}.items():
        if not 0 <= value < 1:
            raise OptionError(f"{name}={value!r}; it must be at least 0 and below 1")
    if group.get("nesterov") and not group.get("momentum"):
        raise OptionError("nesterov=True needs a momentum above 0")


def _checked(name: str, **hyperparameters: Any) -> Rule:
    check_group({"rule": name, **hyperparameters})
    return Rule(name, hyperparameters)
