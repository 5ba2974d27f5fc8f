"""One optimizer on one tensor: its bytes, and its time beside torch's fused AdamW."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, provenance, quartiles, root_cause, timed
from benchmarks.optim.cases import CASES, Case, fused_adamw
from packlight import measure_peak

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.jsonl"
QUICK_RESULTS = ROOT / ".cache" / "optim-quick.jsonl"


@dataclass
class Record:
    """What one optimizer showed.

    Attributes:
        tool, name: see `Case`.
        num_elements: of the one parameter.
        num_threads: of torch and of everything else.
        parameter_bytes: of it.
        state_bytes: what is allocated after the first step.
        transient_bytes: the most that the second step holds beside that.
        first_transient_bytes: the same for the first step.
        first_seconds: the first step, with compilation unless that is cached.
        ratio_median, ratio_quartiles: time of a step over that of fused AdamW in fp32 on as many
            elements, in the same round.
        seconds_median, baseline_seconds_median: durations.
        num_rounds: how many rounds those are taken over.
        error: why there is no result.
        provenance: see `benchmarks.common.provenance`, with the tool's version.
    """

    tool: str
    name: str
    num_elements: int
    num_threads: int
    parameter_bytes: int = 0
    state_bytes: int | None = None
    transient_bytes: int | None = None
    first_transient_bytes: int | None = None
    first_seconds: float | None = None
    ratio_median: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    seconds_median: float | None = None
    baseline_seconds_median: float | None = None
    num_rounds: int = 0
    error: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def measure(
    key: str, num_elements: int, num_rounds: int, num_threads: int, seed: int, command: str
) -> Record:
    """Return a case's record; a failure is a result too."""
    case = CASES[key]
    torch.set_num_threads(num_threads)
    made = provenance(seed, "cpu", command)
    made["versions"].update(_version(case.tool))
    record = Record(case.tool, case.name, num_elements, num_threads, provenance=made)
    try:
        _measure(case, record, num_rounds, seed)
    except Exception as error:
        record.error = root_cause(error)
    return record


def _measure(case: Case, record: Record, num_rounds: int, seed: int) -> None:
    parameter = _parameter(record.num_elements, case.dtype, seed)
    optimizer = case.make([parameter])
    record.parameter_bytes = parameter.nbytes
    seconds: list[float] = []
    first = measure_peak(lambda: seconds.append(timed(optimizer.step, parameter.device)))
    later = measure_peak(optimizer.step)
    record.first_seconds = seconds[0]
    record.state_bytes = first.end_bytes
    record.first_transient_bytes = first.peak_bytes - first.end_bytes
    record.transient_bytes = later.peak_bytes
    other = _parameter(record.num_elements, torch.float32, seed)
    baseline = fused_adamw([other])
    baseline.step()
    rounds = []
    for number in range(num_rounds):  # who goes first alternates
        steps = [optimizer.step, baseline.step]
        times = [timed(step, parameter.device) for step in steps[:: -1 if number % 2 else 1]]
        rounds.append(times[:: -1 if number % 2 else 1])
    ratios = [mine / theirs for mine, theirs in rounds]
    record.ratio_median, record.ratio_quartiles = statistics.median(ratios), quartiles(ratios)
    record.seconds_median = statistics.median(mine for mine, _ in rounds)
    record.baseline_seconds_median = statistics.median(theirs for _, theirs in rounds)
    record.num_rounds = num_rounds


def _parameter(num_elements: int, dtype: torch.dtype, seed: int) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    shape = (num_elements // 1024, 1024)
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
    parameter.grad = (0.01 * torch.randn(shape, generator=generator)).to(dtype)
    return parameter


def _version(tool: str) -> dict[str, str]:
    import importlib.metadata

    names = [tool] if tool != "packlight" else ["numba"]
    try:
        return {name: importlib.metadata.version(name) for name in names}
    except importlib.metadata.PackageNotFoundError:
        return {}
