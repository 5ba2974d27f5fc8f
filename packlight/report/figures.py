"""The report's figures. Each function returns a matplotlib Figure; none touches global state.

Memory is shown for the whole step where a `StepMemory` is given: resident bytes (parameters,
optimizer state, batch) lie under what forward and backward allocate.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from packlight.planner.accounts import (
    Curve,
    PlainStep,
    curve,
    layer_groups,
    peak_by_kind,
    peak_by_layer,
    plain_step,
    whole_step_bytes,
)
from packlight.planner.explain import operation_at
from packlight.report.style import LIGHT, drawing
from packlight.step import Machine, Plan, StepGraph, simulate
from packlight.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from packlight.step.profile import StepMemory

_MAX_BARS = 8
WIDTH_INCHES = 10.2
# Of `memory_kinds`, in their order.
KIND_COLOURS = ("parameters", "optimizer", "allocated", "batch", "accumulated", "beside")


def memory_over_time(
    graph: StepGraph,
    plan: Plan | None,
    *,
    plain: PlainStep | None = None,
    memory: StepMemory | None = None,
    machine: Machine | None = None,
    height_inches: float = 4.3,
) -> Figure:
    """Return the picture of memory over one step, planned against plain.

    Args:
        graph: the step.
        plan: the plan; None draws the plain step alone.
        plain: the plain step, made here if not given.
        memory: what is in memory besides what the step allocates; None leaves it out.
        machine: with the lanes of the plan's transfers, if it has some.
        height_inches: of the figure; its width is fixed.
    """
    base = 0 if memory is None else memory.resident_bytes
    plain = plain or plain_step(graph)
    plain_base = base + plain.resting_bytes
    plain_curve = curve(plain.graph, plain.schedule)
    plan_curve = None if plan is None else curve(graph, plan.schedule, machine)
    curves = [c for c in (plain_curve, plan_curve) if c is not None]
    budget = None if plan is None or plan.budget_bytes is None else base + plan.budget_bytes
    top = max(plain_base + plain_curve.peak_bytes, budget or 0, 1)
    if plan_curve is not None:
        top = max(top, base + plan_curve.peak_bytes)
    end = max([c.total_seconds for c in curves] + [1e-9])
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, height_inches))
        axes = figure.add_axes((0.075, 0.12, 0.905, 0.70))
        if base:
            axes.fill_between(
                [0, end], [base, base], color=LIGHT["resident"], linewidth=0,
                label=f"resident {format_bytes(base)}",
            )
        _draw_curve(axes, plain_curve, plain_base, "plain", plain_name(plan), alpha=0.35)
        if plan_curve is not None and plan is not None:
            label = f"planned, {plan.slowdown:.2f}x the time"
            _draw_curve(axes, plan_curve, base, "planned", label, alpha=0.40)
        if budget is not None:
            axes.axhline(
                budget, color=LIGHT["budget"], linewidth=1.4, linestyle=(0, (5, 3)),
                label=f"budget {format_bytes(budget)}",
            )
        axes.set_xlim(0, end)
        axes.set_ylim(0, top * 1.17)
        shown = plan_curve or plain_curve
        _mark_boundary(axes, shown, end, planned=plan_curve is not None)
        _mark_peak(axes, plain_curve, plain_base, "plain", end)
        if plan_curve is not None:
            _mark_peak(axes, plan_curve, base, "planned", end, budget)
        _byte_axis(axes.yaxis, top)
        second_axis(axes.xaxis, end)
        axes.set_xlabel(into_the_step(end))
        handles, labels = axes.get_legend_handles_labels()
        order = sorted(range(len(labels)), key=lambda i: labels[i].startswith("resident"))
        figure.legend(
            [handles[i] for i in order], [labels[i] for i in order],
            loc="upper left", bbox_to_anchor=(0.066, 1.0), ncols=2,
            columnspacing=2.0, handlelength=1.6, borderaxespad=0.4,
        )
    return figure


def _draw_curve(
    axes: Axes, drawn: Curve, base: int, colour: str, label: str, *, alpha: float
) -> None:
    heights = [base + b for b in drawn.bytes]
    axes.fill_between(
        drawn.seconds, [base] * len(heights), heights, color=LIGHT[colour], alpha=alpha, linewidth=0
    )
    where = f", peak {format_bytes(base + drawn.peak_bytes)} at {_clip(drawn.peak_name, 44)}"
    axes.plot(drawn.seconds, heights, color=LIGHT[colour], linewidth=1.3, label=label + where)


def _mark_boundary(axes: Axes, drawn: Curve, end: float, *, planned: bool) -> None:
    at = drawn.forward_seconds
    axes.axvline(at, color=LIGHT["muted"], linewidth=0.9, linestyle=(0, (1, 2)))
    inside: dict[str, Any] = {
        "transform": axes.get_xaxis_transform(), "color": LIGHT["muted"], "va": "top",
        "bbox": {"boxstyle": "square,pad=0.1", "fc": LIGHT["surface"], "ec": "none"},
    }
    gap = 0.008 * end
    who = " (planned)" if planned else ""
    if at > 0.14 * end:
        axes.text(at - gap, 0.985, f"forward{who}", ha="right", **inside)
    if at < 0.86 * end:
        axes.text(at + gap, 0.985, f"backward{who}", ha="left", **inside)


def _mark_peak(
    axes: Axes, drawn: Curve, base: int, colour: str, end: float, budget: int | None = None
) -> None:
    height = base + drawn.peak_bytes
    axes.plot(
        [drawn.peak_seconds], [height], marker="o", markersize=6.5, color=LIGHT[colour],
        markeredgecolor=LIGHT["surface"], markeredgewidth=1.4, zorder=5, linestyle="none",
    )
    # Before the peak memory is lower than after it, so there is room; and a good plan's peak is
    # close under its budget, so the words go above that line.
    beyond_left = drawn.peak_seconds < 0.10 * end
    axes.annotate(
        format_bytes(height), (drawn.peak_seconds, max(height, budget or 0)),
        xytext=(9 if beyond_left else -9, 5), textcoords="offset points",
        ha="left" if beyond_left else "right", va="bottom", fontweight="bold", zorder=6,
        bbox={"boxstyle": "round,pad=0.2", "fc": LIGHT["surface"], "ec": "none", "alpha": 0.75},
    )


def peak_breakdown(
    graph: StepGraph,
    plan: Plan | None,
    *,
    plain: PlainStep | None = None,
    machine: Machine | None = None,
) -> Figure:
    """Return two bar charts: what is live at the peak, by kind and by layer, plain and planned.

    Args: as `memory_over_time`.
    """
    plain = plain or plain_step(graph)
    timelines = {"plain": plain.timeline}
    schedules = {"plain": plain.schedule}
    if plan is not None:
        timelines["planned"] = simulate(graph, plan.schedule, machine)
        schedules["planned"] = plan.schedule
    groups = layer_groups(graph, 30)
    by_kind = {name: peak_by_kind(graph, timeline) for name, timeline in timelines.items()}
    by_layer = {name: peak_by_layer(graph, found, groups) for name, found in timelines.items()}
    for name, timeline in timelines.items():
        layer = groups[operation_at(graph, schedules[name], timeline.peak_index).layer]
        by_layer[name][layer] = by_layer[name].get(layer, 0) + timeline.peak_workspace_bytes
    kinds = [k for k in next(iter(by_kind.values())) if any(v[k] for v in by_kind.values())]
    # The layers in question are those at the peak of what is asked about: the plan if there is one.
    asked = by_layer["planned" if plan is not None else "plain"]
    layers = sorted(asked, key=lambda layer: -asked[layer])[:_MAX_BARS]
    rest = {name: sum(v for k, v in found.items() if k not in layers)
            for name, found in by_layer.items()}
    if any(rest.values()):
        layers.append("all others")
        for name, found in by_layer.items():
            found["all others"] = rest[name]
    rows = max(len(kinds), len(layers))
    row_inches = 0.46 if plan is not None else 0.30
    with drawing() as matplotlib:
        height = 1.0 + row_inches * rows
        figure: Figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, height))
        bottom, span = 0.12 / height, 1 - 0.75 / height
        panels = []
        for edge, names, values in ((0.165, kinds, by_kind), (0.68, layers, by_layer)):
            share = len(names) / rows
            panels.append(figure.add_axes((edge, bottom + span * (1 - share), 0.25, span * share)))
            _bars(panels[-1], names, values)
        left, right = panels
        left.set_title("by kind", loc="left", fontsize=9.5, fontweight="bold", pad=4)
        right.set_title("by layer", loc="left", fontsize=9.5, fontweight="bold", pad=4)
        if plan is not None:
            handles, labels = left.get_legend_handles_labels()
            figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=2,
                          borderaxespad=0.2, handlelength=1.2)
    return figure


def _bars(axes: Axes, names: list[str], values: dict[str, dict[str, int]]) -> None:
    top = max([found.get(name, 0) for found in values.values() for name in names] + [1])
    thickness = 0.76 / len(values)
    labels = {"plain": "at the plain peak", "planned": "at the planned peak"}
    for row, (series, found) in enumerate(values.items()):
        places = [i - 0.38 + thickness * (row + 0.5) for i in range(len(names))]
        lengths = [found.get(name, 0) for name in names]
        axes.barh(
            places, lengths, height=thickness * 0.88, color=LIGHT[series], label=labels[series]
        )
        for place, length in zip(places, lengths, strict=True):
            axes.text(length + 0.015 * top, place, format_bytes(length), va="center", fontsize=8.0,
                      color=LIGHT["muted"])
    shown = [_clip(name, 28) for name in names]
    axes.set_yticks(range(len(names)), shown, color=LIGHT["ink"])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.02 * top)
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.set_xticks([])


def pareto_curve(
    plans: list[Plan], plan: Plan | None, *, memory: StepMemory | None = None
) -> Figure:
    """Return peak against slowdown for plans of several budgets, and the bound below them.

    Args:
        plans: at least one, of the same graph.
        plan: the current one, marked.
        memory: adds resident bytes to every peak, as in `memory_over_time`.
    """
    known = sorted([*plans, *([plan] if plan else [])], key=lambda p: (p.peak_bytes, p.seconds))
    plain = plain_name(plan)
    peaks = [whole_step_bytes(memory, p.peak_bytes) for p in known]
    plain_bytes = whole_step_bytes(memory, known[0].plain_peak_bytes)
    # A bound holds for a plan's budget; a plan without one had the plain peak at its disposal.
    bounds = sorted(
        (whole_step_bytes(memory, p.plain_peak_bytes if p.budget_bytes is None else
                          min(p.budget_bytes, p.plain_peak_bytes)),
         p.bound_seconds / p.plain_seconds if p.plain_seconds else 1.0)
        for p in known
    )
    slowdowns = [p.slowdown for p in known]
    low, high = min(peaks + [b for b, _ in bounds]), max([*peaks, plain_bytes])
    margin = 0.06 * (high - low) or 0.1 * high
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES, 4.0))
        axes = figure.add_axes((0.075, 0.13, 0.905, 0.75))
        axes.plot(peaks, slowdowns, color=LIGHT["planned"], linewidth=1.5, marker="o",
                  markersize=5.5, label="plans")
        axes.plot([b for b, _ in bounds], [s for _, s in bounds], color=LIGHT["bound"],
                  linewidth=1.4, linestyle=(0, (5, 2)), label="lower bound: no schedule is faster")
        axes.plot([plain_bytes], [1.0], linestyle="none", marker="s", markersize=7,
                  color=LIGHT["plain"], label=f"{plain}, {format_bytes(plain_bytes)}")
        if plan is not None:
            at = whole_step_bytes(memory, plan.peak_bytes)
            axes.plot([at], [plan.slowdown], linestyle="none", marker="o", markersize=13,
                      markerfacecolor="none", markeredgewidth=2.0, color=LIGHT["budget"],
                      label=f"this plan, {format_bytes(at)} at {plan.slowdown:.2f}x")
        top = max(slowdowns)
        axes.set_ylim(1 - 0.08 * (top - 1 or 0.1), top + 0.10 * (top - 1 or 0.1))
        axes.set_xlim(low - margin, high + margin)
        _byte_axis(axes.xaxis, high)
        axes.yaxis.set_major_locator(
            matplotlib.ticker.MultipleLocator(_round_step((top - 1 or 0.1) / 5))
        )
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}x")
        axes.set_xlabel("peak of the whole step")
        axes.set_ylabel(f"time, {plain} = 1")
        figure.legend(loc="upper left", bbox_to_anchor=(0.066, 1.0), ncols=4, columnspacing=2.0,
                      handlelength=1.6, borderaxespad=0.4)
    return figure


def three_kinds(
    memory: StepMemory,
    plain_peak_bytes: int,
    plan: Plan | None,
    plain_memory: StepMemory | None = None,
) -> Figure:
    """Return pies of parameters, optimizer state, and what the step allocates; areas compare.

    Args:
        memory: the resident kinds.
        plain_peak_bytes: peak of what the plain step allocates.
        plan: draws a second pie for the plan's peak.
        plain_memory: the resident kinds of the plain step, where the plan streams some of them.
    """
    kinds = {plain_name(plan): memory_kinds(plain_memory or memory, plain_peak_bytes)}
    if plan is not None:
        kinds["planned"] = memory_kinds(memory, plan.peak_bytes)
    largest = max(sum(parts.values()) for parts in kinds.values()) or 1
    colours = [LIGHT[name] for name in KIND_COLOURS]
    with drawing() as matplotlib:
        figure: Figure = matplotlib.figure.Figure(figsize=(WIDTH_INCHES * 0.47, 2.6))
        for column, (name, parts) in enumerate(kinds.items()):
            total = sum(parts.values())
            radius = math.sqrt(total / largest) if total else 0.1
            axes = figure.add_axes((0.01 + 0.5 * column, 0.0, 0.48, 0.85))
            wedges = [max(value, 0) for value in parts.values()]
            axes.pie(
                wedges or [1], colors=colours, radius=radius, startangle=90, counterclock=False,
                wedgeprops={
                    "width": 0.42 * radius, "edgecolor": LIGHT["surface"], "linewidth": 1.5,
                },
            )
            axes.set_xlim(-1.05, 1.05)
            axes.set_ylim(-1.05, 1.05)
            figure.text(0.25 + 0.5 * column, 0.93, f"{name}, {format_bytes(total)}",
                        ha="center", va="center", fontweight="bold")
    return figure


def memory_kinds(memory: StepMemory, allocated_bytes: int) -> dict[str, int]:
    """Return the kinds of memory that a training step needs and their bytes at its peak."""
    return {
        "parameters and model buffers": memory.parameter_bytes + memory.state_bytes,
        "optimizer state": memory.optimizer_bytes,
        "activations, gradients, workspace": whole_step_bytes(memory, allocated_bytes)
        - memory.resident_bytes,
        "batch": memory.input_bytes,
        "accumulated gradients": memory.accumulated_bytes,
        "beside the step": memory.beside_bytes,
    }


def plain_name(plan: Plan | None) -> str:
    """Return what a plan is compared with: the same operations, each of them once."""
    is_part = plan is not None and plan.num_microbatches > 1
    return "plain microbatch" if is_part else "plain step"


def into_the_step(end: float) -> str:
    """Return the name of a time axis that ends there, see `second_axis`."""
    return "seconds into the step" if end >= 1 else "milliseconds into the step"


def _byte_axis(axis: Axis, top: float) -> None:
    """Put ticks at round numbers of the unit in which `top` reads best."""
    from matplotlib.ticker import MultipleLocator

    unit = next((u for u in (2**30, 2**20, 2**10) if top >= u), 1)
    step = _round_step(top / unit / 6) * unit
    axis.set_major_locator(MultipleLocator(step))
    names = {2**30: "GiB", 2**20: "MiB", 2**10: "KiB", 1: "B"}
    axis.set_major_formatter(lambda value, _: f"{value / unit:g} {names[unit]}")


def second_axis(axis: Axis, end: float) -> None:
    """Put ticks at round numbers of seconds, or of milliseconds in a short step."""
    from matplotlib.ticker import MultipleLocator

    scale = 1.0 if end >= 1 else 1e-3
    axis.set_major_locator(MultipleLocator(_round_step(end / scale / 8) * scale))
    axis.set_major_formatter(lambda value, _: f"{value / scale:g}")


def _round_step(rough: float) -> float:
    """Return the smallest of 1, 2, 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else "…" + text[1 - length :]


def describe_curve(drawn: Curve, base_bytes: int) -> str:
    """Return a curve in one sentence, for readers that cannot see it."""
    return (
        f"peak {format_bytes(base_bytes + drawn.peak_bytes)} at {drawn.peak_name}, "
        f"{format_seconds(drawn.total_seconds)}"
    )
