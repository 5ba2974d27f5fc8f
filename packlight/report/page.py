"""One HTML page about a step and its plan: figures, tables, no network, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from packlight.planner.accounts import (
    PlainStep,
    curve,
    home_layers,
    layer_accounts,
    plain_step,
    whole_step_bytes,
)
from packlight.report.style import css_variables, drawing, to_svg
from packlight.report.tables import (
    Cell,
    bytes_cell,
    code,
    number_cell,
    seconds_cell,
    sortable_table,
)
from packlight.report.template import CSS, PAGE, SCRIPT, write_page
from packlight.report.transfers import buffer_transfers, lanes_over_time
from packlight.step import Phase, Plan, StepGraph, Timeline, simulate
from packlight.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from packlight.step.profile import StepMemory, StepProfile

_MAX_OPERATIONS = 200
_MAX_TRANSFERS = 200


def write_report(
    directory: str | Path,
    profile: StepProfile,
    plans: Sequence[Plan],
    plan: Plan | None,
    title: str,
    *,
    how: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write `index.html` into a directory and return its path.

    Args:
        directory: made if it is not there.
        profile: the step.
        plans: plans for several budgets, for the Pareto curve; may be empty.
        plan: the plan that the page is about; None for a page about the plain step.
        title: what was profiled, for the page's head.
        how: (name, text) of what else is to be said about how the step runs, such as its moves.

    Raises:
        MissingExtraError: matplotlib is not installed.
        OSError: the directory cannot be written.
    """
    return write_page(render_report(profile, plans, plan, title, how=how), directory)


def render_report(
    profile: StepProfile,
    plans: Sequence[Plan],
    plan: Plan | None,
    title: str,
    *,
    how: Sequence[tuple[str, str]] = (),
) -> str:
    """Return the page as text; see `write_report`."""
    with drawing():
        from packlight.report import figures
    graph, memory = profile.graph, profile.memory
    plain = plain_step(graph)
    plain_memory = replace(
        memory,
        parameter_bytes=memory.parameter_bytes + plain.resting_parameter_bytes,
        optimizer_bytes=memory.optimizer_bytes + plain.resting_state_bytes,
    )
    plain_peak_bytes = plain.timeline.peak_bytes
    over_time, at_peak = _memory_sections(profile, plan, plain)
    pies = to_svg(
        figures.three_kinds(memory, plain_peak_bytes, plan, plain_memory), "three-kinds",
        escape("Shares of parameters, optimizer state and what the step allocates."),
    )
    kinds = figures.memory_kinds(plain_memory, plain_peak_bytes)
    sections = [
        _tiles(profile, plan, whole_step_bytes(plain_memory, plain_peak_bytes)),
        _how_section(plan, how),
        over_time,
        _transfer_section(profile, plan) if plan is not None and plan.lane_seconds else "",
        at_peak,
        _kinds_section(profile, plan, kinds, pies),
        _pareto_section(profile, plans, plan) if plans else "",
        _layer_section(profile, plan, plain),
        _operation_section(profile, plan) if plan is not None else "",
    ]
    facts = f"{escape(profile.device_name)}, torch {escape(profile.torch_version)}, "
    facts += f"{graph.num_computations} operations"
    return PAGE.format(
        title=escape(title),
        facts=facts,
        css=css_variables() + CSS,
        body="\n".join(filter(None, sections)),
        script=SCRIPT,
    )


