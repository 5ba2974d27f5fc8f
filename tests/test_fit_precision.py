"""`allow={"bf16"}` and `{"fp16"}` train what eager's loop with an autocast block trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.errors import (
    InfeasibleBudgetError,
    LossScaleError,
    OptionError,
    PrecisionError,
    UnsupportedModelError,
)
from packlight.moves.precision import PRECISIONS, SMALLEST_SCALE, under_autocast
from packlight.step import StepGraph, simulate
from tests.oracles.eager_loop import Training, assert_equal_losses, assert_same_bits

Batch = tuple[torch.Tensor, torch.Tensor]
IN_BACKWARD = ("update-in-backward",)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Budgets found in one test do not depend on times seen in another."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


class Cnn(nn.Module):
    """Convolutions with batch norm, and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16),
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.block(x)).mean((2, 3)))


class Transformer(nn.Module):
    """Blocks of attention and MLP; the embedding's weight is the head's."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({
                "ln_1": nn.LayerNorm(32), "qkv": nn.Linear(32, 96), "out": nn.Linear(32, 32),
                "ln_2": nn.LayerNorm(32), "up": nn.Linear(32, 128), "down": nn.Linear(128, 32),
            })
            for _ in range(num_blocks)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            parts = block["qkv"](block["ln_1"](x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(*parts, is_causal=True)
            x = x + block["out"](y.transpose(1, 2).flatten(2))
            x = x + block["down"](F.gelu(block["up"](block["ln_2"](x))))
        return F.linear(x, self.embedding.weight)


def classify(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def cnn() -> tuple[nn.Module, Batch]:
    return Cnn(), (torch.randn(8, 3, 12, 12), torch.randint(0, 10, (8,)))


def transformer(num_blocks: int = 1) -> tuple[nn.Module, Batch]:
    return Transformer(num_blocks), (torch.randint(0, 64, (4, 24)), torch.randint(0, 64, (4, 24)))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)


def autocast(loss_fn: Any, precision: str) -> Callable[..., torch.Tensor]:
    """Return what a user would write: the oracle."""

    def loss_in_a_block(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", PRECISIONS[precision]):
            return loss_fn(model, batch)

    return loss_in_a_block


def scaler_for(precision: str) -> torch.amp.GradScaler | None:
    return torch.amp.GradScaler("cpu") if precision == "fp16" else None


def fit(training: Training, batch: Any, budget: int | None = None, **options: Any) -> Any:
    options = {"moves": IN_BACKWARD, "progress": False, **options}
    return packlight.fit(
        training.model, training.loss_fn, training.optimizer, batch, budget, **options
    )


CASES: dict[str, tuple[Callable[[], tuple[nn.Module, Batch]], Any]] = {
    "cnn": (cnn, sgd), "transformer": (transformer, adamw),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", CASES)
def test_every_bit_is_that_of_a_loop_with_an_autocast_block_within_any_budget(
    family: str, precision: str
) -> None:
    make_case, make_optimizer = CASES[family]
    torch.manual_seed(0)
    model, batch = make_case()
    start = copy.deepcopy(model)
    eager = Training(model, make_optimizer(model), autocast(classify, precision))
    scaler = scaler_for(precision)
    expected = [eager.step(batch, scaler=scaler) for _ in range(3)]
    with torch.no_grad():
        evaluated = eager.loss_fn(eager.model.eval(), batch)

    def trained(budget: int | None) -> packlight.TrainStep:
        fresh = copy.deepcopy(start)
        mine = Training(fresh, make_optimizer(fresh), classify)
        step = fit(mine, batch, budget, allow={precision})
        losses = [step(batch), step(batch)]
        measured = step.measured(batch)
        assert_equal_losses([*losses, measured.loss], expected)
        assert_same_bits(mine, eager)
        assert all(p.dtype == torch.float32 for p in mine.model.parameters())
        assert step.evaluate(batch).item() == evaluated.item()
        assert budget is None or measured.peak_bytes <= budget
        assert abs(measured.peak_bytes - step.peak_bytes) <= 0.005 * measured.peak_bytes
        if scaler is not None:
            assert step.scaler.state_dict() == scaler.state_dict()
        return step

    plain = trained(None)
    with pytest.raises(InfeasibleBudgetError) as caught:
        fit(Training(start, make_optimizer(start), classify), batch, 1, allow={precision})
    smallest_bytes = caught.value.smallest_bytes
    assert smallest_bytes < plain.peak_bytes
    trained((smallest_bytes + plain.peak_bytes) // 2)
    step = trained(smallest_bytes)
    assert f"{precision} under autocast" in step.describe()
    assert ("update-in-backward" in plain.describe().split("moves")[1].splitlines()[0]) == (
        precision == "bf16"
    )
    assert step.plan.allowed == (precision,)


def weight_casts(graph: StepGraph) -> list[int]:
    """Return the operations that make copies of what updates change: of parameters."""
    parameters = {b for o in graph.operations for b in o.mutates}
    return [
        o.id for o in graph.operations[: graph.num_forward]
        if "_to_copy" in o.name and parameters.issuperset(o.reads)
    ]


def test_a_weight_is_cast_by_one_operation_that_the_planner_may_run_again() -> None:
    """Eager's autocast holds a copy of every weight from its first use to the backward's end."""
    torch.manual_seed(0)
    model, batch = transformer(num_blocks=2)
    training = Training(model, adamw(model), classify)
    plain = fit(training, batch, allow={"bf16"})
    graph = plain.profile.graph
    casts = weight_casts(graph)
    # Four linear layers with biases in each block, and the head; norms are computed in float32.
    assert len(casts) == 2 * 4 * 2 + 1
    copies = [b for o in casts for b in graph.operations[o].creates]
    linear = [p for n, p in model.named_parameters() if "ln_" not in n]
    assert sum(graph.buffers[b].bytes for b in copies) >= sum(p.numel() for p in linear) * 2
    assert all(graph.operations[o].can_recompute for o in casts)
    with pytest.raises(InfeasibleBudgetError) as caught:
        fit(training, batch, 1, allow={"bf16"})
    tight = fit(training, batch, caught.value.smallest_bytes, allow={"bf16"})
    counts = tight.plan.schedule.run_counts()
    assert sum(counts[o] > 1 for o in casts) > 1

    def held_bytes(step: packlight.TrainStep) -> int:
        at_the_peak = simulate(graph, step.plan.schedule).peak_buffers
        return sum(graph.buffers[b].bytes for b in at_the_peak if b in copies)

    assert held_bytes(tight) < 0.5 * held_bytes(plain)


class Twice(nn.Module):
    """A layer that is used three times."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(self.shared(x))
        return self.head(x)


def test_a_shared_layers_weight_is_cast_once_with_the_bits_of_the_traced_step() -> None:
    torch.manual_seed(0)
    model, batch = Twice(), (torch.randn(8, 16), torch.randint(0, 4, (8,)))
    eager = Training(copy.deepcopy(model), None, autocast(classify, "bf16"))
    eager.optimizer = sgd(eager.model)
    mine = Training(model, sgd(model), classify)
    step = fit(mine, batch, allow={"bf16"})
    assert len(weight_casts(step.profile.graph)) == 4
    eager.loss_fn = torch.compile(eager.loss_fn, backend="aot_eager", fullgraph=True, dynamic=False)
    assert_equal_losses([step(batch) for _ in range(3)], [eager.step(batch) for _ in range(3)])
    assert_same_bits(mine, eager)


@pytest.mark.parametrize("allow", PRECISIONS)
def test_the_users_own_autocast_block_wins(allow: str) -> None:
    """Of his bf16 block nothing is doubled, and what he keeps in float32 stays there."""

    def loss_fn(model: nn.Module, batch: Batch) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = torch.tanh(model.shared(batch[0]))
        with torch.autocast("cpu", enabled=False):
            logits = model.head(hidden.float())
            assert logits.dtype == torch.float32
        return F.cross_entropy(logits, batch[1])

    torch.manual_seed(0)
    model, batch = Twice(), (torch.randn(8, 16), torch.randint(0, 4, (8,)))
    eager = Training(copy.deepcopy(model), None, loss_fn)
    eager.optimizer = sgd(eager.model)
    mine = Training(model, sgd(model), loss_fn)
    without, step = fit(mine, batch), fit(mine, batch, allow={allow})
    names = [[o.name for o in s.profile.graph.operations] for s in (without, step)]
    if allow == "bf16":  # where fp16 is asked for, its scaler takes the updates together
        assert names[0] == names[1]
    dtypes = {
        n.meta["val"].dtype for n in step.ready.parts[0].traced.loss.joint.graph.nodes
        if isinstance(n.meta.get("val"), torch.Tensor)
    }
    assert torch.float16 not in dtypes and torch.bfloat16 in dtypes
    scaler = scaler_for(allow)
    expected = [eager.step(batch, scaler=scaler) for _ in range(3)]
    assert_equal_losses([step(batch) for _ in range(3)], expected)
    assert_same_bits(mine, eager)


def test_microbatches_run_under_autocast_too() -> None:
    """Up to bf16's rounding: sums are made in another order."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 4))
    batch = torch.randn(4, 64, 16), torch.randint(0, 4, (4, 64))
    eager = Training(copy.deepcopy(model), None, autocast(classify, "bf16"))
    eager.optimizer = sgd(eager.model)
    mine = Training(model, sgd(model), classify)
    options: dict[str, Any] = dict(moves=("microbatch",), allow={"bf16"})
    with pytest.raises(InfeasibleBudgetError) as caught:
        fit(mine, batch, 1, **options)
    smallest_bytes = caught.value.smallest_bytes
    step = fit(mine, batch, smallest_bytes, **options)
    assert step.way.num_microbatches > 1
    for _ in range(3):
        measured = step.measured(batch)
        assert measured.peak_bytes <= smallest_bytes
        torch.testing.assert_close(measured.loss, eager.step(batch), rtol=1e-2, atol=0)


def test_the_scale_falls_at_overflows_and_skips_them_as_in_the_usual_loop() -> None:
    def steep(model: nn.Module, batch: Batch) -> torch.Tensor:
        return 1000.0 * classify(model, batch)

    torch.manual_seed(0)
    model, batch = transformer()
    eager = Training(copy.deepcopy(model), None, autocast(steep, "fp16"))
    eager.optimizer = adamw(eager.model)
    mine = Training(model, adamw(model), steep)
    step, scaler = fit(mine, batch, allow={"fp16"}), torch.amp.GradScaler("cpu")
    scales = []
    for _ in range(12):
        assert step(batch).item() == eager.step(batch, scaler=scaler).item()
        assert step.scaler.state_dict() == scaler.state_dict()
        scales.append(scaler.get_scale())
    assert_same_bits(mine, eager)
    assert scales[0] > scales[-1] == scales[-2], f"it overflows, and then trains: {scales}"


def test_a_users_scaler_is_taken() -> None:
    model, batch = transformer()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step = fit(Training(model, adamw(model), classify), batch, allow={"fp16"}, scaler=scaler)
    assert step.scaler is scaler
    assert "loss scale 8" in step.describe()
    assert "the loss scaler looks at all gradients" in step.describe()


class Sqrt(nn.Module):
    """Has a finite forward, and a backward that is NaN where a square root is taken of zero."""

    def __init__(self) -> None:
        super().__init__()
        self.fine, self.broken = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.broken(x)
        return self.fine(x).square().mean() + ((y - y) * y).sqrt().mean()


def test_a_scale_that_collapses_is_an_error_and_nothing_was_updated() -> None:
    torch.manual_seed(0)
    model, batch = Sqrt(), torch.randn(3, 4)
    training = Training(model, adamw(model), lambda model, batch: model(batch))
    before = copy.deepcopy(model.state_dict())
    step = fit(training, batch, allow={"fp16"})
    # From 2**16 down to fp16's smallest number: 40 skipped steps, whatever their scaler's history.
    for _ in range(40):
        step(batch)
    assert step.scaler.get_scale() == SMALLEST_SCALE
    saved = step.scaler.state_dict()
    with pytest.raises(LossScaleError, match=r"'broken.weight' and 1 more.*\n.*bf16") as caught:
        step(batch)
    assert caught.value.scale == SMALLEST_SCALE / 2 and caught.value.step_index == 40
    assert caught.value.parameters == ["broken.weight", "broken.bias"]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert training.optimizer.state_dict()["state"] == {}
    assert all(p.grad is None for p in model.parameters())
    # A run that is resumed knows how far its scale had come.
    resumed = fit(training, batch, allow={"fp16"})
    resumed.scaler.load_state_dict(saved)
    with pytest.raises(LossScaleError):
        resumed(batch)


def test_plan_and_profile_are_those_that_fit_uses() -> None:
    torch.manual_seed(0)
    model, batch = transformer()
    for precision in PRECISIONS:
        step = fit(Training(model, adamw(model), classify), batch, allow={precision})
        plan = packlight.plan(
            model, classify, adamw(model), batch, None, moves=IN_BACKWARD, allow={precision},
            progress=False,
        )
        assert plan.peak_bytes == step.plan.peak_bytes
        profile = packlight.profile(model, classify, None, batch, allow={precision}, progress=False)
        assert len(weight_casts(profile.graph)) == len(weight_casts(step.profile.graph)) > 0


def test_names_that_are_unknown_or_exclude_each_other_are_told() -> None:
    model, batch = transformer()
    training = Training(model, adamw(model), classify)
    with pytest.raises(OptionError, match="'bf16' and 'fp16'.*\nhint: 'bf16' has float32's range"):
        fit(training, batch, allow={"bf16", "fp16"})
    with pytest.raises(OptionError, match="'half'.*\nhint: known techniques.*'bf16', 'fp16'"):
        fit(training, batch, allow={"half"})
    with pytest.raises(OptionError, match="meta has no autocast to torch.float16"):
        under_autocast(classify, "fp16", torch.device("meta"))
    model.half()
    with pytest.raises(UnsupportedModelError, match=r"float16.*'embedding.weight'.*\n.*float\(\)"):
        fit(training, batch, allow={"fp16"})


def test_a_kernel_that_is_missing_in_a_precision_is_named() -> None:
    """Determinants have none in either; float32 has one, and an autocast-free part computes it."""

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch).det().square()

    def mended(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return model(batch).float().det().square()

    torch.manual_seed(0)
    model, batch = nn.Linear(4, 4), torch.randn(4, 4)
    for precision in PRECISIONS:
        with pytest.raises(PrecisionError, match=f"in {precision} on cpu.*\nhint: .*enabled=False"):
            fit(Training(model, sgd(model), loss_fn), batch, allow={precision})
        step = fit(Training(model, sgd(model), mended), batch, allow={precision})
        assert torch.isfinite(step(batch))


def test_a_recurrent_layer_runs_in_fp16_where_there_is_no_kernel_of_all_its_steps() -> None:
    torch.manual_seed(0)
    model, batch = nn.LSTM(8, 8), torch.randn(5, 2, 8)
    training = Training(model, sgd(model), lambda model, x: model(x)[0].float().square().mean())
    expected = training.loss_fn(copy.deepcopy(model), batch).item()
    assert fit(training, batch, allow={"fp16"})(batch).item() == pytest.approx(expected, rel=1e-2)


def test_a_call_without_a_kernel_in_fp16_is_named() -> None:
    model, batch = nn.Sequential(nn.Linear(8, 8), nn.RReLU()), torch.randn(5, 8)
    with pytest.raises(RuntimeError, match="not implemented for 'Half'"):
        with torch.autocast("cpu", torch.float16):
            model(batch)
    training = Training(model, sgd(model), lambda model, x: model(x).float().square().mean())
    with pytest.raises(PrecisionError, match="rrelu.* does not run in fp16 on cpu.*\n.*bf16"):
        fit(training, batch, allow={"fp16"})


def test_an_evaluation_that_fails_in_a_precision_alone_says_so() -> None:
    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        y = model(batch)
        return y.square().mean() if model.training else y.det()

    model, batch = nn.Linear(4, 4), torch.randn(4, 4)
    step = fit(Training(model, sgd(model), loss_fn), batch, allow={"bf16"})
    with pytest.raises(PrecisionError, match="the eager forward does not run in bf16 on cpu"):
        step.evaluate(batch)
    assert model.training
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:  # in float32, too
        step.evaluate(torch.randn(4, 5))
    assert not isinstance(caught.value, PrecisionError)
