"""Two ranks with parts of weights, by DTensor: one process's numbers, in planned bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import packlight
from packlight.errors import NonFiniteLossError
from packlight.moves.microbatch.move import Microbatch
from packlight.search.search import Search
from tests.rank_pool import RankPool

PARALLEL = packlight.Parallel(tensor="tensor")
WIDTH, HEADS, VOCABULARY = 32, 4, 64


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks for all tests."""
    pool = RankPool(2, tmp_path_factory.mktemp("tensor"))
    yield pool
    pool.close()


class Block(nn.Module):
    """Attention, whose heads lie with ranks, and MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        heads = [m(normed).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
                 for m in (self.q, self.k, self.v)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.embedding(tokens)))


def gpt() -> nn.Module:
    torch.manual_seed(0)
    return Gpt()


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tensor",))


def split(model: nn.Module, splits_tokens: bool = False) -> nn.Module:
    """Split heads and hidden units over ranks, and between them perhaps tokens."""
    outside = Shard(1) if splits_tokens else Replicate()
    plan: dict[str, ParallelStyle] = {}
    for i in range(2):
        for name in ("q", "k", "v", "up"):
            plan[f"blocks.{i}.{name}"] = ColwiseParallel(input_layouts=outside)
        for name in ("out", "down"):
            plan[f"blocks.{i}.{name}"] = RowwiseParallel(output_layouts=outside)
        for name in ("norm", "norm2") if splits_tokens else ():
            plan[f"blocks.{i}.{name}"] = SequenceParallel()
    if splits_tokens:
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1))
        plan["head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
    parallelize_module(model, mesh(), plan)
    return model


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def batches(count: int = 3) -> list[Any]:
    """Return the batches of all ranks."""
    generator = torch.Generator().manual_seed(1)
    tokens = [torch.randint(VOCABULARY, (8, 17), generator=generator) for _ in range(count)]
    return [(t[:, :-1].clone(), t[:, 1:].clone()) for t in tokens]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)


def trained(share: float | None, splits_tokens: bool) -> dict[str, Any]:
    """Train three steps within a share of what activations take."""
    model = packlight.localize(split(gpt(), splits_tokens))
    optimizer = optimizer_of(model)
    moves = ("update-in-backward",)
    options: dict[str, Any] = {"mesh": mesh(), "parallel": PARALLEL, "moves": moves}
    budget = None
    if share is not None:
        free = packlight.fit(model, loss_of, optimizer, batches()[0], **options)
        resident = free.way.memory.resident_bytes
        budget = resident + int(share * (free.peak_bytes - resident))
    step = packlight.fit(model, loss_of, optimizer, batches()[0], budget, **options)
    losses = [float(step(batch)) for batch in batches()[:-1]]
    measured = step.measured(batches()[-1])
    graph = step.profile.graph
    collectives = {o.id for o in graph.operations if o.name.startswith("packlight.all_reduce")}
    return {
        "losses": [*losses, float(measured.loss)],
        "parameters": [p.detach() for p in model.parameters()],
        "peak": measured.peak_bytes,
        "predicted": step.peak_bytes,
        "budget": budget,
        "num_collectives": len(collectives),
        "num_run_again": len(collectives & graph.reruns(step.plan.schedule).keys()),
        "words": step.describe(),
        "schedule": repr(step.plan.schedule),
        "evaluated": float(step.evaluate(batches()[0])),
    }


def trained_by_dtensor(splits_tokens: bool) -> list[torch.Tensor]:
    """Train the same by eager PyTorch; return this rank's parts."""
    model = split(gpt(), splits_tokens)
    optimizer = optimizer_of(model)
    for batch in batches():
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    return [
        (p.to_local() if isinstance(p, DTensor) else p).detach() for p in model.parameters()
    ]


def trained_alone() -> list[float]:
    """Train the same in one process with whole weights; return losses."""
    model = gpt()
    optimizer = optimizer_of(model)
    losses = []
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    "share, splits_tokens",
    [(None, False), (0.6, False), pytest.param(None, True, marks=pytest.mark.slow)],
)
def test_parts_of_weights_train_as_one_process_does(
    pool: RankPool, share: float | None, splits_tokens: bool
) -> None:
    results = pool.run(trained, share, splits_tokens)
    by_dtensor = pool.run(trained_by_dtensor, splits_tokens)
    alone = trained_alone()
    assert results[0]["schedule"] == results[1]["schedule"]
    for result, parts in zip(results, by_dtensor, strict=True):
        assert result["losses"] == pytest.approx(alone, rel=1e-5)
        assert sorted(p.shape for p in result["parameters"]) == sorted(p.shape for p in parts)
        sums = sorted(float(p.double().sum()) for p in result["parameters"])
        assert sums == sorted(float(p.double().sum()) for p in parts)  # bits, whatever the order
        assert result["predicted"] - 64 <= result["peak"] <= result["predicted"]
        assert result["num_collectives"] >= 7  # 4 in the forward, the last 3 or 4 in the backward
        assert share is None or result["predicted"] <= result["budget"]
        assert share is None or "recomputed" in result["words"]
    assert results[0]["losses"] == results[1]["losses"]


