"""Draws the documentation's pictures from real plans: `python docs/make_pictures.py [NAME ...]`.

    memory          the reference GPT of the benchmarks, plain and in 35% of what that allocates
    retention       the worked example of how-a-budget-becomes-a-schedule.md, plain and planned
    chunked_head    a small GPT with a large vocabulary, its loss head whole and in row chunks
    offload         the character GPT with a disk to offload to
    pipelines       four schedules of the same pipeline
    report          the page of `packlight plan examples/char_gpt.py --report`, in a real browser

Everything is captured and profiled on this machine; nothing is trained. Times differ from machine
to machine, shapes of curves do not. The last one needs Chromium.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import packlight  # noqa: E402
from packlight.cli import build_parser, main  # noqa: E402
from packlight.cli.options import moves  # noqa: E402
from packlight.cli.profile import planned  # noqa: E402
from packlight.cluster import StageCosts, simulate_pipeline  # noqa: E402
from packlight.cluster.schedules import (  # noqa: E402
    interleaved,
    one_f_one_b,
    varuna,
    zero_bubble_h1,
)
from packlight.fitting import planned_step  # noqa: E402
from packlight.planner import plain_schedule, plan_schedule  # noqa: E402
from packlight.planner.accounts import curve  # noqa: E402
from packlight.report.cluster import pipeline_picture  # noqa: E402
from packlight.report.figures import memory_over_time  # noqa: E402
from packlight.report.style import LIGHT, drawing  # noqa: E402
from packlight.report.transfers import lanes_over_time  # noqa: E402
from packlight.run.train_step import TrainStep  # noqa: E402
from packlight.step import Action, Schedule, StepGraph, simulate  # noqa: E402
from tests.browser import Browser, find_chromium  # noqa: E402
from tests.models import make  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BUDGET_SHARE = 0.35
DPI = 110
NUM_COLOURS = 128
MIB = 2**20
EXAMPLE = ROOT / "docs" / "how-a-budget-becomes-a-schedule.md"
EXAMPLE_BUDGET_BYTES = 14 * MIB
LABELS = {"f1.0": "a", "f2.0": "b", "b3.0": "grad b", "b2.0": "grad a", "b1.0": "grad w"}
SMALL = {"layers": 3, "width": 96, "length": 64, "vocabulary": 512}
WIDE_HEAD = {
    "layers": 2, "width": 128, "heads": 4, "length": 128,
    "vocabulary": 8192, "batch_size": 8,
}


def memory(quick: bool) -> bytes:
    """Return the picture of the README: memory over a step, plain and planned."""
    model, batch, loss_fn = make("reference_gpt", **(SMALL if quick else {}))
    graph = packlight.profile(model, loss_fn, None, batch).graph
    plain_bytes = simulate(graph, plain_schedule(graph)).peak_bytes
    plan = plan_schedule(graph, int(BUDGET_SHARE * plain_bytes))
    print(
        f"  {plain_bytes / MIB:.0f} MiB to {plan.peak_bytes / MIB:.0f} MiB at a predicted "
        f"{plan.slowdown:.3f}x"
    )
    return _png(memory_over_time(graph, plan, height_inches=3.9))


# -- the worked example


def worked_example() -> StepGraph:
    """Return the graph that the first Python block of the planner's page builds."""
    block = re.search(r"^```python\n(.*?)^```", EXAMPLE.read_text(encoding="utf-8"), re.M | re.S)
    assert block is not None
    names: dict[str, Any] = {}
    with redirect_stdout(io.StringIO()):
        exec(block.group(1), names)
    graph: StepGraph = names["graph"]
    return graph


def intervals(
    graph: StepGraph, schedule: Schedule
) -> tuple[dict[int, list[tuple[float, float]]], list[tuple[str, float, float]]]:
    """Return when each buffer is in memory, and (name, start, end) of each run of an operation."""
    timeline = simulate(graph, schedule)
    since: dict[int, float] = {}
    held: dict[int, list[tuple[float, float]]] = {}
    runs = []
    for instruction, done in zip(schedule.instructions, timeline.done_seconds, strict=True):
        if instruction.action is Action.RUN:
            operation = graph.operations[instruction.target]
            start = done - operation.seconds
            runs.append((operation.name, start, done))
            since |= dict.fromkeys(operation.creates, start)
        else:
            b = instruction.target
            held.setdefault(b, []).append((since.pop(b), done))
    for b, start in since.items():
        held.setdefault(b, []).append((start, timeline.seconds))
    return held, runs


