"""Plans captured steps with an older checkout and with this one, and writes both beside each other.

    python -m benchmarks.house --old ../base
    python -m benchmarks.house --old ../base --steps gpt2-fit lstm-32-fit --corpus ../corpus

Steps are captured once, by the older checkout, into a folder that is not committed: times are then
the same for both. What the older planner made of a step is kept there, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, provenance, read_lines, replace_between_markers, write_lines
from benchmarks.house.report import FOLDER, RESULTS, Line, report

WORKER = FOLDER / "worker.py"
CORPUS = ROOT / ".cache" / "house"
FAMILIES = (
    "mlp", "wrn", "resnet50", "unet", "densenet", "mobilenet", "lstm", "gpt2", "bert", "roberta",
    "t5", "llama", "vit", "convnext", "clip", "reference_gpt", "gpt2-12x768", "lstm-16",
)
LINKED = ("mlp-fit", "unet-fit", "gpt2-fit")
STEPS = [f"{family}-{kind}" for family in FAMILIES for kind in ("compile", "fit")]
STEPS += ["synthetic_gpt-416", "lstm-64-fit", "lstm-128-fit"]  # 10,000 operations; long scans
# An absence of everything there and back takes as long as the step.
LINK_SHARE = 1.0


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house")
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the older code")
    parser.add_argument("--steps", nargs="+", default=STEPS, metavar="FAMILY-KIND")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    arguments.corpus.mkdir(parents=True, exist_ok=True)
    lines = [line for line in read_lines(arguments.out, Line) if line.step not in arguments.steps]
    made = provenance(0, "cpu", " ".join(sys.argv[1:]))
    for step in arguments.steps:
        for is_linked in (False, True) if step in LINKED else (False,):
            lines += _compared(step, is_linked, arguments.old, arguments.corpus, made)
            write_lines(arguments.out, lines)
    if arguments.out == RESULTS:
        replace_between_markers(FOLDER / "README.md", "house", report(lines))
    print("\n".join(report(lines)))


def _compared(
    step: str, is_linked: bool, old: Path, corpus: Path, made: dict[str, Any]
) -> list[Line]:
    """Return what both planners make of a step, a line per budget."""
    graph = corpus / f"{step}.json"
    if not graph.exists():
        _run(old, ["capture", *step.rsplit("-", 1), str(graph)])
    options = ["--link", str(LINK_SHARE)] if is_linked else []
    kept = corpus / f"{step}{'-linked' if is_linked else ''}.old.jsonl"
    if not kept.exists():
        text = _run(old, ["plan", str(graph), *options])
        kept.write_text(text, encoding="utf-8")
    before = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    budgets = json.dumps({record["setting"]: record["budget_bytes"] for record in before})
    text = _run(ROOT, ["plan", str(graph), *options, "--budgets", budgets])
    after = [json.loads(line) for line in text.splitlines()]
    return [
        Line(step, is_linked, b["setting"], b, a, made)
        for b, a in zip(before, after, strict=True)
    ]


def _run(checkout: Path, arguments: list[str]) -> str:
    """Run the worker with a checkout; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), *arguments]
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return found.stdout


if __name__ == "__main__":
    main()
