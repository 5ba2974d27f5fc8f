"""Modules whose backward keeps less: drop-in for `torch.nn`'s, alone or for a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from packlight.errors import OptionError
from packlight.lossy import functional
from packlight.lossy.few_bit import BITS
from packlight.lossy.sketch import KINDS, num_kept_rows

# A module's class -> its function of (module, x, bits). Those exact in one bit ignore the bits.
_ACTIVATIONS: dict[type[nn.Module], Callable[[Any, torch.Tensor, int], torch.Tensor]] = {
    nn.GELU: lambda m, x, bits: functional.gelu(x, m.approximate, bits),
    nn.SiLU: lambda m, x, bits: functional.silu(x, bits),
    nn.Mish: lambda m, x, bits: functional.mish(x, bits),
    nn.ELU: lambda m, x, bits: functional.elu(x, m.alpha, bits),
    nn.SELU: lambda m, x, bits: functional.selu(x, bits),
    nn.CELU: lambda m, x, bits: functional.celu(x, m.alpha, bits),
    nn.Softplus: lambda m, x, bits: functional.softplus(x, m.beta, bits),
    nn.Tanh: lambda m, x, bits: functional.tanh(x, bits),
    nn.Sigmoid: lambda m, x, bits: functional.sigmoid(x, bits),
    nn.Hardswish: lambda m, x, bits: functional.hardswish(x, bits),
    nn.ReLU: lambda m, x, bits: functional.relu(x),
    nn.ReLU6: lambda m, x, bits: functional.relu6(x),
    nn.LeakyReLU: lambda m, x, bits: functional.leaky_relu(x, m.negative_slope),
    nn.Hardtanh: lambda m, x, bits: functional.hardtanh(x, m.min_val, m.max_val),
    nn.Hardsigmoid: lambda m, x, bits: functional.hardsigmoid(x),
}


class FewBitActivation(nn.Module):
    """An activation of `torch.nn` whose backward keeps a few bits of each element.

    Args:
        activation: of a class that has a table: GELU, SiLU, Mish, ELU (alpha 1), SELU, CELU,
            Softplus, Tanh, Sigmoid, Hardswish; or exact in one bit: ReLU, ReLU6, LeakyReLU,
            Hardtanh, Hardsigmoid. It is not done in place.
        bits: 1 to 4.

    Raises:
        OptionError: another class, or other bits.

    >>> FewBitActivation(nn.GELU(), bits=2)(torch.ones(1))
    tensor([0.8413])
    """

    def __init__(self, activation: nn.Module, bits: int = 3) -> None:
        super().__init__()
        if type(activation) not in _ACTIVATIONS:
            known = ", ".join(kind.__name__ for kind in _ACTIVATIONS)
            raise OptionError(
                f"there is no table of the derivative of {type(activation).__name__}\nhint: there "
                f"are those of {known}"
            )
        if bits not in BITS:
            raise OptionError(f"a derivative in {bits!r} bits\nhint: 1, 2, 3 or 4 are known")
        if isinstance(activation, nn.ELU) and activation.alpha != 1:
            functional.elu(torch.empty(0), activation.alpha)  # says what is there instead
        self.activation, self.bits = activation, bits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return what the activation does, exactly."""
        return _ACTIVATIONS[type(self.activation)](self.activation, x, self.bits)

    def extra_repr(self) -> str:
        """Return the bits."""
        return f"bits={self.bits}"


class RandomizedLinear(nn.Linear):
    """A linear layer that keeps a sketch of its input; see `packlight.lossy.functional.linear`.

    Args:
        in_features: of the input.
        out_features: of the output.
        bias: whether there is one.
        fraction: of the input's rows that the sketch has.
        kind: "winners", "rows", "gaussian" or "rademacher".
        seed: random bits depend on it.
        **options: `device` and `dtype` of the parameters.

    Raises:
        OptionError: a fraction that is not between 0 and 1, an unknown kind.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, fraction: float = 0.2,
        kind: str = "winners", seed: int = 0, **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, **options)
        num_kept_rows(1, fraction)
        if kind not in KINDS:
            raise OptionError(f"a sketch of kind {kind!r}\nhint: known are {', '.join(KINDS)}")
        self.fraction, self.kind, self.seed = fraction, kind, seed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x of shape (..., in features) times the transposed weight, plus the bias."""
        return functional.linear(x, self.weight, self.bias, self.fraction, self.kind, self.seed)

    def extra_repr(self) -> str:
        """Return sizes and setting."""
        return f"{super().extra_repr()}, fraction={self.fraction}, kind={self.kind}"


def few_bit_activations(model: nn.Module, bits: int = 3) -> list[str]:
    """Give a model's activations few-bit backwards, in place.

    Args:
        model: whose modules are looked through; functions that it calls stay what they are.
        bits: 1 to 4.

    Returns:
        names of the modules that were replaced.
    """
    found = [
        (name, module) for name, module in model.named_modules()
        if type(module) in _ACTIVATIONS and not name.endswith("activation")
    ]
    made = {id(module): FewBitActivation(module, bits) for _, module in found}
    for name, module in found:
        _replace(model, name, made[id(module)])
    return [name for name, _ in found]


def randomized_linears(
    model: nn.Module, fraction: float = 0.2, kind: str = "winners"
) -> list[str]:
    """Give a model's linear layers randomized backwards, in place; parameters stay the same.

    Args:
        model: whose modules of class `nn.Linear` are replaced.
        fraction: of the rows of each input that its sketch has.
        kind: "winners", "rows", "gaussian" or "rademacher".

    Returns:
        names of the modules that were replaced.
    """
    found = [(name, m) for name, m in model.named_modules() if type(m) is nn.Linear]
    for place, (name, linear) in enumerate(found):
        made = RandomizedLinear(
            linear.in_features, linear.out_features, linear.bias is not None, fraction, kind,
            place, device="meta",
        )
        made.weight = linear.weight
        if linear.bias is not None:
            made.bias = linear.bias
        _replace(model, name, made)
    return [name for name, _ in found]


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    if not name:
        raise OptionError(
            "the model itself is what would be replaced\nhint: wrap it in nn.Sequential, or make "
            f"a {type(module).__name__}"
        )
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
