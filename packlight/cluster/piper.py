"""Stages, tensor and data degrees of any graph of layers, under Piper's cost model: exact.

Tarnawski, Narayanan and Phanishayee, "Piper: Multidimensional Planner for DNN Parallelization",
NeurIPS 2021. A stage is a contiguous set of layers: the difference of two sets that are closed
under successors. With t tensor parallel and d data parallel ranks it takes, of each sample,

    sum(seconds)/d + 2 (edges + syncs across its border)/(d B) + 4 (d - 1)/d * parameters/(N B)

and each of its layers has a few ways to run (kept or computed again), of which those are taken that
fit: sum(frame_bytes * y + fixed_bytes) <= memory, where y = ceil(s / d) microbatches are in flight
with s the data degrees of this stage and all behind it. The slowest stage is to be fast:

    best[set][k][s] = min over subsets, t, d of max(best[subset][k - t d][s - d], stage(t, d, s))

Piper picks ways by a heuristic; here that knapsack is solved exactly, so the optimum is at least as
good as Piper's in its own terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from packlight.errors import OptionError

_MAX_SETS = 20_000


@dataclass(frozen=True, slots=True)
class WayToRun:
    """One way to run a layer on t ranks (Piper's TMPC).

    Attributes:
        seconds: of one sample, forward and backward.
        parameter_bytes: what data parallel ranks exchange.
        frame_bytes, fixed_bytes: held for each microbatch in flight, and throughout.
        sync_in, sync_out: bytes besides an edge's own, by the layer at its other end.
        name: for reports.
    """

    seconds: float
    parameter_bytes: float = 0.0
    frame_bytes: float = 0.0
    fixed_bytes: float = 0.0
    sync_in: Mapping[int, float] = field(default_factory=dict)
    sync_out: Mapping[int, float] = field(default_factory=dict)
    name: str = ""


@dataclass(frozen=True)
class PiperProblem:
    """A graph of layers and the devices for it.

    Attributes:
        ways: of each layer, by tensor parallel degree.
        edges: bytes from one layer to another.
        num_devices: at most so many are used.
        memory_bytes: of each.
        bytes_per_second: from each to any other.
        num_microbatches: of a batch, N; data degrees divide it.
    """

    ways: Sequence[Mapping[int, Sequence[WayToRun]]]
    edges: Mapping[tuple[int, int], float]
    num_devices: int
    memory_bytes: float
    bytes_per_second: float
    num_microbatches: int


@dataclass(frozen=True, slots=True)
class PiperStage:
    """Layers with the same degrees.

    Attributes:
        layers: which.
        tensor, data: degrees.
        ways: the index of the way that each layer takes.
        seconds: of one sample.
    """

    layers: tuple[int, ...]
    tensor: int
    data: int
    ways: tuple[int, ...]
    seconds: float


def solve(problem: PiperProblem) -> list[PiperStage] | None:
    """Return the stages whose slowest is fastest, in order; None where nothing fits.

    Cost: (pairs of sets) x (degrees) x (devices x frames), vectorised over the last two.

    Raises:
        OptionError: the graph has too many successor-closed sets, or a circle.
    """
    sets = closed_sets(len(problem.ways), problem.edges)
    devices = problem.num_devices
    frames = min(problem.num_microbatches, devices)
    shape = (devices + 1, frames + 1)
    best: dict[int, npt.NDArray[np.float64]] = {0: np.zeros(shape)}
    for whole in sets[1:]:
        table = np.full(shape, np.inf)
        for part, stage, d in _first_stages(problem, whole, sets, frames):
            used = stage.tensor * d
            seconds = stage.seconds(d, frames)
            behind = best[part][: devices + 1 - used, : frames + 1 - d]
            found = np.maximum(behind, seconds[np.newaxis, d:])
            np.minimum(table[used:, d:], found, out=table[used:, d:])
        best[whole] = np.minimum.accumulate(np.minimum.accumulate(table, axis=0), axis=1)
    if not np.isfinite(best[sets[-1]][-1, -1]):
        return None
    return _read(problem, sets, best, frames)


def _read(
    problem: PiperProblem,
    sets: Sequence[int],
    best: Mapping[int, npt.NDArray[np.float64]],
    frames: int,
) -> list[PiperStage]:
    """Return the stages that a table's last entry stands for."""
    stages: list[PiperStage] = []
    whole, k, s = sets[-1], problem.num_devices, frames
    limit = best[whole][k, s]
    while whole:
        # The table says "at most": the optimum may be that of fewer microbatches in flight.
        s = int(np.argmax(best[whole][k] <= limit))
        part, stage, d = next(
            (part, stage, d)
            for part, stage, d in _first_stages(problem, whole, sets, s)
            if stage.tensor * d <= k and d <= s
            and max(best[part][k - stage.tensor * d, s - d], stage.seconds(d, s)[s]) <= limit
        )
        ways = stage.cheapest(d, -(-s // d))
        assert ways is not None, "it fitted before"
        stages.append(PiperStage(tuple(stage.layers), stage.tensor, d, ways[1], ways[0]))
        whole, k, s = part, k - stage.tensor * d, s - d
    return stages


def closed_sets(count: int, edges: Iterable[tuple[int, int]]) -> list[int]:
    """Return all sets of nodes that contain their members' successors, as bits, small ones first.

    Raises:
        OptionError: there are too many, or the graph has a circle.
    """
    behind = [0] * count
    for source, target in edges:
        behind[source] |= 1 << target
    found, new = {0}, [0]
    while new:
        grown = {
            each | 1 << node
            for each in new
            for node in range(count)
            if not each >> node & 1 and behind[node] & ~each == 0
        }
        new = list(grown - found)
        found |= grown
        if len(found) > _MAX_SETS:
            raise OptionError(
                f"a graph of {count} layers has more than {_MAX_SETS} ways to be cut in two\n"
                "hint: group layers that belong together, or search with `mcmc`"
            )
    if (1 << count) - 1 not in found:
        raise OptionError("the graph of layers has a circle")
    return sorted(found, key=lambda each: (each.bit_count(), each))


def _first_stages(
    problem: PiperProblem, whole: int, sets: Sequence[int], frames: int
) -> Iterable[tuple[int, _Inside, int]]:
    """Yield (what is behind, layers and t, d) of all first stages of a closed set."""
    for part in sets:
        if part == whole or part & ~whole:
            continue
        inside = whole & ~part
        layers = [i for i in range(inside.bit_length()) if inside >> i & 1]
        for t in sorted(set.intersection(*(set(problem.ways[layer]) for layer in layers))):
            stage = _Inside(problem, layers, inside, t)
            for d in range(1, min(problem.num_devices // t, frames) + 1):
                if problem.num_microbatches % d == 0:
                    yield part, stage, d


class _Inside:
    """The layers of a stage on t tensor parallel ranks: what they take with d and y."""

    def __init__(
        self, problem: PiperProblem, layers: Sequence[int], inside: int, tensor: int
    ) -> None:
        self.problem, self.layers, self.tensor = problem, layers, tensor
        crossing = {
            edge: num_bytes for edge, num_bytes in problem.edges.items()
            if (inside >> edge[0] & 1) != (inside >> edge[1] & 1)
        }
        # Of each layer its ways: (seconds and crossing bytes as seconds, resync seconds, bytes).
        self._ways: list[list[tuple[float, float, float, float]]] = []
        for layer in layers:
            into = [(edge[0], size) for edge, size in crossing.items() if edge[1] == layer]
            out = [(edge[1], size) for edge, size in crossing.items() if edge[0] == layer]
            self._ways.append([
                (
                    way.seconds + 2 / problem.bytes_per_second * (
                        sum(size + way.sync_in.get(other, 0.0) for other, size in into)
                        + sum(size + way.sync_out.get(other, 0.0) for other, size in out)
                    ),
                    4 * way.parameter_bytes / problem.num_microbatches / problem.bytes_per_second,
                    way.frame_bytes,
                    way.fixed_bytes,
                )
                for way in problem.ways[layer][tensor]
            ])

    def seconds(self, d: int, frames: int) -> npt.NDArray[np.float64]:
        """Return the least seconds with data degree d, for s = 0 .. frames."""
        seconds = np.full(frames + 1, np.inf)
        for y in range(1, -(-frames // d) + 1):
            ways = self.cheapest(d, y)
            if ways is None:
                break  # More microbatches in flight take more memory.
            seconds[(y - 1) * d + 1 : y * d + 1] = ways[0]
        return seconds

    def cheapest(self, d: int, y: int) -> tuple[float, tuple[int, ...]] | None:
        """Return the least seconds with y microbatches in flight, and the ways of the layers."""
        options = [
            [
                (frame * y + fixed, seconds / d + resync * (d - 1) / d, i)
                for i, (seconds, resync, frame, fixed) in enumerate(ways)
            ]
            for ways in self._ways
        ]
        memory = self.problem.memory_bytes
        fastest = [min(each, key=lambda o: (o[1], o[0])) for each in options]
        if sum(o[0] for o in fastest) <= memory:
            return sum(o[1] for o in fastest), tuple(o[2] for o in fastest)
        if sum(min(o[0] for o in each) for each in options) > memory:
            return None
        return knapsack(options, memory)


def knapsack(
    options: Sequence[Sequence[tuple[float, float, int]]], capacity: float
) -> tuple[float, tuple[int, ...]] | None:
    """Return the least seconds of one (bytes, seconds, name) of each, within so many bytes.

    Layer by layer all pairs (bytes, seconds) are kept that no other beats.
    """
    front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for each in options:
        grown = sorted(
            (held + more, seconds + longer, (*names, name))
            for held, seconds, names in front
            for more, longer, name in each
            if held + more <= capacity
        )
        front = []
        for state in grown:
            if not front or state[1] < front[-1][1]:
                front.append(state)
    return (front[-1][1], front[-1][2]) if front else None
