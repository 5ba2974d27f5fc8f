"""One trial: a depth is trained for two steps in a process that the kernel gives no more memory.

    python -m benchmarks.largest.trial --tool "plain PyTorch" --depth 2 --limit 2147483648

The limit is RLIMIT_DATA: all private writable memory of the process, that of the interpreter, of
its libraries and of the heap included, whether touched or not. It is set before torch is imported.
Files that are mapped and shared are not in it. The trial prints a JSON object.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, root_cause

NUM_STEPS = 2
WARM_WIDTH = 96

TRAINED = "trained"
OUT_OF_MEMORY = "out of memory"  # the kernel refused
REFUSED = "refused"  # by the tool, which says that the budget is too small
OUT_OF_TIME = "out of time"
FAILED = "failed"

# Freed memory goes back to the kernel at once, and threads reserve no heaps of their own.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}


@dataclass
class Trial:
    """What came of one trial.

    Attributes:
        outcome: one of the words above.
        depth: number of blocks.
        num_parameters: of the model, where it could be built.
        held_bytes: of the process before the model was built, its libraries used once.
        budget_bytes: given to `packlight.fit`.
        predicted_bytes: peak of the step, by Packlight.
        moves: what Packlight does.
        losses: of the steps.
        prepare_seconds: until the first step: the model is built, and the step planned.
        seconds: of the whole trial.
        error: why it did not train.
    """

    outcome: str
    depth: int
    num_parameters: int | None = None
    held_bytes: int | None = None
    budget_bytes: int | None = None
    predicted_bytes: int | None = None
    moves: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    prepare_seconds: float | None = None
    seconds: float | None = None
    error: str | None = None


def run_trial(
    tool: str, depth: int, limit_bytes: int, seconds: float, directory: Path | None = None,
    width: int | None = None, cache: Path | None = None,
) -> Trial:
    """Return what comes of a trial in a process of its own.

    Args:
        tool: a name out of `tools.TOOLS`.
        depth: number of blocks.
        limit_bytes: of the process.
        seconds: after so many the process is ended.
        directory: for what is offloaded; a temporary one if None.
        width: another one than the benchmark's, for tests.
        cache: of Packlight, shared by trials: how long calls take does not matter here.
    """
    command = [
        sys.executable, "-m", "benchmarks.largest.trial", "--tool", tool, "--depth", str(depth),
        "--limit", str(limit_bytes),
    ]
    command += ["--width", str(width)] if width else []
    environment = {**os.environ, **ENVIRONMENT}
    if cache is not None:
        environment["PACKLIGHT_CACHE"] = str(cache)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        try:
            process = subprocess.run(
                [*command, "--directory", scratch], cwd=ROOT, env=environment, timeout=seconds,
                capture_output=True, text=True, check=False,
            )
        except subprocess.TimeoutExpired:
            trial = Trial(OUT_OF_TIME, depth, error=f"stopped after {seconds:.0f} s")
        else:
            trial = _read(process, depth)
    trial.seconds = time.perf_counter() - begin
    return trial


def _read(process: subprocess.CompletedProcess[str], depth: int) -> Trial:
    for line in reversed(process.stdout.splitlines()):
        if line.startswith("{"):
            return Trial(**json.loads(line))
    lines = process.stderr.strip().splitlines()
    # Without memory even an error may not be told: the interpreter or a library ends.
    is_memory = any(w in process.stderr for w in ("MemoryError", "allocate memory", "bad_alloc"))
    return Trial(
        OUT_OF_MEMORY if is_memory else FAILED, depth,
        error=f"ended with {process.returncode}: {lines[-1] if lines else ''}"[:300],
    )


# -- in the process


def writable_bytes() -> int:
    """Return what the kernel compares with RLIMIT_DATA."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def _train(trial: Trial, tool_name: str, limit_bytes: int, directory: Path, width: int) -> None:
    from benchmarks.largest.tools import TOOLS, Setting

    tool = TOOLS[tool_name]
    if importlib.util.find_spec(tool.module) is None:
        raise ModuleNotFoundError(f"{tool.module} is not installed")

    def spare_bytes() -> int:
        return limit_bytes - writable_bytes()

    tiny = tool.prepare(Setting(1, WARM_WIDTH, None, spare_bytes, directory), {})
    for _ in range(NUM_STEPS):
        tiny()
    del tiny
    gc.collect()
    trial.held_bytes = writable_bytes()
    begin = time.perf_counter()
    notes: dict[str, Any] = {}
    try:
        step = tool.prepare(
            Setting(trial.depth, width, limit_bytes, spare_bytes, directory), notes
        )
    finally:
        trial.budget_bytes = notes.get("budget_bytes")
    trial.predicted_bytes, trial.moves = notes.get("predicted_bytes"), notes.get("moves", [])
    trial.prepare_seconds = time.perf_counter() - begin
    for _ in range(NUM_STEPS):
        trial.losses.append(step().item())


def main() -> None:
    """Run one trial and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.largest.trial")
    parser.add_argument("--tool", required=True)
    parser.add_argument("--depth", type=int, required=True)
    parser.add_argument("--limit", type=int, required=True, help="in bytes")
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--width", type=int)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (arguments.limit, arguments.limit))

    import torch

    from benchmarks.largest.tools import WIDTH
    from packlight.errors import InfeasibleBudgetError

    torch.set_num_threads(1)
    trial = Trial(FAILED, arguments.depth)
    width = arguments.width or WIDTH
    trial.num_parameters = num_parameters(arguments.depth, width)
    try:
        _train(trial, arguments.tool, arguments.limit, arguments.directory, width)
        trial.outcome = TRAINED
    except Exception as error:
        trial.error = root_cause(error)
        if isinstance(error, InfeasibleBudgetError):
            trial.outcome = REFUSED
        elif isinstance(error, MemoryError) or "allocate memory" in str(error):
            trial.outcome = OUT_OF_MEMORY
    print(json.dumps(vars(trial)), flush=True)
    os._exit(0)  # nothing is left to be done, and it may take long


def num_parameters(depth: int, width: int) -> int:
    """Return how many parameters the model has, counted by hand.

    >>> num_parameters(12, 768) // 10**6
    97
    """
    from benchmarks.largest.tools import LENGTH, VOCABULARY

    block = 12 * width**2 + 13 * width
    return depth * block + (2 * VOCABULARY + LENGTH + 2) * width


if __name__ == "__main__":
    main()
