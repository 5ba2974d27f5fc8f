"""One `fit` in a process of its own, by whichever checkout is first on the path.

    PYTHONPATH=checkout python -P benchmarks/fit_time/trial.py --case gpt2-checkpoint

Prints a JSON object. It stands alone: of this folder it takes what lies beside it, of the checkout
the library, and the models of `tests.models` and `benchmarks.largest`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

# A budget that is too small is followed by the one that the error names.
MOST_BUDGETS = 3
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Fit once and print what it took."""
    parser = argparse.ArgumentParser(prog="trial.py", description=__doc__)
    parser.add_argument("--case", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--budget", type=int, help="in bytes, for the case's own")
    arguments = parser.parse_args()

    import torch

    begin = time.perf_counter(), time.process_time()
    from packlight import fit

    result: dict[str, Any] = {
        "import_seconds": time.perf_counter() - begin[0],
        "import_cpu_seconds": time.process_time() - begin[1],
    }
    import packlight

    sys.path.append(str(HERE))  # last: what the checkout has goes first
    from cases import CASES
    from where import Sampler

    torch.set_num_threads(1)
    case = CASES[arguments.case]
    depth = case.quick_depth if arguments.quick else case.depth
    budget_bytes = case.quick_budget_bytes if arguments.quick else case.budget_bytes
    budget_bytes = arguments.budget or budget_bytes
    model, batch, loss_fn, optimizer = case.build(depth)
    moves = tuple(name for name in packlight.MOVES if name != "offload")
    begin = time.perf_counter(), time.process_time()
    with Sampler() as sampler:
        for _ in range(MOST_BUDGETS):
            try:
                step = fit(
                    model, loss_fn, optimizer, batch, budget_bytes, moves=moves, progress=False
                )
            except packlight.errors.InfeasibleBudgetError as error:  # type: ignore[attr-defined]
                budget_bytes = result["smallest_bytes"] = error.smallest_bytes
            else:
                result |= {
                    "budget_bytes": budget_bytes, "peak_bytes": step.peak_bytes,
                    "predicted_seconds": step.way.seconds,
                    "moves": dict(step.how_it_runs()).get("moves"),
                }
                break
    result["seconds"] = time.perf_counter() - begin[0]
    result["cpu_seconds"] = time.process_time() - begin[1]
    result["parts"] = {k: round(v, 4) for k, v in sampler.seconds.items()}
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