def _memory_sections(
    profile: StepProfile, plan: Plan | None, plain: PlainStep
) -> tuple[str, str]:
    """Return the pictures of memory over time and of what is there at the peak."""
    from packlight.report import figures

    graph, memory, machine = profile.graph, profile.memory, profile.machine
    plain_curve = curve(plain.graph, plain.schedule)
    shown = plain_curve if plan is None else curve(graph, plan.schedule, machine)
    base = memory.resident_bytes
    description = f"{figures.plain_name(plan).capitalize()}: "
    description += f"{figures.describe_curve(plain_curve, base + plain.resting_bytes)}."
    if plan is not None:
        description += f" Planned: {figures.describe_curve(shown, base)}."
    over_time = figures.memory_over_time(graph, plan, plain=plain, memory=memory, machine=machine)
    at_peak = figures.peak_breakdown(graph, plan, plain=plain, machine=machine)
    return (
        _figure(
            "Memory over the step",
            to_svg(over_time, "memory-over-time", escape(description)),
            f"Everything in memory while {_what_runs(graph, plan)}. Resident are "
            f"{_resident_kinds(memory)}. Each operation is as wide as its measured seconds and "
            "holds its workspace while it runs.",
        ),
        _figure(
            "Where the peak is",
            to_svg(
                at_peak, "peak-breakdown",
                escape("Bytes in memory at the peak, by kind and by layer."),
            ),
            f"What the step has allocated when it holds the most: at <b>{escape(shown.peak_name)}"
            "</b>. What is resident comes on top.",
        ),
    )


def _pareto_section(profile: StepProfile, plans: Sequence[Plan], plan: Plan | None) -> str:
    from packlight.report import figures

    return _figure(
        "Memory against time",
        to_svg(
            figures.pareto_curve(list(plans), plan, memory=profile.memory), "pareto",
            escape("Peak of the whole step against slowdown for several budgets."),
        ),
        "Each point is a plan for another budget. The dashed curve is proved: no schedule "
        "within that much memory is faster. Peaks are of the whole step.",
        _pareto_table(profile, plans, plan),
    )


def _figure(title: str, svg: str, caption: str, table: str = "") -> str:
    return (
        f"<section><h2>{title}</h2><p class=note>{caption}</p>"
        f"{_scrolling(svg)}{table}</section>"
    )


def _scrolling(svg: str) -> str:
    return f'<figure tabindex="0">{svg}</figure>'


def _what_runs(graph: StepGraph, plan: Plan | None) -> str:
    what = "one step"
    if plan is not None and plan.num_microbatches > 1:
        what = f"one of {plan.num_microbatches} microbatches"
    if any(operation.phase is Phase.UPDATE for operation in graph.computations):
        return f"{what} runs, updates included"
    return f"{what} runs, before the optimizer's update"


def _resident_kinds(memory: StepMemory) -> str:
    sums = ", accumulated gradients" if memory.accumulated_bytes else ""
    return f"parameters, optimizer state, batch{sums}"


def _how_section(plan: Plan | None, how: Sequence[tuple[str, str]]) -> str:
    if not how:
        return ""
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in how)
    note = "Plain means: with the same moves, but nothing is recomputed or transferred."
    if plan is not None and plan.num_microbatches > 1:
        note += " All that follows is about one microbatch."
    return f"<section><h2>How it runs</h2><p class=note>{note}</p><dl>{rows}</dl></section>"


def _tiles(profile: StepProfile, plan: Plan | None, plain_bytes: int) -> str:
    from packlight.report.figures import plain_name

    memory = profile.memory
    tiles = [(plain_name(plan), format_bytes(plain_bytes), format_seconds(profile.graph.seconds))]
    if plan is not None:
        peak_bytes = whole_step_bytes(memory, plan.peak_bytes)
        share = peak_bytes / plain_bytes if plain_bytes else 1.0
        bound = plan.bound_seconds / plan.plain_seconds if plan.plain_seconds else 1.0
        each = f", {plan.num_microbatches} times" if plan.num_microbatches > 1 else ""
        tiles.insert(0, ("planned peak", format_bytes(peak_bytes), f"{share:.0%} of plain"))
        tiles.insert(1, ("predicted time", f"{plan.slowdown:.2f}x",
                         f"{format_seconds(plan.seconds)}{each}; at least {bound:.2f}x"))
        if plan.budget_bytes is not None:
            budget_bytes = memory.resident_bytes + plan.budget_bytes
            tiles.insert(2, ("budget", format_bytes(budget_bytes),
                             f"{peak_bytes / budget_bytes:.1%} used"))
    tiles.append(("resident", format_bytes(memory.resident_bytes),
                  _resident_kinds(memory)))
    return "<div class=tiles>" + "".join(
        f"<div><span>{escape(name)}</span><b>{escape(value)}</b><small>{escape(more)}</small></div>"
        for name, value, more in tiles
    ) + "</div>"


