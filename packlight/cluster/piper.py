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
        for part, t, d, seconds in _stages(problem, whole, sets, frames):
            behind = best[part][: devices + 1 - t * d, : frames + 1 - d]
            found = np.maximum(behind, seconds[np.newaxis, d:])
            np.minimum(table[t * d :, d:], found, out=table[t * d :, d:])
        best[whole] = np.minimum.accumulate(np.minimum.accumulate(table, axis=0), axis=1)
    whole = sets[-1]
    if not np.isfinite(best[whole][-1, -1]):
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
        for part, t, d, seconds in _stages(problem, whole, sets, s):
            if t * d <= k and d <= s and max(best[part][k - t * d, s - d], seconds[s]) <= limit:
                layers = _members(whole & ~part)
                y = -(-s // d)
                ways = _cheapest(problem, layers, whole & ~part, t, d, y)
                assert ways is not None, "it fitted before"
                stages.append(PiperStage(tuple(layers), t, d, ways[1], ways[0]))
                whole, k, s = part, k - t * d, s - d
                break
        else:
            raise AssertionError("a stage of the optimum")
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


def _members(bits: int) -> list[int]:
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


def _stages(
    problem: PiperProblem, whole: int, sets: Sequence[int], frames: int
) -> Iterable[tuple[int, int, int, npt.NDArray[np.float64]]]:
    """Yield (what is behind, t, d, seconds for each s) of all first stages of a closed set."""
    for part in sets:
        if part == whole or part & ~whole:
            continue
        inside = whole & ~part
        layers = _members(inside)
        degrees = set.intersection(*(set(problem.ways[layer]) for layer in layers))
        for t in sorted(degrees):
            for d in range(1, min(problem.num_devices // t, frames) + 1):
                if problem.num_microbatches % d:
                    continue
                seconds = np.full(frames + 1, np.inf)
                for y in range(1, -(-frames // d) + 1):
                    ways = _cheapest(problem, layers, inside, t, d, y)
                    if ways is None:
                        break  # More microbatches in flight take more memory.
                    seconds[(y - 1) * d + 1 : y * d + 1] = ways[0]
                if np.isfinite(seconds).any():
                    yield part, t, d, seconds


def _cheapest(
    problem: PiperProblem, layers: Sequence[int], inside: int, t: int, d: int, y: int
) -> tuple[float, tuple[int, ...]] | None:
    """Return the least seconds of a stage that fits, and the ways of its layers."""
    # (bytes, seconds, ways): those that no other beats, layer by layer.
    front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
    for layer in layers:
        options = [
            (way.frame_bytes * y + way.fixed_bytes, _seconds(problem, layer, way, inside, d), i)
            for i, way in enumerate(problem.ways[layer][t])
        ]
        grown = sorted(
            (held + more, seconds + longer, (*ways, i))
            for held, seconds, ways in front
            for more, longer, i in options
            if held + more <= problem.memory_bytes
        )
        front = []
        for each in grown:
            if not front or each[1] < front[-1][1]:
                front.append(each)
        if not front:
            return None
    return front[-1][1], front[-1][2]


def _seconds(problem: PiperProblem, layer: int, way: WayToRun, inside: int, d: int) -> float:
    crossing = 0.0
    for (source, target), num_bytes in problem.edges.items():
        if target == layer and not inside >> source & 1:
            crossing += 2 * (num_bytes + way.sync_in.get(source, 0.0))
        if source == layer and not inside >> target & 1:
            crossing += 2 * (num_bytes + way.sync_out.get(target, 0.0))
    resync = 4 * (d - 1) / d * way.parameter_bytes / problem.num_microbatches
    return way.seconds / d + (crossing / d + resync) / problem.bytes_per_second
