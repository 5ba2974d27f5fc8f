"""Reads out of a captured loss what it divides by (see denominator.py).

The graph is walked back from the loss through operations that are linear in the losses of the rows,
to the reductions over rows. Where it divides by a constant which may or may not be the number of
rows, both are alternatives: the loss itself decides when it runs (`settle` in
independence.py). That rows do not look at one another is not read here: it is observed
there, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from packlight.errors import MicrobatchError
from packlight.moves.microbatch.batch_value import BatchValue, count_targets, extract
from packlight.moves.microbatch.denominator import Denominator, Term
from packlight.moves.microbatch.loss_graph import (
    ancestors,
    loss_of,
    operator_name,
    reads_sizes_only,
)
from packlight.torch_internals.aot import is_tangent
from packlight.torch_internals.dispatch import is_fake


def find_denominator(
    module: fx.GraphModule,
    num_forward_outputs: int,
    num_rows: int,
    leaf_of_primal: Mapping[int, int],
    real_inputs: Sequence[Any],
    loss_index: int | None = None,
) -> Denominator:
    """Return what the loss of a captured step divides by.

    Args:
        module: joint graph whose forward returns the scalar loss (and new values of inputs).
        num_forward_outputs: how many of its outputs belong to the forward.
        num_rows: of the batch that it was traced with.
        leaf_of_primal: index of a primal -> index of the batch's tensor (`leaves_of_primals`).
        real_inputs: real tensors behind the primals; read only where they are no parameters.
        loss_index: which of the forward's outputs is the loss, where it returns more.

    Raises:
        MicrobatchError: the loss is none of the known forms; says at which operation.
    """
    output = next(n for n in reversed(module.graph.nodes) if n.op == "output")
    gradients = list(output.args[0])[num_forward_outputs:]
    trained = {index for index, gradient in enumerate(gradients) if gradient is not None}
    walk = _Walk(module, num_rows, leaf_of_primal, real_inputs, trained)
    walk.visit(loss_of(output, num_forward_outputs, loss_index), _Path())
    return walk.denominator()


@dataclass(frozen=True)
class _Path:
    """What lies between the loss and a node.

    Attributes:
        factors: (node, exponent) of what the loss is divided by.
        kind: "rows" or "sum", as the reduction over rows next to the node has it; "" before one.
        is_ambiguous: the other kind is possible, too.
        operation: that reduction.
    """

    factors: tuple[tuple[BatchValue, int], ...] = ()
    kind: str = ""
    is_ambiguous: bool = False
    operation: str = ""


@dataclass
class _Plain:
    operation: str
    kind: str
    is_ambiguous: bool


@dataclass
class _Walk:
    module: fx.GraphModule
    num_rows: int
    leaf_of_primal: Mapping[int, int]
    real_inputs: Sequence[Any]
    trained: set[int]
    terms: list[Term] = field(default_factory=list)
    plains: list[_Plain] = field(default_factory=list)
    constant: str = ""

    def __post_init__(self) -> None:
        self.primals = [
            n for n in self.module.graph.nodes if n.op == "placeholder" and not is_tangent(n)
        ]
        self.index_of_primal = {n: i for i, n in enumerate(self.primals)}
        self.on_rows: set[fx.Node] = set()
        self.on_parameters: set[fx.Node] = set()
        self.on_inputs: set[fx.Node] = set()
        for index, node in enumerate(self.primals):
            value = node.meta.get("val")
            self.on_inputs.add(node)
            if index in self.leaf_of_primal:
                if isinstance(value, torch.Tensor) and value.ndim > 0:
                    self.on_rows.add(node)
            elif index in self.trained:
                self.on_parameters.add(node)
        for node in self.module.graph.nodes:
            if not reads_sizes_only(node):
                for group in (self.on_rows, self.on_parameters, self.on_inputs):
                    if any(i in group for i in node.all_input_nodes):
                        group.add(node)

    # -- from the loss to the reductions

    def visit(self, node: Any, path: _Path) -> None:
        """Follow a summand of the loss to where rows are told apart."""
        if node not in self.on_rows:
            self._visit_constant(node, path)
            return
        step = getattr(self, _STEPS.get(operator_name(node), ""), None)
        if step is not None and step(node, path):
            return
        if self._step_reduction_argument(node, path):
            return
        if self._has_lost_rows(node):
            raise MicrobatchError(
                f"{node.target} is not linear in the losses of the rows", node.name
            )
        self._finish(node, [node], path)

    def _visit_constant(self, node: Any, path: _Path) -> None:
        """A summand that is the same for each microbatch: weights have to sum to 1."""
        if not isinstance(node, fx.Node) and node == 0:
            return
        name = node.name if isinstance(node, fx.Node) else f"the constant {node}"
        if path.factors:
            raise MicrobatchError("it is divided by what depends on the batch", name)
        self.constant = name

    def _finish(self, node: fx.Node, read: list[fx.Node], path: _Path) -> None:
        """The path from the loss ends at `node`, of whose inputs `read` are not linear any more."""
        self._refuse_inner_reductions(read)
        name = path.operation or node.name
        if path.factors:
            self.terms.append(Term(name, path.factors, path.kind == "rows"))
        else:
            assert path.kind, "rows cannot get lost without a reduction"
            self.plains.append(_Plain(name, path.kind, path.is_ambiguous))

    def _refuse_inner_reductions(self, nodes: list[fx.Node]) -> None:
        """Refuse what reduces over rows inside of what is not linear."""
        for node in ancestors(nodes):
            if node in self.on_rows and self._has_lost_rows(node):
                raise MicrobatchError(
                    "it reduces over rows, and the loss is not linear in it", node.name
                )

    def _has_lost_rows(self, node: fx.Node) -> bool:
        """Whether a tensor has fewer elements than there are rows, or is a scalar."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return False
        return value.ndim == 0 or value.numel() < self.num_rows

    # -- steps: each returns whether it went on

    def _step_same(self, node: fx.Node, path: _Path) -> bool:
        self.visit(node.args[0], path)
        return True

    def _step_add(self, node: fx.Node, path: _Path) -> bool:
        if not self._has_lost_rows(node):
            return False
        for argument in node.args[:2]:
            self.visit(argument, path)
        return True

    def _step_stack(self, node: fx.Node, path: _Path) -> bool:
        if not self._has_lost_rows(node):
            return False
        for argument in node.args[0]:  # type: ignore[union-attr]
            self.visit(argument, path)
        return True

    def _step_reduce(self, node: fx.Node, path: _Path) -> bool:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dimensions = node.args[1] if len(node.args) > 1 else None
        dimensions = [dimensions] if isinstance(dimensions, int) else dimensions
        num_dimensions = source.meta["val"].ndim
        is_over_rows = not dimensions or 0 in [d % num_dimensions for d in dimensions]  # type: ignore
        if is_over_rows and not self._has_lost_rows(source):
            path = _reduced(path, "rows" if "mean" in str(node.target) else "sum", node)
        self.visit(source, path)
        return True

    def _step_dot(self, node: fx.Node, path: _Path) -> bool:
        self._finish(node, node.all_input_nodes, _reduced(path, "sum", node))
        return True

    def _step_mul(self, node: fx.Node, path: _Path) -> bool:
        first, second = node.args[:2]
        if first in self.on_rows and second in self.on_rows:
            if self._is_batch_scalar(second):
                self.visit(first, self._with_factor(path, second, -1))
            elif self._is_batch_scalar(first):
                self.visit(second, self._with_factor(path, first, -1))
            else:
                return False
            return True
        main, factor = (first, second) if first in self.on_rows else (second, first)
        self.visit(main, self._with_constant(path, factor))
        return True

    def _step_div(self, node: fx.Node, path: _Path) -> bool:
        first, second = node.args[:2]
        if node.kwargs.get("rounding_mode") is not None:
            return False
        if second in self.on_rows:
            if not self._is_batch_scalar(second):
                return False
            self.visit(first, self._with_factor(path, second, 1))
        else:
            self.visit(first, self._with_constant(path, second))
        return True

    def _step_item(self, node: fx.Node, path: _Path) -> bool:
        """The loss of nll_loss, which divides by the targets (or weights) that count."""
        call, index = node.args
        assert isinstance(call, fx.Node)
        if index != 0 or operator_name(call) not in ("nll_loss_forward", "nll_loss2d_forward"):
            return False
        scores, target, weight, reduction, ignore_index = call.args
        assert isinstance(scores, fx.Node) and isinstance(target, fx.Node)
        if reduction == 0:
            return False
        path = _reduced(path, "sum", node)
        if reduction == 1:
            counts = (count_targets, (target, weight, ignore_index))
            value = self._batch_value(
                [counts], [False], None, f"the targets of {call.name} that count", call
            )
            path = replace(path, factors=(*path.factors, (value, 1)))
        self._finish(node, [scores, target], path)
        return True

    def _step_reduction_argument(self, node: fx.Node, path: _Path) -> bool:
        """A loss that takes `reduction`: mean over all elements (1) or their sum (2)."""
        if not isinstance(node.target, torch._ops.OpOverload):
            return False
        for place, argument in enumerate(node.target._schema.arguments):
            if argument.name == "reduction":
                given = node.args[place] if place < len(node.args) else argument.default_value
                reduction = node.kwargs.get("reduction", given)
                if reduction not in (1, 2):
                    return False
                path = _reduced(path, "rows" if reduction == 1 else "sum", node)
                self._finish(node, node.all_input_nodes, path)
                return True
        return False

    # -- what a loss is divided by

    def _is_batch_scalar(self, node: Any) -> bool:
        is_from_batch = node in self.on_rows and node not in self.on_parameters
        return is_from_batch and self._has_lost_rows(node) and node.meta["val"].numel() == 1

    def _with_constant(self, path: _Path, constant: Any) -> _Path:
        """A factor that the graph holds as a constant may be a number of rows."""
        if isinstance(constant, fx.Node):
            is_ambiguous = constant not in self.on_inputs
        else:
            factor = abs(float(constant))
            sizes = [factor / self.num_rows, 1 / (factor or 1) / self.num_rows]
            is_ambiguous = any(0.5 < s < math.inf and abs(s - round(s)) < 1e-6 * s for s in sizes)
        return replace(path, is_ambiguous=path.is_ambiguous or is_ambiguous)

    def _with_factor(self, path: _Path, node: Any, exponent: int) -> _Path:
        """Add a scalar computed from the batch: sums over rows, and what follows from them."""
        roots: list[fx.Node] = []
        stack = [node]
        seen: set[fx.Node] = set()
        while stack:
            current = stack.pop()
            if current in seen or current not in self.on_rows:
                continue
            seen.add(current)
            sources = [i for i in current.all_input_nodes if i in self.on_rows]
            if all(self._has_lost_rows(s) for s in sources):
                stack.extend(sources)
            elif operator_name(current) in ("sum", "mean", "count_nonzero"):
                self._refuse_inner_reductions(sources)
                roots.append(current)
            else:
                raise MicrobatchError(
                    f"the loss is divided by {node.name}, and {current.target} does not add up "
                    "over rows",
                    current.name,
                )
        tail = None
        if roots != [node]:
            tail = self._tail(node, roots)
        value = self._batch_value(
            roots, [operator_name(r) == "mean" for r in roots], tail,
            f"{node.name} of the batch", node,
        )
        return replace(path, factors=(*path.factors, (value, exponent)))

    def _tail(self, node: fx.Node, roots: list[fx.Node]) -> fx.GraphModule:
        tail, inputs = extract(self.module, [node], roots)
        strange = [n for n in inputs if n not in roots]
        if strange:
            raise MicrobatchError(f"it is computed from {strange[0].name}, too", node.name)
        return tail

    def _batch_value(
        self,
        results: Sequence[Any],
        is_mean: list[bool],
        tail: fx.GraphModule | None,
        description: str,
        node: fx.Node,
    ) -> BatchValue:
        sums, inputs = extract(self.module, results)
        sources = tuple(self._source(i, node) for i in inputs)
        return BatchValue(sums, sources, tuple(is_mean), tail, self.num_rows, description)

    def _source(self, primal: fx.Node, node: fx.Node) -> int | torch.Tensor:
        index = self.index_of_primal.get(primal, -1)
        if index in self.leaf_of_primal:
            return self.leaf_of_primal[index]
        if primal in self.on_parameters or index < 0:
            raise MicrobatchError(f"what it divides by depends on {primal.name}", node.name)
        real = self.real_inputs[index]
        if not isinstance(real, torch.Tensor) or is_fake(real):
            raise MicrobatchError(f"the value of {primal.name} is not known", node.name)
        return real

    # -- the whole

    def denominator(self) -> Denominator:
        """Return what all terms together allow.

        Raises:
            MicrobatchError: nothing.
        """
        terms = tuple(self.terms)
        needs_one = terms[0].operation if terms else self.constant
        kinds = ["rows", "sum"]
        for plain in self.plains:
            mine = ["rows", "sum"] if plain.is_ambiguous else [plain.kind]
            if needs_one and mine == ["sum"]:
                raise MicrobatchError(
                    f"it is a sum over rows, and {needs_one} in the same loss is none",
                    plain.operation,
                )
            kinds = [k for k in kinds if k in mine and not (k == "sum" and needs_one)]
        if not self.plains:
            return Denominator(terms, constant_operation=self.constant)
        if not kinds:
            means = next(p.operation for p in self.plains if p.kind == "rows")
            sums = next(p.operation for p in self.plains if p.kind == "sum")
            raise MicrobatchError(f"it is a sum over rows, and {means} a mean over them", sums)
        first, *others = [
            Denominator(terms, kind, self.plains[0].operation, self.constant) for kind in kinds
        ]
        return replace(first, alternatives=tuple(others))


_STEPS = {
    **dict.fromkeys(
        ("neg", "view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "clone", "alias",
         "detach", "_to_copy", "to", "expand"),
        "_step_same",
    ),
    **dict.fromkeys(("add", "sub", "rsub"), "_step_add"),
    **dict.fromkeys(("stack", "cat"), "_step_stack"),
    **dict.fromkeys(("sum", "mean"), "_step_reduce"),
    "dot": "_step_dot",
    "mul": "_step_mul",
    "div": "_step_div",
    "getitem": "_step_item",
}  # fmt: skip


def _reduced(path: _Path, kind: str, node: fx.Node) -> _Path:
    """A reduction nearer to the rows decides, but where the two differ, a look at both is due."""
    is_ambiguous = path.is_ambiguous or path.kind not in ("", kind)
    return replace(path, kind=kind, is_ambiguous=is_ambiguous, operation=node.name)
