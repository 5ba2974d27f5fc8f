"""`make demo`: a GPT trained plainly, then in 40% of the memory, with identical losses.

Both runs start from the same seeds. What is counted is everything that a training step has in
memory at its worst moment: parameters, gradients, optimizer state, the batch, activations and
kernels' own workspace. The second run then goes on to a sensible loss, inside its budget, and
writes some text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import char_gpt
import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import packlight
from packlight.units import format_bytes, format_seconds

SEED = 1
NUM_COMPARED = 20
BUDGET_SHARE = 0.40
MAX_STEPS = 420
TIME_LIMIT_SECONDS = 240.0
MEASURED_STEPS = (2, 10)
BAR_WIDTH = 46


@dataclass
class Run:
    """What a training run showed.

    Attributes:
        losses: one per step.
        peak_bytes: measured whole-step peak.
        step_seconds: least time of a step that was not being measured.
    """

    losses: list[float]
    peak_bytes: int
    step_seconds: float


def main() -> None:
    """Run the demonstration."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=MAX_STEPS, help="most steps of the second run")
    arguments = parser.parse_args()
    started = time.perf_counter()
    console = Console(width=min(100, Console().width))
    console.print(
        Panel(
            f"A character-level GPT ({char_gpt.NUM_LAYERS} layers, width {char_gpt.WIDTH}, "
            f"{char_gpt.BATCH} sequences of {char_gpt.CONTEXT} characters) on tiny Shakespeare, "
            f"dropout on.\nMemory below is the whole step's peak: parameters, gradients, optimizer "
            "state, batch, activations and workspace.",
            title="Packlight",
        )
    )

    console.print(f"\n[bold]1.[/bold] Plain PyTorch, {NUM_COMPARED} steps")
    plain = run_plain(console)
    budget_bytes = int(BUDGET_SHARE * plain.peak_bytes)
    console.print(
        f"   measured peak {format_bytes(plain.peak_bytes)}, "
        f"{format_seconds(plain.step_seconds)} per step, last loss {plain.losses[-1]:.6f}",
        highlight=False,
    )

    console.print(
        f"\n[bold]2.[/bold] packlight.fit with budget={format_bytes(budget_bytes)} "
        f"({BUDGET_SHARE:.0%} of that), {NUM_COMPARED} steps from the same seeds",
        highlight=False,
    )
    model, optimizer, data = fresh_start()
    batch = next(data)
    planning = time.perf_counter()
    # Microbatches and chunks would round sums in another order; here every bit is compared.
    step = packlight.fit(
        model, char_gpt.loss, optimizer, batch, budget=budget_bytes, moves=packlight.EXACT_MOVES
    )
    console.print(
        f"   captured, profiled and planned in {format_seconds(time.perf_counter() - planning)}",
        highlight=False,
    )
    torch.manual_seed(SEED)
    packed = run_steps(console, step, model, optimizer, batch, data, NUM_COMPARED)
    is_equal = packed.losses == plain.losses
    console.print(comparison(plain, packed, step, budget_bytes))
    console.print(bars(plain.peak_bytes, packed.peak_bytes))
    if not is_equal:
        pairs = zip(plain.losses, packed.losses, strict=True)
        index = next(i for i, (a, b) in enumerate(pairs) if a != b)
        raise SystemExit(
            f"losses differ from step {index + 1} on: "
            f"{plain.losses[index]!r} plainly, {packed.losses[index]!r} in the budget"
        )
    if packed.peak_bytes > budget_bytes:
        raise SystemExit(f"measured peak {packed.peak_bytes} is above the budget {budget_bytes}")
    console.print(
        f"   [bold green]all {NUM_COMPARED} losses are identical to the last bit[/bold green]"
    )

    num_more = max(0, arguments.steps - NUM_COMPARED)
    console.print(f"\n[bold]3.[/bold] Training on, inside the budget: up to {num_more} steps more")
    deadline = started + TIME_LIMIT_SECONDS
    later = run_steps(
        console, step, model, optimizer, next(data), data, num_more, deadline=deadline
    )
    losses = (packed.losses + later.losses)[-20:]
    held_out = char_gpt.batches("validation")
    validation = sum(step.evaluate(next(held_out)).item() for _ in range(5)) / 5
    console.print(
        f"   loss {sum(losses) / len(losses):.3f} in the last steps, {validation:.3f} on held-out "
        f"text (nats per character) after {len(packed.losses + later.losses)} steps",
        highlight=False,
    )
    console.print(Panel(char_gpt.sample(model).strip(), title="It writes"))
    console.print(f"{time.perf_counter() - started:.0f} seconds in all", highlight=False)


