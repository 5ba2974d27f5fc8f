"""One method on some workers: a small character GPT, with the bytes that the kernel saw sent."""

from __future__ import annotations

import math
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn

from benchmarks.comm.methods import METHODS
from benchmarks.common import append_line, provenance
from packlight.comm import WireCounter

TEXT = Path(__file__).resolve().parents[2] / "examples" / "data" / "tinyshakespeare.txt"
NUM_LAYERS, NUM_HEADS, WIDTH, CONTEXT = 2, 4, 64, 32
BATCH_PER_WORKER = 4
WARMUP_SHARE, LAST_SHARE = 0.1, 0.05  # of steps in which the rate rises, of the rate at the end
VALIDATION_BATCHES, VALIDATION_ROWS = 16, 64
TIMEOUT_SECONDS = 300


@dataclass(frozen=True)
class Record:
    """What one run came to.

    Attributes:
        method: a key of `METHODS`.
        baseline: the method that has the same optimizer and sends everything in fp32.
        network: the rate of each worker's link; "" for loopback as it is.
        num_workers: gloo ranks, each in a process of its own.
        num_steps: of each worker.
        num_parameters: of the model.
        validation_loss: in the end, of rank 0's model after the last average.
        bytes_per_step: sent by a worker, as the kernel counts them, the mean over workers.
        losses: training loss of rank 0, the mean of each tenth.
        seconds: of the steps, on a machine that others use, too.
        provenance: where and with what.
    """

    method: str
    library: str
    baseline: str
    network: str
    num_workers: int
    num_steps: int
    seed: int
    num_parameters: int
    validation_loss: float
    bytes_per_step: float
    losses: list[float]
    seconds: float
    provenance: dict[str, Any]


class Block(nn.Module):
    """Attention and MLP, pre-norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, length, width] for the same."""
        heads = self.qkv(self.norm(x)).unflatten(-1, (3, NUM_HEADS, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharGPT(nn.Module):
    """Next characters."""

    def __init__(self, num_characters: int) -> None:
        super().__init__()
        self.token = nn.Embedding(num_characters, WIDTH)
        self.place = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(NUM_LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_characters)
        for module in self.modules():
            if isinstance(module, (nn.Embedding, nn.Linear)):
                nn.init.normal_(module.weight, std=0.05)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [batch, length, characters] of int64 [batch, length]."""
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def run(
    methods: list[str], num_workers: int, num_steps: int, seeds: list[int], out: Path, command: str
) -> bool:
    """Train with each method and seed on workers that stay; write a line for each.

    Returns:
        Whether all workers came to their end.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder, "store"))
        workers = [
            context.Process(
                target=work,
                args=(rank, num_workers, methods, num_steps, seeds, store, out, command, ""),
            )
            for rank in range(num_workers)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return all(worker.exitcode == 0 for worker in workers)


def work(
    rank: int, size: int, methods: list[str], num_steps: int, seeds: list[int], store: str,
    out: Path, command: str, network: str,
) -> None:
    """Be one of the workers."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    text = TEXT.read_text(encoding="utf-8")
    alphabet = {character: i for i, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[character] for character in text])
    for seed in seeds:
        for method in methods:
            found = _trained(method, rank, num_steps, seed, tokens, len(alphabet))
            everybody: list[Any] = [None] * size
            dist.all_gather_object(everybody, found.pop("sent"))
            if rank == 0:
                append_line(out, Record(
                    method=method,
                    library=METHODS[method].library,
                    baseline=METHODS[method].baseline,
                    network=network,
                    num_workers=size,
                    num_steps=num_steps,
                    seed=seed,
                    bytes_per_step=sum(everybody) / size / num_steps,
                    provenance=provenance(seed, "cpu", command, ["numba", "numpy"]),
                    **found,
                ))
    dist.barrier()


def _trained(
    method: str, rank: int, num_steps: int, seed: int, tokens: torch.Tensor, num_characters: int
) -> dict[str, Any]:
    cut = int(0.9 * len(tokens))
    torch.manual_seed(seed)
    model = CharGPT(num_characters)
    chosen = METHODS[method]
    called, optimizer, step = chosen.start(model, chosen.optimizer(model))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        getattr(optimizer, "optim", optimizer), lambda i: _share(i, num_steps)
    )
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    losses = []
    counter, begin = WireCounter(), time.perf_counter()
    for _ in range(num_steps):
        loss = _loss(called, _batch(tokens[:cut], BATCH_PER_WORKER, generator))
        optimizer.zero_grad()
        loss.backward()
        step()
        schedule.step()
        losses.append(float(loss.detach()))
    seconds, sent = time.perf_counter() - begin, counter.sent_bytes()
    validation = 0.0
    if rank == 0:
        generator.manual_seed(0)
        with torch.no_grad():
            for _ in range(VALIDATION_BATCHES):
                batch = _batch(tokens[cut:], VALIDATION_ROWS, generator)
                validation += float(_loss(model, batch)) / VALIDATION_BATCHES
    tenth = max(num_steps // 10, 1)
    return {
        "sent": sent, "seconds": seconds, "validation_loss": validation,
        "losses": [sum(losses[i : i + tenth]) / tenth for i in range(0, tenth * 10, tenth)],
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }


def _share(step: int, num_steps: int) -> float:
    warmup = max(int(WARMUP_SHARE * num_steps), 1)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(num_steps - warmup, 1)
    return LAST_SHARE + (1 - LAST_SHARE) * 0.5 * (1 + math.cos(math.pi * done))


def _batch(tokens: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(tokens) - CONTEXT, (rows,), generator=generator)
    return torch.stack([tokens[i : i + CONTEXT + 1] for i in starts.tolist()])


def _loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
