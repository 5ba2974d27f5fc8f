"""Every strategy beside one process with the whole batch: losses, gradients, parameters, state.

Each cell trains five steps. Gradients are the optimizer's momentum after the first of them.
Errors are those of the worst tensor: the norm of the difference, relative to the norm of what one
process has (of parameters: of how far they have moved), or to 1/1000 of the norm of all tensors
where that is more.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_leaves, tree_map

import packlight
from benchmarks.common import append_line
from benchmarks.ranks.cases import CONFIGS, MODELS, STRATEGIES, Config, Model, Strategy
from packlight.errors import InfeasibleBudgetError
from packlight.optim.rearrange import decoded_moments
from packlight.ranks.tensor import parts_of, plain_names
from tests.rank_pool import Raised, RankPool

NUM_STEPS, FLOOR = 5, 1e-3
KINDS = ("gradients", "parameters", "state")
Named = dict[str, torch.Tensor]
# Of one kind: for each tensor the squared norms of a rank's difference and of what it should have.
Distances = dict[str, tuple[float, float]]


@dataclass
class Cell:
    """One model, strategy and config.

    Attributes:
        status: "equal", "differs", "over budget", or what was raised.
        errors: of losses, and of the worst tensor of each kind.
        worst: which tensor that is.
        peak_bytes, predicted_bytes: of the rank with most.
        budget_bytes: of each rank, None for none.
        provenance: where, when and with what.
    """

    model: str
    strategy: str
    config: str
    status: str
    errors: dict[str, float] = field(default_factory=dict)
    worst: dict[str, str] = field(default_factory=dict)
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    budget_bytes: int | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def run(
    names: Sequence[tuple[str, str, str]], out: Path, told: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Add a line for each of some cells, one after the other.

    Args:
        names: models, strategies, configs.
        out: the file.
        told: where and with what lines are made.
        say: told of each cell.
    """
    pools: dict[int, RankPool] = {}
    free: dict[tuple[str, str], tuple[int, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            for model, strategy, config in names:
                alone = _alone_in(Path(folder), model, config)
                size = STRATEGIES[strategy].num_ranks
                if size not in pools:
                    store = tempfile.mkdtemp(dir=folder)
                    pools[size] = RankPool(size, Path(store))
                cell = _cell(pools[size], model, strategy, config, alone, free)
                cell.provenance = told
                append_line(out, cell)
                say(f"{model}, {strategy}, {config}: {cell.status} {_in_words(cell)}")
                if not cell.errors:  # something was raised: ranks may have parted
                    pools.pop(size).close()
        finally:
            for pool in pools.values():
                pool.close()


def _in_words(cell: Cell) -> str:
    return ", ".join(f"{kind} {error:.1e}" for kind, error in cell.errors.items())


def _cell(
    pool: RankPool, model: str, strategy: str, config: str, alone: Path,
    free: dict[tuple[str, str], tuple[int, int]],
) -> Cell:
    """Train one cell; without a budget, note what is resident and the peak, for one with."""
    cell = Cell(model, strategy, config, "equal")
    share = CONFIGS[config].share
    if share is not None and (model, strategy) not in free:
        outcomes = _outcomes(pool, trained, model, strategy, config, str(alone), None)
        if not _note(cell, outcomes):
            return cell
        free[model, strategy] = _most(outcomes, "resident"), _most(outcomes, "predicted")
    if share is not None:
        resident, peak = free[model, strategy]
        cell.budget_bytes = resident + int(share * (peak - resident))
    outcomes = _outcomes(pool, trained, model, strategy, config, str(alone), cell.budget_bytes)
    if not _note(cell, outcomes):
        return cell
    cell.peak_bytes, cell.predicted_bytes = _most(outcomes, "peak"), _most(outcomes, "predicted")
    cell.budget_bytes = outcomes[0]["budget"]
    cell.errors["losses"] = max(outcome["losses"] for outcome in outcomes)
    for kind in KINDS:
        cell.errors[kind], cell.worst[kind] = worst([outcome[kind] for outcome in outcomes])
    tolerance = CONFIGS[config].tolerance
    if not all(error <= tolerance for error in cell.errors.values()):  # (NaN is none)
        cell.status = "differs"
    elif any(o["peak"] > o["predicted"] for o in outcomes) or (
        cell.budget_bytes is not None and cell.peak_bytes > cell.budget_bytes
    ):
        cell.status = "over budget"
    return cell


def _outcomes(pool: RankPool, *arguments: Any) -> list[Any]:
    try:
        return pool.outcomes(*arguments)
    except AssertionError as error:  # a rank hangs
        return [error]


def _note(cell: Cell, outcomes: Sequence[Any]) -> bool:
    """Return whether all ranks came to an end; note what was raised."""
    raised = [outcome for outcome in outcomes if not isinstance(outcome, dict)]
    for first in raised[:1]:
        kind = first.kind if isinstance(first, Raised) else "hang" if first is not None else "died"
        text = first.text.partition("\n")[0] if isinstance(first, Raised) else ""
        cell.status = f"{kind}: {text}"
    return not raised


def _most(outcomes: Sequence[Mapping[str, Any]], what: str) -> int:
    return max(int(outcome[what]) for outcome in outcomes)


def worst(ranks: Sequence[Distances]) -> tuple[float, str]:
    """Return the largest relative error of any tensor over all ranks' parts, and whose it is."""
    found: dict[str, tuple[float, float]] = {}
    for distances in ranks:
        for name, (difference, size) in distances.items():
            before = found.get(name, (0.0, 0.0))
            found[name] = before[0] + difference, before[1] + size
    floor = FLOOR**2 * sum(size for _, size in found.values())
    errors = {
        name: math.sqrt(difference / max(size, floor, 1e-300))
        for name, (difference, size) in found.items()
    }
    name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return errors[name], name


# -- one process with the whole batch


@dataclass
class Alone:
    """What one process has, by the parameters' names.

    Attributes:
        losses: of all steps.
        start: parameters before the first.
        gradients: of the first.
        parameters, state: after the last.
    """

    losses: list[float]
    start: Named
    gradients: Named
    parameters: Named
    state: Named


def _alone_in(folder: Path, model: str, config: str) -> Path:
    key = "fp32" if CONFIGS[config].share is not None else config
    path = folder / f"{model} {key}.pt"
    if not path.exists():
        torch.save(trained_alone(MODELS[model], CONFIGS[key]), path)
    return path


def made(model: Model) -> nn.Module:
    """Return a model of the same weights in every process."""
    torch.manual_seed(0)
    return model.make()


def batches(model: Model) -> list[Any]:
    """Return whole batches."""
    generator = torch.Generator().manual_seed(1)
    return [model.batch(generator) for _ in range(NUM_STEPS)]


def trained_alone(model: Model, config: Config, num_parts: int = 1) -> Alone:
    """Train in eager PyTorch.

    Args:
        model: which.
        config: which.
        num_parts: in how many microbatches, whose gradients are accumulated.
    """
    module = made(model)
    optimizer = config.optimizer([*module.parameters()])
    names = {parameter: name for name, parameter in module.named_parameters()}
    start = {name: p.detach().clone() for p, name in names.items()}
    losses, gradients = [], Named()
    is_bf16 = config.options.get("allow") == "bf16"
    for index, batch in enumerate(batches(model)):
        total = 0.0
        for part in range(num_parts):
            piece = tree_map(lambda t, part=part: t.chunk(num_parts)[part], batch)
            with torch.autocast("cpu", torch.bfloat16, is_bf16):
                loss = model.loss_fn(module, piece) / num_parts
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        if index == 0:
            gradients = state_of(optimizer, names)
    parameters = {name: p.detach().clone() for p, name in names.items()}
    return Alone(losses, start, gradients, parameters, state_of(optimizer, names))


def state_of(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> Named:
    """Return the momentum of parameters, as vectors in 32 bits, by name."""
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if parameter not in names or not state:
                continue
            if "momentum_buffer" in state and state["momentum_buffer"].is_floating_point():
                value = state["momentum_buffer"]
            else:
                (value,) = decoded_moments(group, state).values()
            found[names[parameter]] = value.detach().float().flatten().clone()
    return found


# -- on a rank


def trained(
    model_name: str, strategy_name: str, config_name: str, alone: str, budget: int | None
) -> dict[str, Any]:
    """Train on one of the ranks, and compare what it has with the same of one process."""
    model, config = MODELS[model_name], CONFIGS[config_name]
    strategy = STRATEGIES[strategy_name]
    rank = _Pipelined(model, strategy, config) if strategy.parallel is None else _Rank(
        model, strategy, config
    )
    try:
        rank.fit(budget)
    except InfeasibleBudgetError as error:  # the same on all ranks
        budget = error.smallest_bytes
        rank.fit(budget)
    expected: Alone = torch.load(alone, weights_only=False)
    whole = batches(model)
    losses = [rank.trained(whole[0])]
    gradients = rank.distances(rank.state(), expected.gradients)
    losses += [rank.trained(batch) for batch in whole[1:-1]]
    peak, loss = rank.measured(whole[-1])
    losses.append(loss)
    found: dict[str, Any] = {
        "losses": max(
            abs(one - other) / abs(other)
            for one, other in zip(losses, expected.losses, strict=True)
        ),
        "gradients": gradients,
        "state": rank.distances(rank.state(), expected.state),
        "peak": peak, "predicted": rank.step.peak_bytes, "resident": rank.resident_bytes,
        "budget": budget,
    }
    with rank.step.whole_parameters():
        values = {name: p.detach().flatten() for p, name in rank.names.items()}
        found["parameters"] = rank.distances(
            values, expected.parameters, expected.start, are_whole=True
        )
    return found


class _Rank:
    """One of the ranks that share a model by `packlight.fit`."""

    step: Any

    def __init__(self, model: Model, strategy: Strategy, config: Config) -> None:
        self.model, self.strategy, self.config = model, strategy, config
        names, sizes = tuple(strategy.mesh), tuple(strategy.mesh.values())
        self.mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)

    def fit(self, budget: int | None) -> None:
        """Make a model, and plan its step."""
        self.module = made(self.model)
        if self.strategy.splits_weights:
            self.model.split(self.module, self.mesh["tensor"])
        plain = plain_names(self.module)
        self.names = {p: plain.get(n, n) for n, p in self.module.named_parameters()}
        self.parts = parts_of(self.module)
        self.optimizer = self.config.optimizer([*self.module.parameters()])
        self.step = packlight.fit(
            self.module, self.model.loss_fn, self.optimizer, self.own(batches(self.model)[0]),
            budget, mesh=self.mesh, parallel=self.strategy.parallel, progress=False,
            **self.config.options,
        )

    @property
    def resident_bytes(self) -> int:
        """What always is in memory."""
        return int(self.step.way.memory.resident_bytes)

    def own(self, batch: Any) -> Any:
        """Return this rank's part of a batch."""
        if not self.strategy.splits_batch:
            return batch
        rank, size = self.mesh.get_local_rank("data"), self.strategy.mesh["data"]
        return tree_map(lambda t: t.chunk(size)[rank].clone(), batch)

    def trained(self, batch: Any) -> float:
        """Train a step and return its loss."""
        return float(self.step(self.own(batch)))

    def measured(self, batch: Any) -> tuple[int, float]:
        """Train a step; return its peak and its loss."""
        found = self.step.measured(self.own(batch))
        return found.peak_bytes, float(found.loss)

    def state(self) -> Named:
        """Return this rank's part of the optimizer's state."""
        return state_of(self.optimizer, self.names)

    def distances(
        self, found: Named, whole: Named, start: Named | None = None, are_whole: bool = False
    ) -> Distances:
        """Return how far this rank's part of tensors is from the same part of whole ones.

        Args:
            found: this rank's, as vectors.
            whole: of one process.
            start: what sizes are counted from.
            are_whole: rows of other ranks are there, too.
        """
        shapes = {name: tuple(value.shape) for name, value in self._start().items()}
        parameter_of = {name: p for p, name in self.names.items()}
        distances = {}
        for name, value in found.items():
            def own(tensor: torch.Tensor, name: str = name) -> torch.Tensor:
                tensor = tensor.view(shapes[name])
                return self._own(parameter_of[name], tensor, are_whole).float().flatten()

            expected = own(whole[name])
            moved = expected if start is None else expected - own(start[name])
            difference = value.float() - expected
            distances[name] = float(difference.square().sum()), float(moved.square().sum())
        return distances

    def _start(self) -> Named:
        return {name: p.detach() for name, p in made(self.model).named_parameters()}

    def _own(
        self, parameter: nn.Parameter, whole: torch.Tensor, are_whole: bool
    ) -> torch.Tensor:
        if parameter in self.parts:
            whole = self._part(parameter, whole)
        pieces = self.step.ready.sharding.pieces.get(parameter)
        if pieces is None or are_whole:
            return whole
        first, end = pieces.rows[self.mesh.get_local_rank("data")]
        return whole[first:end]

    def _part(self, parameter: nn.Parameter, whole: torch.Tensor) -> torch.Tensor:
        part, rank = self.parts[parameter], self.mesh.get_local_rank("tensor")
        if part is not None:
            return torch.cat([whole.narrow(part.dim, *block) for block in part.blocks], part.dim)
        pieces = self.step.ready.sharding.pieces.get(parameter)
        own = tuple(parameter.shape) if pieces is None else pieces.shape
        for dim, (size, all_of_it) in enumerate(zip(own, whole.shape, strict=True)):
            if size != all_of_it:
                return whole.chunk(self.strategy.mesh["tensor"], dim)[rank]
        return whole


class _Pipelined(_Rank):
    """One of the ranks that have a stage each."""

    def fit(self, budget: int | None) -> None:
        """Make a model, and plan its stages."""
        self.module = made(self.model)
        self.parts = {}
        self.optimizer = self.config.optimizer([*self.module.parameters()])
        self.step = packlight.fit_pipeline(
            self.module, self.model.loss_fn, self.optimizer, batches(self.model)[0], budget,
            mesh=self.mesh, num_microbatches=1, progress=False,
            **{n: value for n, value in self.config.options.items() if n != "moves"},
        )
        own = {*self.step.layout.own_parameters}
        self.names = {p: n for n, p in self.module.named_parameters() if p in own}

    @property
    def resident_bytes(self) -> int:
        """What is in memory between steps."""
        states = [v for s in self.optimizer.state.values() for v in s.values()]
        held = [*self.module.parameters(), *self.module.buffers(), *filter(torch.is_tensor, states)]
        return sum({
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in [*held, *tree_leaves(batches(self.model)[0])]
        }.values())

    def measured(self, batch: Any) -> tuple[int, float]:
        """Train a step; return its peak and its loss."""
        before = self.resident_bytes
        found = packlight.measure_peak(lambda: self.step(batch))
        return before + found.peak_bytes, float(found.result)

    def _own(
        self, parameter: nn.Parameter, whole: torch.Tensor, are_whole: bool
    ) -> torch.Tensor:
        return whole
