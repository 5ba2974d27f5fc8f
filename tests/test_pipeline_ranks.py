"""Stages on ranks: one device's numbers, each rank's bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import packlight
from packlight.errors import NonFiniteLossError, RankError
from packlight.run.distributed import load_distributed
from tests.rank_pool import Raised, RankPool

WIDTH, VOCABULARY, ROWS, LENGTH, NUM_MICROBATCHES = 32, 64, 8, 16, 4


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks for all tests."""
    pool = RankPool(2, tmp_path_factory.mktemp("pipeline"))
    yield pool
    pool.close()


class Block(nn.Module):
    """Attention and MLP, with dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = self.qkv(self.norm(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in heads)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.dropout(self.out(attended.transpose(1, 2).flatten(-2)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class Gpt(nn.Module):
    """A few blocks, whose head may be the embedding."""

    def __init__(self, dropout: float = 0.0, is_tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Skips(nn.Module):
    """Values cross several boundaries: each level of the way down is added on the way up."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.down = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x, kept = self.embed(tokens), []
        for layer in self.down:
            kept.append(x)
            x = torch.tanh(layer(x))
        self.seen.add_(x.detach().mean((0, 1)))
        for layer in self.up:
            x = torch.tanh(layer(x)) + kept.pop()
        return self.head(x)


class Shared(Gpt):
    """One block, run four times: each stage adds to its gradient, some of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0]] * 4)


class Added(Gpt):
    """Two gradients lie in one place: those of what is added up before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn(WIDTH, WIDTH)) for _ in range(2))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x @ (self.left + self.right))


def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    tokens, labels = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())


def batch_of(seed: int, is_masked: bool = False) -> Any:
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(VOCABULARY, (2, ROWS, LENGTH), generator=generator)
    if is_masked:
        labels[torch.rand(ROWS, LENGTH, generator=generator) < 0.4] = -100
    return tokens, labels


MODELS = {
    "gpt": Gpt,
    "dropout": lambda: Gpt(dropout=0.2),
    "tied": lambda: Gpt(is_tied=True),
    "skips": Skips,
    "shared": Shared,
    "added": Added,
}


def made(kind: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = MODELS[kind]()
    if kind == "tied":  # Adam makes much of gradients that are nothing but rounding
        return model, torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)


def on_one_device(kind: str, num_steps: int, is_masked: bool) -> tuple[list[float], Any]:
    """Return losses and the state of eager PyTorch's loop over microbatches."""
    model, optimizer = made(kind)
    torch.manual_seed(5)
    losses = []
    for number in range(num_steps):
        tokens, labels = batch_of(number, is_masked)
        counted = (labels != -100).sum()
        seed = int(torch.randint(2**62, ())) if kind == "dropout" else 0
        state = torch.get_rng_state()
        total = torch.zeros(())
        parts = zip(tokens.chunk(NUM_MICROBATCHES), labels.chunk(NUM_MICROBATCHES), strict=True)
        for index, part in enumerate(parts):
            torch.manual_seed(seed + index)
            weight = float((part[1] != -100).sum()) / float(counted)
            loss = loss_fn(model, part)
            loss.backward(torch.full_like(loss, weight))
            total = total + weight * loss.detach()
        torch.set_rng_state(state)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
    return losses, model.state_dict()


def in_stages(
    kind: str, num_steps: int, is_masked: bool, budget: int | None, schedule: str, stages: int
) -> Any:
    """Return losses, whole state, budget, planned and measured peaks of one rank."""
    model, optimizer = made(kind)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    step = packlight.fit_pipeline(
        model, loss_fn, optimizer, batch_of(0, is_masked), budget, mesh=mesh, schedule=schedule,
        num_microbatches=NUM_MICROBATCHES, stages_per_rank=stages, progress=False,
    )
    torch.manual_seed(5)
    losses, peak = [], 0
    for number in range(num_steps):
        batch = batch_of(number, is_masked)
        resident = resident_bytes(model, optimizer, batch)
        measured = packlight.measure_peak(lambda batch=batch: step(batch))
        losses.append(float(measured.result))
        peak = max(peak, resident + measured.peak_bytes)
    held = sum(p.untyped_storage().nbytes() for p in model.parameters())
    with step.whole_parameters():
        state = {name: value.clone() for name, value in model.state_dict().items()}
    return losses, state, step.peak_bytes, peak, held, step.describe()


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> int:
    held = [v for s in optimizer.state.values() for v in s.values()]
    states = [v for v in held if torch.is_tensor(v)]
    everything = [*model.parameters(), *model.buffers(), *states, *batch]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in everything}
    return sum(storages.values())


CASES = [
    ("gpt", False, "1f1b", 1), ("gpt", True, "gpipe", 1), ("dropout", False, "1f1b", 1),
    ("tied", False, "1f1b", 1), ("skips", False, "1f1b", 2), ("added", False, "varuna", 1),
    ("gpt", False, "zb-h1", 1), ("dropout", True, "zb-h2", 1),
]


