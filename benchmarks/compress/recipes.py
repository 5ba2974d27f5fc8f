"""What is done to a trained network, method by method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import nn

import packlight.compress as compress
from benchmarks.compress.data import Digits
from benchmarks.compress.lenets import CONVOLUTIONS_FASTER_IN, Recipe, lenet_5, lenet_300_100, train

_STEPS_BETWEEN_MASKS = 25


@dataclass(frozen=True)
class Method:
    """A way to make a network small.

    Attributes:
        coding: of the file.
        densities: to keep, overall (with `score` over all tensors) or by weight.
        score: by which weights are kept; see `compress.Pruner`.
        pruning: how the network is trained while its weights become fewer.
        pruned_by: the share of that training after which they do not become fewer any more.
        num_values: of each weight's codebook.
        num_bias_values: of each bias's.
        start: of codebooks.
        learn: "codebook" or "both"; see `compress.share`.
        bit_weight: likewise.
        sharing: how codebooks are trained.
        dense: how the network is trained before.
        channels_kept: the share of each layer's channels that is kept before weights are pruned.
    """

    coding: str
    densities: float | Mapping[str, float]
    score: str
    pruning: Recipe
    pruned_by: float
    num_values: int
    num_bias_values: int
    start: str
    learn: str
    bit_weight: float
    sharing: Recipe
    dense: Recipe
    channels_kept: float = 1.0


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "lenet-300-100": lenet_300_100,
    "lenet-5": lenet_5,
}

# Tables 2 and 3 of arXiv 1510.00149: densities; 6 bits of a code in matrices, 8 in convolutions.
_DEEP = Method(
    coding="huffman", densities={}, score="magnitude", pruning=Recipe(4, 1e-3, weight_decay=0.02),
    pruned_by=0.5, num_values=2**6 - 1, num_bias_values=2**6 - 1, start="linear",
    learn="codebook", bit_weight=0.0, sharing=Recipe(1, 2e-4),
    dense=Recipe(12, 1.5e-3, weight_decay=0.1),
)  # fmt: skip
_SMALL = Method(
    coding="range", densities=0.046, score="lamp", pruning=Recipe(5, 2e-3, 256, distorted=True),
    pruned_by=0.3, num_values=8, num_bias_values=8, start="optimal", learn="both",
    bit_weight=0.02, sharing=Recipe(1, 1e-3, 256, distorted=True),
    dense=Recipe(25, 3e-3, 256, distorted=True),
)  # fmt: skip

METHODS: dict[str, dict[str, Method]] = {
    "lenet-300-100": {
        "deep compression": replace(
            _DEEP, densities={"1.weight": 0.08, "3.weight": 0.09, "5.weight": 0.26}
        ),
        "small": _SMALL,
        "smaller": replace(
            _SMALL, densities=0.03, pruning=Recipe(4, 3e-3, 256, distorted=True), pruned_by=0.75,
        ),
    },
    "lenet-5": {
        "deep compression": replace(
            _DEEP,
            densities={"0.weight": 0.66, "2.weight": 0.12, "5.weight": 0.08, "7.weight": 0.19},
            pruning=Recipe(1, 5e-4), sharing=Recipe(1, 1e-4),
            dense=Recipe(8, 1.5e-3, weight_decay=0.05),
        ),
        "small": replace(
            _SMALL, channels_kept=0.35, densities=0.06,
            pruning=Recipe(10, 3e-3, 256, distorted=True),
            sharing=Recipe(1, 1e-3, 256, distorted=True),
            dense=Recipe(8, 1.5e-3, weight_decay=0.05),
        ),
    },
}  # fmt: skip


def prune(model: nn.Module, digits: Digits, method: Method, seed: int) -> None:
    """Remove channels, if wanted, and train a network while its weights become fewer."""
    if method.channels_kept < 1:
        compress.remove_channels(model, digits.images[:2], method.channels_kept, scope="layer")
        model.to(memory_format=CONVOLUTIONS_FASTER_IN)
    pruner = compress.Pruner(model, score=method.score)
    num_steps = 0

    def now(share_done: float, final_density: float) -> float:
        return compress.gradual(share_done, final_density, end=method.pruned_by)

    def on_step(share_done: float) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps % _STEPS_BETWEEN_MASKS:
            return
        densities = method.densities
        if isinstance(densities, Mapping):
            pruner.prune_to({name: now(share_done, d) for name, d in densities.items()})
        else:
            pruner.prune_to(now(share_done, densities))

    train(model, digits, method.pruning, seed, on_step=on_step)
    pruner.finish()


def share(model: nn.Module, digits: Digits, method: Method, seed: int) -> None:
    """Let a network's weights share few values, and train those."""
    counts = {
        name: method.num_values if parameter.dim() > 1 else method.num_bias_values
        for name, parameter in model.named_parameters()
    }
    sharing = compress.share(
        model, counts, start=method.start, learn=method.learn, bit_weight=method.bit_weight,
        seed=seed,
    )  # fmt: skip
    train(model, digits, method.sharing, seed)
    sharing.finish(half=True)
