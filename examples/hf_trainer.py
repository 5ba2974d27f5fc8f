"""Hugging Face's Trainer inside a budget: one line more, `model.compile(backend="packlight", ...)`.

    python examples/hf_trainer.py --budget 150MiB --steps 20

The Trainer, its arguments and its optimizer stay as they are: it clips gradients, accumulates those
of two batches, lets the learning rate fall and saves the model, and all of it gives the same bits
as without the marked line. TrainingArguments has a `torch_compile_backend` too, but accelerate,
through which it goes, knows a fixed list of backends and passes no options. `model.compile` changes
the model in place: checkpoints, `generate` and the Trainer's look at the signature of `forward` see
the model that they know.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from hf_gpt2 import CONTEXT, TEXT, model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import packlight

BATCH = 8


class Bytes(Dataset[dict[str, torch.Tensor]]):
    """The text cut into pieces of equal length."""

    def __init__(self) -> None:
        tokens = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
        self.pieces = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def __len__(self) -> int:
        """Return the number of pieces."""
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Return input_ids and labels, int64 [context]."""
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


class MeasuringTrainer(Trainer):
    """A Trainer that looks at the memory of one forward and backward; nobody needs it to train."""

    peak_bytes = 0

    def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
        """Train on one batch."""
        run = super().training_step
        if self.peak_bytes or not self.state.global_step:  # the first batch is captured and planned
            return run(*arguments, **named)
        peak = packlight.measure_peak(lambda: run(*arguments, **named), self.args.device)
        self.peak_bytes = peak.peak_bytes
        result: torch.Tensor = peak.result
        return result


def main() -> None:
    """Train for a few steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="150MiB", help="for what forward and backward allocate")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--save", type=Path, metavar="DIR", help="where to save the model")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    network = model()
    network.compile(backend="packlight", options={"budget": arguments.budget})  # the one line
    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            output_dir=directory,
            max_steps=arguments.steps,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            bf16=arguments.precision == "bf16",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = MeasuringTrainer(model=network, args=settings, train_dataset=Bytes())
        trainer.train()
        if arguments.save:
            trainer.save_model(str(arguments.save))
    print(f"measured peak {trainer.peak_bytes / 2**20:.1f} MiB, budget {arguments.budget}")


if __name__ == "__main__":
    main()
