"""Layers in two steps through fewer channels, chosen by what the layers respond to real data.

Zhang, Zou, He, Sun 2015, arXiv 1505.06798. Responses of a layer lie near a subspace: the layer
becomes one with as many outputs as that has dimensions, and one that combines them. Found from
responses, not weights; from inputs as the layers before, factored already, give them
("asymmetric"); through the ReLU that follows, if one does; ranks for a total cost by the paper's
greedy search on the product of energies.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from packlight.compress.errors import CalibrationError, CompressionError
from packlight.errors import OptionError

_PENALTIES = [0.01] * 15 + [1.0] * 15
_ROUNDING = 1e-11
COSTS = ("multiplications", "parameters")


@dataclass
class _Layer:
    """A layer that may be factored, and what was seen of it.

    Attributes:
        name: in the model.
        has_relu: whether a ReLU module takes its output.
        num_places: outputs of a channel in one example.
        spectrum: of its centred responses' covariance, largest first.
    """

    name: str
    has_relu: bool = False
    num_places: int = 0
    spectrum: torch.Tensor | None = None

    def costs(self, module: Any, cost: str) -> tuple[int, int]:
        """Return what one rank costs, and what the layer costs as it is."""
        num_outputs, fan_in = module.weight.shape[0], module.weight[0].numel()
        factor = self.num_places if cost == "multiplications" else 1
        return (num_outputs + fan_in) * factor, num_outputs * fan_in * factor


@torch.no_grad()
def low_rank(
    model: nn.Module,
    batches: Iterable[Any],
    kept: float,
    *,
    names: Iterable[str] | None = None,
    cost: str = "multiplications",
    max_samples: int = 4000,
    seed: int = 0,
) -> dict[str, int]:
    """Factor linear layers and convolutions so that they cost a share of what they did.

    Args:
        model: changed: a factored layer `name` becomes `nn.Sequential` of two, `name.0` and
            `name.1`; so parameters are new.
        batches: of calibration data: the model's inputs, a tensor or a tuple of them.
        kept: the share of the layers' cost that may be left, above 0 and below 1.
        names: of layers; None is all linear layers and 2-d convolutions without groups.
        cost: "multiplications" of one example, or "parameters".
        max_samples: responses of each layer that are looked at.
        seed: of which.

    Returns:
        The rank of each layer that was factored; for others factors would cost more.

    Raises:
        OptionError: `kept` or `cost` is out of range.
        CompressionError: no such layer, or the share cannot be met with one rank each.
        CalibrationError: no batches.

    >>> layer = nn.Linear(20, 30)
    >>> with torch.no_grad():
    ...     _ = layer.weight.copy_(torch.randn(30, 2) @ torch.randn(2, 20))
    >>> model = nn.Sequential(layer)
    >>> inputs = torch.randn(100, 20)
    >>> expected = model(inputs)
    >>> low_rank(model, [inputs], kept=0.2)
    {'0': 2}
    >>> torch.allclose(model(inputs), expected, atol=1e-4)
    True
    """
    if not 0 < kept < 1:
        raise OptionError(f"kept={kept!r}; it must be above 0 and below 1")
    if cost not in COSTS:
        raise OptionError(f"cost={cost!r}\nhint: one of {', '.join(COSTS)}")
    examples = [tuple(b) if isinstance(b, (tuple, list)) else (b,) for b in batches]
    if not examples:
        raise CalibrationError("low_rank")
    was_training = model.training
    model.eval()
    layers = _seen(model, examples, _names(model, names))
    original = copy.deepcopy(model)
    picker = _Picker(max_samples, len(examples), seed)
    responses = {
        layer.name: _responses(original, layer.name, examples, picker, with_bias=True)
        for layer in layers
    }
    for layer in layers:
        centred = responses[layer.name] - responses[layer.name].mean(dim=0)
        layer.spectrum = torch.linalg.eigvalsh(centred.T @ centred).flip(0).clamp_min(0)
    ranks = _choose_ranks(model, layers, kept, cost)
    for layer in layers:
        if layer.name in ranks:
            given = _responses(model, layer.name, examples, picker, with_bias=False)
            left, right, bias = fit(
                given, responses[layer.name], ranks[layer.name], relu=layer.has_relu
            )
            _replace(model, layer.name, left, right, bias)
    model.train(was_training)
    return ranks


def fit(
    given: torch.Tensor, wanted: torch.Tensor, rank: int, *, relu: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (P, Q, b) with P Q of a rank such that r(P Q given + b) is near r(wanted).

    Args:
        given: float64 [M, C].
        wanted: float64 [M, D].
        rank: of P [D, rank] and Q [rank, C].
        relu: whether r is max(0, .), else it is nothing. Then a stand-in z for P Q given + b
            alternates with them: sum (r(wanted) - r(z))^2 + p (z - P Q given - b)^2, p growing.
    """
    solution = _reduced_rank_regression(given, wanted, rank)
    if not relu:
        return solution
    rectified = wanted.clamp_min(0)
    for penalty in _PENALTIES:
        left, right, bias = solution
        guess = given @ right.T @ left.T + bias
        positive = ((rectified + penalty * guess) / (1 + penalty)).clamp_min(0)
        negative = guess.clamp_max(0)
        cost_positive = (rectified - positive).square() + penalty * (positive - guess).square()
        cost_negative = rectified.square() + penalty * (negative - guess).square()
        stand_in = torch.where(cost_positive <= cost_negative, positive, negative)
        solution = _reduced_rank_regression(given, stand_in, rank)
    return solution


