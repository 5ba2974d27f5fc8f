"""An ensemble trained as one step within a budget, as many members at once as are fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from packlight.capture.undisturbed import generators_kept
from packlight.ensemble.optimizer import Settings, member_settings, optimizer_of
from packlight.ensemble.stacked import MemberLoss, Stacked, check_alike
from packlight.errors import InfeasibleBudgetError, MemberError
from packlight.fitting import fit as fit_step
from packlight.fitting import planned_step
from packlight.run.train_step import TrainStep
from packlight.units import format_bytes, format_seconds, parse_bytes

# Chunks that cost more than this beside their plain step are compared with smaller ones.
FREE_SLOWDOWN = 1.02
# Calls of several steps take time that no plan predicts: so much faster have more chunks to be.
MARGIN = 1.1


class Ensemble(nn.Module):
    """Members of one shape, in chunks that are stacked.

    Args:
        make: returns a new member.
        seeds: of torch when the members are made, one for each.

    Raises:
        MemberError: two members differ in shape; names both.
    """

    def __init__(self, make: Callable[[], nn.Module], seeds: Sequence[int]) -> None:
        super().__init__()
        members = []
        with generators_kept():
            for seed in seeds:
                torch.manual_seed(seed)
                members.append(make())
        self._put(members, len(members))

    @classmethod
    def of(cls, members: Sequence[nn.Module]) -> Ensemble:
        """Return an ensemble of members that are there; their values are copied."""
        ensemble = cls.__new__(cls)
        nn.Module.__init__(ensemble)
        ensemble._put(members, len(members))
        return ensemble

    def _put(self, members: Sequence[nn.Module], size: int) -> None:
        """Stack members, so many at a time."""
        check_alike(members)
        self.num_members = len(members)
        self.chunks = nn.ModuleList(
            Stacked(members[start : start + size]) for start in range(0, len(members), size)
        )

    @property
    def stacks(self) -> list[Stacked]:
        """The chunks."""
        return [chunk for chunk in self.chunks if isinstance(chunk, Stacked)]

    def members(self) -> list[nn.Module]:
        """Return copies of all members, as they are now."""
        return [chunk.member(i) for chunk in self.stacks for i in range(chunk.num_members)]

    def rechunk(self, most_members: int) -> None:
        """Stack so many members at a time. Optimizers have to be made anew."""
        was_training = self.training
        if most_members != self.stacks[0].num_members:
            self._put(self.members(), most_members)
            self.train(was_training)

    def forward(self, *inputs: Any) -> torch.Tensor:
        """Return what each member returns for the same inputs, [members, ...]."""
        return torch.cat([chunk.each(_called, *inputs) for chunk in self.stacks])

    @torch.no_grad()
    def predict(self, *inputs: Any) -> torch.Tensor:
        """Return what each member returns in eval mode, without gradients, [members, ...]."""
        was_training = self.training
        self.eval()
        try:
            predicted: torch.Tensor = self(*inputs)
        finally:
            self.train(was_training)
        return predicted


def _called(member: nn.Module, *inputs: Any) -> Any:
    return member(*inputs)


class EnsembleStep:
    """Trains all members of an ensemble for one step, chunk by chunk. Made by `fit`.

    Attributes:
        ensemble: whose members it trains.
        steps: of the chunks, each a planned `TrainStep`.
        optimizers: of the chunks.
        num_steps: trained so far.
    """

    def __init__(
        self, ensemble: Ensemble, steps: Sequence[TrainStep],
        optimizers: Sequence[torch.optim.Optimizer], own_batches: bool,
    ) -> None:
        self.ensemble, self.steps, self.optimizers = ensemble, list(steps), list(optimizers)
        self.num_steps = 0
        self._own_batches = own_batches

    @property
    def chunk_size(self) -> int:
        """How many members are trained at once."""
        return self.ensemble.stacks[0].num_members

    @property
    def peak_bytes(self) -> int:
        """Predicted peak, all members' parameters and optimizer states included."""
        return max(step.peak_bytes for step in self.steps)

    @property
    def seconds(self) -> float:
        """Predicted duration of one step of all members."""
        return sum(step.way.seconds for step in self.steps)

    def __call__(self, batch: Any) -> torch.Tensor:
        """Train one step and return the detached losses, [members].

        Args:
            batch: of all members, or with `own_batches=True` of each: tensors of [members, ...].

        Raises:
            NonFiniteLossError: a member's loss is NaN or infinite. Its chunk, and those behind it,
                are not updated.
        """
        losses = []
        for part, step in zip(self.parts(batch), self.steps, strict=True):
            losses.append(step(part)[1])
        self.num_steps += 1
        return torch.cat(losses)

    def parts(self, batch: Any) -> Iterator[Any]:
        """Yield each chunk's part of a batch."""
        yield from parts_of(self.ensemble, batch, self._own_batches)

    def describe(self) -> str:
        """Return a few lines: how many members are trained at once, in what, and how."""
        sizes = ", ".join(str(chunk.num_members) for chunk in self.ensemble.stacks)
        return (
            f"{self.ensemble.num_members} members, at once: {sizes}; peak "
            f"{format_bytes(self.peak_bytes)}, {format_seconds(self.seconds)} for all\n"
            + self.steps[0].describe()
        )


def _rows(batch: Any, start: int, stop: int) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor[start:stop], batch)


