"""What ranks were asked for, and what they traced: whoever differs is named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.capture.batch import tensors_of
from packlight.errors import RankMismatchError
from packlight.moves.microbatch.split import num_rows
from packlight.moves.request import Request
from packlight.ranks.collectives import is_heard
from packlight.ranks.group import Ranks
from packlight.ranks.tensor import parts_of
from packlight.search.plan_way import WayPlanner

SAME_MODEL = "every rank has to build the same model, from the same seed or checkpoint"
SAME_CALL = "every rank has to call fit with the same arguments"
SAME_BATCH = "with weights in parts all ranks have the same batch"

# A value, and a hint for whoever has another one; by name.
Fact = tuple[str, str]
Facts = Mapping[str, Fact]


@dataclass(frozen=True)
class Identity:
    """What one rank was asked for, and what became of it.

    Attributes:
        facts: what must be the same on all ranks, by its name: (value, hint).
        digest: of its graph.
        num_rows: of its batch; None where that has no rows.
        part: which part of the weights it has.
        data_part: which part of the batch it has.
        of_part: what must be the same on all ranks with the same part of the weights.
        of_data_part: what must be the same on all ranks with the same part of the batch.
    """

    facts: Facts
    digest: str
    num_rows: int | None
    part: int
    data_part: int
    of_part: Facts
    of_data_part: Facts

    @classmethod
    def of(cls, planner: WayPlanner) -> Identity:
        """Return this rank's, once its step is traced."""
        request, whole = planner.request, planner.draft(())
        facts: dict[str, Fact] = {}
        of_part: dict[str, Fact] = {}
        of_data_part: dict[str, Fact] = {}
        parts = parts_of(request.model)
        tensors = [
            *(("parameter", *named) for named in request.model.named_parameters()),
            *(("buffer", *named) for named in request.model.named_buffers()),
        ]
        facts["number of parameters and buffers"] = (str(len(tensors)), SAME_MODEL)
        for kind, name, tensor in tensors:
            facts[f"{kind} {name!r}"] = (_described(tensor), SAME_MODEL)
        for kind, name, tensor in tensors if not planner.costs.are_compared else ():
            if kind == "parameter":  # (statistics of batch norm are each rank's own)
                on_whom = of_part if tensor in parts else facts
                on_whom[f"values of {kind} {name!r}"] = (_digest_of(tensor), SAME_MODEL)
        if request.is_tensor_parallel:
            batch = ", ".join(map(_digest_of, tensors_of(planner.batch)))
            of_data_part["the batch"] = (batch, SAME_BATCH)
        facts.update((name, (value, SAME_CALL)) for name, value in _asked(request).items())
        try:
            rows: int | None = num_rows(planner.batch)
        except ValueError:
            rows = None
        text = "\n".join(_operations(whole.graph_module, request))
        return cls(
            facts, hashlib.sha256(text.encode()).hexdigest(), rows,
            0 if request.tensor_ranks is None else request.tensor_ranks.rank,
            0 if request.data_ranks is None else request.data_ranks.rank,
            of_part, of_data_part,
        )


def _asked(request: Request) -> dict[str, str]:
    optimizer = request.optimizer
    settings = {} if optimizer is None else {
        f"{name!r} of the optimizer's group {place}": str(
            len(value) if name == "params" else value
        )
        for place, group in enumerate(optimizer.param_groups)
        for name, value in group.items()
    }
    return {
        "the version of torch": torch.__version__,
        "the version of packlight": version("packlight"),
        "the budget": f"{request.budget_bytes} bytes" if request.budget_bytes else "none",
        "moves=": str(sorted(request.moves)),
        "allow=": str(sorted(request.allow)),
        "clipping": str(request.clipping),
        "the loss scaler": str(None if request.scaler is None else request.scaler.state_dict()),
        "loss_weight=": "a function" if callable(request.loss_weight) else str(request.loss_weight),
        "tensor=": "yes" if request.is_tensor_parallel else "no",
        "space=": "yes" if request.is_talkative else "no",
        "pieces=": ", ".join(request.placements) or "none",
        "offloading": "yes" if request.offload_directory is not None else "no",
        "the optimizer": type(optimizer).__name__,
        **settings,
        "the number of threads": str(torch.get_num_threads()),
        "training mode": str([module.training for module in request.model.modules()]),
    }


