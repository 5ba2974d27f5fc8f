"""A loop of one's own with all that loops have, inside a budget: one line more.

    python examples/plain_loop.py --budget 60MiB --updates 20 --precision bf16

Gradients of two batches are accumulated and clipped, the learning rate follows a schedule, an
average of the weights is kept, the loss may run under autocast (and be scaled, in fp16), and the
result is saved. The budget covers what forward and backward allocate. Without the marked line the
script prints the same losses.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import char_gpt
import torch
from safetensors.torch import save_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import packlight

NUM_ACCUMULATED = 2
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def main() -> None:
    """Train, print losses and the peak of one forward and backward, and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--budget", default="60MiB", help="for what forward and backward allocate")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument("--save", type=Path, metavar="DIR", help="where to save the result")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = char_gpt.model().to(device)
    optimizer = char_gpt.optimizer(model)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, char_gpt.LEARNING_RATE, total_steps=arguments.updates + 1
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    dtype = PRECISIONS[arguments.precision]
    scaler = torch.amp.GradScaler(device, enabled=dtype is torch.float16)
    model.compile(backend="packlight", options={"budget": arguments.budget})  # the one line

    def forward_and_backward(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        autocast = torch.autocast(device, dtype) if dtype else contextlib.nullcontext()
        with autocast:
            loss = char_gpt.loss(model, batch) / NUM_ACCUMULATED
        scaler.scale(loss).backward()
        return loss.detach()

    data = char_gpt.batches()
    peak_bytes = 0
    for update in range(arguments.updates):
        total = torch.zeros((), device=device)
        for _ in range(NUM_ACCUMULATED):
            tokens, following = next(data)
            batch = tokens.to(device), following.to(device)
            if update == 1:  # the first batch is captured and planned
                peak = packlight.measure_peak(lambda b=batch: forward_and_backward(b), device)
                total += peak.result
                peak_bytes = max(peak_bytes, peak.peak_bytes)
            else:
                total += forward_and_backward(batch)
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        average.update_parameters(model)
        print(f"update {update}: loss {total.item():.6f}", flush=True)
    print(f"measured peak {peak_bytes / 2**20:.1f} MiB, budget {arguments.budget}")

    if arguments.save:
        arguments.save.mkdir(parents=True, exist_ok=True)
        save_model(model, str(arguments.save / "model.safetensors"))
        state = {
            "model": model.state_dict(), "average": average.module.state_dict(),
            "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
            "scaler": scaler.state_dict(),
        }
        torch.save(state, arguments.save / "training.pt")


if __name__ == "__main__":
    main()
