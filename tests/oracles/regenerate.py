"""Solve every graph of `graphs.py` exactly and write the answers to `optimal.json`.

`python -m tests.oracles.regenerate` takes a few minutes on one core. Answers whose graph has not
changed are kept; `--all` solves everything anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from packlight.step import StepGraph
from packlight.step.serialize import encode
from tests.oracles.checkmate import Status, fastest_schedule, smallest_peak
from tests.oracles.graphs import graphs
from tests.oracles.liveness import plain_order, recount_peak_bytes

ANSWERS_PATH = Path(__file__).with_name("optimal.json")
# Budgets, as places between the smallest peak (0) and the plain step's (1).
PLACES = (0.75, 0.5, 0.25, 0.0)
TIME_LIMIT_SECONDS = 300.0


def graph_hash(graph: StepGraph) -> str:
    """Return a digest of everything in the graph that a planner could look at."""
    return hashlib.sha256(json.dumps(encode(graph)).encode()).hexdigest()[:16]


def solve(graph: StepGraph) -> dict[str, Any]:
    """Return the record of one graph: its peaks, and the optimal seconds for each budget."""
    plain_bytes = recount_peak_bytes(graph, plain_order(graph).instructions)
    smallest = smallest_peak(graph, TIME_LIMIT_SECONDS)
    if smallest.status is not Status.OPTIMAL:
        raise RuntimeError(f"smallest peak: {smallest.status} in {TIME_LIMIT_SECONDS} s")
    budgets = []
    for place in PLACES:
        budget_bytes = round(smallest.peak_bytes + place * (plain_bytes - smallest.peak_bytes))
        answer = fastest_schedule(graph, budget_bytes, TIME_LIMIT_SECONDS)
        if answer.status is not Status.OPTIMAL or answer.schedule is None:
            raise RuntimeError(f"budget {budget_bytes}: {answer.status}")
        peak_bytes = recount_peak_bytes(graph, answer.schedule.instructions)
        budgets.append(
            {"budget_bytes": budget_bytes, "seconds": answer.seconds, "peak_bytes": peak_bytes}
        )
    return {
        "graph_hash": graph_hash(graph),
        "num_operations": len(graph.operations),
        "plain_seconds": graph.seconds,
        "plain_peak_bytes": plain_bytes,
        "smallest_peak_bytes": smallest.peak_bytes,
        "budgets": budgets,
    }


def load_answers() -> dict[str, dict[str, Any]]:
    """Return the committed answers by graph name."""
    return json.loads(ANSWERS_PATH.read_text()) if ANSWERS_PATH.exists() else {}


def main() -> None:
    """Bring `optimal.json` up to date."""
    known = {} if "--all" in sys.argv else load_answers()
    answers = {}
    for name, graph in graphs().items():
        if known.get(name, {}).get("graph_hash") == graph_hash(graph):
            answers[name] = known[name]
            continue
        answers[name] = solve(graph)
        slowdowns = [b["seconds"] / graph.seconds for b in answers[name]["budgets"]]
        print(f"{name:18}", *(f"{slowdown:.3f}" for slowdown in slowdowns), flush=True)
    ANSWERS_PATH.write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main()