@pytest.mark.parametrize(("kind", "is_masked", "schedule", "stages"), CASES)
def test_stages_on_two_ranks_have_one_devices_bits_within_their_bytes(
    pool: RankPool, kind: str, is_masked: bool, schedule: str, stages: int
) -> None:
    """Without a budget, and in little more than the smallest that an error names."""
    plain = pool.run(in_stages, kind, 1, is_masked, None, schedule, stages)
    (least,) = {smallest_of(o) for o in pool.outcomes(refused, 1000, kind, schedule, stages)}
    budget = least + int(0.2 * (max(planned for _, _, planned, *_ in plain) - least))
    small = pool.run(in_stages, kind, 3, is_masked, budget, schedule, stages)
    for results, num_steps in ((plain, 1), (small, 3)):
        expected, state = on_one_device(kind, num_steps, is_masked)
        for losses, found, planned, peak, held, words in results:
            if kind == "tied":  # two ranks' parts are added up once, not for each microbatch
                assert losses == pytest.approx(expected, rel=1e-5), words
            else:
                assert losses == expected, words
            for name, value in found.items():
                if kind == "tied":
                    assert torch.allclose(value, state[name], rtol=1e-3, atol=1e-4), name
                elif name != "seen":  # a buffer is its rank's own
                    assert torch.equal(value, state[name]), name
            assert peak <= planned, words
            assert held < whole_bytes(kind)
    assert all(planned <= budget for _, _, planned, *_ in small)


def whole_bytes(kind: str) -> int:
    return sum(p.nbytes for p in made(kind)[0].parameters())


def smallest_of(outcome: Any) -> int:
    assert isinstance(outcome, Raised) and outcome.kind == "InfeasibleBudgetError"
    found = re.search(r"\((\d+) bytes\)", outcome.text)
    assert found is not None
    return int(found[1])


def refused(
    budget: int | None, kind: str = "gpt", schedule: str = "1f1b", stages: int = 1, **options: Any
) -> Any:
    options = {"schedule": schedule, "stages_per_rank": stages} | options
    model, optimizer = made(kind)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    given = {"num_microbatches": NUM_MICROBATCHES, "progress": False} | options
    return packlight.fit_pipeline(
        model, loss_fn, optimizer, batch_of(0), budget, mesh=mesh, **given
    ).peak_bytes


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"num_microbatches": 3}, "BatchError", "equal parts"),
        ({"schedule": "pipedream"}, "OptionError", "is planned for clusters"),
        ({"stages_per_rank": 500}, "OptionError", "places"),
    ],
)
def test_what_cannot_run_is_said_before_anything_does(
    pool: RankPool, options: dict[str, Any], kind: str, words: str
) -> None:
    outcomes = pool.outcomes(_refused_with, options)
    assert all(isinstance(o, Raised) and o.kind == kind and words in o.text for o in outcomes)


def _refused_with(options: dict[str, Any]) -> Any:
    return refused(None, **options)


def after_nan() -> tuple[str, bool, float]:
    model, optimizer = made("gpt")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    step = packlight.fit_pipeline(
        model, loss_fn, optimizer, batch_of(0), mesh=mesh, num_microbatches=2, progress=False
    )
    step(batch_of(0))
    before = [p.clone() for p in model.parameters()]
    tokens, labels = batch_of(1)
    try:
        step((tokens, torch.full_like(labels, -100)))
    except NonFiniteLossError as error:
        said = type(error).__name__
    except packlight.MicrobatchError as error:
        said = type(error).__name__
    same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    return said, same, float(step(batch_of(2)))


def test_a_batch_in_which_nothing_counts_leaves_all_ranks_as_they_were(pool: RankPool) -> None:
    outcomes = pool.run(after_nan)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1] and outcomes[0][2] > 0


def large_loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
    return 1e4 * loss_fn(model, batch)


def clipped(with_scaler: bool) -> Any:
    """Return the parameters after two steps, and the scaler's scale, of which a step is skipped."""
    model, optimizer = made("gpt")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127) if with_scaler else None
    step = packlight.fit_pipeline(
        model, large_loss_fn, optimizer, batch_of(0), mesh=mesh, num_microbatches=NUM_MICROBATCHES,
        clip_grad_norm=0.05, scaler=scaler, progress=False,
    )
    if scaler is not None:
        step(batch_of(0))  # overflows on some rank
        assert not optimizer.state and scaler.get_scale() == 2.0**126
        scaler.update(2.0**10)
    for number in range(2):
        step(batch_of(number))
    with step.whole_parameters():
        return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("with_scaler", [False, True], ids=["norm", "scaled"])
