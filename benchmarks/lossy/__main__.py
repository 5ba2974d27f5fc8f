"""Measures: `python -m benchmarks.lossy [--questions bandwidth quality]`; appends lines."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.common import KEEP_FREED_MEMORY, append_line, provenance
from benchmarks.lossy import bandwidth, quality
from benchmarks.lossy.records import RESULTS, Record, read_records

# Text that comes with the repository: its own documents and code.
ROOT = Path(__file__).resolve().parent.parent.parent
TEXT = ("docs/*.md", "packlight/planner/*.py")


def main() -> int:
    """Measure what is not in results.jsonl yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lossy", description=__doc__)
    parser.add_argument("--questions", nargs="+", choices=("bandwidth", "quality"),
                        default=("bandwidth", "quality"))
    parser.add_argument("--threads", type=int, default=1, help="of the bandwidth")
    parser.add_argument("--rounds", type=int, default=7, help="of the bandwidth")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the quality")
    parser.add_argument("--steps", type=int, default=400, help="of the quality")
    parser.add_argument("--text", type=Path, help="a file to train on")
    arguments = parser.parse_args()
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():  # glibc reads them when it starts
        module = [sys.executable, "-m", "benchmarks.lossy", *sys.argv[1:]]
        return subprocess.run(module, env={**os.environ, **KEEP_FREED_MEMORY}).returncode
    known = {(r.question, r.case, r.seed) for r in read_records()}
    command = shlex.join(["python", "-m", "benchmarks.lossy", *sys.argv[1:]])
    if "bandwidth" in arguments.questions:
        for case, values in bandwidth.measured(arguments.threads, arguments.rounds):
            if ("bandwidth", case, None) not in known:
                where = provenance(0, "cpu", command, ("numba",))
                append_line(RESULTS, Record("bandwidth", case, where, values))
    if "quality" in arguments.questions:
        text = _text(arguments.text)
        for seed in arguments.seeds:
            for case in quality.CASES:
                if ("quality", case, seed) in known:
                    continue
                where = provenance(seed, "cpu", command, ("numba",))
                values = quality.trained(case, seed, arguments.steps, text)
                values["characters"] = len(text)
                append_line(RESULTS, Record("quality", case, where, values, seed))
                print(case, seed, values, flush=True)
    return 0


def _text(path: Path | None) -> str:
    if path is not None:
        return path.read_text(encoding="utf-8")
    files = [file for pattern in TEXT for file in sorted(ROOT.glob(pattern))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


if __name__ == "__main__":
    sys.exit(main())