def retention(quick: bool) -> bytes:
    """Return which buffer is in memory when, and what that adds up to, plain and planned."""
    graph = worked_example()
    plan = plan_schedule(graph, EXAMPLE_BUDGET_BYTES)
    schedules = {"plain": plain_schedule(graph), "planned": plan.schedule}
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(10.2, 4.9))
        for column, (name, schedule) in enumerate(schedules.items()):
            left = 0.06 + 0.49 * column
            top = figure.add_axes((left, 0.46, 0.43, 0.43))
            _draw_intervals(top, graph, schedule, LIGHT[name])
            peak = simulate(graph, schedule).peak_bytes // MIB
            title = "plain: every buffer until its last use" if name == "plain" else (
                "planned for 14 MiB: a is dropped, f1 runs again"
            )
            top.set_title(title, loc="left", fontsize=10, fontweight="bold", pad=22)
            below = figure.add_axes((left, 0.11, 0.43, 0.30))
            drawn = curve(graph, schedule)
            heights = [b / MIB for b in drawn.bytes]
            milliseconds = [s * 1e3 for s in drawn.seconds]
            below.fill_between(milliseconds, heights, color=LIGHT[name], alpha=0.4, linewidth=0)
            below.plot(milliseconds, heights, color=LIGHT[name], linewidth=1.3)
            below.axhline(14, color=LIGHT["budget"], linewidth=1.3, linestyle=(0, (5, 3)))
            below.text(drawn.peak_seconds * 1e3, peak + 0.5, f"{peak} MiB", ha="center",
                       fontweight="bold")
            below.set_ylim(0, 22)
            below.set_yticks([0, 4, 8, 12, 16, 20])
            below.grid(False)
            below.set_xlim(0, 26.5)
            below.set_xlabel("milliseconds into the step")
            if column == 0:
                below.set_ylabel("MiB in memory")
            else:
                below.text(0.3, 14.5, "budget 14 MiB", color=LIGHT["budget"])
    return _png(figure)


def _draw_intervals(axes: Axes, graph: StepGraph, schedule: Schedule, colour: str) -> None:
    held, runs = intervals(graph, schedule)
    shown = [b.id for b in graph.buffers if b.bytes and not b.kind.is_resident]
    for row, b in enumerate(shown):
        spans = [(start * 1e3, (end - start) * 1e3) for start, end in held[b]]
        axes.broken_barh(spans, (row - 0.36, 0.72), color=colour, alpha=0.45, linewidth=0)
        size = f"{graph.buffers[b].bytes // MIB} MiB"
        for start, length in spans:
            if length >= 3:
                axes.text(start + length / 2, row, size, ha="center", va="center", fontsize=8.5)
    for name, start, end in runs:
        axes.axvline(end * 1e3, color=LIGHT["rule"], linewidth=0.8, zorder=0)
        axes.text((start + end) * 5e2, -0.65, name, ha="center", va="bottom", fontsize=9)
    axes.set_yticks(range(len(shown)), [LABELS[graph.buffers[b].name] for b in shown],
                    color=LIGHT["ink"])
    axes.set_ylim(len(shown) - 0.5, -0.6)
    axes.set_xlim(0, 26.5)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)


# -- moves


