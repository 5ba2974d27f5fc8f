"""A loop with Hugging Face's Accelerate inside a budget: one line more.

    python examples/accelerate_loop.py --budget 150MiB --updates 20 --precision bf16

Accelerate prepares model, optimizer, data and schedule, decides on which batches the optimizer
steps, clips gradients and saves. The marked line may stand before or after `prepare`; without it
the script prints the same losses.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from hf_gpt2 import loss, model, optimizer
from hf_trainer import BATCH, Bytes
from torch.utils.data import DataLoader

import packlight


def main() -> None:
    """Train, print losses and the peak of one forward and backward, and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="150MiB", help="for what forward and backward allocate")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--save", type=Path, metavar="DIR", help="where to save the result")
    arguments = parser.parse_args()

    accelerator = Accelerator(
        gradient_accumulation_steps=2, mixed_precision=arguments.precision,
        cpu=not torch.cuda.is_available(),
    )
    torch.manual_seed(0)
    network = model()
    updates = optimizer(network)
    schedule = torch.optim.lr_scheduler.LinearLR(updates, 1.0, 0.1, arguments.updates)
    data = DataLoader(Bytes(), batch_size=BATCH, shuffle=True)
    network, updates, data, schedule = accelerator.prepare(network, updates, data, schedule)
    network.compile(backend="packlight", options={"budget": arguments.budget})  # the one line

    def forward_and_backward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        value = loss(network, batch)
        accelerator.backward(value)
        return value.detach()

    num_updates = peak_bytes = 0
    for batch in data:
        with accelerator.accumulate(network):
            if num_updates == 1:  # the first batch is captured and planned
                peak = packlight.measure_peak(
                    lambda b=batch: forward_and_backward(b), accelerator.device
                )
                value = peak.result
                peak_bytes = max(peak_bytes, peak.peak_bytes)
            else:
                value = forward_and_backward(batch)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(network.parameters(), 1.0)
                num_updates += 1
            updates.step()
            schedule.step()
            updates.zero_grad()
        print(f"update {num_updates}: loss {value.item():.6f}", flush=True)
        if num_updates == arguments.updates:
            break
    print(f"measured peak {peak_bytes / 2**20:.1f} MiB, budget {arguments.budget}")
    if arguments.save:
        accelerator.save_model(network, str(arguments.save))  # safetensors
        accelerator.save_state(str(arguments.save))


if __name__ == "__main__":
    main()
