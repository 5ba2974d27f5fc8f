"""How wrong approximations make a step's gradient: measured against the exact one.

The joint graph runs on the example batch, call by call, exactly and then with approximations, for
several draws of their random bits; parameters and generators stay as they are. The error is that of
all gradients as one vector, relative to its norm. Values with the same role (equal layers) are
measured together and share what is found; errors of different values are independent, so that
their squares add up. What that leaves out (biased approximations of which errors add up
themselves) shows where a whole choice is measured, which is always done.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from packlight.capture.step_capture import CapturedLoss
from packlight.costs.measure import real_tensors
from packlight.moves.lossy.rewrite import Approximation, approximated
from packlight.moves.lossy.saved import SavedValue
from packlight.torch_internals.aot import is_tangent

NUM_DRAWS = 2
# The seed of the step itself is 0.
_FIRST_SEED = 1


@dataclass(frozen=True)
class GradientErrors:
    """Measures errors of one joint graph's gradient.

    Attributes:
        module: exact.
        loss: its inputs, and how many of its results are no gradients.
    """

    module: fx.GraphModule
    loss: CapturedLoss

    def measured(
        self, choices: Iterable[Mapping[SavedValue, Approximation]], num_draws: int = NUM_DRAWS
    ) -> list[float]:
        """Return the relative error of the gradient for each choice: root mean square over draws.

        The exact gradient is computed once; it and one other are in memory beside the step.

        Raises:
            ArithmeticError: the exact gradient is zero, or not finite.
        """
        exact = self._gradients(self.module)
        norm = _norm(exact)
        if not 0 < norm < math.inf:
            raise ArithmeticError(f"the norm of its gradient is {norm}")
        found = []
        for chosen in choices:
            squares = []
            for seed in range(_FIRST_SEED, _FIRST_SEED + num_draws):
                other = self._gradients(approximated(self.module, chosen, seed))
                for mine, right in zip(other, exact, strict=True):
                    mine.sub_(right)
                squares.append((_norm(other) / norm) ** 2)
            found.append(math.sqrt(sum(squares) / num_draws))
        return found

    def by_value(
        self, options: Mapping[SavedValue, Sequence[Approximation]]
    ) -> dict[tuple[SavedValue, Approximation], float]:
        """Return each value's own share of the error under each of its options."""
        by_role: dict[tuple[str, Approximation], list[SavedValue]] = defaultdict(list)
        for value, possible in options.items():
            for approximation in possible:
                by_role[value.role, approximation].append(value)
        errors = self.measured([
            dict.fromkeys(values, approximation) for (_, approximation), values in by_role.items()
        ])
        return {
            (value, approximation): error / math.sqrt(len(values))
            for ((_, approximation), values), error in zip(by_role.items(), errors, strict=True)
            for value in values
        }

    def _gradients(self, module: fx.GraphModule) -> list[torch.Tensor]:
        """Return copies of a joint graph's gradients; every run draws the same random numbers."""
        fakes = [node.meta["val"] for node in module.graph.nodes if is_tangent(node)]
        with real_tensors():  # generators are where they were, afterwards
            ones = [torch.ones(t.shape, dtype=t.dtype, device=t.device) for t in fakes]
            results = _FreeingInterpreter(module, garbage_collect_values=True).run(
                *self.loss.arguments, *ones, enable_io_processing=False
            )
        gradients = results[self.loss.num_forward_outputs :]
        return [g.to(torch.float32, copy=True) for g in gradients if g is not None]


class _FreeingInterpreter(fx.Interpreter):
    """Drops at once what nobody reads; otherwise that stays to the end."""

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        return result if n.users or n.op == "output" else None


def _norm(gradients: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum(dtype=torch.float64)) for g in gradients))
