"""A LightningModule inside a budget: one line more.

    python examples/lightning_module.py --budget 60MiB --updates 20 --precision bf16-mixed

Lightning's Trainer accumulates and clips gradients, follows the schedule, keeps an average of the
weights and writes checkpoints. Without the marked line the script prints the same losses.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import char_gpt
import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

import packlight

NUM_ACCUMULATED = 2


class Batches(IterableDataset[Any]):
    """The example's batches."""

    def __iter__(self) -> Iterator[Any]:
        """Yield (characters, the ones that follow)."""
        return char_gpt.batches()


class CharGPTModule(lightning.LightningModule):
    """The character GPT with its loss, optimizer and schedule."""

    def __init__(self, num_updates: int) -> None:
        super().__init__()
        self.network: nn.Module = char_gpt.model()
        self.num_updates = num_updates
        self.peak_bytes = 0

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        """Return the loss of a batch."""
        loss = char_gpt.loss(self.network, batch)
        print(f"batch {index}: loss {loss.item():.6f}", flush=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return AdamW and a schedule that is followed update by update."""
        optimizer = char_gpt.optimizer(self)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, char_gpt.LEARNING_RATE, total_steps=self.num_updates + 1
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def optimizer_step(
        self, epoch: int, index: int, optimizer: Any, closure: Callable[[], Any] | None = None
    ) -> None:
        """Step, and look at the memory of one forward and backward; nobody needs it to train."""
        assert closure is not None
        if self.global_step == 1:  # before that, the step is captured and planned
            def measured() -> Any:
                peak = packlight.measure_peak(closure, self.device)
                self.peak_bytes = peak.peak_bytes
                return peak.result

            super().optimizer_step(epoch, index, optimizer, measured)
        else:
            super().optimizer_step(epoch, index, optimizer, closure)


def main() -> None:
    """Train, print losses and the peak of one forward and backward, and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="60MiB", help="for what forward and backward allocate")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--save", type=Path, metavar="DIR", help="where to save a checkpoint")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    module = CharGPTModule(arguments.updates)
    options = {"budget": arguments.budget}
    module.network.compile(backend="packlight", options=options)  # the one line
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    trainer = lightning.Trainer(
        accelerator="auto",
        max_steps=arguments.updates,
        accumulate_grad_batches=NUM_ACCUMULATED,
        gradient_clip_val=1.0,
        precision=arguments.precision,
        callbacks=[WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.99))],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Batches(), batch_size=None))
    print(f"measured peak {module.peak_bytes / 2**20:.1f} MiB, budget {arguments.budget}")
    if arguments.save:
        trainer.save_checkpoint(arguments.save / "training.ckpt")


if __name__ == "__main__":
    main()
