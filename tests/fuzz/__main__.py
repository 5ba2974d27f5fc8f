"""A long fuzz: `python -m tests.fuzz --seconds 3600 --seed 0`.

Prints a line for each trial that ends with an error of Packlight's or has a problem, the latter
with the simplest trial found that has it, too.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import torch

from tests.fuzz.trial import Outcome, Trial, drawn, outcome_of, simpler


def kind_of(problem: str) -> str:
    """Return what a problem has in common with others of its kind."""
    words = problem.partition(": ")[2] if problem.startswith("step") else problem
    return " ".join("".join(c for c in words if not c.isdigit()).split()[:4])


def simplest(trial: Trial, outcome: Outcome, seconds: float) -> tuple[Trial, Outcome]:
    """Return the simplest trial with a problem of the same kind that is found in some time."""
    end, kind = time.perf_counter() + seconds, kind_of(outcome.problem)
    improved = True
    while improved and time.perf_counter() < end:
        improved = False
        for candidate in simpler(trial):
            found = outcome_of(candidate)
            if found.problem and kind_of(found.problem) == kind:
                trial, outcome, improved = candidate, found, True
                break
            if time.perf_counter() > end:
                break
    return trial, outcome


def main() -> int:
    """Run trials until the time is over; return 1 if any has a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial")
    parser.add_argument("--simplify", type=float, default=60.0, help="seconds for each problem")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    end, seed = time.perf_counter() + arguments.seconds, arguments.seed
    num_steps, said, problems = 0, Counter[str](), Counter[str]()
    while time.perf_counter() < end:
        trial = drawn(seed)
        outcome = outcome_of(trial)
        num_steps += outcome.num_steps
        if outcome.said:
            said[outcome.said[:80]] += 1
            print(f"seed {seed}: {outcome.said}", flush=True)
        if outcome.problem:
            problems[kind_of(outcome.problem)] += 1
            print(f"seed {seed}: PROBLEM {outcome.problem}\n  {trial}", flush=True)
            if problems[kind_of(outcome.problem)] == 1 and arguments.simplify:
                trial, outcome = simplest(trial, outcome, arguments.simplify)
                print(f"  simplest: {outcome.problem}\n  {trial}", flush=True)
        seed += 1
    print(f"{seed - arguments.seed} trials, {num_steps} steps, {sum(said.values())} errors said, "
          f"{sum(problems.values())} problems: {dict(problems)}")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
