"""`packlight search FILE --memory 1GiB`: trials side by side in one limit of memory."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from packlight.cli import options
from packlight.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from packlight.trials import Record, Study
    from packlight.trials.coordinator import Coordinator

HELP = "search for hyper-parameters: trials side by side in one limit of memory"

# So many of the latest trials are shown, and so often.
NUM_SHOWN = 12
SECONDS_BETWEEN_LOOKS = 0.2
NUM_BEST = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "file", metavar="FILE", help="Python file with model(), loss(), ... and space(trial)"
    )
    parser.add_argument(
        "--memory",
        metavar="BYTES",
        required=True,
        help="for all processes together, for example 1GiB; the kernel keeps them to it",
    )
    parser.add_argument(
        "--trials",
        type=options.positive_int,
        default=20,
        help="that the study has in the end, earlier ones included (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=options.positive_int,
        default=1,
        help="how many trials may run side by side (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=options.positive_int,
        default=100,
        help="of training in each trial (default: %(default)s)",
    )
    parser.add_argument(
        "--report-every",
        metavar="N",
        type=int,
        default=0,
        help="steps between two looks at the validation error (default: only at the end)",
    )
    parser.add_argument(
        "--pruner",
        default="none",
        metavar="NAME",
        help="end trials early that look bad where they report: median, halving or none "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--study",
        metavar="DIR",
        help="where the study is kept; the same command goes on with it (default: FILE-study)",
    )
    parser.add_argument(
        "--any-moves",
        action="store_true",
        help="also moves that round sums in another order (default: only those that keep every "
        "bit, so that losses do not depend on the memory)",
    )
    parser.add_argument(
        "--allow",
        metavar="NAME",
        action="append",
        default=[],
        help="allow an approximate technique by name, such as bf16; may be given several times",
    )
    parser.add_argument(
        "--threads",
        metavar="N",
        type=options.positive_int,
        help="of torch in each trial; its bits may depend on it (default: this machine's cores "
        "over --workers)",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--report", metavar="DIR", help="write an HTML page with pictures to DIR")


def run(arguments: argparse.Namespace) -> int:
    """Run the study, or go on with it, and print its best trials."""
    from packlight.extras import require_optuna
    from packlight.trials import Settings, search
    from packlight.trials.settings import default_threads

    report = options.check_report(arguments.report)
    require_optuna("packlight search")
    directory = arguments.study or f"{Path(arguments.file).stem}-study"
    options.writable_directory(directory, "--study")
    settings = Settings(
        steps=arguments.steps, report_every=arguments.report_every, seed=arguments.seed,
        pruner=arguments.pruner, threads=arguments.threads or default_threads(arguments.workers),
        exact=not arguments.any_moves, allow=tuple(arguments.allow),
    )
    console = Console()
    with _View(console) as view:
        study = search(
            arguments.file, arguments.memory, arguments.trials, directory,
            num_workers=arguments.workers, settings=settings, watch=view.look,
        )
    console.print(best_table(study))
    for line in summary(study):
        console.print(line, highlight=False, markup=False)
    if report is not None:
        from packlight.report.trials import write_trials_report

        console.print(f"report: {write_trials_report(report, study, arguments.file)}")
    return 0


class _View:
    """Shows a study while it runs: a live table on a terminal, else a line for each trial."""

    def __init__(self, console: Console) -> None:
        self._console, self._shown = console, set[int]()
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._next_look = 0.0

    def __enter__(self) -> _View:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def look(self, coordinator: Coordinator) -> None:
        """Show how the study stands."""
        if not self._console.is_terminal:
            for number in sorted(set(coordinator.records) - self._shown):
                self._shown.add(number)
                self._console.print(in_words(coordinator.records[number]), soft_wrap=True,
                                    highlight=False, markup=False)  # fmt: skip
            return
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + SECONDS_BETWEEN_LOOKS
            self._live.update(live_table(coordinator), refresh=True)


def live_table(coordinator: Coordinator) -> Table:
    """Return what is running, what waits, and how the latest trials ended."""
    held = format_bytes(coordinator.held_bytes)
    table = Table(
        title=f"{len(coordinator.records)} of {coordinator.num_trials} trials; steps hold at most "
        f"{held} of {format_bytes(coordinator.step_bytes)}"
    )
    for name in ("trial", "state", "point", "planned peak", "slowdown", "error"):
        table.add_column(name, overflow="fold")
    for active in coordinator.active.values():
        state = "training" if active.planned else "planning"
        planned = active.planned
        table.add_row(
            str(active.pending.trial.number), state, _point_text(active.pending.point),
            format_bytes(active.held_bytes), f"{planned.slowdown:.2f}" if planned else "", "",
        )
    for pending in coordinator.waiting:
        needs = min(option.bytes for option in pending.options or ())
        table.add_row(
            str(pending.trial.number), "waits", _point_text(pending.point), format_bytes(needs), "",
            "",
        )
    for number in sorted(coordinator.records)[-NUM_SHOWN:]:
        record = coordinator.records[number]
        table.add_row(*_cells(record), style="dim")
    return table


def best_table(study: Study) -> Table:
    """Return the best trials."""
    table = Table(title="Least validation error")
    for name in ("trial", "state", "point", "planned peak", "slowdown", "error"):
        table.add_column(name, overflow="fold")
    complete = [r for r in study.records.values() if r.error is not None and r.same_as is None]
    for record in sorted(complete, key=lambda r: (r.outcome.value, r.error))[:NUM_BEST]:
        table.add_row(*_cells(record))
    return table


def summary(study: Study) -> list[str]:
    """Return how the trials of a study ended."""
    from packlight.trials import Outcome

    repeated = sum(record.same_as is not None for record in study.records.values())
    counts = ", ".join(
        f"{study.count(outcome)} {outcome.value}" for outcome in Outcome if study.count(outcome)
    )
    recomputed = sum(
        r.planned is not None and r.planned.slowdown > 1.01 for r in study.records.values()
    )
    lines = [
        f"{len(study.records)} trials: {counts}",
        f"{repeated} at points that were run before; {recomputed} recomputed to fit; "
        f"{study.num_retried} started again with more memory",
    ]
    if study.importances:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in study.importances.items())
        lines.append(f"importance for the error: {shares}")
    return lines


def in_words(record: Record) -> str:
    """Return a trial in a line."""
    number, state, point, peak, slowdown, error = _cells(record)
    parts = [f"trial {number} {state}", point]
    if peak:
        parts.append(f"peak {peak}, {slowdown}x")
    parts.append(f"error {error}, {format_seconds(record.seconds)}" if error else "")
    if record.same_as is not None:
        parts.append(f"as trial {record.same_as}")
    elif record.why:
        parts.append(record.why.splitlines()[0])
    return "  ".join(filter(None, parts))


def _cells(record: Record) -> tuple[str, ...]:
    planned = record.planned
    return (
        str(record.number), record.outcome.value, _point_text(record.point),
        format_bytes(planned.peak_bytes) if planned else "",
        f"{planned.slowdown:.2f}" if planned else "",
        "" if record.error is None else f"{record.error:.4g}",
    )


def _point_text(point: dict[str, object]) -> str:
    return " ".join(
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in point.items()
    )