def attempted(what: str) -> Any:
    model = split(gpt())
    if what != "dtensor":
        packlight.localize(model)
    optimizer = optimizer_of(model)
    batch = batches(1)[0]
    options: dict[str, Any] = {"mesh": mesh(), "parallel": PARALLEL}
    if what == "nobody":
        options = {}
    if what == "batch" and dist.get_rank() == 1:
        batch = (batch[0].flip(0), batch[1])
    packlight.fit(model, loss_of, optimizer, batch, **options)


@pytest.mark.parametrize(
    "what, kind, words",
    [
        ("dtensor", "UnsupportedModelError", "packlight.localize"),
        ("nobody", "UnsupportedModelError", "the loss talks to other ranks"),
        ("batch", "RankMismatchError", "all ranks have the same batch"),
    ],
)
def test_what_cannot_be_is_said_on_all_ranks(
    pool: RankPool, what: str, kind: str, words: str
) -> None:
    pool.assert_refused(words, attempted, what, kind=kind)


def with_nan() -> tuple[bool, float]:
    model = packlight.localize(split(gpt()))
    optimizer = optimizer_of(model)
    scaled = (*batches(1)[0], torch.ones(1))

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return loss_of(model, batch[:2]) * batch[2].mean()

    step = packlight.fit(model, loss_fn, optimizer, scaled, mesh=mesh(), parallel=PARALLEL)
    before = [p.detach().clone() for p in model.parameters()]
    try:
        step((*scaled[:2], torch.full((1,), float("nan"))))
    except NonFiniteLossError:
        is_same = all(map(torch.equal, before, model.parameters()))
        return is_same, float(step(scaled))
    return False, 0.0


def test_a_loss_that_is_nan_leaves_all_parts_as_they_are(pool: RankPool) -> None:
    one, another = pool.run(with_nan)
    assert one == another and one[0] and one[1] > 0


def clipped(norm: float) -> tuple[list[float], list[float]]:
    """Train with the norm of all gradients clipped; return losses, and those of microbatches."""
    found = []
    for starts in (((),), ((Microbatch(2),),)):
        model = packlight.localize(split(gpt()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Search, "_starts", lambda self, starts=starts: iter(starts))
            step = packlight.fit(
                model, loss_of, optimizer, batches()[0], mesh=mesh(), parallel=PARALLEL,
                clip_grad_norm=norm, moves=("microbatch",),
            )
        assert step.way.num_microbatches == 1 + len(starts[0])
        found.append([float(step(batch)) for batch in batches()])
    return found[0], found[1]


@pytest.mark.slow
def test_the_norm_of_all_parts_is_clipped(pool: RankPool) -> None:
    norm, model = 0.05, gpt()
    optimizer, alone = torch.optim.SGD(model.parameters(), lr=0.1), []
    for batch in batches():
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), norm)
        optimizer.step()
        alone.append(float(loss.detach()))
    for whole, in_microbatches in pool.run(clipped, norm):
        assert whole == pytest.approx(alone, rel=1e-5)
        assert in_microbatches == pytest.approx(alone, rel=1e-5)


def overflowing() -> dict[str, Any]:
    """Have the gradient of one rank's part overflow: that of the last hidden unit's weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[3], model[0].bias[3] = 0.0, 0.0
        model[1].weight[:, 3] = 2e38
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    packlight.localize(parallelize_module(model, mesh(), plan))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    batch = torch.ones(4, 8)
    step = packlight.fit(
        model, lambda model, batch: model(batch).sum(), optimizer, batch, mesh=mesh(),
        parallel=PARALLEL, scaler=scaler,
    )
    before = [p.detach().clone() for p in model.parameters()]
    step(batch)
    is_same = all(map(torch.equal, before, model.parameters()))
    return {"is_untouched": is_same, "scale": scaler.get_scale()}


def test_an_overflow_in_one_part_skips_the_update_of_all(pool: RankPool) -> None:
    for result in pool.run(overflowing):
        assert result == {"is_untouched": True, "scale": 4.0}


def test_parts_of_other_sizes_and_tied_weights_are_refused(pool: RankPool) -> None:
    pool.assert_refused("has no equal parts for 2 ranks", localized_unevenly)


def localized_unevenly() -> None:
    model = nn.Sequential(nn.Linear(4, 5))
    packlight.localize(parallelize_module(model, mesh(), {"0": ColwiseParallel()}))