def fresh_start() -> tuple[torch.nn.Module, torch.optim.Optimizer, Iterator[Any]]:
    """Return model, optimizer and data; the same ones every time."""
    torch.manual_seed(SEED)
    model = char_gpt.model().train()
    return model, char_gpt.optimizer(model), fixed_batches()


def fixed_batches() -> Iterator[Any]:
    """Yield training batches that do not depend on how often dropout has drawn numbers."""
    data, state = char_gpt.batches(), torch.Generator().manual_seed(SEED).get_state()
    while True:
        outside = torch.get_rng_state()
        torch.set_rng_state(state)
        batch = next(data)
        state = torch.get_rng_state()
        torch.set_rng_state(outside)
        yield batch


def run_plain(console: Console) -> Run:
    """Train the way everybody does."""
    model, optimizer, data = fresh_start()

    def step(batch: Any) -> torch.Tensor:
        loss = char_gpt.loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    batch = next(data)
    torch.manual_seed(SEED)
    return run_steps(console, step, model, optimizer, batch, data, NUM_COMPARED)


def run_steps(
    console: Console,
    step: Any,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    data: Iterator[Any],
    num_steps: int,
    deadline: float = float("inf"),
) -> Run:
    """Call `step` on one batch after the other until the count or the time is up."""
    run = Run([], 0, float("inf"))
    columns = (
        TextColumn("   step {task.completed}/{task.total}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=num_steps, status="")
        for index in range(1, num_steps + 1):
            started = time.perf_counter()
            if index in MEASURED_STEPS:
                resident_bytes = bytes_of(model, optimizer, batch)
                peak = packlight.measure_peak(lambda batch=batch: step(batch))
                run.peak_bytes = max(run.peak_bytes, resident_bytes + peak.peak_bytes)
                run.losses.append(peak.result.item())
            else:
                run.losses.append(step(batch).item())
                run.step_seconds = min(run.step_seconds, time.perf_counter() - started)
            progress.update(task, completed=index, status=f"loss {run.losses[-1]:.4f}")
            if time.perf_counter() > deadline:
                break
            batch = next(data)
    return run


def bytes_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> int:
    """Return the bytes of parameters, model buffers, optimizer state and batch."""
    tensors = [*model.parameters(), *model.buffers(), *batch]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def comparison(plain: Run, packed: Run, step: Any, budget_bytes: int) -> Table:
    """Return both runs side by side."""
    table = Table()
    for name in ("", "plain", "in the budget"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row("budget", "", f"{budget_bytes:,} bytes")
    table.add_row("predicted peak", "", f"{step.peak_bytes:,} bytes")
    table.add_row("measured peak", f"{plain.peak_bytes:,} bytes", f"{packed.peak_bytes:,} bytes")
    share, error = packed.peak_bytes / plain.peak_bytes, step.peak_bytes / packed.peak_bytes - 1
    table.add_row("  of the plain one", "", f"{share:.1%}")
    table.add_row("  predicted / measured", "", f"{error:+.2%}")
    seconds = (plain.step_seconds, packed.step_seconds)
    table.add_row("fastest step", *(format_seconds(value) for value in seconds))
    table.add_row("  predicted for forward + backward", "", f"{step.plan.slowdown:.2f} x")
    table.add_row("  measured for the whole step", "", f"{seconds[1] / seconds[0]:.2f} x")
    for index in (0, NUM_COMPARED // 2, NUM_COMPARED - 1):
        both = (plain.losses[index], packed.losses[index])
        table.add_row(f"loss of step {index + 1}", *(value.hex() for value in both))
    return table


def bars(plain_bytes: int, packed_bytes: int) -> str:
    """Return both peaks as bars."""
    short = round(BAR_WIDTH * packed_bytes / plain_bytes)
    return (
        f"   plain      {'█' * BAR_WIDTH} {format_bytes(plain_bytes)}\n"
        f"   packlight  {'█' * short} {format_bytes(packed_bytes)}"
    )


if __name__ == "__main__":
    main()