def _described(tensor: torch.Tensor) -> str:
    frozen = "" if tensor.requires_grad else ", frozen"
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}{frozen}"


def _digest_of(tensor: torch.Tensor) -> str:
    """Return a digest of a tensor's values."""
    content = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(content.numpy().data, digest_size=8).hexdigest()


def compare(identities: Sequence[Identity]) -> None:
    """Raise where a rank was asked for something else than the first with which it shares it.

    Raises:
        RankMismatchError: names what.
    """
    first_of_part: dict[int, int] = {}
    first_of_data_part: dict[int, int] = {}
    for rank, mine in enumerate(identities):
        alike = first_of_part.setdefault(mine.part, rank)
        beside = first_of_data_part.setdefault(mine.data_part, rank)
        for first, theirs, facts in (
            (0, identities[0].facts, mine.facts),
            (alike, identities[alike].of_part, mine.of_part),
            (beside, identities[beside].of_data_part, mine.of_data_part),
        ):
            for name, (value, hint) in theirs.items():
                found = facts.get(name, ("nothing of that name", hint))[0]
                if found != value:
                    raise RankMismatchError(name, rank, value, found, hint, first)


def _operations(module: fx.GraphModule, request: Request) -> list[str]:
    """Return a graph's calls, each as text: targets, literal arguments, shapes, dtypes, strides.

    Where weights lie in parts with all ranks, numbers may say which part; names of groups are each
    rank's own.

    Args:
        module: the graph.
        request: what it was captured for.
    """
    place_of: dict[fx.Node, int] = {}

    def described(leaf: Any) -> str:
        if isinstance(leaf, fx.Node):
            return f"%{place_of[leaf]}"
        if isinstance(leaf, torch.Tensor):
            return f"{leaf.dtype}{tuple(leaf.shape)}{tuple(leaf.stride())}"
        if request.is_tensor_parallel and type(leaf) in (int, float):
            return "a number"
        if request.is_tensor_parallel and isinstance(leaf, str) and is_heard(leaf):
            return "ranks with other parts of the weights"
        if isinstance(leaf, str) and leaf and {*leaf.split()} <= {*request.spoken}:
            return " ".join(f"group {request.spoken.index(name)}" for name in leaf.split())
        text = repr(leaf)
        return type(leaf).__name__ if " at 0x" in text else text  # a mesh, each rank's own

    lines = []
    for node in module.graph.nodes:
        content = (node.args, dict(node.kwargs), node.meta.get("val"))
        leaves = ",".join(map(described, pytree.tree_leaves(content)))
        lines.append(f"{node.op} {node.target} {leaves}")
        place_of[node] = len(place_of)
    return lines


def compare_graphs(
    ranks: Ranks, planner: WayPlanner, identities: Sequence[Identity]
) -> None:
    """Raise where ranks with as many rows have other graphs: their models differ.

    Ranks whose models tell one another things need one graph whatever they have.
    """
    request = planner.request
    digest_of: dict[int | None, tuple[int, str]] = {}
    strange: tuple[int, int] | None = None
    for rank, identity in enumerate(identities):
        # (Beside ranks with parts of the weights, those with other data may have fewer rows.)
        alike = request.is_talkative and request.data_ranks in (None, request.ranks)
        rows = None if alike else identity.num_rows
        other, digest = digest_of.setdefault(rows, (rank, identity.digest))
        if digest != identity.digest and strange is None:
            strange = other, rank
    if strange is None:
        return
    graphs = ranks.gather(lambda: _operations(planner.draft(()).graph_module, request))
    one, another = (graphs[rank] for rank in strange)
    place = next(
        (i for i, pair in enumerate(zip(one, another, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(another)),
    )
    words = [graph[place] if place < len(graph) else "nothing more" for graph in (one, another)]
    raise RankMismatchError(
        f"operation {place} of the captured step", strange[1], words[0], words[1],
        "every rank has to run the same model and loss on batches of the same structure, dtypes "
        "and shapes (but for the number of rows)", strange[0],
    )
