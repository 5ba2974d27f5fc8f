"""`packlight plan FILE --budget 300MiB`: what would be kept and recomputed, and what it costs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from packlight.cli import options, shards
from packlight.cli.profile import planned
from packlight.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from packlight.cli.breakdown import NetworkRow, PlanRow
    from packlight.step import Plan
    from packlight.step.profile import StepProfile

HELP = "show how a training step would fit in a budget, and what other budgets cost"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_common(parser, with_budget=True)
    parser.add_argument(
        "--save", metavar="FILE", help="write how the step runs to FILE, for train --way"
    )
    parser.add_argument(
        "--mesh", metavar="data=N[,shard=M]",
        help="plan what one of N ranks does that are not there, each with a part of the batch; "
        "with shard=M, of N groups of M ranks that share pieces of parameters",
    )
    parser.add_argument(
        "--no-others", action="store_true", help="leave out what other budgets would cost"
    )
    parser.add_argument(
        "--no-weights", action="store_true",
        help="the model has no values and takes no memory, however large it is; times are those of "
        "single calls on this machine's CPU",
    )
    shards.add_arguments(parser)
    parser.add_argument(
        "--link", metavar="SPEED", help="with --mesh: of the network, such as 25GB/s"
    )


def run(arguments: argparse.Namespace) -> int:
    """Capture the step of the example, plan it and print the plan."""
    report = options.check_report(arguments.report)
    if arguments.save is not None:
        options.writable_directory(str(Path(arguments.save).parent), "--save")
    budget_bytes = options.parsed_budget(arguments)
    directory = options.offload_directory(arguments)
    from packlight.cli import breakdown

    console = Console()
    mesh = options.modelled_mesh(arguments)
    is_hybrid = mesh is not None and mesh.shard is not None
    parallel = shards.parallel(arguments, mesh is not None, is_hybrid)
    ranks = {} if mesh is None else {"mesh": mesh, "parallel": parallel}
    step = planned(
        arguments, budget_bytes, moves=options.moves(arguments), offload_directory=directory,
        **ranks,
    )
    profile, plan = step.profile, step.plan
    console.print(plan_table(breakdown.plan_rows(profile.graph, plan.schedule)))
    for line in summary(profile, plan, budget_bytes):
        console.print(line, highlight=False)
    console.print(step.describe(), highlight=False, markup=False)
    if profile.graph.reductions:
        console.print(network_table(breakdown.network_rows(profile, plan.schedule)))
    plans = [] if arguments.no_others else other_plans(profile)
    if plans:
        console.print(pareto_table(profile, plans))
    if arguments.save is not None:
        step.save_way(arguments.save)
        console.print(f"way: {arguments.save}")
    if report is not None:
        from packlight.report import write_report

        page = write_report(
            report, profile, plans, plan, arguments.file, how=step.how_it_runs()
        )
        console.print(f"report: {page}")
    return 0


def other_plans(profile: StepProfile) -> list[Plan]:
    """Return plans for other budgets: fewer where each of them is searched with transfers."""
    from packlight.planner import pareto

    return pareto(profile.graph, 4 if profile.graph.transfers else 8, profile.machine)


def summary(profile: StepProfile, plan: Plan, budget_bytes: int | None) -> list[str]:
    """Return the lines that say what the plan promises."""
    from packlight.cli.breakdown import headline

    budget = "no limit" if budget_bytes is None else format_bytes(budget_bytes)
    bound = plan.bound_seconds / plan.plain_seconds if plan.plain_seconds else 1.0
    transfers = []
    if profile.graph.reductions and not profile.graph.transfers:
        transfers.append(
            f"network          busy for {format_seconds(plan.lane_seconds)}, operations wait for "
            f"it for {format_seconds(plan.wait_seconds)}"
        )
    elif plan.lane_seconds:
        transfers.append(
            f"transfers        {format_bytes(plan.offloaded_bytes)} offloaded; lanes are busy for "
            f"{format_seconds(plan.lane_seconds)}, operations wait for them for "
            f"{format_seconds(plan.wait_seconds)}"
        )
    return [
        f"budget           {budget}, for the whole step",
        f"predicted peak   {headline(profile.memory, plan.peak_bytes)}",
        f"plain step       {headline(profile.memory, plan.plain_peak_bytes)}",
        f"predicted time   {format_seconds(plan.seconds)}, {plan.slowdown:.3f} x the plain step's "
        f"{format_seconds(plan.plain_seconds)} per run of the schedule",
        *transfers,
        f"lower bound      {bound:.3f} x: no schedule within this budget is faster",
        f"search           {plan.termination}",
    ]


def plan_table(rows: list[PlanRow]) -> Table:
    """Return what is kept and recomputed by layer."""
    table = Table(title="Kept for the backward, and computed again")
    table.add_column("layer", overflow="fold")
    table.add_column("layers", justify="right")
    table.add_column("kept, each", justify="right")
    table.add_column("kept", overflow="fold")
    table.add_column("recomputed (times)", overflow="fold")
    table.add_column("costs, each", justify="right")
    for row in rows:
        table.add_row(
            row.layer,
            str(row.num_layers),
            format_bytes(row.kept_bytes),
            ", ".join(_counted(list(row.kept))),
            ", ".join(f"{name} ({times})" for name, times in _merged(row.recomputed)),
            format_seconds(row.extra_seconds) if row.recomputed else "",
        )
    return table


def network_table(rows: list[NetworkRow]) -> Table:
    """Return what is on the network, and when."""
    table = Table(title="On the network")
    for name in ("reductions", "bytes", "from", "to"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.num_reductions), format_bytes(row.num_bytes),
            format_seconds(row.start_seconds), format_seconds(row.end_seconds),
        )
    return table


def pareto_table(profile: StepProfile, plans: list[Plan]) -> Table:
    """Return other budgets and what they cost."""
    table = Table(title="Other budgets")
    for name in ("whole step", "allocated by the step", "slowdown", "bound", "search"):
        table.add_column(name, justify="right")
    for plan in plans:
        bound = plan.bound_seconds / plan.plain_seconds if plan.plain_seconds else 1.0
        table.add_row(
            format_bytes(profile.memory.peak_bytes(plan.peak_bytes)),
            format_bytes(plan.peak_bytes),
            f"{plan.slowdown:.3f}",
            f"{bound:.3f}",
            str(plan.termination),
        )
    return table


def _counted(names: list[str]) -> list[str]:
    counts = {name: names.count(name) for name in names}
    return [name if count == 1 else f"{count} {name}" for name, count in counts.items()]


def _merged(recomputed: tuple[tuple[str, int], ...]) -> list[tuple[str, int]]:
    """Return one entry per operation name: how often operations of that name run again."""
    merged: dict[str, int] = {}
    for name, times in recomputed:
        merged[name] = merged.get(name, 0) + times
    return list(merged.items())
