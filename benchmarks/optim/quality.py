"""Does a character GPT learn as well with fewer bytes per parameter? Several seeds each.

    python -m benchmarks.optim.quality
    python -m benchmarks.optim.quality --only "adamw 8bit" --seeds 0 --steps 300

Trains examples/char_gpt.py by a plain loop, on the same batches for every optimizer. Runs that are
in the file already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from benchmarks.common import provenance, read_lines, replace_between_markers, table
from benchmarks.optim.measure import FOLDER
from examples import char_gpt
from packlight.optim import LowBit, adamw

RESULTS = FOLDER / "quality.jsonl"
NUM_VALIDATED = 20
REFERENCE = "torch AdamW, fp32"


@dataclass
class Run:
    """One training run.

    Attributes:
        name: of the optimizer.
        seed: of weights, batches and dropout.
        num_steps: trained.
        learning_rate: at its highest; it falls to a tenth in a cosine.
        validation_loss: over the first batches of the validation text, in float32.
        train_seconds: without validation.
        provenance: see `benchmarks.common.provenance`.
    """

    name: str
    seed: int
    num_steps: int
    learning_rate: float
    validation_loss: float | None = None
    train_seconds: float | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


def low_bit(states: str, weights: str) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return a maker of AdamW with the example's settings; norms and vectors stay float32."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        groups = []
        for group in char_gpt.optimizer(model).param_groups:
            for is_matrix in (True, False):
                chosen = [p for p in group["params"] if (p.dim() > 1) == is_matrix]
                if chosen:
                    own = weights if is_matrix else "fp32"
                    decay = group["weight_decay"]
                    groups.append({"params": chosen, "weights": own, "weight_decay": decay})
        if weights.startswith("bf16"):
            for group in groups:
                if group["weights"] != "fp32":
                    for parameter in group["params"]:
                        parameter.data = parameter.data.bfloat16()
        rule = adamw(lr=char_gpt.LEARNING_RATE, betas=(0.9, 0.99))
        return LowBit(groups, rule, states=states)

    return make


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    REFERENCE: char_gpt.optimizer,
    "8-bit states": low_bit("8bit", "fp32"),
    "4-bit states": low_bit("4bit", "fp32"),
    "bf16 weights, stochastic rounding": low_bit("bf16", "bf16-stochastic"),
    "bf16 weights, Kahan compensation": low_bit("bf16", "bf16-kahan"),
    "24-bit weights (bf16 + 8)": low_bit("8bit", "bf16+8bit"),
    "bf16 weights, rounded to nearest": low_bit("bf16", "bf16-nearest"),
}


def main() -> int:
    """Train what is lacking and write the table."""
    arguments = _parser().parse_args()
    command = " ".join(["python -m benchmarks.optim.quality", *sys.argv[1:]])
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for seed in arguments.seeds:
            for name in arguments.only or OPTIMIZERS:
                run = Run(name, seed, arguments.steps, char_gpt.LEARNING_RATE)
                known = {(r.name, r.seed, r.num_steps) for r in read_lines(RESULTS, Run)}
                if (name, seed, arguments.steps) in known:
                    continue
                run.provenance = provenance(seed, "cpu", command)
                train(run, progress)
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(run)) + "\n")
    replace_between_markers(FOLDER / "README.md", "quality", report(read_lines(RESULTS, Run)))
    return 0


def train(run: Run, progress: Progress) -> None:
    """Train and validate; fill in the results."""
    torch.manual_seed(run.seed)
    model = char_gpt.model().train()
    optimizer = OPTIMIZERS[run.name](model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, run.num_steps, eta_min=run.learning_rate / 10
    )
    batches = islice(char_gpt.batches(), run.num_steps)
    task = progress.add_task(f"{run.name}, seed {run.seed}", total=run.num_steps)
    begin = time.perf_counter()
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        # Activations are bfloat16 for all, so that only the optimizer tells runs apart.
        with torch.autocast("cpu", torch.bfloat16):
            loss = char_gpt.loss(model, batch)
        loss.backward()
        optimizer.step()
        schedule.step()
        progress.advance(task)
    run.train_seconds = time.perf_counter() - begin
    model.eval().float()
    with torch.no_grad():
        losses = [
            float(char_gpt.loss(model, batch))
            for batch in islice(char_gpt.batches("validation"), NUM_VALIDATED)
        ]
    run.validation_loss = statistics.mean(losses)
    progress.remove_task(task)


def report(runs: list[Run]) -> list[str]:
    """Return the lines of the table and what was trained."""
    by_seed = {(r.name, r.seed): r.validation_loss or 0.0 for r in runs}
    rows = []
    for name in OPTIMIZERS:
        losses = {seed: loss for (who, seed), loss in by_seed.items() if who == name}
        if not losses:
            continue
        off = [loss - by_seed[REFERENCE, s] for s, loss in losses.items()
               if (REFERENCE, s) in by_seed]
        values = list(losses.values())
        rows.append([
            name, f"{statistics.mean(values):.4f}", f"{min(values):.4f} to {max(values):.4f}",
            f"{statistics.mean(off):+.4f}" if off else "-", str(len(values)),
        ])
    made = runs[0].provenance
    header = ["optimizer", "validation loss", "over seeds", "off fp32's, same seeds", "seeds"]
    return [
        *table(header, rows),
        "",
        f"AdamW on examples/char_gpt.py, {runs[0].num_steps} steps, learning rate "
        f"{runs[0].learning_rate}; {made['hardware']}, torch {made['versions']['torch']}, "
        f"commit {made['commit']}.",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZERS), metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    return parser


if __name__ == "__main__":
    sys.exit(main())