def test_norms_and_overflows_are_those_of_all_ranks(pool: RankPool, with_scaler: bool) -> None:
    model, optimizer = made("gpt")
    for number in range(2):
        tokens, labels = batch_of(number)
        for part in zip(tokens.chunk(4), labels.chunk(4), strict=True):
            (loss_fn(model, part) / 4).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.1
        optimizer.step()
        optimizer.zero_grad()
    for found in pool.run(clipped, with_scaler):
        for name, value in model.state_dict().items():
            # What the norm rounds, Adam makes much of where a gradient is almost nothing.
            assert (found[name] - value).abs().mean() < 1e-4, name


def saved_and_loaded(directory: str) -> Any:
    """Return what three steps lead to, and two, a checkpoint, and one by another schedule."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))

    def fitted(schedule: str) -> Any:
        model, optimizer = made("gpt")
        return model, packlight.fit_pipeline(
            model, loss_fn, optimizer, batch_of(0), mesh=mesh, num_microbatches=NUM_MICROBATCHES,
            schedule=schedule, progress=False,
        )

    ends = []
    model, step = fitted("1f1b")
    step(batch_of(0))
    step(batch_of(1))
    step.save(directory, {"position": 2})
    other, resumed = fitted("zb-h1")
    assert resumed.load(directory) == {"position": 2}
    for one, its in ((model, step), (other, resumed)):
        its(batch_of(2))
        with its.whole_parameters():
            ends.append({name: value.clone() for name, value in one.state_dict().items()})
    return ends


def test_a_checkpoint_goes_on_under_another_schedule_and_in_one_process(
    pool: RankPool, tmp_path: Path
) -> None:
    directory = tmp_path / "checkpoint"
    for went_on, resumed in pool.run(saved_and_loaded, str(directory)):
        assert all(torch.equal(resumed[name], value) for name, value in went_on.items())
    model, optimizer = made("gpt")
    assert load_distributed(directory, model, optimizer) == {"position": 2}
    tokens, labels = batch_of(2)
    for part in zip(tokens.chunk(4), labels.chunk(4), strict=True):
        loss = loss_fn(model, part)
        loss.backward(torch.full_like(loss, 0.25))
    optimizer.step()
    assert all(torch.equal(value, went_on[n]) for n, value in model.state_dict().items())


def replicated(shape: tuple[int, int], kind: str) -> Any:
    """Return losses and whole state of three steps of pipelines beside one another."""
    model, optimizer = made(kind)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "stage"))
    mine = mesh.get_local_rank("data")

    def part(number: int) -> Any:
        return tuple(t.chunk(shape[0])[mine] for t in batch_of(number, is_masked=True))

    step = packlight.fit_pipeline(
        model, loss_fn, optimizer, part(0), mesh=mesh, data="data", progress=False,
        num_microbatches=NUM_MICROBATCHES // shape[0], stages_per_rank=2 if shape[1] == 1 else 1,
    )
    torch.manual_seed(5)
    losses = [float(step(part(number))) for number in range(3)]
    with step.whole_parameters():
        return losses, {name: value.clone() for name, value in model.state_dict().items()}


def check_replicas(pool: RankPool, shape: tuple[int, int], kind: str) -> None:
    """Sums come in another order, and nothing else differs from one device's microbatches."""
    expected, state = on_one_device(kind, 3, is_masked=True)
    results = pool.run(replicated, shape, kind)
    for losses, found in results:
        assert losses == pytest.approx(expected, rel=1e-4)
        for name, value in found.items():
            assert torch.equal(value, results[0][1][name]), "all ranks have one model"
            assert (value - state[name]).abs().mean() < 2e-4, name


def test_pipelines_beside_one_another_train_one_model(pool: RankPool) -> None:
    check_replicas(pool, (2, 1), "dropout")


@pytest.mark.slow
def test_two_pipelines_of_two_ranks_train_one_model(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    four = RankPool(4, tmp_path_factory.mktemp("four"))
    try:
        check_replicas(four, (2, 2), "dropout")
        check_replicas(four, (2, 2), "gpt")
    finally:
        four.close()


def one_fails() -> str:
    model, optimizer = made("gpt")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("stage",))
    step = packlight.fit_pipeline(
        model, loss_fn, optimizer, batch_of(0), mesh=mesh, num_microbatches=2, progress=False
    )
    step(batch_of(0))
    if dist.get_rank() == 1:
        step.programs.clear()  # whatever goes wrong in the middle of a step
    try:
        step(batch_of(1))
    except (RankError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_rank_that_fails_in_a_step_ends_the_others_with_its_words(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    own = RankPool(2, tmp_path_factory.mktemp("failing"))
    try:
        waiting, failing = own.run(one_fails)
    finally:
        own.close()
    assert failing.startswith("KeyError")
    assert waiting.startswith("RankError") and "rank 1 failed" in waiting
