"""`packlight profile FILE`: where the bytes of the plain training step are."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from packlight.cli import options
from packlight.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from packlight.cli.breakdown import LayerRow, PeakBreakdown
    from packlight.run.train_step import TrainStep
    from packlight.step.profile import StepProfile

HELP = "show where the memory of a training step goes, by kind and by layer"
KIND_BAR_WIDTH = 40
LAYER_BAR_WIDTH = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_common(parser, with_budget=False)
    parser.add_argument(
        "--energy",
        action="store_true",
        help="estimate the step's energy from counted operations and published prices",
    )


def run(arguments: argparse.Namespace) -> int:
    """Capture and profile the step of the example, and print it."""
    report = options.check_report(arguments.report)
    from packlight.cli import breakdown

    console = Console()
    profile, parameter_bytes = capture(arguments)
    console.print(kind_table(breakdown.peak_breakdown(profile), profile))
    rows = breakdown.layer_rows(profile, parameter_bytes)
    console.print(layer_table(rows))
    if arguments.energy:
        console.print(energy_table(profile, *counted(arguments)))
    if report is not None:
        from packlight.report import write_report

        page = write_report(report, profile, [], None, arguments.file)
        console.print(f"report: {page}")
    return 0


def capture(arguments: argparse.Namespace) -> tuple[StepProfile, dict[str, int]]:
    """Return the profile of the example's plain step, and the bytes of each parameter by name."""
    step = planned(arguments, None, moves=())
    return step.profile, {name: p.nbytes for name, p in step.model.named_parameters()}


def counted(arguments: argparse.Namespace) -> tuple[int, int]:
    """Return the multiply-adds of the example's forward and of its backward."""
    from packlight.capture.returned import loss_of
    from packlight.costs.energy import count_multiply_adds
    from packlight.example import BatchStream, build, load_example

    example = load_example(arguments.file)
    model, _ = build(example, arguments.device, arguments.seed)
    batch = next(BatchStream(example, "train", arguments.device, arguments.seed))
    losses: list[Any] = []
    forward = count_multiply_adds(lambda: losses.append(loss_of(example.loss(model, batch))))
    return forward, count_multiply_adds(lambda: losses[0].backward())


def energy_table(profile: StepProfile, forward: int, backward: int) -> Table:
    """Return the energy of the plain step's phases, compute and memory apart."""
    from packlight.costs.energy import step_energy
    from packlight.step import Phase

    memory = profile.memory
    # Parameters and state are read and written, gradients read.
    held = memory.parameter_bytes + memory.optimizer_bytes
    update_bytes = 2 * held + memory.gradient_bytes
    phases = step_energy(profile.graph, forward, backward, update_bytes)
    table = Table(
        title="Energy of the plain step, estimated",
        caption="operations counted, each at its price in 45 nm (Horowitz 2014): multiply-add 4.6 "
        "pJ, 32 bits from DRAM 640 pJ, as if nothing stayed in a cache; compare shares, not joules",
    )
    for name in ("phase", "multiply-adds", "traffic", "compute", "memory", "share"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    total = sum(phase.joules for phase in phases.values())
    for phase in Phase:
        energy = phases[phase]
        table.add_row(
            phase.value, f"{energy.multiply_adds:.3g}", format_bytes(energy.traffic_bytes),
            f"{1e3 * energy.compute_joules:.3g} mJ", f"{1e3 * energy.memory_joules:.3g} mJ",
            f"{energy.joules / total:.1%}" if total else "-",
        )  # fmt: skip
    return table


def planned(
    arguments: argparse.Namespace, budget_bytes: int | None, **how: Any
) -> TrainStep:
    """Return the example's step, captured and planned."""
    from packlight.example import BatchStream, PartStream, build, load_example
    from packlight.fitting import planned_step

    allow = options.allowed(arguments)
    example = load_example(arguments.file)
    device = "meta" if getattr(arguments, "no_weights", False) else arguments.device
    model, optimizer = build(example, device, arguments.seed)
    stream: Iterator[Any] = BatchStream(example, "train", arguments.device, arguments.seed)
    if "mesh" in how:
        stream = PartStream(stream, 0, how["mesh"].num_ranks)
    batch = next(stream)
    return planned_step(
        model, example.loss, optimizer, batch, budget_bytes, allow=allow, **how)


def kind_table(peak: PeakBreakdown, profile: StepProfile) -> Table:
    """Return the kinds of memory at the plain step's peak, with a bar for each."""
    graph = profile.graph
    table = Table(
        title="Plain step: what is in memory at its peak",
        caption=(
            f"{graph.num_computations} operations, {format_seconds(graph.seconds)} "
            f"on {profile.device_name} with torch {profile.torch_version}\n"
            f"the update at its end holds {format_bytes(profile.memory.gradient_bytes)} gradients"
        ),
    )
    table.add_column("kind")
    table.add_column("bytes", justify="right")
    table.add_column("share", justify="right")
    table.add_column("")
    kinds = [
        ("parameters", peak.parameter_bytes),
        ("model buffers", peak.state_bytes),
        ("batch", peak.input_bytes),
        ("optimizer state", peak.optimizer_bytes),
        ("gradients", peak.gradient_bytes),
        ("activations", peak.activation_bytes),
        ("workspace", peak.workspace_bytes),
    ]
    for kind, size in kinds:
        share = size / max(1, peak.peak_bytes)
        table.add_row(kind, format_bytes(size), f"{share:.1%}", bar(share, KIND_BAR_WIDTH))
    table.add_section()
    table.add_row("whole step", format_bytes(peak.peak_bytes), "", "")
    return table


def layer_table(rows: list[LayerRow]) -> Table:
    """Return the three kinds of memory by layer, with a bar for all three."""
    table = Table(
        title="By layer",
        caption="activations: at the peak; gradients and optimizer state: by share of parameters",
    )
    table.add_column("layer", overflow="fold")
    for name in ("parameters", "gradients + optimizer", "activations"):
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True, min_width=LAYER_BAR_WIDTH)
    largest = max((row.total_bytes for row in rows), default=1)
    for row in rows:
        table.add_row(
            row.layer,
            format_bytes(row.parameter_bytes),
            format_bytes(row.optimizer_bytes),
            format_bytes(row.activation_bytes),
            bar(row.total_bytes / max(1, largest), LAYER_BAR_WIDTH),
        )
    table.add_section()
    table.add_row(
        "all",
        format_bytes(sum(row.parameter_bytes for row in rows)),
        format_bytes(sum(row.optimizer_bytes for row in rows)),
        format_bytes(sum(row.activation_bytes for row in rows)),
        "",
    )
    return table


def bar(share: float, width: int) -> str:
    """Return a bar of eighths of characters.

    >>> bar(0.5, 4), bar(0.03, 4), bar(0.0, 4)
    ('██', '▏', '')
    """
    eighths = round(share * width * 8)
    if share > 0:
        eighths = max(1, eighths)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
