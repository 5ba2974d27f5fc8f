"""What the benchmarks share: provenance, JSON lines, comparisons, Markdown tables."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
MEBIBYTE = 2**20

# For glibc, in every process that is timed: memory that was freed stays with the process. Else
# blocks of 32 MiB and more go back to the system at once, and what is timed is also how often the
# system clears pages: up to a quarter of an eager step, and less the leaner a step is.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}

Line = TypeVar("Line")

# -- results as JSON lines


def read_lines(path: Path, kind: Callable[..., Line]) -> list[Line]:
    """Return the records of a file, made by `kind(**line)`; none if the file does not exist."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [kind(**json.loads(line)) for line in lines if line.strip()]


def write_lines(path: Path, records: Iterable[Any]) -> None:
    """Write all records (dataclasses), whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(r)) + "\n" for r in records)
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, delete=False, encoding="utf-8"
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def append_line(path: Path, record: Any) -> None:
    """Add one record (a dataclass) to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(record)) + "\n")


def provenance(
    seed: int, device: str, command: str, packages: Sequence[str] = ()
) -> dict[str, Any]:
    """Return where, when and with what a record was made.

    Args:
        seed: of everything.
        device: its name is told.
        command: what the user typed.
        packages: whose versions are told, too, where they are installed.
    """
    import torch

    from packlight.costs.cache import device_name

    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("transformers", *packages):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "hardware": device_name(torch.device(device)),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_at_start": round(os.getloadavg()[0], 2),
        "versions": versions,
        "keeps_freed_memory": KEEP_FREED_MEMORY.items() <= os.environ.items(),
        "commit": _commit(),
        "seed": seed,
        "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
    }


def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def run_apart(module: str, arguments: Sequence[str], path_first: Path | None = None) -> bool:
    """Run `python -m module` in a process of its own and return whether it succeeded."""
    return status_apart(module, arguments, path_first=path_first) == 0


def status_apart(
    module: str,
    arguments: Sequence[str],
    limit_seconds: float | None = None,
    path_first: Path | None = None,
) -> int:
    """Run `python -m module` in a process of its own and return its exit status.

    The process keeps what it frees and returns all of it when it ends, and has a cache of its own:
    what Packlight predicts in it comes from times measured in it.

    Args:
        module: to run.
        arguments: of its command line.
        limit_seconds: how long it may take.
        path_first: a folder with packages that go before those that are installed.

    Raises:
        subprocess.TimeoutExpired: it took longer than it may, and was killed.
    """
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", module, *arguments]
        environment = {**os.environ, **KEEP_FREED_MEMORY, "PACKLIGHT_CACHE": cache}
        if path_first is not None:
            paths = [str(path_first.resolve()), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        return subprocess.run(command, env=environment, timeout=limit_seconds).returncode


# -- measuring and comparing


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Return how many seconds a call takes; the garbage collector is off meanwhile."""
    gc.collect()
    gc.disable()
    try:
        synchronize(device)
        begin = time.perf_counter()
        function()
        synchronize(device)
        return time.perf_counter() - begin
    finally:
        gc.enable()


def synchronize(device: torch.device) -> None:
    """Wait for what a device was told to do."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quartiles(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the first and third quartile, None of fewer than two values."""
    if len(values) < 2:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Return whether two tensors are equal, or both are lacking."""
    import torch

    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a, b)


def relative_error(
    expected: Sequence[torch.Tensor | None], found: Sequence[torch.Tensor | None]
) -> float | None:
    """Return the largest absolute difference over the largest expected value; None if one lacks."""
    off = scale = 0.0
    for a, b in zip(expected, found, strict=True):
        if (a is None) != (b is None):
            return None
        if a is not None and b is not None:
            off = max(off, float((a - b).abs().max()))
            scale = max(scale, float(a.abs().max()))
    return off / scale if scale else None


def innermost(error: BaseException) -> BaseException:
    """Return what Packlight raised, or else what was raised first, without dynamo's wrappers."""
    from packlight.errors import PacklightError

    while not isinstance(error, PacklightError):
        inner = getattr(error, "inner_exception", None) or error.__cause__
        if inner is None:
            break
        error = inner
    return error


def root_cause(error: BaseException) -> str:
    """Return what was raised first, in words; files of libraries without where those lie."""
    error = innermost(error)
    words = re.sub(r"\S*/site-packages/", "", f"{type(error).__name__}: {error}")
    return words.strip()[:500]


# -- tables


def models_of(records: Iterable[Any]) -> list[str]:
    """Return the names of the models that records are about, in the order of the file."""
    return list(dict.fromkeys(r.model for r in records))


def of_model(records: Iterable[Line], model: str) -> list[Line]:
    """Return one model's records."""
    return [r for r in records if r.model == model]  # type: ignore[attr-defined]


def mebibytes(num_bytes: int | None) -> str:
    """Return bytes as MiB, short; a dash for None."""
    if num_bytes is None:
        return "-"
    value = num_bytes / MEBIBYTE
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def median_and_quartiles(median: float | None, spread: Sequence[float] | None) -> str:
    """Return a median with its interquartile range; a dash for None."""
    if median is None:
        return "-"
    if spread is None:
        return f"{median:.3f}"
    low, high = spread
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def percent_off(predicted: float | None, measured: float | None) -> str:
    """Return how far a prediction is from what was measured."""
    if not predicted or not measured:
        return "-"
    return f"{100 * (predicted / measured - 1):+.2f}%"


def table(header: list[str], rows: list[list[str]], right_from: int = 1) -> list[str]:
    """Return the lines of a Markdown table; columns from `right_from` on are set flush right."""
    rule = ["---" if i < right_from else "---:" for i in range(len(header))]
    return ["| " + " | ".join(cells) + " |" for cells in (header, rule, *rows)]


def ratio_or_reason(record: Any) -> str:
    """Return a timed record's ratio with its interquartile range, or why it has none."""
    if record is None:
        return "-"
    if record.smallest_bytes is not None:
        return f"infeasible; {mebibytes(record.smallest_bytes)} MiB would do"
    if record.error is not None:
        return first_line(record.error)
    return median_and_quartiles(record.ratio_median, record.ratio_quartiles)


def first_line(text: str | None) -> str:
    """Return the first line of an error, fit for a table."""
    line = (text or "").strip().splitlines()[0] if (text or "").strip() else ""
    return line.replace("|", "/")[:120]


def replace_between_markers(path: Path, name: str, lines: list[str]) -> None:
    """Replace what stands between `<!-- name:begin -->` and `<!-- name:end -->` in a file."""
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(
        rf"(<!-- {name}:begin[^>]*-->\n).*?(<!-- {name}:end -->)", re.DOTALL
    )
    if not pattern.search(text):
        raise SystemExit(f"{path}: no markers <!-- {name}:begin --> and <!-- {name}:end -->")
    body = "\n".join(lines) + "\n"
    path.write_text(
        pattern.sub(lambda m: m.group(1) + body + m.group(2), text), encoding="utf-8"
    )
