"""`packlight train FILE --budget 300MiB`: train inside the budget, with checkpoints.

`--steps` counts from the very start, so the same command line started again after an interruption
goes on where the last checkpoint was written and ends at the same step, with the same bits.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from packlight.cli import comm, options, shards
from packlight.cli.resume import resume_command, unused_directory
from packlight.errors import LossScaleError, NonFiniteLossError, OptionError, PacklightError
from packlight.units import format_bytes, format_seconds

if TYPE_CHECKING:
    import torch

    from packlight.comm import LocalSteps
    from packlight.example import Example
    from packlight.ranks.group import Ranks

HELP = "train inside a budget; the same command resumes from its last checkpoint"

MEASURE_EVERY = 50
NUM_VALIDATION_BATCHES = 10
NUM_LINES = 20
EXIT_INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    options.add_common(parser, with_budget=True)
    parser.add_argument(
        "--steps",
        type=options.positive_int,
        default=100,
        help="train until this step, counted from the first run (default: %(default)s)",
    )
    parser.add_argument(
        "--way", metavar="FILE", help="run the step as plan --save wrote; nothing is searched"
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="write checkpoints to DIR and resume from there"
    )
    parser.add_argument(
        "--save-every",
        metavar="N",
        type=options.positive_int,
        default=100,
        help="with --checkpoint: steps between checkpoints (default: %(default)s)",
    )
    comm.add_arguments(parser)
    shards.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train the example."""
    report = options.check_report(arguments.report)
    comm.check(arguments)
    if comm.has_workers_to_start(arguments):
        return comm.run_workers(arguments)
    budget_bytes = options.parsed_budget(arguments)
    if arguments.checkpoint is not None:
        options.writable_directory(arguments.checkpoint, "--checkpoint")
    directory = options.offload_directory(arguments)
    import packlight
    from packlight.example import (
        BatchStream,
        PartStream,
        build,
        load_example,
        seed_everything,
    )
    from packlight.run.checkpoint import newest_checkpoint

    allow = options.allowed(arguments)
    mesh = options.mesh(arguments.device)
    parallel = shards.parallel(arguments, mesh is not None and arguments.comm is None)
    rank, size = (mesh.get_rank(), mesh.size()) if mesh is not None else (0, 1)
    console = Console(quiet=rank > 0)
    example = load_example(arguments.file)
    found = newest_checkpoint(arguments.checkpoint) if arguments.checkpoint else None
    in_pieces = shards.newest(arguments.checkpoint)
    if in_pieces is not None and found is not None and in_pieces.step <= found.step:
        in_pieces = None
    if in_pieces is not None:
        found = None
    latest = found or in_pieces
    if found is not None:
        _check_same_run(found.path, found.extra, arguments)
    if latest is not None and latest.step >= arguments.steps:
        console.print(f"{latest.path} is at step {latest.step} already; --steps asks for no more")
        return 0
    model, optimizer = build(example, arguments.device, arguments.seed)
    if found is not None:
        found.restore(model, optimizer)
    done = 0 if latest is None else latest.step
    if latest is not None:
        console.print(f"resuming from {latest.path}, step {done}")
    stream: Iterator[Any] = BatchStream(
        example, "train", arguments.device, arguments.seed, num_skipped=done
    )
    if size > 1:
        stream = PartStream(stream, rank, size)
    batch = next(stream)
    step = packlight.fit(
        model, example.loss, optimizer, batch, budget=budget_bytes,
        moves=options.moves(arguments), allow=allow, offload_directory=directory,
        way=arguments.way, mesh=mesh if arguments.comm is None else None, parallel=parallel,
    )
    if found is not None and step.scaler is not None:
        _restore_scaler(found.extra, step.scaler)
    console.print(step.describe(), highlight=False, markup=False)
    if report is not None and rank == 0:
        from packlight.cli.plan import other_plans
        from packlight.report import write_report

        plans = other_plans(step.profile)
        page = write_report(
            report, step.profile, plans, step.plan, arguments.file, how=step.how_it_runs()
        )
        console.print(f"report: {page}")
    # Capturing and planning may have drawn numbers; the run's own start here, each rank's others.
    seed_everything(arguments.seed + rank)
    if found is not None:
        found.restore_rng(rank)
    if in_pieces is not None:
        extra = step.load(in_pieces.path)
        _check_same_run(in_pieces.path, extra, arguments)
        if step.scaler is not None:
            _restore_scaler(extra, step.scaler)
    local = comm.local_steps(arguments, model)
    trainer = _Trainer(arguments, example, model, optimizer, step, local, stream, console, done)
    return trainer.run(batch)


