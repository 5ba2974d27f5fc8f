"""What one forward and backward computes and holds, and in what two of them differ.

Shared by the benchmark and by tests: eager PyTorch's outcome is the oracle of a planned step's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from functorch.compile import default_partition
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop

import packlight
from benchmarks.common import same_bits
from packlight.backend import PacklightBackend
from packlight.capture.dropout import use_eager_dropout
from packlight.torch_internals.aot import as_eager_runs_it

Result = TypeVar("Result")

LossFn = Callable[[nn.Module, Any], torch.Tensor]
# The second call of a traced model may be traced once more, and the first one may fill caches.
NUM_WARM_UPS = 2
DROPOUT_SEED = 11
# A traced step may round otherwise than eager PyTorch, in bf16 by some tenths of a percent; what is
# further off computes something else.
MAX_TRACED_ERROR = 0.05


class Start:
    """Parameters and buffers of a model as they were, whether its state dict has them or not."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._values = {name: tensor.clone() for name, tensor in _tensors(model)}

    @torch.no_grad()
    def restore(self) -> None:
        """Set all values back, let go of gradients and seed PyTorch's, NumPy's, Python's draws."""
        for name, tensor in _tensors(self.model):
            if not torch.equal(tensor, self._values[name]):
                tensor.copy_(self._values[name])
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(DROPOUT_SEED)
        np.random.seed(DROPOUT_SEED)
        random.seed(DROPOUT_SEED)


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    found = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor.detach()) for name, tensor in found]


@dataclass(frozen=True)
class Outcome:
    """What was computed, by name, and the most that was held meanwhile.

    Attributes:
        results: "loss", "gradient of ...", "buffer ..." and "generator".
        peak_bytes: above what was there before.
        draws: whether random numbers were drawn.
    """

    results: dict[str, torch.Tensor | None]
    peak_bytes: int
    draws: bool

    def differences(self, other: Outcome) -> list[str]:
        """Return the names of results of which a bit differs."""
        assert self.results.keys() == other.results.keys()
        return [
            name for name, mine in self.results.items() if not same_bits(mine, other.results[name])
        ]

    def gradient_error(self, other: Outcome) -> float:
        """Return how far the gradients are from another's, over the norm of those."""
        return norm_of_difference(self._gradients(), other._gradients())

    def _gradients(self) -> dict[str, torch.Tensor | None]:
        return {name: g for name, g in self.results.items() if name.startswith("gradient of")}

    def not_finite(self) -> list[str]:
        """Return the names of results that are infinite or not numbers: nothing equals those."""
        return [
            name
            for name, value in self.results.items()
            if not name.startswith("buffer")
            and value is not None
            and not bool(torch.isfinite(value).all())
        ]


def observe(
    model: nn.Module, batch: Any, loss_fn: LossFn, num_warm_ups: int = NUM_WARM_UPS
) -> Outcome:
    """Run forward and backward from given weights and seed, and leave the model as it was.

    Args:
        model: its parameters, buffers and gradients are set back before each run and at the end.
        batch: what `loss_fn` takes.
        loss_fn: eager or compiled.
        num_warm_ups: runs before the one that counts.
    """
    start = Start(model)

    def once() -> torch.Tensor:
        loss = loss_fn(model, batch)
        loss.backward()
        return loss.detach()

    try:
        for _ in range(num_warm_ups):
            start.restore()
            once()
        start.restore()
        before = torch.get_rng_state()
        peak = packlight.measure_peak(once)
        generator = torch.get_rng_state()
        results: dict[str, torch.Tensor | None] = {"loss": peak.result.clone()}
        for name, p in model.named_parameters():
            results[f"gradient of {name}"] = None if p.grad is None else p.grad.clone()
        results |= {f"buffer {name}": b.clone() for name, b in model.named_buffers()}
        results["generator"] = generator
        return Outcome(results, peak.peak_bytes, not torch.equal(before, generator))
    finally:
        start.restore()


def traced(loss_fn: LossFn, fullgraph: bool = True) -> LossFn:
    """Return the loss traced as for Packlight, and run by PyTorch's own code without a plan.

    A model may compute something else when it is traced: transformers' models ask whether they are,
    and recurrent layers run their time steps instead of one fused kernel. So do dropouts on a CPU;
    they are given back eager PyTorch's bits, as Packlight does. PyTorch's min-cut partitioner,
    that of "aot_eager", would make one of two such dropouts of the same values, which draw
    different numbers.

    Args:
        loss_fn: eager.
        fullgraph: whether it is one graph; else it breaks where it breaks for Packlight.
    """
    def partitioned(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        use_eager_dropout(joint)
        return default_partition(joint, *args, **kwargs)

    compiler = aot_autograd(
        fw_compiler=boxed_nop, bw_compiler=boxed_nop, partition_fn=partitioned
    )

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        with as_eager_runs_it():
            return compiler(graph, inputs)

    compiled: LossFn = torch.compile(
        loss_fn, backend=backend, fullgraph=fullgraph, dynamic=False
    )
    return compiled


def run_traced(
    loss_fn: LossFn,
    run: Callable[[LossFn], Result],
    gradient_error: Callable[[Result], float],
    fullgraph: bool = True,
) -> tuple[Result, bool]:
    """Return what comes of a loss that is traced and not planned, and whether PyTorch ran it.

    Where a fake kernel is wrong about strides, PyTorch cannot run what it traced; and what it runs
    may compute something else. Then it is Packlight's plain step, without a budget, that planned
    ones are compared with.

    Args:
        loss_fn: eager.
        run: traced loss -> what comes of it.
        gradient_error: how far its gradients are from eager's, relative to their norm.
        fullgraph: whether it is one graph.
    """
    torch._dynamo.reset()
    by_torch = None
    try:
        by_torch = run(traced(loss_fn, fullgraph))
        if gradient_error(by_torch) <= MAX_TRACED_ERROR:
            return by_torch, True
    except RuntimeError:
        pass
    torch._dynamo.reset()
    backend = PacklightBackend(rehearse=False, progress=False)
    unplanned = run(torch.compile(loss_fn, backend=backend, fullgraph=fullgraph, dynamic=False))
    if by_torch is not None and gradient_error(by_torch) <= gradient_error(unplanned):
        return by_torch, True
    return unplanned, False


def norm_of_difference(
    mine: Mapping[str, torch.Tensor | None], theirs: Mapping[str, torch.Tensor | None]
) -> float:
    """Return the norm of the difference of named tensors over the norm of the others'.

    What is lacking counts as zeros.
    """
    off = total = 0.0
    for name, other in theirs.items():
        if other is not None:
            own = mine[name]
            difference = other if own is None else own - other
            off += float(difference.abs().double().square().sum())
            total += float(other.abs().double().square().sum())
    return (off / total) ** 0.5 if total else 0.0


def in_words(names: Iterable[str]) -> str:
    """Return a few of some names.

    >>> in_words(["loss", "a", "b", "c"])
    'loss, a and 2 more'
    """
    names = list(names)
    few, rest = names[:2], names[2:]
    return ", ".join(few) + (f" and {len(rest)} more" if rest else "")