def _kinds_section(
    profile: StepProfile, plan: Plan | None, plain_kinds: dict[str, int], pies: str
) -> str:
    from packlight.report.figures import KIND_COLOURS, memory_kinds, plain_name

    plan_kinds = None if plan is None else memory_kinds(profile.memory, plan.peak_bytes)
    heads = ["kind", plain_name(plan), *(["planned"] if plan_kinds else [])]
    rows = []
    for colour, (name, num_bytes) in zip(KIND_COLOURS, plain_kinds.items(), strict=True):
        if not num_bytes and not (plan_kinds and plan_kinds[name]):
            continue
        swatch = f'<i style="background:var(--{colour})"></i>'
        row = [Cell(f"<span class=kind>{swatch}{escape(name)}</span>"), bytes_cell(num_bytes)]
        if plan_kinds is not None:
            row.append(bytes_cell(plan_kinds[name]))
        rows.append(row)
    return (
        "<section><h2>The kinds of memory</h2><p class=note>At the peak of the whole step"
        f"{'' if plan is None else '; equal areas are equal bytes'}.</p>"
        f"<div class=beside>{_scrolling(pies)}{sortable_table(heads, rows)}</div></section>"
    )


def _pareto_table(profile: StepProfile, plans: Sequence[Plan], plan: Plan | None) -> str:
    known = list(plans)
    if plan is not None and all(p.schedule != plan.schedule for p in known):
        known.append(plan)
    known.sort(key=lambda p: (-p.peak_bytes, p.seconds))
    rows, marked = [], None
    for position, other in enumerate(known):
        if plan is not None and other.schedule == plan.schedule and marked is None:
            marked = position
        bound = other.bound_seconds / other.plain_seconds if other.plain_seconds else 1.0
        share = other.peak_bytes / other.plain_peak_bytes if other.plain_peak_bytes else 1.0
        rows.append([
            bytes_cell(whole_step_bytes(profile.memory, other.peak_bytes)),
            bytes_cell(other.peak_bytes),
            number_cell(share, f"{share:.0%}"),
            seconds_cell(other.seconds),
            number_cell(other.slowdown, f"{other.slowdown:.3f}x"),
            number_cell(bound, f"{bound:.3f}x"),
            Cell(str(other.termination)),
        ])
    heads = ("whole step", "allocated", "of plain's", "time", "slowdown", "bound", "search")
    return sortable_table(heads, rows, marked=marked)


def _transfer_section(profile: StepProfile, plan: Plan) -> str:
    """Return what the lanes do and when."""
    graph, machine = profile.graph, profile.machine
    assert machine is not None, "a plan with transfers was made for a machine"
    timeline = simulate(graph, plan.schedule, machine)
    layer_of = home_layers(graph)
    transferred = buffer_transfers(graph, plan.schedule, timeline)
    rows = []
    for entry in transferred[:_MAX_TRANSFERS]:
        buffer = graph.buffers[entry.buffer]
        rows.append([
            Cell(code(buffer.name)),
            Cell(code(layer_of[entry.buffer])),
            Cell(buffer.kind.value),
            bytes_cell(buffer.bytes),
            number_cell(entry.num_writes, str(entry.num_writes or "–")),
            number_cell(entry.num_reads, str(entry.num_reads or "–")),
            seconds_cell(entry.lane_seconds),
            seconds_cell(entry.gone_seconds),
        ])
    read_bytes = sum(graph.buffers[e.buffer].bytes * e.num_reads for e in transferred)
    runs = [graph.operations[run] for run in plan.schedule.runs()]
    num_transfers = sum(operation.kind.is_transfer for operation in runs)
    computing_seconds = sum(o.seconds for o in runs if not o.lane)
    copying_seconds = timeline.seconds - timeline.wait_seconds - computing_seconds
    more = ""
    if len(transferred) > _MAX_TRANSFERS:
        more = f" The {_MAX_TRANSFERS} with most bytes of {len(transferred)}."
    caption = (
        f"{format_bytes(plan.offloaded_bytes)} out and {format_bytes(read_bytes)} in, in "
        f"{num_transfers} transfers. {_busy_lanes(timeline)} Where the first row is empty, "
        f"operations wait ({format_seconds(timeline.wait_seconds)} in all) or their cores copy "
        f"({format_seconds(max(0.0, copying_seconds))}).{more}"
    )
    svg = to_svg(
        lanes_over_time(graph, plan.schedule, machine), "lanes-over-time",
        escape("When operations run, and when lanes write and read."),
    )
    heads = ("buffer", "layer", "kind", "bytes", "out", "in", "on lanes", "not in memory")
    return _figure("Transfers", svg, caption, sortable_table(heads, rows))


