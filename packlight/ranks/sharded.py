"""Parameters that lie in pieces with all ranks, and are gathered around their uses.

Between steps a parameter is this rank's piece: a tensor with some of its rows, as FSDP2's local
tensors are. In a step it is a tensor of the whole shape without memory; the planned step gathers
it where it is needed and drops it behind that, and gives the optimizer the piece to update
(ZeRO-3: Rajbhandari et al. 2020, arXiv 1910.02054).

Of other parameters only states and gradients lie in pieces (ZeRO-1 and 2): their values are whole
on all ranks, each updates its rows of them, and then all share what they have updated.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from packlight.errors import UnsupportedModelError
from packlight.ranks.group import Ranks, Sent
from packlight.ranks.pieces import Pieces
from packlight.ranks.tensor import Part, parts_of
from packlight.torch_internals.storages import num_storage_references

Sharding = Mapping[nn.Parameter, Pieces]
Key = tuple[str, int]


@dataclass(frozen=True)
class Lying:
    """What lies in pieces with all ranks, and how.

    Attributes:
        values: parameters whose values do.
        states: those whose optimizer states do.
        rank: which pieces are this rank's.
        parts: parameters that are themselves parts of larger ones.
    """

    values: Sharding = field(default_factory=dict)
    states: Sharding = field(default_factory=dict)
    rank: int = 0
    parts: Mapping[nn.Parameter, Part] = field(default_factory=dict)


@dataclass
class _Place:
    """One parameter.

    Attributes:
        parameter: its object, which stays the same.
        pieces: who has which rows.
        own: this rank's.
        absent: of the whole shape and layout, without memory.
        whole: while it is gathered.
        sent: what of it is under way.
        references: of the storage of `whole` where nobody sends it.
    """

    parameter: nn.Parameter
    pieces: Pieces
    own: torch.Tensor
    absent: torch.Tensor
    whole: torch.Tensor | None = None
    sent: tuple[Sent, ...] = ()
    references: int = 0


class ShardedParameters:
    """The parameters of a model that are in pieces; the calls of a tier, by key.

    Everything but `own` and `drop` talks to the other ranks: all of them do it, in one order.

    Args:
        ranks: all of them.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._places: dict[Key, _Place] = {}
        self._first: Sharding = {}
        self._shared: dict[nn.Parameter, Pieces] = {}
        self._under_way: list[tuple[tuple[Sent, ...], torch.Tensor, int]] = []

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return key_of(parameter) in self._places or parameter in self._shared

    @property
    def parameters(self) -> dict[nn.Parameter, Pieces]:
        """Those whose values are in pieces, and how."""
        return {place.parameter: place.pieces for place in self._places.values()}

    @property
    def states(self) -> dict[nn.Parameter, Pieces]:
        """Those whose optimizer states are in pieces, and how."""
        return {**self._shared, **self.parameters}

    @property
    def own_bytes(self) -> int:
        """Size of this rank's pieces."""
        return sum(place.own.nbytes for place in self._places.values())

    def arrange(
        self,
        wanted: Sharding,
        gathered: Container[nn.Parameter],
        cut_states: Callable[[Sharding, int], None] = lambda *_: None,
    ) -> None:
        """Between steps: have what is wanted in pieces.

        Args:
            wanted: the same in all steps.
            gathered: those of them whose values are in pieces, too.
            cut_states: has the optimizer's states, which may be there already, be those of a rank's
                pieces; called at the first time.

        Raises:
            UnsupportedModelError: other parameters were in pieces before, with their optimizer
                states.
        """
        if self._first and wanted != self._first:
            raise UnsupportedModelError(
                f"{len(self._first)} parameters lie in pieces, with their optimizer states, and "
                f"another {len(wanted)} could now: hooks were added, or memory is looked at\n"
                "hint: save what was trained (step.save), and fit anew"
            )
        if wanted and not self._first:
            cut_states(wanted, self._ranks.rank)
            self._first = wanted
        for parameter, pieces in wanted.items():
            is_cut = key_of(parameter) in self._places
            if parameter in gathered and not is_cut:
                self._shared.pop(parameter, None)
                self._cut(parameter, pieces)
            elif parameter not in gathered:
                if is_cut:  # by a step of other shapes
                    self._make_whole(self._places.pop(key_of(parameter)))
                self._shared[parameter] = pieces

    def gather_all(self) -> None:
        """Between steps: have all parameters whole, until the next `arrange`."""
        for place in self._places.values():
            self._make_whole(place)
        self._places.clear()
        self._shared.clear()

    def _make_whole(self, place: _Place) -> None:
        self._note_own(place)
        place.parameter.data = self._gathered(place)

    def _cut(self, parameter: nn.Parameter, pieces: Pieces) -> None:
        first, end = pieces.rows[self._ranks.rank]
        own = parameter.data[first:end].clone()
        # (Memory that numpy has seen, as that of the values compared between ranks, cannot shrink.)
        absent = torch.empty_like(parameter.data)
        absent.untyped_storage().resize_(0)
        self._places[key_of(parameter)] = _Place(parameter, pieces, own, absent)
        parameter.data = own

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all parameters whole for a while; what is written to them meanwhile stays.

        Every rank has to write the same.
        """
        places = [*self._places.values()]
        for place in places:
            self._make_whole(place)
        try:
            yield
        finally:
            for place in places:
                first, end = place.pieces.rows[self._ranks.rank]
                place.own.copy_(place.parameter.data[first:end])
                place.parameter.data = place.own

    def _gathered(self, place: _Place) -> torch.Tensor:
        whole = self._fetch(place)
        self._wait_fetched(place)
        return whole

    # -- a step

    def begin_step(self) -> None:
        """Have all of them away, each of its whole shape: what a traced step expects."""
        for place in self._places.values():
            self._note_own(place)
            place.parameter.data = place.absent

    def end_step(self) -> None:
        """Let everybody see the pieces."""
        for place in self._places.values():
            place.whole, place.sent = None, ()
            place.parameter.data = place.own
        self._under_way.clear()

    def _note_own(self, place: _Place) -> None:
        """Take over a piece that somebody has put in the old one's place."""
        found = place.parameter.data
        if found.data_ptr() != place.own.data_ptr() and found.shape == place.own.shape:
            place.own = found

    def pieces_of(self, parameter: nn.Parameter) -> Pieces:
        """Return which rows of a parameter each rank updates."""
        return self._first[parameter]

    def own_rows(self, parameter: nn.Parameter) -> tuple[int, int]:
        """Return the first of this rank's rows of a parameter, and the one behind the last."""
        return self.pieces_of(parameter).rows[self._ranks.rank]

    @contextmanager
    def own(self, parameter: nn.Parameter) -> Iterator[None]:
        """Have a parameter be this rank's piece, to be updated."""
        place = self._places.get(key_of(parameter))
        as_it_was = parameter.data
        first, end = self.own_rows(parameter)
        parameter.data = as_it_was[first:end] if place is None else place.own
        try:
            yield
        finally:
            parameter.data = as_it_was

    def share(self, parameter: nn.Parameter) -> None:
        """Start giving all ranks the rows of a parameter that each of them has updated."""
        whole = parameter.data
        references = num_storage_references(whole)
        self._under_way.append((self._sent(whole, self._shared[parameter]), whole, references))

    def share_all(self) -> None:
        """... of all parameters whose values are whole."""
        for parameter in self._shared:
            if parameter.requires_grad:
                self.share(parameter)

    def wait_shared(self) -> None:
        """Wait until all rows that were shared are there."""
        while self._under_way:
            sent, whole, references = self._under_way.pop(0)
            for one in sent:
                self._ranks.wait(one)
            del sent, one
            self._ranks.wait_let_go(whole, references)

    def _sent(self, whole: torch.Tensor, pieces: Pieces) -> tuple[Sent, ...]:
        """Start having each rank send its rows to all others."""
        return tuple(
            self._ranks.start_sharing(whole[first:end], owner)
            for owner, (first, end) in enumerate(pieces.rows)
            if first < end
        )

    def fetch(self, key: Key) -> torch.Tensor:
        """Start gathering a parameter: whole, and nothing besides, is allocated."""
        return self._fetch(self._places[key])

    def _fetch(self, place: _Place) -> torch.Tensor:
        whole = torch.empty_strided(
            place.absent.shape, place.absent.stride(), dtype=place.own.dtype,
            device=place.own.device,
        )
        first, end = place.pieces.rows[self._ranks.rank]
        whole[first:end].copy_(place.own)
        place.references = num_storage_references(whole)
        place.sent = self._sent(whole, place.pieces)
        place.whole = whole
        return whole

    def wait_fetched(self, key: Key) -> None:
        """Wait until all rows are there, and nobody but the step holds the memory."""
        self._wait_fetched(self._places[key])

    def _wait_fetched(self, place: _Place) -> None:
        if place.whole is None or not place.sent:
            return
        sent, place.sent = place.sent, ()
        for one in sent:
            self._ranks.wait(one)
        del sent, one
        whole, place.whole = place.whole, None
        self._ranks.wait_let_go(whole, place.references)

    def drop(self, key: Key) -> None:
        """Let go of a gathered parameter."""
        self._places[key].whole = None

    def updating(self, key: Key) -> None:
        """Do nothing: what is gathered is never updated."""

    def offload(self, key: Key) -> None:
        """Never called: pieces are up to date."""
        raise AssertionError("a gathered parameter is written nowhere")

    def wait_written(self, key: Key) -> None:
        """Never called: see `offload`."""
        raise AssertionError("a gathered parameter is written nowhere")


def key_of(parameter: torch.Tensor) -> Key:
    """Return what a parameter is called here."""
    return "shard", id(parameter)


def lying_of(
    model: nn.Module, sharded: ShardedParameters | None, shard_ranks: Ranks | None
) -> Lying:
    """Return where a model's values and states are, for checkpoints.

    Raises:
        UnsupportedModelError: layers that are parts themselves know alone where those lie.
    """
    found = parts_of(model)
    parts = {parameter: part for parameter, part in found.items() if part is not None}
    if len(parts) < len(found):
        raise UnsupportedModelError(
            "checkpoints of convolutions whose filters or channels lie with ranks are not there "
            "yet\nhint: save packlight.convolution.whole_state(model)"
        )
    if sharded is None or shard_ranks is None:
        return Lying(parts=parts)
    return Lying(sharded.parameters, sharded.states, shard_ranks.rank, parts)
