"""The average over ranks of many named tensors, each by its compressor, in as few rounds as can be.

All tensors of a call share their rounds: what the first messages of all of them say goes in one
exchange, then the second messages of those that have some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from packlight.comm.compressor import Compressor, Message, Reduced, Reduction, State, as_input
from packlight.comm.parse import compressor_of
from packlight.comm.transport import Transport
from packlight.errors import FormatError, OptionError, RankMismatchError
from packlight.units import format_bytes

Choice = str | Compressor | Mapping[str, str | Compressor]


class CompressedAverage:
    """Averages tensors over ranks, and holds what compressors keep for each.

    Args:
        parameters: by name: whose gradients, or changes, will be averaged.
        choice: a compressor, or one in words (see `compressor_of`), for all; or for patterns of
            names, of which the first that fits counts: {"*.bias": "fp32", "*": "topk:0.001"}.
        transport: to the other ranks.
        groups: names that are always averaged in one call and are compressed as one long vector
            (those among them with equal compressors); by default each parameter on its own. Saves
            what a message says of each parameter, and the largest elements of all are sent.

    Attributes:
        compressors: by unit, which is a parameter's name or that of a group's first.
        states: by unit, of this rank.

    Raises:
        OptionError: an unknown compressor, a name without one, a sparse parameter, or a group
            under a compressor that needs matrices.
        RankMismatchError: ranks have other parameters or other compressors; on all of them.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.Tensor],
        choice: Choice,
        transport: Transport,
        groups: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.transport = transport
        chosen = transport.gather(lambda: _chosen(parameters, choice))[transport.rank]
        self._agree(parameters, chosen)
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self._units: dict[str, list[str]] = {}
        for number, group in enumerate(groups or [[name] for name in parameters]):
            units: dict[tuple[int, Compressor], list[str]] = {}
            for name in group:
                units.setdefault((number, chosen[name]), []).append(name)
            self._units |= {members[0]: members for members in units.values()}
        self.compressors = {unit: chosen[unit] for unit in self._units}
        for unit, members in self._units.items():
            if len(members) > 1 and chosen[unit].needs_shape:
                raise OptionError(
                    f"{chosen[unit]} needs matrices, and {len(members)} parameters together are "
                    "one vector\nhint: together=False"
                )
        self.states: dict[str, State] = {
            unit: self.compressors[unit].init(
                self._joined(unit, parameters).detach(), number, transport.rank
            )
            for number, unit in enumerate(self._units)
        }

    def _agree(
        self, parameters: Mapping[str, torch.Tensor], chosen: Mapping[str, Compressor]
    ) -> None:
        mine = [
            (name, tuple(p.shape), str(p.dtype), repr(chosen[name]))
            for name, p in parameters.items()
        ]
        everybody = self.transport.gather(lambda: mine)
        what = ("name", "shape", "dtype", "compressor")
        for rank, theirs in enumerate(everybody):
            for expected, found in zip(everybody[0], theirs, strict=False):
                for field, a, b in zip(what, expected, found, strict=True):
                    if a != b:
                        raise RankMismatchError(
                            f"the {field} of parameter {expected[0]!r}", rank, a, b,
                            "all ranks make the same model and pass the same settings",
                        )
            if len(theirs) != len(everybody[0]):
                raise RankMismatchError(
                    "the number of parameters", rank, len(everybody[0]), len(theirs)
                )

    def _joined(self, unit: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        members = self._units[unit]
        if len(members) == 1:
            return tensors[unit]
        return torch.cat([tensors[name].reshape(-1) for name in members])

    @torch.no_grad()
    def average(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the average of each tensor over ranks, float32 on the CPU, the same on all.

        Args:
            tensors: some of the parameters' gradients, the same on all ranks, in the same order;
                a group as a whole.

        Raises:
            OptionError: a sparse gradient.
            RankError: another rank failed meanwhile, or is gone.
        """
        try:
            inputs = {name: _dense(name, tensor) for name, tensor in tensors.items()}
            averages = self._driven({
                unit: self.compressors[unit].reduce(self._joined(unit, inputs), self.states[unit])
                for unit in self._units if unit in tensors
            })
            return self._parted(averages)
        except Exception as error:
            self.transport.fail(error)
            raise

    def _parted(self, averages: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        parted = {}
        for unit, average in averages.items():
            members = self._units[unit]
            parts = torch.split(average.view(-1), [self._shapes[name].numel() for name in members])
            for name, part in zip(members, parts, strict=True):
                parted[name] = part.view(self._shapes[name])
        return parted

    def _driven(self, reductions: Mapping[str, Reduction]) -> dict[str, torch.Tensor]:
        averages: dict[str, torch.Tensor] = {}
        pending: dict[str, Message] = {name: next(r) for name, r in reductions.items()}
        while pending:
            arrived = self.transport.carry(list(pending.values()))
            following = {}
            for name, messages in zip(pending, arrived, strict=True):
                try:
                    following[name] = reductions[name].send(messages)
                except StopIteration as end:
                    reduced: Reduced = end.value
                    averages[name], self.states[name] = reduced.gradient, reduced.state
            pending = following
        return averages

    # -- what it holds

    def state_bytes(self) -> int:
        """Return the size of everything that compressors keep."""
        return sum(tensor.nbytes for tensor in _tensors(self.states))

    def summary(self) -> str:
        """Return which compressors there are and what they keep, one a line."""
        lines = [
            f"{len(self._shapes)} parameters over {self.transport.size} ranks, "
            f"{format_bytes(self.state_bytes())} of state, "
            f"{format_bytes(self.transport.sent_bytes)} sent by this rank so far"
        ]
        for kind in dict.fromkeys(self.compressors.values()):
            units = [unit for unit, other in self.compressors.items() if other == kind]
            held = sum(t.nbytes for unit in units for t in _tensors(self.states[unit]))
            count = sum(len(self._units[unit]) for unit in units)
            lines.append(f"  {kind}: {count} parameters, {format_bytes(held)} of state")
        return "\n".join(lines)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of this rank's states, for `torch.save`: each rank saves its own."""
        return {
            "ranks": self.transport.size,
            "rank": self.transport.rank,
            "compressors": {name: repr(c) for name, c in self.compressors.items()},
            "states": {name: _copied(state) for name, state in self.states.items()},
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what this rank saved, bit for bit.

        Raises:
            FormatError: it is of another rank, of another number of ranks, or of other compressors;
                nothing was loaded.
        """
        if saved["ranks"] != self.transport.size:
            raise FormatError(
                f"residuals were saved by {saved['ranks']} ranks, and now there are "
                f"{self.transport.size}: what each of them had not sent would be lost or counted "
                "twice\nhint: resume on as many ranks, or start with a new one, which gives up "
                "what was not sent"
            )
        if saved["rank"] != self.transport.rank:
            raise FormatError(
                f"these are residuals of rank {saved['rank']}, and this is rank "
                f"{self.transport.rank}\nhint: each rank saves and loads a file of its own"
            )
        for name, compressor in self.compressors.items():
            found = saved["compressors"].get(name)
            if found != repr(compressor):
                raise FormatError(
                    f"the unit {name!r} was saved with {found}, and now has {compressor}"
                )
        self.states = {name: _copied(saved["states"][name]) for name in self.states}


def _chosen(parameters: Mapping[str, torch.Tensor], choice: Choice) -> dict[str, Compressor]:
    """Return the compressor of each parameter."""
    chosen = {}
    patterns = choice if isinstance(choice, Mapping) else {"*": choice}
    made = {pattern: compressor_of(wanted) for pattern, wanted in patterns.items()}
    for name, parameter in parameters.items():
        fitting = [made[pattern] for pattern in made if fnmatchcase(name, pattern)]
        if not fitting:
            raise OptionError(
                f"no compressor for the parameter {name!r} among the patterns "
                f"{', '.join(map(repr, patterns))}\nhint: add '*': 'fp32' at the end"
            )
        if parameter.layout != torch.strided or not parameter.is_floating_point():
            raise OptionError(
                f"the parameter {name!r} ({parameter.dtype}, {parameter.layout}) is no dense "
                "tensor of floats"
            )
        chosen[name] = fitting[0]
    return chosen


def _dense(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout != torch.strided:
        raise OptionError(
            f"the gradient of {name!r} is sparse ({tensor.layout})\n"
            "hint: make it dense: sparse=False in nn.Embedding"
        )
    return as_input(tensor)


def _tensors(state: Mapping[str, Any]) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for value in state.values():
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, Mapping):
            found += _tensors(value)
    return found


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.clone() if isinstance(value, torch.Tensor)
        else _copied(value) if isinstance(value, Mapping) else value
        for name, value in state.items()
    }
