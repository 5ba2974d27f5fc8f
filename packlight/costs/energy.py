"""How much energy a step takes, roughly: operations counted, each at a published price.

Prices are Horowitz's for 45 nm at 0.9 V (ISSCC 2014, "Computing's energy problem"), the ones that
Deep Compression argues with: reading 32 bits from DRAM costs 6400 times an integer addition. They
belong to no machine of today, so that absolute numbers mean little; shares, and what happens to
them when a model or a plan changes, mean more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from packlight.step import Phase, StepGraph

# Picojoules for 32 bits.
PICOJOULES = {
    "int add": 0.1,
    "float add": 0.9,
    "int multiply": 3.1,
    "float multiply": 3.7,
    "SRAM access": 5.0,
    "DRAM access": 640.0,
}
_WORD_BYTES = 4


@dataclass(frozen=True)
class Energy:
    """What a part of a step does, and what that costs.

    Attributes:
        multiply_adds: of matrix products, convolutions and attention; other arithmetic is nothing
            beside its memory traffic.
        traffic_bytes: read and written, if every operation fetches its operands from DRAM and puts
            its results there. Caches and fusion make it less; a view is counted as the whole that
            it looks at, which makes it more.
    """

    multiply_adds: int
    traffic_bytes: int

    @property
    def compute_joules(self) -> float:
        """Of multiplications and additions, as 32-bit floats."""
        picojoules = PICOJOULES["float multiply"] + PICOJOULES["float add"]
        return self.multiply_adds * picojoules * 1e-12

    @property
    def memory_joules(self) -> float:
        """Of the traffic, at the price of DRAM."""
        return self.traffic_bytes / _WORD_BYTES * PICOJOULES["DRAM access"] * 1e-12

    @property
    def joules(self) -> float:
        """Of both."""
        return self.compute_joules + self.memory_joules

    def __add__(self, other: Energy) -> Energy:
        return Energy(
            self.multiply_adds + other.multiply_adds, self.traffic_bytes + other.traffic_bytes
        )


def count_multiply_adds(run: Callable[[], Any]) -> int:
    """Return the multiplications, each with its addition, of what a function runs.

    Args:
        run: a forward, or a forward and its backward.

    >>> weight = torch.ones(3, 4)
    >>> count_multiply_adds(lambda: weight @ torch.ones(4, 5))
    60
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops()) // 2


def step_energy(
    graph: StepGraph, forward: int, backward: int, update_bytes: int
) -> dict[Phase, Energy]:
    """Return the energy of a plain step, phase by phase.

    Args:
        graph: of the step.
        forward: multiply-adds, from `count_multiply_adds`.
        backward: likewise.
        update_bytes: what the optimizer reads and writes.
    """
    traffic = {phase: 0 for phase in Phase}
    for operation in graph.operations:
        if not operation.kind.is_transfer:
            touched = (*operation.touches, *operation.creates)
            traffic[operation.phase] += sum(graph.buffers[index].bytes for index in touched)
    traffic[Phase.UPDATE] += update_bytes
    counts = {Phase.FORWARD: forward, Phase.BACKWARD: backward, Phase.UPDATE: 0}
    return {phase: Energy(counts[phase], traffic[phase]) for phase in Phase}


def inference_energy(
    model: torch.nn.Module,
    inputs: tuple[Any, ...],
    *,
    stored_bytes: Mapping[str, int] | None = None,
) -> Energy:
    """Return the energy of one forward, its weights from DRAM and its activations written and read.

    Args:
        model: run on the inputs.
        inputs: of one forward.
        stored_bytes: by parameter's name, the bytes that are read for it where it is stored in
            another form, such as a compressed one that is decoded on the way; else its own.

    >>> model = torch.nn.Linear(8, 4, bias=False)
    >>> energy = inference_energy(model, (torch.ones(1, 8),))
    >>> energy.multiply_adds, energy.traffic_bytes  # weights 128, output 16 written and read
    (32, 160)
    >>> inference_energy(model, (torch.ones(1, 8),), stored_bytes={"weight": 10}).traffic_bytes
    42
    """
    sizes = {name: p.nbytes for name, p in model.named_parameters()} | dict(stored_bytes or {})
    activation_bytes = 0

    def see(_: torch.nn.Module, __: Any, output: Any) -> None:
        nonlocal activation_bytes
        if isinstance(output, torch.Tensor):
            activation_bytes += output.nbytes

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(see) for module in leaves]
    try:
        with torch.no_grad():
            multiply_adds = count_multiply_adds(lambda: model(*inputs))
    finally:
        for hook in hooks:
            hook.remove()
    return Energy(multiply_adds, sum(sizes.values()) + 2 * activation_bytes)
