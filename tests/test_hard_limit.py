"""Training where the kernel refuses every byte above the budget: eager PyTorch dies there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracles.limited_training import OUT_OF_MEMORY

ROOT = Path(__file__).resolve().parent.parent
BUDGET_BYTES = 96 * 2**20
# What is not the step's: Python objects of capture and planning, and the heap's own accounts. Half
# of this was enough.
SLACK_BYTES = 32 * 2**20


def run(how: str, budget: int | None, cache: Path) -> subprocess.CompletedProcess[str]:
    """Run the training in a process of its own, the same for both but for who trains."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PACKLIGHT_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        # Memory that is freed goes back to the kernel, and threads do not reserve any.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", "tests.oracles.limited_training", how]
    return subprocess.run(
        [*command, "none" if budget is None else str(budget), str(SLACK_BYTES)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs a kernel that counts RLIMIT_DATA"
)
def test_packlight_trains_where_eager_pytorch_finds_no_memory(tmp_path: Path) -> None:
    unlimited = run("eager", None, tmp_path)
    assert unlimited.returncode == 0, unlimited.stderr

    # Eager PyTorch cannot do it in the budget and not in twice the budget.
    for budget in (BUDGET_BYTES, 2 * BUDGET_BYTES):
        eager = run("eager", budget, tmp_path)
        assert eager.returncode == OUT_OF_MEMORY, eager.stderr
        assert "can't allocate memory" in eager.stderr

    # Planned, measured and trained, from an empty cache of times, in the budget.
    mine = run("packlight", BUDGET_BYTES, tmp_path)
    assert mine.returncode == 0, mine.stderr
    losses = json.loads(mine.stdout)
    assert losses == json.loads(unlimited.stdout) and losses == sorted(losses, reverse=True)
