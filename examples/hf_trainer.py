"""Hugging Face's Trainer inside a budget: one line more, `model.compile(backend="packlight", ...)`.

    python examples/hf_trainer.py --budget 150MiB --steps 20

The Trainer, its arguments and its optimizer stay as they are. TrainingArguments has a
`torch_compile_backend` too, but accelerate, through which it goes, knows a fixed list of backends
and passes no options. `model.compile` changes the model in place: checkpoints, `generate` and the
Trainer's look at the signature of `forward` see the model that they know.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from hf_gpt2 import CONTEXT, TEXT, model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

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


def main() -> None:
    """Train for a few steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="150MiB", help="for what forward and backward allocate")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    network = model()
    network.compile(backend="packlight", options={"budget": arguments.budget})  # the one line
    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            output_dir=directory,
            max_steps=arguments.steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            logging_steps=5,
            report_to="none",
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
        )
        Trainer(model=network, args=settings, train_dataset=Bytes()).train()


if __name__ == "__main__":
    main()