def _busy_lanes(timeline: Timeline) -> str:
    """Return how long each lane works."""
    busy = [
        f"{escape(lane.name)} is busy for {format_seconds(lane.busy_seconds)}"
        for lane in timeline.lanes
    ]
    if len(busy) == 1:
        return f"{busy[0]}."
    return "; ".join(f"{number}: {text}" for number, text in enumerate(busy, 1)) + "."


def _layer_section(profile: StepProfile, plan: Plan | None, plain: PlainStep) -> str:
    graph = profile.graph
    rows = []
    accounts = layer_accounts(graph, plain.schedule, plan)
    has_transfers = any(account.written_bytes for account in accounts)
    for position, account in enumerate(accounts):
        # Sorts by place in the forward, not by name.
        layer = Cell(code(account.layer), position, is_text=True)
        row = [layer, bytes_cell(account.plain_bytes)]
        if plan is not None:
            names = ", ".join(
                name if times == 1 else f"{times} {name}"
                for name, times in (account.reruns or {}).items()
            )
            row += [
                bytes_cell(account.kept_bytes),
                *([bytes_cell(account.written_bytes)] if has_transfers else []),
                number_cell(account.num_reruns, str(account.num_reruns or "–")),
                seconds_cell(account.rerun_seconds),
                Cell(f"<span class=ops>{escape(names)}</span>"),
            ]
        rows.append(row)
    title = "Kept, by layer" if plan is None else "Kept and recomputed, by layer"
    heads = ["layer", "kept by plain"]
    if plan is not None:
        heads += ["kept by plan", *(["offloaded"] if has_transfers else [])]
        heads += ["reruns", "cost", "run again"]
    return (
        f"<section><h2>{title}</h2><p class=note>Kept: made by the forward and still in memory "
        "when the backward begins. Click a heading to sort.</p>"
        f"{sortable_table(heads, rows)}</section>"
    )


def _operation_section(profile: StepProfile, plan: Plan) -> str:
    graph = profile.graph
    again = graph.reruns(plan.schedule)
    if not again:
        return "<section><h2>Recomputed operations</h2><p class=note>None.</p></section>"
    ranked = sorted(again, key=lambda op: (-again[op] * graph.operations[op].seconds, op))
    rows = []
    for op in ranked[:_MAX_OPERATIONS]:
        operation = graph.operations[op]
        made = sum(graph.buffers[b].bytes for b in operation.creates)
        cost = again[op] * operation.seconds
        rows.append([
            Cell(code(operation.short_name)),
            Cell(code(operation.layer)),
            number_cell(again[op], str(again[op])),
            seconds_cell(operation.seconds),
            seconds_cell(cost),
            bytes_cell(made),
        ])
    more = ""
    if len(ranked) > _MAX_OPERATIONS:
        more = f" The {_MAX_OPERATIONS} most expensive of {len(ranked)}."
    heads = ("operation", "layer", "reruns", "each", "in all", "makes")
    return (
        "<section><h2>Recomputed operations</h2><p class=note>What is run again, and what that "
        f"costs.{more}</p>{sortable_table(heads, rows)}</section>"
    )
