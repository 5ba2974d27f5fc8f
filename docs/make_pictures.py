"""Draws docs/memory.png from a real capture: `python docs/make_pictures.py`.

The reference GPT of the benchmarks is captured, profiled on this machine and planned for 35% of
what its plain step allocates. Nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import packlight  # noqa: E402
from packlight.planner import plain_schedule, plan_schedule  # noqa: E402
from packlight.report.figures import memory_over_time  # noqa: E402
from packlight.step import simulate  # noqa: E402
from tests.models import make  # noqa: E402

BUDGET_SHARE = 0.35


def main() -> None:
    """Draw the picture of the README."""
    parser = argparse.ArgumentParser(description="Draw the README's picture.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "memory.png")
    parser.add_argument("--quick", action="store_true", help="a small model, to try the script")
    arguments = parser.parse_args()
    sizes = {"layers": 3, "width": 96, "length": 64, "vocabulary": 512} if arguments.quick else {}
    model, batch, loss_fn = make("reference_gpt", **sizes)
    graph = packlight.profile(model, loss_fn, batch).graph
    plain_bytes = simulate(graph, plain_schedule(graph)).peak_bytes
    plan = plan_schedule(graph, int(BUDGET_SHARE * plain_bytes))
    figure = memory_over_time(graph, plan, height_inches=3.9)
    figure.savefig(arguments.out, dpi=110, metadata={"Software": None})
    print(
        f"{arguments.out.name}: {plain_bytes / 2**20:.0f} MiB to {plan.peak_bytes / 2**20:.0f} MiB "
        f"at a predicted {plan.slowdown:.3f}x, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