def _check_same_run(
    path: Path, extra: Mapping[str, Any], arguments: argparse.Namespace
) -> None:
    for name, value in _identity(arguments).items():
        saved = extra.get(name)
        if saved != value:
            raise OptionError(
                f"{path} is of a run with {name} {saved!r}, not {value!r}\n"
                "hint: give the run a --checkpoint directory of its own"
            )


def _restore_scaler(extra: Mapping[str, Any], scaler: torch.amp.GradScaler) -> None:
    """Go on with the loss scale of a run that had one."""
    state = extra.get("scaler")
    if state is not None:
        scaler.load_state_dict(state)


def _identity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a run must have in common with the one that it resumes."""
    return {"file": Path(arguments.file).name, "seed": arguments.seed}


@dataclass
class _Trainer:
    """The training loop, and what it needs at every step."""

    arguments: argparse.Namespace
    example: Example
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    step: Any
    local: LocalSteps | None
    stream: Iterator[Any]
    console: Console
    num_done: int
    measured_bytes: int = 0
    was_interrupted: bool = False

    @property
    def ranks(self) -> Ranks | None:
        """Those that train together."""
        if self.local is not None:
            return self.local.transport
        ranks: Ranks | None = self.step.request.ranks
        return ranks

    def _is_interrupted(self, interrupt: _Interrupt) -> bool:
        """Whether to end here; all ranks do after the same step."""
        self.was_interrupted = interrupt.is_set
        if self.ranks is not None:
            self.was_interrupted = any(self.ranks.exchange(int(interrupt.is_set)))
        return self.was_interrupted

    def run(self, batch: Any) -> int:
        """Train from the step after `num_done`, on this batch first."""
        arguments = self.arguments
        started, first = time.perf_counter(), self.num_done
        num_tokens = 0
        with self._progress() as (progress, task), _interrupts_noted() as interrupt:
            while True:
                try:
                    loss = self._one_step(batch, is_measured=self._is_measured(first))
                except (NonFiniteLossError, LossScaleError) as error:
                    raise self._with_checkpoint(error) from None
                self.num_done += 1
                if self.local is not None:
                    self.local.step()
                if self.example.tokens_per_batch is not None:
                    tokens = self.example.tokens_per_batch(batch)
                    num_tokens += tokens if self.ranks is None else tokens * self.ranks.size
                seconds = time.perf_counter() - started
                rate = _rate(num_tokens, self.num_done - first, seconds)
                status = f"loss {loss:.4f}  {rate}  {self._peak_text()}"
                progress.update(task, completed=self.num_done, status=status)
                if not self.console.is_terminal and self._is_line_due(first):
                    self.console.print(f"step {self.num_done}/{arguments.steps}  {status}")
                if self._is_interrupted(interrupt):
                    break
                is_last = self.num_done >= arguments.steps
                if arguments.checkpoint and (is_last or self.num_done % arguments.save_every == 0):
                    self._save(Path(arguments.checkpoint))
                if is_last:
                    break
                batch = next(self.stream)
        if self.was_interrupted and self.num_done < arguments.steps:
            return self._interrupted()
        self._finish()
        return 0

    def _one_step(self, batch: Any, *, is_measured: bool) -> float:
        from packlight.capture.returned import loss_of

        if not is_measured:
            return float(loss_of(self.step(batch)))
        measured = self.step.measured(batch)
        self.measured_bytes = max(self.measured_bytes, measured.peak_bytes)
        return float(measured.loss)

    def _is_measured(self, first: int) -> bool:
        return self.num_done == first or self.num_done % MEASURE_EVERY == 0

    def _is_line_due(self, first: int) -> bool:
        every = max(1, self.arguments.steps // NUM_LINES)
        return self.num_done % every == 0 or self.num_done in (first + 1, self.arguments.steps)

    def _with_checkpoint(self, error: NonFiniteLossError | LossScaleError) -> PacklightError:
        """Return the error with the name of the checkpoint to go back to."""
        from packlight.run.checkpoint import newest_checkpoint

        # The training step counts its own steps, not those before a resumption.
        if isinstance(error, NonFiniteLossError):
            error = NonFiniteLossError(self.num_done, error.loss, rank=error.rank)
        else:
            error = LossScaleError(self.num_done, error.scale, error.parameters)
        directory = self.arguments.checkpoint
        found = newest_checkpoint(directory) if directory else None
        if found is None:
            return error
        return PacklightError(f"{error}\n  {found.path} is from step {found.step}, before it")

    def _save(self, directory: Path) -> Path:
        from packlight.run.checkpoint import generator_states, save_checkpoint

        extra = _identity(self.arguments) | {"num_batches": self.num_done}
        if self.step.scaler is not None:
            extra["scaler"] = self.step.scaler.state_dict()
        if self.arguments.shard is not None:
            checkpoint = shards.PieceCheckpoint.at(directory, self.num_done)
            self.step.save(checkpoint.path, extra)
            return checkpoint.path
        ranks = self.ranks

        def save(generators: list[Any] | None) -> Path:
            if ranks is not None and ranks.rank > 0:
                return directory
            return save_checkpoint(
                directory, self.model, self.optimizer, step=self.num_done, extra=extra,
                generators=generators,
            )

        if ranks is None:
            return save(None)
        states = ranks.gather(generator_states)
        return ranks.gather(lambda: save(states))[0]

    def _interrupted(self) -> int:
        if self.local is not None:
            self.console.print(f"interrupted after step {self.num_done}; --comm saves nothing")
            return EXIT_INTERRUPTED
        directory = self.arguments.checkpoint
        if directory is None:
            directory = unused_directory(f"{Path(self.arguments.file).stem}-checkpoint")
        path = self._save(Path(directory))
        self.console.print(f"interrupted after step {self.num_done}; saved {path}")
        self.console.print(
            f"resume: {resume_command(self.arguments, str(directory))}",
            highlight=False, markup=False, soft_wrap=True,
        )
        return EXIT_INTERRUPTED

    def _finish(self) -> None:
        self.console.print(f"done: {self.num_done} steps, {self._peak_text()}", highlight=False)
        if self.local is not None:
            self.console.print(comm.sent_text(self.local), highlight=False)
        validation = self._validation_loss()
        if validation is not None:
            self.console.print(f"validation loss {validation:.4f}", highlight=False)
        if self.example.sample is not None:
            text = self.example.sample(self.model)
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _validation_loss(self) -> float | None:
        """Return the mean loss over the first validation batches, or None where there are none."""
        from packlight.capture.returned import loss_of
        from packlight.example import BatchStream, ExampleError

        arguments = self.arguments
        try:
            stream = BatchStream(self.example, "validation", arguments.device, arguments.seed)
        except ExampleError:
            return None
        losses = []
        for batch, _ in zip(stream, range(NUM_VALIDATION_BATCHES), strict=False):
            losses.append(float(loss_of(self.step.evaluate(batch))))
        return sum(losses) / len(losses) if losses else None

    def _peak_text(self) -> str:
        if not self.measured_bytes:
            return ""
        text = f"peak {format_bytes(self.measured_bytes)}"
        if self.step.budget_bytes is not None:
            text += f" of {format_bytes(self.step.budget_bytes)}"
        return text

    @contextmanager
    def _progress(self) -> Iterator[tuple[Progress, Any]]:
        columns = (
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        is_shown = self.console.is_terminal
        with Progress(*columns, console=self.console, disable=not is_shown) as progress:
            total = self.arguments.steps
            yield progress, progress.add_task("", total=total, completed=self.num_done, status="")


@dataclass
class _Interrupt:
    is_set: bool = False


@contextmanager
def _interrupts_noted() -> Iterator[_Interrupt]:
    """Note the first Ctrl-C, so that the step under way ends whole; a second one stops at once."""
    interrupt = _Interrupt()

    def note(signal_number: int, frame: FrameType | None) -> None:
        if interrupt.is_set:
            raise KeyboardInterrupt
        interrupt.is_set = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)


def _rate(num_tokens: int, num_steps: int, seconds: float) -> str:
    if num_tokens:
        return f"{num_tokens / seconds:,.0f} tokens/s"
    return f"{format_seconds(seconds / max(1, num_steps))} per step"