def chunked_head(quick: bool) -> bytes:
    """Return memory over a step whose loss head runs whole, and the same in chunks."""
    model, batch, loss_fn = make("reference_gpt", **WIDE_HEAD)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps: dict[str, TrainStep] = {}
    for name, allowed in (("plain", ()), ("planned", ("chunk",))):
        budget = None if name == "plain" else round(0.5 * steps["plain"].peak_bytes)
        steps[name] = planned_step(model, loss_fn, optimizer, batch, budget, moves=allowed)
    head = next(text for name, text in steps["planned"].how_it_runs() if name == "moves")
    print(f"  {head}")
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(10.2, 3.4))
        axes = figure.add_axes((0.075, 0.14, 0.905, 0.72))
        for (name, step), label in zip(steps.items(), ("loss head whole", head), strict=True):
            base = step.profile.memory.resident_bytes
            drawn = curve(step.profile.graph, step.plan.schedule)
            heights = [(base + b) / MIB for b in drawn.bytes]
            milliseconds = [s * 1e3 for s in drawn.seconds]
            axes.fill_between(milliseconds, heights, color=LIGHT[name], alpha=0.35, linewidth=0)
            axes.plot(milliseconds, heights, color=LIGHT[name], linewidth=1.3,
                      label=f"{label}: {max(heights):.0f} MiB")
        axes.set_ylim(0)
        axes.set_xlim(0)
        axes.set_xlabel("milliseconds into the step")
        axes.set_ylabel("MiB in memory")
        figure.legend(loc="upper left", bbox_to_anchor=(0.066, 1.0), ncols=2, columnspacing=2.0)
    return _png(figure)


def offload(quick: bool) -> bytes:
    """Return the two lanes of a step that sends activations and optimizer state to a disk."""
    arguments = build_parser().parse_args(["plan", "examples/char_gpt.py", "--exact"])
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        step = planned(
            arguments, 24 * MIB, moves=moves(arguments), offload_directory=Path(folder)
        )
    print(f"  {step.how_it_runs()}")
    machine = step.profile.machine
    assert machine is not None
    return _png(lanes_over_time(step.profile.graph, step.plan.schedule, machine))


def pipelines(quick: bool) -> bytes:
    """Return four schedules of four ranks and eight microbatches, layers computed again."""
    p, m = 4, 8
    whole = StageCosts(1.0, 1.0, 1.0, recompute_seconds=1.0)
    half = StageCosts(0.5, 0.5, 0.5, recompute_seconds=0.5)
    kept = StageCosts(1.0, 1.0, 1.0)
    timelines = {
        "1F1B, all computed again": simulate_pipeline(one_f_one_b(p, m), [whole] * p),
        "interleaved, two chunks": simulate_pipeline(interleaved(p, m, 2), [half] * 2 * p),
        "Varuna: before the gradient is there; the last stage keeps": simulate_pipeline(
            varuna(p, m), [*[whole] * (p - 1), kept]
        ),
        "ZB-H1: backward in halves, nothing computed again": simulate_pipeline(
            zero_bubble_h1(p, m), [kept] * p
        ),
    }
    return _png(pipeline_picture(timelines))


def report(quick: bool) -> bytes:
    """Return a report page as a browser shows it: its first screen and a half."""
    executable = find_chromium()
    if executable is None:
        sys.exit("the picture of the report needs Chromium (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        command = ["plan", "examples/char_gpt.py", "--budget", "80MiB", "--exact"]
        assert main([*command, "--report", folder]) == 0
        with Browser(executable) as browser:
            browser.look(1100, 1320)
            browser.open(Path(folder) / "index.html")
            return browser.screenshot()


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI, metadata={"Software": None})
    return stream.getvalue()


def smaller(png: bytes) -> bytes:
    """Return the picture in few colours, which flat drawings do not miss."""
    stream = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(NUM_COLOURS, dither=Image.Dither.NONE).save(stream, "png", optimize=True)
    return stream.getvalue()


PICTURES: dict[str, Callable[[bool], bytes]] = {
    f.__name__: f for f in (memory, retention, chunked_head, offload, pipelines, report)
}


def draw() -> None:
    """Draw the pictures that are asked for, all if none is."""
    parser = argparse.ArgumentParser(description="Draw the documentation's pictures.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PICTURES))
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="default: docs")
    parser.add_argument("--quick", action="store_true", help="a small model, to try the script")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(PICTURES):
        parser.error(f"no such picture: {', '.join(sorted(unknown))}")
    out = arguments.out.resolve()
    os.chdir(ROOT)
    for name in arguments.names or PICTURES:
        print(name)
        (out / f"{name}.png").write_bytes(smaller(PICTURES[name](arguments.quick)))


if __name__ == "__main__":
    draw()
