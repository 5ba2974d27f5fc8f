"""A number that a captured loss computes from its batch alone, for any rows of any batch.

The graph was traced for one number of rows, and its sizes are constants in it. So what runs here is
that very graph at that very size: rows are brought to it in chunks, the last one filled up with
copies of its first row, whose share is then subtracted. That is exact for what adds up over rows
(how many labels count, the sum of a mask); what is computed from such sums (a clamp, an epsilon)
runs once for each part and once for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

Leaves = Sequence[torch.Tensor]
Sums = Sequence[torch.Tensor]
Output = fx.Node | tuple[Callable[..., Any], tuple[Any, ...]]


@dataclass(frozen=True)
class BatchValue:
    """A value computed from the rows of a batch.

    Attributes:
        sums: traced for `num_rows`; from its inputs to tensors that add up over rows, and means.
        sources: its inputs: indices of the batch's leaves, or tensors that all rows share.
        is_mean: which of its results are means over rows.
        tail: from those results to the value; None if the only result is the value.
        num_rows: that the graph was traced for.
        description: for people.
    """

    sums: fx.GraphModule
    sources: tuple[int | torch.Tensor, ...]
    is_mean: tuple[bool, ...]
    tail: fx.GraphModule | None
    num_rows: int
    description: str

    @torch.no_grad()
    def of_parts(self, sums: Sequence[Sums], counts: Sequence[int]) -> tuple[list[float], float]:
        """Return the value of each part, and of all rows of all parts together.

        Args:
            sums: per part what adds up over its rows, from `sums_of`.
            counts: per part its number of rows.
        """
        values = [self._finish(s, n) for s, n in zip(sums, counts, strict=True)]
        together = [torch.stack(same).sum(0) for same in zip(*sums, strict=True)]
        return values, self._finish(together, sum(counts))

    @torch.no_grad()
    def sums_of(self, leaves: Leaves) -> Sums:
        """Return what adds up over a part's rows.

        Args:
            leaves: the tensors of its batch, in the order of `tensor_leaves`.
        """
        num_rows = num_rows_of(leaves)
        total = [torch.tensor(0.0, dtype=torch.float64)] * len(self.is_mean)
        for start in range(0, num_rows, self.num_rows):
            stop = min(start + self.num_rows, num_rows)
            missing = self.num_rows - (stop - start)
            rows = torch.arange(start, start + self.num_rows).where(
                torch.arange(self.num_rows) < stop - start, torch.tensor(start)
            )
            found = self._run(leaves, rows)
            if missing:
                copies = self._run(leaves, torch.full((self.num_rows,), start))
                share = missing / self.num_rows
                found = [f - share * c for f, c in zip(found, copies, strict=True)]
            total = [t + f for t, f in zip(total, found, strict=True)]
        return total

    def _run(self, leaves: Leaves, rows: torch.Tensor) -> list[torch.Tensor]:
        """Return what adds up over rows (a mean as the sum of its rows' means), as doubles."""
        inputs = []
        for source in self.sources:
            if isinstance(source, torch.Tensor):
                inputs.append(source)
                continue
            leaf = leaves[source]
            inputs.append(leaf if leaf.ndim == 0 else leaf[rows.to(leaf.device)])
        results = [r.cpu().double() for r in self.sums(*inputs)]
        return [
            r * self.num_rows if mean else r for r, mean in zip(results, self.is_mean, strict=True)
        ]

    def _finish(self, sums: Sums, num_rows: int) -> float:
        values = [s / num_rows if m else s for s, m in zip(sums, self.is_mean, strict=True)]
        if self.tail is None:
            return float(values[0])
        fakes = [n.meta["val"] for n in self.tail.graph.nodes if n.op == "placeholder"]
        inputs = [
            (v if f.is_floating_point() else v.round()).to(f.device, f.dtype)
            for v, f in zip(values, fakes, strict=True)
        ]
        return float(self.tail(*inputs)[0])


def count_targets(
    target: torch.Tensor, weight: torch.Tensor | None, ignore_index: int
) -> torch.Tensor:
    """Return what a mean nll_loss divides by: its targets, or their classes' weights, not ignored.

    Args:
        target: class indices of any shape.
        weight: of the classes, or None.
        ignore_index: the index that does not count.
    """
    counts = target != ignore_index
    if weight is None:
        return counts.sum()
    return torch.where(counts, weight[target.masked_fill(~counts, 0)], 0).sum()


def extract(
    module: fx.GraphModule, outputs: Sequence[Output], inputs: Sequence[fx.Node] = ()
) -> tuple[fx.GraphModule, list[fx.Node]]:
    """Return a graph of its own for some results, and the nodes that are its inputs, in order.

    Args:
        module: whose nodes they are.
        outputs: nodes, or calls (function, arguments) on nodes.
        inputs: nodes that become placeholders, besides those that are.
    """
    wanted: set[fx.Node] = set()
    stack = [n for output in outputs for n in _nodes_of(output)]
    while stack:
        node = stack.pop()
        if node not in wanted:
            wanted.add(node)
            if node not in inputs:
                stack.extend(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    ordered = [n for n in module.graph.nodes if n in wanted]
    first = [n for n in ordered if n.op == "placeholder" and n not in inputs] + list(inputs)
    for node in first:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta["val"] = node.meta.get("val")
    for node in ordered:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    made = []
    for output in outputs:
        if isinstance(output, fx.Node):
            made.append(copies[output])
        else:
            function, arguments = output
            made.append(graph.call_function(function, fx.map_arg(arguments, copies.__getitem__)))
    graph.output(tuple(made))
    return fx.GraphModule(module, graph), first


def _nodes_of(output: Output) -> list[fx.Node]:
    if isinstance(output, fx.Node):
        return [output]
    return [a for a in output[1] if isinstance(a, fx.Node)]


def num_rows_of(leaves: Leaves) -> int:
    """Return the number of rows of a batch's tensors."""
    return next(leaf.shape[0] for leaf in leaves if leaf.ndim > 0)