def _reduced_rank_regression(
    given: torch.Tensor, wanted: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean_given, mean_wanted = given.mean(dim=0), wanted.mean(dim=0)
    centred = given - mean_given
    covariance = centred.T @ centred
    crossed = (wanted - mean_wanted).T @ centred
    # Directions that responses in float32 hold nothing but rounding of are not worth a fit.
    full = crossed @ torch.linalg.pinv(covariance, rtol=_ROUNDING, hermitian=True)
    left = torch.linalg.eigh(full @ covariance @ full.T).eigenvectors[:, -rank:]
    right = left.T @ full
    return left, right, mean_wanted - left @ (right @ mean_given)


def _choose_ranks(
    model: nn.Module, layers: Sequence[_Layer], kept: float, cost: str
) -> dict[str, int]:
    """Return ranks with a large product of the energies that are kept."""
    ranks, per_rank, energy = {}, {}, {}
    total = 0
    for layer in layers:
        assert layer.spectrum is not None
        one, whole = layer.costs(model.get_submodule(layer.name), cost)
        total += whole
        # From here on down factors cost less than the layer.
        ranks[layer.name] = max(1, min(len(layer.spectrum), (whole - 1) // one))
        per_rank[layer.name], energy[layer.name] = one, layer.spectrum.cumsum(0)
    whole_costs = {
        layer.name: layer.costs(model.get_submodule(layer.name), cost)[1] for layer in layers
    }
    is_factored = dict.fromkeys(ranks, False)

    def spent() -> int:
        return sum(
            ranks[n] * per_rank[n] if is_factored[n] else whole_costs[n] for n in ranks
        )

    def loss_per_cost(name: str) -> float:
        sums, rank = energy[name], ranks[name]
        if not is_factored[name]:
            saved = whole_costs[name] - rank * per_rank[name]
            return float(1 - sums[rank - 1] / sums[-1].clamp_min(1e-300)) / max(1, saved)
        lost = 1 - sums[rank - 2] / sums[rank - 1].clamp_min(1e-300)
        return float(lost) / per_rank[name]

    while (left_over := spent()) > kept * total:
        open_names = [
            n for n in ranks
            if (ranks[n] > 1 if is_factored[n] else ranks[n] * per_rank[n] < whole_costs[n])
        ]  # fmt: skip
        if not open_names:
            raise CompressionError(
                type(model).__name__, f"costs {left_over / total:.3f} of what it did at rank 1, "
                f"above kept={kept}", f"kept={left_over / total + 0.001:.3f} is possible",
            )  # fmt: skip
        name = min(open_names, key=loss_per_cost)
        if is_factored[name]:
            ranks[name] -= 1
        is_factored[name] = True
    return {name: rank for name, rank in ranks.items() if is_factored[name]}


def _names(model: nn.Module, names: Iterable[str] | None) -> list[str]:
    def fits(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or (
            isinstance(module, nn.Conv2d) and module.groups == 1
        )

    known = [name for name, module in model.named_modules() if fits(module)]
    wanted = known if names is None else list(names)
    for name in wanted:
        if name not in known or not name:
            raise CompressionError(
                name or type(model).__name__,
                "is no linear layer and no 2-d convolution without groups inside a model",
                f"there are {', '.join(filter(None, known[:8]))}",
            )  # fmt: skip
    if not wanted:
        raise CompressionError(type(model).__name__, "has no layer that can be factored")
    return wanted


def _seen(model: nn.Module, examples: Sequence[Any], names: Sequence[str]) -> list[_Layer]:
    """Return the layers that run, in that order."""
    found: dict[str, _Layer] = {}
    last: list[tuple[str, torch.Tensor]] = []

    def on_layer(name: str, output: torch.Tensor) -> None:
        channel_dim = 1 if output.dim() == 4 else -1
        places = output[0].numel() // output.shape[channel_dim]
        found[name] = _Layer(name, num_places=places)
        last[:] = [(name, output)]

    def on_relu(tensor: torch.Tensor) -> None:
        if last and tensor is last[0][1]:
            found[last[0][0]].has_relu = True

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: on_layer(name, output)
        )
        for name in names
    ]
    hooks += [
        module.register_forward_pre_hook(lambda _, inputs: on_relu(inputs[0]))
        for module in model.modules()
        if isinstance(module, nn.ReLU)
    ]
    model(*examples[0])
    for hook in hooks:
        hook.remove()
    return list(found.values())


class _Picker:
    """Which responses are looked at: the same of each layer in every run."""

    def __init__(self, max_samples: int, num_batches: int, seed: int) -> None:
        self._num, self._seed = max(1, max_samples // num_batches), seed

    def __call__(self, rows: torch.Tensor, batch_index: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._seed + batch_index)
        return rows[torch.randperm(len(rows), generator=generator)[: self._num]].double()


def _responses(
    model: nn.Module, name: str, examples: Sequence[Any], pick: _Picker, *, with_bias: bool
) -> torch.Tensor:
    """Return samples of a layer's outputs, float64 [M, outputs]."""
    layer: Any = model.get_submodule(name)
    samples: list[torch.Tensor] = []

    def see(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        rows = output.movedim(1, -1) if output.dim() == 4 else output
        samples.append(pick(rows.reshape(-1, rows.shape[-1]), len(samples)))

    hook = layer.register_forward_hook(see)
    for example in examples:
        model(*example)
    hook.remove()
    found = torch.cat(samples)
    return found if with_bias or layer.bias is None else found - layer.bias.double()


def _replace(
    model: nn.Module, name: str, left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor
) -> None:
    layer: Any = model.get_submodule(name)
    weight, rank = layer.weight, right.shape[0]
    inner = (right @ weight.double().flatten(1)).view(rank, *weight.shape[1:])
    where = {"device": weight.device, "dtype": weight.dtype}
    first: Any
    second: Any
    if isinstance(layer, nn.Linear):
        first = nn.Linear(layer.in_features, rank, bias=False, **where)
        second = nn.Linear(rank, layer.out_features, **where)
        second.weight.copy_(left)
    else:
        first = nn.Conv2d(
            layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding,
            layer.dilation, bias=False, padding_mode=layer.padding_mode, **where,
        )  # fmt: skip
        second = nn.Conv2d(rank, layer.out_channels, 1, **where)
        second.weight.copy_(left[:, :, None, None])
    first.weight.copy_(inner)
    second.bias.copy_(bias)
    model.set_submodule(name, nn.Sequential(first, second))


def spatial(layer: nn.Conv2d, rank: int) -> nn.Sequential:
    """Return a convolution as a column of taps and a row of taps (Jaderberg et al. 2014).

    The weights' best approximation of that form (arXiv 1405.3866, scheme 2, by SVD).

    Args:
        layer: without groups.
        rank: channels between the two.

    >>> layer = nn.Conv2d(2, 4, (3, 5), padding=1, stride=2)
    >>> images = torch.randn(1, 2, 9, 9)
    >>> exact = spatial(layer, rank=6)  # min(2 * 3, 4 * 5)
    >>> torch.allclose(exact(images), layer(images), atol=1e-5)
    True
    """
    if layer.groups != 1 or isinstance(layer.padding, str):
        raise CompressionError("Conv2d", "has groups or padding by name: it is not split")
    num_outputs, num_inputs, high, wide = layer.weight.shape
    matrix = layer.weight.detach().permute(1, 2, 0, 3).reshape(num_inputs * high, -1)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    rank = min(rank, len(s))
    root = s[:rank].sqrt()
    columns = (u[:, :rank] * root).T.reshape(rank, num_inputs, high, 1)
    rows = (root[:, None] * v[:rank]).reshape(rank, num_outputs, 1, wide).transpose(0, 1)

    def half(weight: torch.Tensor, dim: int, bias: torch.Tensor | None) -> nn.Conv2d:
        def along(pair: tuple[int, ...], other: int) -> tuple[int, int]:
            return (pair[0], other) if dim == 0 else (other, pair[1])

        conv = nn.Conv2d(
            weight.shape[1], weight.shape[0], (weight.shape[2], weight.shape[3]),
            along(layer.stride, 1), along(layer.padding, 0),  # type: ignore[arg-type]
            along(layer.dilation, 1), bias=bias is not None, padding_mode=layer.padding_mode,
            device=layer.weight.device, dtype=layer.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            conv.weight.copy_(weight)
            if conv.bias is not None and bias is not None:
                conv.bias.copy_(bias)
        return conv

    return nn.Sequential(half(columns, 0, None), half(rows, 1, layer.bias))
