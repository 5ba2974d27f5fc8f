"""Print how far the planner is from the optimum: `python -m tests.oracles.compare [NAME...]`.

One line per graph: smallest peak over the smallest possible, then for each budget seconds over the
optimum's ("-" where the planner finds nothing) and, in brackets, the lower bound over the optimum.
"""

from __future__ import annotations

import sys
import time

from packlight.errors import InfeasibleBudgetError
from packlight.planner import lower_bound_seconds, plan_schedule, smallest_plan
from tests.oracles.graphs import graphs
from tests.oracles.regenerate import load_answers


def main(names: list[str]) -> None:
    """Print the comparison for graphs whose name contains one of `names`, or for all."""
    failures, total = 0, 0
    for name, answer in load_answers().items():
        if names and not any(part in name for part in names):
            continue
        graph, cells = graphs()[name], []
        started = time.perf_counter()
        for record in answer["budgets"]:
            budget_bytes, optimum = record["budget_bytes"], record["seconds"]
            bound = lower_bound_seconds(graph, budget_bytes) / optimum
            total += 1
            try:
                ratio = plan_schedule(graph, budget_bytes).seconds / optimum
                failures += ratio > 1.01
                cells.append(f"{ratio:.4f} [{bound:.3f}]")
            except InfeasibleBudgetError:
                failures += 1
                cells.append(f"-      [{bound:.3f}]")
        smallest = smallest_plan(graph).peak_bytes / answer["smallest_peak_bytes"]
        seconds = time.perf_counter() - started
        row = f"{name:16} smallest {smallest:.3f} | {' '.join(cells)} | {seconds:.2f} s"
        print(row, flush=True)
    print(f"{failures} of {total} budgets: infeasible, or more than 1% from the optimum")


if __name__ == "__main__":
    main(sys.argv[1:])