def parts_of(ensemble: Ensemble, batch: Any, own_batches: bool) -> Iterator[Any]:
    """Yield each chunk's part of a batch."""
    start = 0
    for chunk in ensemble.stacks:
        stop = start + chunk.num_members
        yield _rows(batch, start, stop) if own_batches else batch
        start = stop


def fit(
    ensemble: Ensemble,
    loss_fn: MemberLoss,
    optimizer: type[torch.optim.Optimizer],
    batch: Any,
    budget: str | int | None = None,
    *,
    settings: Settings | None = None,
    own_batches: bool = False,
    most_members: int | None = None,
    **options: Any,
) -> EnsembleStep:
    """Return a training step of all members that keeps within a budget.

    Members are stacked and run under vmap: all at once, or in chunks, one after the other, of
    which activations and gradients are there for one at a time. Sizes of chunks are planned, from
    all members at once down until one needs no recomputation, and one member at a time; the fastest
    is taken.

    Args:
        ensemble: its chunks are made anew.
        loss_fn: `loss_fn(member, batch)` returns a scalar.
        optimizer: the class of each member's optimizer.
        batch: an example: for all members, or of tensors [members, ...].
        budget: bytes, or a string such as "1GiB", for everything: all members' parameters and
            optimizer states, one chunk's gradients and activations. None for no limit.
        settings: of the optimizers, for example {"lr": Each([1e-3, 3e-3]), "weight_decay": 0.1}:
            an `Each` has a value for each member.
        own_batches: whether each member has a batch of its own.
        most_members: to be trained at once; with 1 each member's bits are those that it has alone.
        **options: as for `packlight.fit`.

    Raises:
        InfeasibleBudgetError: not even one member at a time fits; names the smallest budget.
        MemberError: settings or batch are not for as many members.
    """
    own = member_settings(settings or {}, ensemble.num_members)
    _check_batch(batch, ensemble.num_members if own_batches else None)
    budget_bytes = None if budget is None else parse_bytes(budget)
    options = {"progress": False, **options}

    def optimizers() -> list[torch.optim.Optimizer]:
        made, start = [], 0
        for chunk in ensemble.stacks:
            held = own[start : start + chunk.num_members]
            parameters = list(chunk.parameters())
            made.append(
                optimizer(parameters, **held[0]) if chunk.is_alone
                else optimizer_of(parameters, optimizer, held)
            )
            start += chunk.num_members
        return made

    def planned(size: int) -> tuple[float, float]:
        """Return the seconds of all chunks of a size, and the slowdown of the largest."""
        ensemble.rechunk(size)
        made = optimizers()
        part = next(parts_of(ensemble, batch, own_batches))
        step = planned_step(
            ensemble.stacks[0],
            ensemble.stacks[0].loss_function(loss_fn, own_batches=own_batches),
            made[0], part, budget_bytes, beside=_beside(ensemble, made, 0), **options,
        )
        return step.way.seconds * ensemble.num_members / size, step.way.slowdown

    most = ensemble.num_members if most_members is None else most_members
    sizes = [size for size in chunk_sizes(ensemble.num_members) if size <= most]
    size = _fastest_size(sizes, planned)
    ensemble.rechunk(size)
    made = optimizers()
    steps = []
    for place, part in enumerate(parts_of(ensemble, batch, own_batches)):
        chunk = ensemble.stacks[place]
        steps.append(fit_step(
            chunk, chunk.loss_function(loss_fn, own_batches=own_batches), made[place], part,
            budget_bytes, beside=_beside(ensemble, made, place), **options,
        ))  # fmt: skip
    return EnsembleStep(ensemble, steps, made, own_batches)


def chunk_sizes(num_members: int) -> list[int]:
    """Return the sizes of the largest chunk for 1, 2, ... chunks, without repetition.

    >>> chunk_sizes(8)
    [8, 4, 3, 2, 1]
    """
    return list(dict.fromkeys(-(-num_members // count) for count in range(1, num_members + 1)))


def _fastest_size(
    sizes: Sequence[int], planned: Callable[[int], tuple[float, float]]
) -> int:
    """Return the size of chunks with which all members are stepped first.

    Smaller ones are looked at until one needs no recomputation; and one member at a time, with
    which kernels may be faster than for several (convolutions).
    """
    best: tuple[float, int] | None = None
    smallest: InfeasibleBudgetError | None = None
    is_enough = False
    for size in sizes:
        if is_enough and size > 1:
            continue
        try:
            seconds, slowdown = planned(size)
        except InfeasibleBudgetError as error:
            if smallest is None or error.smallest_bytes < smallest.smallest_bytes:
                smallest = error
            continue
        if best is None or MARGIN * seconds < best[0]:
            best = seconds, size
        is_enough = is_enough or slowdown <= FREE_SLOWDOWN
    if best is None:
        assert smallest is not None
        raise smallest
    return best[1]


def _beside(
    ensemble: Ensemble, optimizers: Sequence[torch.optim.Optimizer], place: int
) -> list[Any]:
    """Return what is there beside a chunk's step: the other chunks and their optimizers."""
    others = [i for i in range(len(optimizers)) if i != place]
    return [*(ensemble.stacks[i] for i in others), *(optimizers[i] for i in others)]


def _check_batch(batch: Any, num_members: int | None) -> None:
    if num_members is None:
        return
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and (not leaf.ndim or leaf.shape[0] != num_members):
            raise MemberError(
                f"own_batches=True with a tensor of shape {tuple(leaf.shape)} for {num_members} "
                "members"
            )

