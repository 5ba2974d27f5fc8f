"""`packlight compress FILE --target 40x`: a trained model as a small file, by a search."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from packlight.cli import options
from packlight.errors import OptionError
from packlight.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from torch import nn

    from packlight.compress.search import Outcome, Trial
    from packlight.example import Example

HELP = "make a trained model small: prune, share, code; a search for the best settings"

EXIT_NOT_MET = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("file", metavar="FILE", help="Python file with model(), loss(), ...")
    parser.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="of packlight train: the trained weights"
    )
    parser.add_argument(
        "--target", required=True, metavar="SIZE", help="of the file: 40x smaller, or 25KB"
    )
    parser.add_argument("--output", required=True, metavar="PATH", help="the file")
    parser.add_argument(
        "--max-error",
        type=float,
        metavar="RISE",
        help="how much the error may rise: that of error(model, batch) in FILE, or else the loss",
    )
    parser.add_argument(
        "--steps",
        type=options.positive_int,
        default=300,
        help="of retraining in each of a trial's two stages (default: %(default)s)",
    )
    parser.add_argument(
        "--values",
        type=options.positive_int,
        nargs="+",
        default=[8, 16, 4],
        help="sizes of codebooks to try (default: 8 16 4)",
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--report", metavar="DIR", help="write an HTML page with pictures to DIR")


def run(arguments: argparse.Namespace) -> int:
    """Search, write the file, and print what it takes layer by layer."""
    report = options.check_report(arguments.report)
    output = Path(arguments.output)
    options.writable_directory(str(output.parent), "--output")
    from packlight.compress.search import search
    from packlight.example import build, error_of, load_example
    from packlight.run.checkpoint import newest_checkpoint

    console = Console()
    example = load_example(arguments.file)
    found = newest_checkpoint(arguments.checkpoint)
    if found is None:
        raise OptionError(
            f"--checkpoint {arguments.checkpoint}: no checkpoint there\n"
            f"hint: packlight train {arguments.file} --checkpoint {arguments.checkpoint}"
        )
    model, optimizer = build(example, arguments.device, arguments.seed)
    found.restore(model, optimizer)
    del optimizer
    dense_bytes = sum(tensor.nbytes for tensor in model.state_dict().values())
    target_bytes = parsed_target(arguments.target, dense_bytes)
    key = f"{Path(arguments.file).name} step {found.step} seed {arguments.seed} {arguments.steps}"
    with _progress(console) as progress:
        task = progress.add_task("", total=2 * arguments.steps * len(arguments.values))
        outcome = search(
            model, target_bytes, output,
            _trainer(arguments, example, progress, task),
            lambda model: error_of(model, example, arguments.device, arguments.seed),
            num_values=arguments.values, key=key,
            on_trial=lambda trial: console.print(_in_words(trial, dense_bytes)),
        )  # fmt: skip
    console.print(_trial_table(outcome))
    console.print(outcome.report.describe(), highlight=False, markup=False)
    if report is not None:
        from packlight.report.compression import write_compression_report

        page = write_compression_report(report, outcome, arguments.file)
        console.print(f"report: {page}")
    return _judged(outcome, arguments, console)


def parsed_target(text: str, dense_bytes: int) -> int:
    """Return the bytes that a target such as "40x" or "25KB" means.

    Raises:
        OptionError: it is no such thing, or would make the file larger.
        BudgetFormatError: it is no number of bytes.

    >>> parsed_target("40x", 1_000_000), parsed_target("25KB", 1_000_000)
    (25000, 25000)
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*[xX]\s*", text)
    if match is None:
        return parse_bytes(text)
    if float(match.group(1)) < 1:
        raise OptionError(f"--target {text} would make the file larger\nhint: for example 40x")
    return int(dense_bytes / float(match.group(1)))


def _trainer(
    arguments: argparse.Namespace, example: Example, progress: Progress, task: TaskID
) -> Callable[[nn.Module, str, Callable[[float], None]], None]:
    from packlight.capture.returned import loss_of
    from packlight.example import BatchStream, seed_everything

    def train(model: nn.Module, stage: str, on_step: Callable[[float], None]) -> None:
        seed_everything(arguments.seed)
        model.train()
        optimizer = example.optimizer(model)
        stream = BatchStream(example, "train", arguments.device, arguments.seed)
        for step, batch in zip(range(arguments.steps), stream, strict=False):
            on_step(step / arguments.steps)
            loss = loss_of(example.loss(model, batch))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            progress.update(task, advance=1, description=f"{stage}, loss {loss.item():.4f}")

    return train


def _judged(outcome: Outcome, arguments: argparse.Namespace, console: Console) -> int:
    """Say what was not met, and return the exit code."""
    missed = []
    if not outcome.meets_target:
        missed.append(
            f"{format_bytes(outcome.best.file_bytes)} is above the target, "
            f"{format_bytes(outcome.target_bytes)}"
        )
    rise = outcome.best.error - outcome.dense_error
    if arguments.max_error is not None and rise > arguments.max_error:
        missed.append(f"the error rose by {rise:.4g}, more than {arguments.max_error:g}")
    for text in missed:
        console.print(f"not met: {text}; the best file that was found is kept", highlight=False)
    if missed:
        console.print("hint: more --steps, other --values, or a larger --target")
    return EXIT_NOT_MET if missed else 0


def _in_words(trial: Trial, dense_bytes: int) -> str:
    return (
        f"{trial.num_values} values, {trial.density:.2%} of the weights: "
        f"{trial.file_bytes} bytes, {dense_bytes / trial.file_bytes:.1f}x, "
        f"error {trial.error:.4g}, {format_seconds(trial.seconds)}"
    )


def _trial_table(outcome: Outcome) -> Table:
    table = Table(title=f"dense: {outcome.dense_bytes} bytes, error {outcome.dense_error:.4g}")
    for head in ("values", "weights kept", "bytes", "smaller", "error", ""):
        table.add_column(head, justify="right")
    for trial in sorted(outcome.trials, key=lambda trial: trial.file_bytes):
        table.add_row(
            str(trial.num_values), f"{trial.density:.2%}", str(trial.file_bytes),
            f"{outcome.dense_bytes / trial.file_bytes:.1f}x", f"{trial.error:.4g}",
            "kept" if trial is outcome.best else "",
        )  # fmt: skip
    return table


def _progress(console: Console) -> Any:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip
