"""Two ranks (gloo) train as one device would: bits, bytes, agreement and failure."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import packlight
from packlight.costs import profiler as profiler_module
from packlight.errors import (
    NonFiniteLossError,
    OptionError,
    PacklightError,
    RankError,
    RankMismatchError,
    UnsupportedModelError,
)
from packlight.ranks.group import Ranks
from packlight.run.checkpoint import read_checkpoint
from packlight.run.distributed import load_distributed
from packlight.search.saved import way_to_json
from tests.rank_pool import TIMEOUT_SECONDS, Raised, RankPool, mesh, part

SCALARS = 64  # bytes that a step's losses may take
VOCABULARY = 96


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks for all tests that leave them well."""
    pool = RankPool(2, tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.close()


@pytest.fixture
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    """Two ranks for one test."""
    pool = RankPool(2, tmp_path_factory.mktemp("mortal"))
    yield pool
    pool.close()


# -- models, the same on every rank


class Block(nn.Module):
    """Attention and MLP, pre-norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Two blocks with a tied head; a label of -100 does not count."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.Sequential(Block(width), Block(width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.linear(self.blocks(self.embedding(tokens)), self.embedding.weight)


def mlp() -> nn.Module:
    """Linear layers, more parameters than activations."""
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.Linear(128, 10))


def normalised() -> nn.Module:
    """Convolutions with batch norm, which is each rank's own."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )


MODELS = {"mlp": mlp, "gpt": Gpt, "conv": normalised}


def model_of(name: str) -> nn.Module:
    """Return a model, with the same weights in every process."""
    torch.manual_seed(0)
    return MODELS[name]()


def loss_of(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean loss over all targets that count."""
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def whole_batches(name: str, rows: int, count: int, masked: bool = False) -> list[Any]:
    """Return batches of all ranks together."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(count):
        if name == "gpt":
            tokens = torch.randint(VOCABULARY, (rows, 17), generator=generator)
            labels = tokens[:, 1:].clone()
            if masked:
                labels[: rows // 2, :11] = -100
            batches.append((tokens[:, :-1].clone(), labels))
            continue
        shape = (rows, 16) if name == "mlp" else (rows, 3, 8, 8)
        x = torch.randn(shape, generator=generator)
        batches.append((x, torch.randint(10, (rows,), generator=generator)))
    return batches


def optimizer_of(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    """Return an optimizer of a kind."""
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


# -- what ranks do


def trained(
    name: str, kind: str, rows: int, budget: int | None, options: dict[str, Any],
    masked: bool = False,
) -> dict[str, Any]:
    """Train three steps on a rank's parts, and say what became of it."""
    model = model_of(name)
    optimizer = optimizer_of(kind, model)
    batches = [part(batch) for batch in whole_batches(name, rows, 3, masked)]
    step = packlight.fit(
        model, loss_of, optimizer, batches[0], budget, mesh=mesh(), **options
    )
    losses = [float(step(batch)) for batch in batches[:-1]]
    measured = step.measured(batches[-1])
    return {
        "losses": [*losses, float(measured.loss)],
        "parameters": [p.detach() for p in model.parameters()],
        "peak": measured.peak_bytes,
        "predicted": step.peak_bytes,
        "plain": step.plan.plain_peak_bytes,
        "resident": step.way.memory.resident_bytes,
        "way": way_to_json(step.way),
        "words": step.describe(),
        "num_microbatches": step.way.num_microbatches,
    }


def trained_by_ddp(name: str, kind: str, rows: int, clip: float | None) -> dict[str, Any]:
    """Train the same with DistributedDataParallel."""
    model = model_of(name)
    optimizer = optimizer_of(kind, model)
    wrapped = DistributedDataParallel(model)
    for batch in whole_batches(name, rows, 3):
        optimizer.zero_grad()
        loss_of(wrapped, part(batch)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=False)
        optimizer.step()
    return {"parameters": [p.detach() for p in model.parameters()]}


def trained_alone(name: str, kind: str, rows: int, masked: bool = False) -> dict[str, Any]:
    """Train the same in one process on whole batches, by eager PyTorch."""
    model = model_of(name)
    optimizer = optimizer_of(kind, model)
    losses = []
    for batch in whole_batches(name, rows, 3, masked):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return {"losses": losses, "parameters": [p.detach() for p in model.parameters()]}


def assert_same_bits(one: dict[str, Any], another: dict[str, Any]) -> None:
    for a, b in zip(one["parameters"], another["parameters"], strict=True):
        assert torch.equal(a, b)


def assert_close(one: dict[str, Any], another: dict[str, Any]) -> None:
    assert one["losses"] == pytest.approx(another["losses"], rel=1e-5)
    for a, b in zip(one["parameters"], another["parameters"], strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def assert_keeps_its_promise(result: dict[str, Any], budget: int | None) -> None:
    """What was predicted is what was measured, to the byte."""
    assert result["predicted"] - SCALARS <= result["peak"] <= result["predicted"]
    assert budget is None or result["predicted"] <= budget


# -- one device's numbers, DDP's bits


@pytest.mark.parametrize(
    "name, kind, clip",
    [("mlp", "adamw", None), ("gpt", "adamw", None), ("gpt", "sgd", 0.5), ("conv", "sgd", None)],
)
def test_two_ranks_have_ddp_s_bits_in_as_many_bytes_as_predicted(
    pool: RankPool, name: str, kind: str, clip: float | None
) -> None:
    mine = pool.run(trained, name, kind, 8, None, {"clip_grad_norm": clip})
    theirs = pool.run(trained_by_ddp, name, kind, 8, clip)
    for rank in range(2):
        assert_same_bits(mine[rank], theirs[rank])
        assert_keeps_its_promise(mine[rank], None)
    assert mine[0]["losses"] == mine[1]["losses"]
    assert mine[0]["way"] == mine[1]["way"]


def test_a_budget_is_kept_on_every_rank_with_the_same_bits(pool: RankPool) -> None:
    exact = {"moves": ("update-in-backward", "pack")}
    free = pool.run(trained, "gpt", "adamw", 8, None, exact)
    resident = free[0]["resident"]
    budget = resident + 6 * (free[0]["predicted"] - resident) // 10
    planned = pool.run(trained, "gpt", "adamw", 8, budget, exact)
    for rank in range(2):
        assert "recomputed" in planned[rank]["words"]
        assert_same_bits(free[rank], planned[rank])
        assert_keeps_its_promise(planned[rank], budget)


@pytest.mark.parametrize("rows, masked", [(7, False), (7, True), (8, True)])
def test_uneven_parts_and_masked_tokens_count_as_on_one_device(
    pool: RankPool, rows: int, masked: bool
) -> None:
    together = pool.run(trained, "gpt", "sgd", rows, None, {}, masked)
    alone = trained_alone("gpt", "sgd", rows, masked)
    for rank in range(2):
        assert_close(together[rank], alone)
        assert_keeps_its_promise(together[rank], None)
    assert_same_bits(*together)


def test_gradients_of_microbatches_are_reduced_once(pool: RankPool) -> None:
    free = pool.run(trained, "gpt", "sgd", 32, None, {})
    accumulated = sum(p.nbytes for p in free[0]["parameters"])
    budget = free[0]["resident"] + accumulated + (free[0]["predicted"] - free[0]["resident"]) // 6
    results = pool.run(trained_counting, "gpt", 32, budget)
    alone = trained_alone("gpt", "sgd", 32, masked=True)
    for result in results:
        assert result["num_microbatches"] > 1
        assert_close(result, alone)
        assert result["peak"] <= result["predicted"] <= budget
        parameter_bytes = sum(p.nbytes for p in result["parameters"])
        assert result["reduced_bytes"] == 3 * parameter_bytes
    assert_same_bits(*results)


def trained_counting(name: str, rows: int, budget: int) -> dict[str, Any]:
    """Train with microbatches alone, and count the bytes of gradients that are reduced."""
    reduced = []
    original = Ranks.start

    def start(self: Ranks, tensor: torch.Tensor) -> Any:
        if tensor.dtype == torch.float32:
            reduced.append(tensor.nbytes)
        return original(self, tensor)

    Ranks.start = start  # type: ignore[method-assign]
    try:
        options = {"moves": ("microbatch",)}
        result = trained(name, "sgd", rows, budget, options, masked=True)
    finally:
        Ranks.start = original  # type: ignore[method-assign]
    # The network was measured before, by the tests above; its sizes are no parameter's.
    return {**result, "reduced_bytes": sum(reduced)}


def test_a_part_in_which_nothing_counts_takes_part(pool: RankPool) -> None:
    results = pool.run(trained_on_one_part)
    model = model_of("gpt")
    optimizer = optimizer_of("sgd", model)
    loss = loss_of(model, emptied()[0])
    loss.backward()
    optimizer.step()
    for result in results:
        assert result["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
        for a, b in zip(result["parameters"], model.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def emptied() -> list[Any]:
    """Return a batch whose second half does not count, and one in which all of it does."""
    (batch,) = whole_batches("gpt", 8, 1)
    labels = batch[1].clone()
    labels[4:] = -100
    return [(batch[0], labels), batch]


def trained_on_one_part() -> dict[str, Any]:
    model = model_of("gpt")
    optimizer = optimizer_of("sgd", model)
    batch, example = map(part, emptied())
    step = packlight.fit(model, loss_of, optimizer, example, mesh=mesh())
    return {"loss": float(step(batch)), "parameters": [p.detach() for p in model.parameters()]}


# -- one plan


def test_ranks_with_other_caches_and_other_speed_run_one_plan(
    pool: RankPool, tmp_path: Any
) -> None:
    free = pool.run(trained, "gpt", "adamw", 8, None, {})[0]
    budget = free["resident"] + 6 * (free["predicted"] - free["resident"]) // 10
    for _ in range(2):  # the second time one of the caches is warm, and the other gone
        results = pool.run(trained_apart, str(tmp_path), budget)
        assert results[0]["way"] == results[1]["way"]
        assert_same_bits(*results)


def trained_apart(directory: str, budget: int) -> dict[str, Any]:
    """Train with a cache of this rank's own, on a rank 1 that seems to be three times slower."""
    rank = dist.get_rank()
    cache = os.path.join(directory, f"{rank}" if rank == 0 else f"{time.time()}")
    before, original = os.environ.get("PACKLIGHT_CACHE"), profiler_module.observe_call
    os.environ["PACKLIGHT_CACHE"] = cache

    def observe(*call: Any) -> Any:
        facts = original(*call)
        return profiler_module.replace(facts, seconds=facts.seconds * (3 if rank else 1))

    profiler_module.observe_call = observe
    try:
        return trained("gpt", "adamw", 8, budget, {})
    finally:
        profiler_module.observe_call = original
        if before is None:
            del os.environ["PACKLIGHT_CACHE"]
        else:
            os.environ["PACKLIGHT_CACHE"] = before


def test_a_new_shape_and_a_changed_model_are_planned_together(pool: RankPool) -> None:
    for losses in pool.run(planned_again):
        assert losses[0] != losses[1] and losses[2] == pytest.approx(losses[1], rel=0.5)


def planned_again() -> list[float]:
    model = model_of("mlp")
    step = packlight.fit(
        model, scaled_loss, optimizer_of("sgd", model), part(whole_batches("mlp", 8, 1)[0]),
        mesh=mesh(),
    )
    losses = [float(step(part(whole_batches("mlp", 8, 1)[0])))]
    model.factor = 2.0  # type: ignore[assignment]
    losses.append(float(step(part(whole_batches("mlp", 8, 1)[0]))))
    losses.append(float(step(part(whole_batches("mlp", 6, 1)[0]))))
    return losses


def scaled_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return loss_of(model, batch) * getattr(model, "factor", 1.0)


# -- bad input: the same error on all ranks


def attempted(what: str) -> Any:
    """Do something wrong on rank 1; return what is raised, within how many seconds, and where."""
    rank = dist.get_rank()
    wrong = rank == 1
    torch.manual_seed(1 if wrong and what == "seed" else 0)
    model = nn.Sequential(nn.Linear(16, 24 if wrong and what == "shape" else 32), nn.Linear(32, 10))
    if wrong and what == "shape":
        model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 10))
    if wrong and what == "frozen":
        model[0].bias.requires_grad_(False)
    rate = 0.2 if wrong and what == "rate" else 0.1
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    batch: Any = part(whole_batches("mlp", 8, 1)[0])
    if wrong and what == "batch":
        batch = (batch[0].double(), batch[1])
    if wrong and what == "no batch":
        batch = None
    budget = None
    if what == "budget":
        budget = "1MiB" if wrong else "2MiB"
    if what == "infeasible":
        budget = "4KiB"
    loss = scaled_loss if not (wrong and what == "loss") else doubled_loss
    start = time.perf_counter()
    try:
        packlight.fit(model, loss, optimizer, batch, budget, mesh=mesh())
    except PacklightError as error:
        return type(error).__name__, str(error), time.perf_counter() - start
    return None


def doubled_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return 2 * scaled_loss(model, batch)


@pytest.mark.parametrize(
    "what, kind, words",
    [
        ("seed", "RankMismatchError", "values of parameter '0.weight'"),
        ("shape", "RankMismatchError", "parameter '0.weight': float32 of shape (24, 16)"),
        ("frozen", "RankMismatchError", "parameter '0.bias': float32 of shape (32,), frozen"),
        ("rate", "RankMismatchError", "'lr' of the optimizer's group 0: 0.2, where rank 0 has 0.1"),
        ("budget", "RankMismatchError", "the budget: 1048576 bytes, where rank 0 has 2097152"),
        ("loss", "RankMismatchError", "operation"),
        ("infeasible", "InfeasibleBudgetError", "smallest feasible peak"),
    ],
)
def test_the_same_error_on_all_ranks_names_what_differs(
    pool: RankPool, what: str, kind: str, words: str
) -> None:
    (name, text, _), other = pool.run(attempted, what)
    assert (name, text) == other[:2]
    assert name == kind and words in text


@pytest.mark.parametrize("what", ["batch", "no batch"])
def test_a_batch_that_one_rank_does_not_have_is_an_error_on_all(pool: RankPool, what: str) -> None:
    for outcome in pool.outcomes(attempted, what):
        assert isinstance(outcome, (Raised, tuple))


def test_nan_on_one_rank_is_the_same_error_on_all_and_changes_nothing(pool: RankPool) -> None:
    for budget in (None, "recompute"):
        one, another = pool.run(with_nan, budget)
        assert one == another
        text, seconds_are_few, is_untouched, goes_on = one
        assert "nan on rank 1" in text and seconds_are_few and is_untouched and goes_on


def with_nan(budget: str | None) -> Any:
    model = model_of("gpt")
    optimizer = optimizer_of("adamw", model)
    good = part(whole_batches("gpt", 8, 1)[0])
    moves = ("microbatch",) if budget else None
    step = packlight.fit(model, poisoned_loss, optimizer, (*good, torch.zeros(4)), mesh=mesh(),
                         moves=moves)
    before = [p.detach().clone() for p in model.parameters()]
    poison = torch.full((4,), float("nan") if dist.get_rank() == 1 else 0.0)
    start = time.perf_counter()
    try:
        step((*good, poison))
    except NonFiniteLossError as error:
        text = str(error)
    is_quick = time.perf_counter() - start < 30
    is_same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    is_same = is_same and not optimizer.state
    goes_on = float(step((*good, torch.zeros(4)))) > 0
    return text, is_quick, is_same, goes_on


def poisoned_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return loss_of(model, batch[:2]) + batch[2].mean()


def test_a_rank_that_fails_in_its_update_ends_the_others(mortal: RankPool) -> None:
    healthy, failing = mortal.run(failing_update)
    assert failing[0][0] == "ZeroDivisionError"
    # At the latest in its next step, and in whatever is tried afterwards.
    assert healthy[0][0] == "RankError" and "rank 1" in healthy[0][1]
    assert "ZeroDivisionError: told to" in healthy[0][1]
    assert healthy[1][0] == failing[1][0] == "RankError"


def failing_update() -> Any:
    model = model_of("mlp")
    step = packlight.fit(
        model, loss_of, Failing(model.parameters(), lr=0.1), part(whole_batches("mlp", 8, 1)[0]),
        mesh=mesh(),
    )
    Failing.fails = dist.get_rank() == 1
    errors: list[tuple[str, str]] = []
    while len(errors) < 2:
        try:
            step(part(whole_batches("mlp", 8, 1)[0]))
        except Exception as error:
            errors.append((type(error).__name__, str(error)))
    return errors


class Failing(torch.optim.SGD):
    """Divides by zero when told to."""

    fails = False

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if Failing.fails:
            raise ZeroDivisionError("told to")
        super().step(closure)


def test_a_rank_that_has_left_ends_those_that_compare_and_plan(mortal: RankPool) -> None:
    survivor, _ = mortal.outcomes(leaving)
    assert survivor == ["rank 1 failed in the middle of a step"] * 2


def leaving() -> list[str]:
    """Have rank 1 leave: it does not die, so its connections stay."""
    found = []
    for ranks in [Ranks((0, 1), torch.device("cpu"), 60.0) for _ in range(2)]:
        if ranks.rank == 1:
            ranks.fail(ValueError("told to"))
            continue
        ask = ranks.gather if not found else (lambda _, r=ranks: r.broadcast(None, 1))
        try:
            ask(lambda: 1)
        except RankError as error:
            found.append(str(error).partition("\n")[0])
    return found


def test_a_rank_that_dies_ends_the_others(mortal: RankPool) -> None:
    survivor, dead = mortal.outcomes(dying)
    assert dead is None
    assert survivor[0] == "RankError" and "gone" in survivor[1]


def dying() -> Any:
    model = model_of("mlp")
    batch = part(whole_batches("mlp", 8, 1)[0])
    step = packlight.fit(model, loss_of, optimizer_of("sgd", model), batch, mesh=mesh())
    step(batch)
    if dist.get_rank() == 1:
        os._exit(1)
    try:
        step(batch)
    except RankError as error:
        return type(error).__name__, str(error)


def test_wrapped_models_and_meshes_that_say_nothing_are_refused(pool: RankPool) -> None:
    for texts in pool.run(refused):
        assert "model.module" in texts["ddp"] and "before it is wrapped" in texts["fsdp"]
        assert "no dimension of the mesh (data=2)" in texts["name"]
        assert "needs the mesh" in texts["no mesh"] and "no DeviceMesh" in texts["not a mesh"]


def refused() -> dict[str, str]:
    from torch.distributed.fsdp import fully_shard

    batch = part(whole_batches("mlp", 8, 1)[0])
    plain, sharded = model_of("mlp"), model_of("mlp")
    fully_shard(sharded, mesh=mesh())
    attempts: dict[str, tuple[nn.Module, dict[str, Any]]] = {
        "ddp": (DistributedDataParallel(model_of("mlp")), {}),
        "fsdp": (sharded, {}),
        "name": (plain, {"mesh": mesh(), "parallel": packlight.Parallel(data="rows")}),
        "no mesh": (plain, {"parallel": packlight.Parallel()}),
        "not a mesh": (plain, {"mesh": 2}),
    }
    texts = {}
    for name, (model, options) in attempts.items():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        try:
            packlight.fit(model, loss_of, optimizer, batch, **options)
        except (UnsupportedModelError, OptionError) as error:
            texts[name] = str(error)
    return texts


def test_a_mismatch_says_who_and_what() -> None:
    error = RankMismatchError("the budget", 3, "1", "2", "say the same")
    assert str(error) == (
        "rank 3 differs from rank 0 in the budget: 2, where rank 0 has 1\nhint: say the same"
    )
    assert error.rank == 3 and isinstance(error, RankError)


# -- the command line

EXAMPLE = """
import torch
from torch import nn
import torch.nn.functional as F

def model():
    return nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.2), nn.GELU(), nn.Linear(64, 10))

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])

def optimizer(model):
    return torch.optim.AdamW(model.parameters(), 1e-2)

def batches(split="train"):
    while True:
        x = torch.randn(9, 16)
        yield x, (x.sum(1) > 0).long()
"""


def test_an_interrupted_run_of_two_ranks_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(EXAMPLE)
    command = [
        *("torchrun", "--nproc-per-node", "2", "-m", "packlight", "train", str(file)),
        *("--budget", "1MiB", "--save-every", "2", "--checkpoint"),
    ]
    straight = torchrun(command, tmp_path / "straight", 4)
    assert "gradients of 2 ranks" in straight and straight.count("step 4/4") == 1
    torchrun(command, tmp_path / "broken", 2)
    assert "resuming from" in torchrun(command, tmp_path / "broken", 4)
    ends = [read_checkpoint(tmp_path / d / "step-00000004.safetensors") for d in DIRECTORIES]
    models = []
    for end in ends:
        spec = namespace(EXAMPLE)
        model = spec["model"]()
        end.restore(model, spec["optimizer"](model))
        models.append({"parameters": [p.detach() for p in model.parameters()]})
    assert_same_bits(*models)


@pytest.mark.slow
def test_torchrun_shards_and_resumes_with_pieces_or_without(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(EXAMPLE)
    command = [
        *("torchrun", "--nproc-per-node", "2", "-m", "packlight", "train", str(file)),
        *("--shard", "planned", "--save-every", "2", "--checkpoint"),
    ]
    assert "parameters in pieces" in torchrun(command, tmp_path / "straight", 4)
    torchrun(command, tmp_path / "broken", 2)
    assert "resuming from" in torchrun(command, tmp_path / "broken", 4)
    ends = []
    for name in DIRECTORIES:
        spec = namespace(EXAMPLE)
        model = spec["model"]()
        optimizer = spec["optimizer"](model)
        load_distributed(tmp_path / name / "step-00000004", model, optimizer)
        ends.append({"parameters": [p.detach() for p in model.parameters()]})
    assert_same_bits(*ends)
    whole = [word for word in command if word not in ("--shard", "planned")]
    assert "resuming from" in torchrun(whole, tmp_path / "broken", 5)


DIRECTORIES = ("straight", "broken")


def namespace(source: str) -> dict[str, Any]:
    """Return what a file defines."""
    defined: dict[str, Any] = {}
    exec(source, defined)
    return defined


def torchrun(command: list[str], directory: Path, steps: int) -> str:
    """Run a command line on two ranks; return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *command[1:], str(directory),
         "--steps", str(steps)],
        env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
