"""One plan for all ranks: they compare what they were asked for, one of them plans, all check.

    each rank    traces its step; what it was asked for and its graph are compared, whoever differs
                 is named
    rank 0       searches; each way that it looks at, the others look at, too, so that the slowest
                 rank's costs count
    all          get the way as JSON, bind it to their own capture, and have `simulate` judge it

Ranks whose part of the batch has another size have another graph. The first rank with each graph
plans for those that share it; buckets of gradients are those of rank 0 on all of them. Where
parameters lie in pieces, all ranks run the schedule of the largest part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.capture.batch import tensors_of
from packlight.capture.whole_step import WholeStep
from packlight.costs.profiler import Known
from packlight.errors import RankMismatchError
from packlight.moves.data_parallel import DataParallel
from packlight.moves.microbatch.split import num_rows
from packlight.moves.request import Request
from packlight.ranks.group import Ranks
from packlight.ranks.tensor import parts_of_ranks
from packlight.search.other_rows import Order, for_other_rows
from packlight.search.plan_way import Moves, WayPlanner, environment
from packlight.search.ready import Ready
from packlight.search.restore import restored
from packlight.search.saved import way_from_json, way_to_json
from packlight.search.slowest import slowest
from packlight.search.way import Way
from packlight.step import Schedule

SAME_MODEL = "every rank has to build the same model, from the same seed or checkpoint"
SAME_CALL = "every rank has to call fit with the same arguments"


def agreed(planner: WayPlanner, find: Callable[[], Ready]) -> Ready:
    """Return how this rank runs its part of the step; called on all ranks at once.

    Args:
        planner: of this rank's part of the batch.
        find: looks for the fastest way, on the ranks that plan.

    Raises:
        RankMismatchError: ranks were asked for different things.
        Exception: planning failed on one rank: its error, on all.
    """
    ranks = planner.request.ranks
    assert ranks is not None
    identities = ranks.gather(lambda: _Identity.of(planner))
    _compare(identities)
    planner.costs.are_compared = True
    leader_of = {
        digest: next(rank for rank, other in enumerate(identities) if other.digest == digest)
        for digest in dict.fromkeys(identity.digest for identity in identities)
    }
    _compare_graphs(ranks, planner, identities)
    if planner.request.shards:  # all gather parameters in one order: that of one schedule
        most = max(range(ranks.size), key=lambda rank: identities[rank].num_rows or 0)
        leader_of = {identities[most].digest: most}
    mine: Ready | None = None
    for digest, leader in leader_of.items():
        team = _Team(ranks, planner, identities, digest, leader)
        found = team.led(find) if ranks.rank == leader else team.follow()
        mine = found or mine
        planner.costs.agreed_buckets = team.buckets
    planner.costs.agreed_buckets = None
    assert mine is not None, "every rank is in one team"
    return mine


# -- what ranks were asked for


@dataclass(frozen=True)
class _Identity:
    """What one rank was asked for, and what became of it.

    Attributes:
        facts: what must be the same on all ranks, by its name: (value, hint).
        digest: of its graph.
        num_rows: of its batch; None where that has no rows.
    """

    facts: Mapping[str, tuple[str, str]]
    digest: str
    num_rows: int | None

    @classmethod
    def of(cls, planner: WayPlanner) -> _Identity:
        request, whole = planner.request, planner.draft(())
        facts: dict[str, tuple[str, str]] = {}
        parts = parts_of_ranks(request.model)
        tensors = [
            *(("parameter", *named) for named in request.model.named_parameters()),
            *(("buffer", *named) for named in request.model.named_buffers()),
        ]
        facts["number of parameters and buffers"] = (str(len(tensors)), SAME_MODEL)
        for kind, name, tensor in tensors:
            facts[f"{kind} {name!r}"] = (_described(tensor), SAME_MODEL)
        for kind, name, tensor in tensors if not planner.costs.are_compared else ():
            # Statistics of batch norm are each rank's own, and so are parts of weights.
            if kind == "parameter" and id(tensor) not in parts:
                facts[f"values of {kind} {name!r}"] = (_digest_of(tensor), SAME_MODEL)
        if request.is_tensor_parallel:
            batch = ", ".join(map(_digest_of, tensors_of(planner.batch)))
            facts["the batch"] = (batch, "with weights in parts all ranks have the same batch")
        facts.update((name, (value, SAME_CALL)) for name, value in _asked(request).items())
        try:
            rows: int | None = num_rows(planner.batch)
        except ValueError:
            rows = None
        text = "\n".join(_operations(whole.graph_module, request))
        return cls(facts, hashlib.sha256(text.encode()).hexdigest(), rows)


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


def _compare(identities: Sequence[_Identity]) -> None:
    first = identities[0].facts
    for rank, other in enumerate(identities):
        for name, (value, hint) in first.items():
            found = other.facts.get(name, ("nothing of that name", hint))[0]
            if found != value:
                raise RankMismatchError(name, rank, value, found, hint)


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


def _compare_graphs(
    ranks: Ranks, planner: WayPlanner, identities: Sequence[_Identity]
) -> None:
    """Raise where ranks with as many rows have other graphs: their models differ.

    Ranks whose models tell one another things need one graph whatever they have.
    """
    digest_of: dict[int | None, tuple[int, str]] = {}
    strange: tuple[int, int] | None = None
    for rank, identity in enumerate(identities):
        rows = None if planner.request.is_talkative else identity.num_rows
        other, digest = digest_of.setdefault(rows, (rank, identity.digest))
        if digest != identity.digest and strange is None:
            strange = other, rank
    if strange is None:
        return
    graphs = ranks.gather(lambda: _operations(planner.draft(()).graph_module, planner.request))
    one, another = (graphs[rank] for rank in strange)
    place = next(
        (i for i, pair in enumerate(zip(one, another, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(another)),
    )
    words = [graph[place] if place < len(graph) else "nothing more" for graph in (one, another)]
    raise RankMismatchError(
        f"operation {place} of the captured step (compared with rank {strange[0]})", strange[1],
        words[0], words[1],
        "every rank has to run the same model and loss on batches of the same structure, dtypes "
        "and shapes (but for the number of rows)",
    )


# -- one plans, the others look


@dataclass(frozen=True)
class _Observe:
    moves: Moves
    size: int | None


@dataclass(frozen=True)
class _Rehearse:
    moves: Moves
    size: int | None
    schedule: Schedule


@dataclass(frozen=True)
class _Found:
    """What the planning rank found: a way as JSON text, and what was agreed on the way."""

    way: str
    known: Known
    order: Order


@dataclass(frozen=True)
class _Failed:
    """It found nothing; the error is gathered."""


class _Team:
    """Ranks with one graph: one of them plans, all of them look at what it looks at.

    Ranks that are not in the team listen; with parameters in pieces they run the same schedule for
    another number of rows.

    Attributes:
        buckets: of gradients, once a way was found.
    """

    def __init__(
        self, ranks: Ranks, planner: WayPlanner, identities: Sequence[_Identity], digest: str,
        leader: int,
    ) -> None:
        self.ranks, self.planner, self.leader = ranks, planner, leader
        self.num_rows = identities[ranks.rank].num_rows
        self.is_in_it = identities[ranks.rank].digest == digest
        self.buckets: tuple[tuple[str, ...], ...] | None = None
        self._observed: set[tuple[Moves, int | None]] = set()

    # -- on the rank that plans (see `Partners`)

    def led(self, find: Callable[[], Ready]) -> Ready:
        """Return the way found, once all others have bound it."""
        self.planner.partners = self
        error: Exception | None = None
        try:
            ready = find()
        except Exception as raised:
            error = raised
            self._say(_Failed())
        finally:
            self.planner.partners = None
        if error is not None:
            self._raise(error)
        order = Order.of(ready, self.leader, self.num_rows)
        self._say(_Found(way_to_json(ready.way), self.planner.profiler.known, order))
        self._note(ready.way)
        self.ranks.gather(lambda: None)
        return ready

    def observe(self, moves: Moves, size: int | None) -> None:
        """Have the profiler know what calls cost on the slowest rank."""
        if (moves, size) in self._observed:
            return
        self._observed.add((moves, size))
        self._say(_Observe(moves, size))
        self.planner.profiler.take(slowest(self.ranks.gather(lambda: self._seen(moves, size))))

    def rehearse(
        self, moves: Moves, size: int | None, step: WholeStep, schedule: Schedule
    ) -> dict[int, float]:
        """Return seconds of operations inside a step, on the slowest rank."""
        self._say(_Rehearse(moves, size, schedule))
        draft = self.planner.draft(moves, size)
        everybody = self.ranks.gather(lambda: self.planner.rehearsal(draft, step, schedule))
        return {
            index: max(seconds.get(index, 0.0) for seconds in everybody)
            for index in everybody[self.leader]
        }

    def _say(self, message: Any) -> None:
        self.ranks.broadcast(message, self.leader)

    # -- on the others

    def follow(self) -> Ready | None:
        """Look at what the planning rank looks at; return the way bound to this rank's step."""
        while True:
            message: Any = self.ranks.broadcast(None, self.leader)
            if isinstance(message, _Failed):
                self._raise(None)
            if isinstance(message, _Found):
                found: list[Ready | None] = []
                self.ranks.gather(lambda: found.append(self._bound(message)))  # noqa: B023
                return found[0]
            try:
                if isinstance(message, _Observe):
                    seen = self.ranks.gather(lambda: self._seen(message.moves, message.size))  # noqa: B023
                    if self.is_in_it:
                        self.planner.profiler.take(slowest(seen))
                else:
                    self.ranks.gather(lambda: self._rehearsed(message))  # noqa: B023
            except Exception:  # the planning rank has it, too, and goes on or fails
                continue

    def _bound(self, found: _Found) -> Ready | None:
        way = way_from_json(found.way)
        self._note(way)
        if not self.is_in_it:
            if not self.planner.request.shards:
                return None
            return for_other_rows(way, found.order, self.planner, self.num_rows)
        self.planner.profiler.take(found.known)
        # Its seconds are the slowest rank's, wherever that is.
        here = environment(self.planner.costs.device)
        return restored(replace(way, environment=here), self.planner)

    def _rehearsed(self, message: _Rehearse) -> dict[int, float]:
        if not self.is_in_it:
            return {}
        draft = self.planner.draft(message.moves, message.size)
        return self.planner.rehearsal(draft, self.planner.completed(draft), message.schedule)

    # -- on all

    def _seen(self, moves: Moves, size: int | None) -> Known:
        """Return what this rank knows of a step's calls."""
        if not self.is_in_it:
            return Known({}, {})
        self.planner.completed(self.planner.draft(moves, size))
        return self.planner.profiler.known

    def _note(self, way: Way) -> None:
        parallel = way.made(DataParallel)
        if isinstance(parallel, DataParallel):
            self.buckets = parallel.buckets

    def _raise(self, error: Exception | None) -> None:
        def fail() -> None:
            if error is not None:
                raise error

        self.ranks.gather(fail)
        raise AssertionError("the planning rank has raised its error")
