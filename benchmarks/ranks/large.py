"""A step of 512 ranks planned on this machine: how long that takes, and in how much memory."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.common import MEBIBYTE, ROOT, table

FILE = "benchmarks/ranks/gpt_1b.py"
MESHES = (
    ("--mesh", "data=512", "--link", "25GB/s", "--shard"),
    ("--mesh", "data=64,shard=8", "--link", "25GB/s,shard=200GB/s", "--shard"),
)


@dataclass
class Planned:
    """One plan.

    Attributes:
        command: what was run, with an empty cache.
        seconds: from its start to its end.
        cpu_seconds: that it computed; all but that, others did.
        resident_bytes: the most that the process had.
        predicted_peak: of each rank, in words.
        predicted_seconds: of a step, in words.
        provenance: where, when and with what.
    """

    command: str
    seconds: float
    cpu_seconds: float
    resident_bytes: int
    predicted_peak: str
    predicted_seconds: str
    provenance: dict[str, Any] = field(default_factory=dict)


def planned(mesh: Sequence[str], told: dict[str, Any]) -> Planned:
    """Plan the step of a mesh in a process of its own.

    Raises:
        subprocess.CalledProcessError: there is no plan.
    """
    words = ["plan", FILE, "--no-weights", *mesh, "--no-others"]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PACKLIGHT_CACHE": cache, "COLUMNS": "200"}
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        found = subprocess.run(
            [sys.executable, "-m", "packlight", *words], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, check=True,
        )
        seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    return Planned(
        " ".join(["packlight", *words]), seconds, cpu_seconds, after.ru_maxrss * 1024,
        _line(found.stdout, "predicted peak"), _line(found.stdout, "predicted time"), told,
    )


def lines(found: Sequence[Planned]) -> list[str]:
    """Return the table: the latest plan of each command.

    How long a step takes is left to the lines: calls are timed on this machine, whatever else it
    does.
    """
    latest = {one.command: one for one in found}
    rows = [
        [
            f"`{command}`", f"{one.seconds:.0f}", f"{one.cpu_seconds:.0f}",
            f"{one.provenance['load_at_start']:.1f}", f"{one.resident_bytes / MEBIBYTE:.0f}",
            one.predicted_peak.partition(" = ")[0],
        ]
        for command, one in latest.items()
    ]
    heads = [
        "command", "s", "CPU s", "load", "most resident, MiB", "predicted peak of a rank",
    ]
    return table(heads, rows)


def _line(text: str, name: str) -> str:
    match = re.search(rf"^{name} +(.*)$", text, re.MULTILINE)
    return "" if match is None else re.split(r"[,(;=]| of ", match[1])[0].strip()
