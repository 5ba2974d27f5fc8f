"""Rerun the scoreboard: `python -m benchmarks.cluster` writes results.json and docs/cluster.md."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.cluster.tables import MEGATRON, SELECTIVE, Row
from packlight.cluster import Cluster, Transformer, cluster_of, predict
from packlight.cluster.planner import plan_cluster
from packlight.cluster.why import describe_layout
from packlight.units import format_seconds

FOLDER = Path(__file__).parent
PAGE = FOLDER.parent.parent / "docs" / "cluster.md"
ROWS = MEGATRON + SELECTIVE
# The one constant that is calibrated on steps: what long products sustain of the peak.
EFFICIENCIES = [round(0.79 + 0.01 * i, 2) for i in range(9)]
# ... and what two published benchmarks of single products say: 238.8 and 212.3 TFLOP/s.
FROM_PRODUCTS = 0.85


def machine(num_gpus: int, **gpu: float) -> Cluster:
    """Return the machine of all tables, with other constants if wanted."""
    known = cluster_of("a100-80gb", num_gpus)
    return replace(known, gpu=replace(known.gpu, **gpu)) if gpu else known


def error(row: Row, **gpu: float) -> float:
    """Return by how much a prediction is off: of TFLOP/s or of seconds, as the paper has it."""
    seconds = predict(row.model, machine(row.layout.num_gpus, **gpu), row.layout, row.batch).seconds
    if row.seconds is not None:
        return seconds / row.seconds - 1
    return row.measured_seconds / seconds - 1


def summary(errors: Sequence[float]) -> dict[str, float]:
    """Return mean, worst and bias of relative errors."""
    return {
        "mean": mean(map(abs, errors)), "worst": max(map(abs, errors)), "bias": mean(errors),
    }


def scoreboard() -> dict[str, Any]:
    """Return errors of all rows, of each with the constant calibrated on the others, and more."""
    used = machine(8).gpu.matmul_efficiency
    by_value = {value: [error(row, matmul_efficiency=value) for row in ROWS]
                for value in EFFICIENCIES}
    first = len(MEGATRON)

    def calibrated(indices: Sequence[int]) -> float:
        return min(EFFICIENCIES, key=lambda v: mean(abs(by_value[v][i]) for i in indices))

    everything = range(len(ROWS))
    left_out = []
    for i in everything:
        value = calibrated([j for j in everything if j != i])
        left_out.append({"value": value, "error": by_value[value][i]})
    tables = {"megatron": range(first), "selective": range(first, len(ROWS))}
    across = {}
    for name, own in tables.items():
        value = calibrated([i for i in everything if i not in own])
        across[name] = {"value": value, **summary([by_value[value][i] for i in own])}
    return {
        "used": used,
        "calibrated": calibrated(everything),
        "rows": [
            {"name": row.name, "measured": row.seconds or row.tflops,
             "unit": "s" if row.seconds else "TFLOP/s",
             "error": by_value[used][i], "left_out": left_out[i]}
            for i, row in enumerate(ROWS)
        ],
        "tables": {
            name: {
                "used": summary([by_value[used][i] for i in own]),
                "left_out": summary([left_out[i]["error"] for i in own]),
                "across": across[name],
                "from_products": summary([by_value[FROM_PRODUCTS][i] for i in own]),
            }
            for name, own in tables.items()
        },
    }


def sensitivity() -> list[dict[str, Any]]:
    """Return what a tenth more of each constant does to predicted seconds: which ones matter."""
    rows = [MEGATRON[3], MEGATRON[6], SELECTIVE[3]]
    base = machine(8).gpu
    found = []
    constants = ("matmul_efficiency", "pipeline_depth", "memory_efficiency", "kernel_seconds")
    for name in constants:
        changed = {name: 1.1 * getattr(base, name)}
        ratios = []
        for row in rows:
            n = row.layout.num_gpus
            now, then = (
                predict(row.model, machine(n, **gpu), row.layout, row.batch).seconds
                for gpu in ({}, changed)
            )
            ratios.append(then / now - 1)
        found.append({"constant": name, "change": dict(zip(
            [row.name for row in rows], ratios, strict=True
        ))})
    return found


def plans() -> list[dict[str, Any]]:
    """Return what the planner would do instead on the same machines, with the same batch."""
    found = []
    for row in [*MEGATRON, *SELECTIVE[1::2]]:
        started = time.process_time()
        plan = plan_cluster(row.model, machine(row.layout.num_gpus), row.batch)
        took = time.process_time() - started
        same = predict(row.model, machine(row.layout.num_gpus), row.layout, row.batch).seconds
        found.append({
            "name": row.name, "layout": describe_layout(plan.layout),
            "seconds": plan.prediction.seconds, "published_layout_seconds": same,
            "bound_seconds": plan.bound_seconds, "tflops": plan.tflops,
            "planning_cpu_seconds": took,
        })
        print(row.name, found[-1]["layout"], f"{same / plan.prediction.seconds:.2f}x", flush=True)
    return found


def large() -> list[dict[str, Any]]:
    """Return how long planning takes for very many GPUs."""
    model, found = Transformer(128, 25600, 160), []
    for num_gpus in (3072, 10240):
        started = time.process_time()
        plan = plan_cluster(model, machine(num_gpus), num_gpus)
        found.append({"gpus": num_gpus, "cpu_seconds": time.process_time() - started,
                      "layout": describe_layout(plan.layout),
                      "seconds": plan.prediction.seconds, "tflops": plan.tflops,
                      "bound_seconds": plan.bound_seconds})
    return found


def written(results: dict[str, Any]) -> str:
    """Return the page's generated part."""
    score = results["scoreboard"]
    lines = [
        "| configuration | published | predicted | error | ... calibrated without this row |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in score["rows"]:
        predicted = row["measured"] * (1 + row["error"])
        digits = 2 if row["unit"] == "s" else 0
        lines.append(
            f"| {row['name']} | {row['measured']:g} {row['unit']} | {predicted:.{digits}f} "
            f"{row['unit']} | {row['error']:+.1%} | {row['left_out']['error']:+.1%} |"
        )
    lines += [
        "",
        "| | Megatron, 10 rows: mean, worst | selective recomputation, 8 rows: mean, worst |",
        "| --- | ---: | ---: |",
    ]
    names = {
        "used": f"as used (products sustain {score['used']:g} of the peak)",
        "left_out": "each row predicted with that constant calibrated on the 17 others",
        "across": "each table predicted with it calibrated on the other table",
        "from_products": f"nothing calibrated on steps ({FROM_PRODUCTS:g}, from single products)",
    }
    for key, name in names.items():
        cells = [
            f"{score['tables'][table][key]['mean']:.1%}, {score['tables'][table][key]['worst']:.1%}"
            for table in ("megatron", "selective")
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        "A tenth more of a constant changes predicted seconds by:",
        "",
        "| constant | " + " | ".join(results["sensitivity"][0]["change"]) + " |",
        "| --- |" + " ---: |" * len(results["sensitivity"][0]["change"]),
        *("| `" + each["constant"] + "` | "
          + " | ".join(f"{value:+.1%}" for value in each["change"].values()) + " |"
          for each in results["sensitivity"]),
        "",
        "What the planner would do on the same machines with the same batch, both predicted:",
        "",
        "| configuration | plan | as published | planned | gain | TFLOP/s | planned in (CPU) |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for plan in results["plans"]:
        gain = plan["published_layout_seconds"] / plan["seconds"]
        lines.append(
            f"| {plan['name']} | {plan['layout']} | "
            f"{format_seconds(plan['published_layout_seconds'])} | "
            f"{format_seconds(plan['seconds'])} | {gain:.2f}x | {plan['tflops']:.0f} | "
            f"{format_seconds(plan['planning_cpu_seconds'])} |"
        )
    lines += ["", "One trillion parameters, one sample for each GPU:", "",
              "| GPUs | plan | step | bound | planned in (CPU) |",
              "| ---: | --- | ---: | ---: | ---: |"]
    for plan in results["large"]:
        lines.append(
            f"| {plan['gpus']:,} | {plan['layout']} | {format_seconds(plan['seconds'])} | "
            f"{format_seconds(plan['bound_seconds'])} | {format_seconds(plan['cpu_seconds'])} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run everything, or write the page again from what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page-only", action="store_true", help="from results.json")
    arguments = parser.parse_args()
    file = FOLDER / "results.json"
    if not arguments.page_only:
        results = {
            "command": "python -m benchmarks.cluster",
            "python": platform.python_version(),
            "machine": f"{platform.system()} {platform.machine()}",
            "scoreboard": scoreboard(),
            "sensitivity": sensitivity(),
            "plans": plans(),
            "large": large(),
        }
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    results = json.loads(file.read_text(encoding="utf-8"))
    begin, end = "<!-- cluster:begin -->", "<!-- cluster:end -->"
    page = PAGE.read_text(encoding="utf-8")
    head, _, rest = page.partition(begin)
    _, _, tail = rest.partition(end)
    PAGE.write_text(f"{head}{begin}\n{written(results)}\n{end}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
