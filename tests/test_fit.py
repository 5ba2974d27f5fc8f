"""`fit` trains what the eager loop trains, to the last bit, and holds what it says it holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight.errors import InfeasibleBudgetError
from packlight.step import Action, BufferKind, Phase
from tests import models
from tests.oracles.eager_loop import (
    MakeOptimizer,
    Training,
    assert_equal_losses,
    assert_same_bits,
    without_one_dnn,
)

IN_BACKWARD = ("update-in-backward",)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Budgets found in one test do not depend on times seen in another."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


def small_t5() -> models.Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        num_layers=1, d_model=32, num_heads=2, d_kv=16, d_ff=64, vocab_size=128, use_cache=False,
        decoder_start_token_id=0,
    )
    tokens = torch.randint(3, 128, (4, 32))
    model = T5ForConditionalGeneration(config)
    return model, {"input_ids": tokens, "labels": tokens.clone()}, models.hf_loss


def small_wrn() -> models.Case:
    batch = torch.randn(8, 3, 16, 16), torch.randint(0, 10, (8,))
    return models.WideResNet(depth=10), batch, models.classify


def small_lstm() -> models.Case:
    model, (tokens, targets), loss_fn = models.lstm()
    return model, (tokens[:, :4].contiguous(), targets[:, :4].contiguous()), loss_fn


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=0.01, nesterov=True)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def fused_adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def adafactor(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adafactor(model.parameters(), lr=1e-2)


def muon(model: nn.Module) -> torch.optim.Optimizer:
    """It takes matrices only: biases stay what they are, in eager PyTorch, too."""
    return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2)


FAMILIES: dict[str, tuple[Callable[[], models.Case], MakeOptimizer]] = {
    "mlp": (models.mlp, muon),
    "wrn": (small_wrn, sgd),
    "gpt2": (lambda: models.gpt2(layers=1), adamw),
    "t5": (small_t5, adafactor),
    "unet": (lambda: models.unet(side=32), fused_adamw),
    "bert": (lambda: models.bert(layers=1), sgd),
    "lstm": (small_lstm, adamw),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_eagers_to_the_bit_within_any_budget(family: str) -> None:
    make_case, make_optimizer = FAMILIES[family]
    torch.manual_seed(0)
    model, batch, loss_fn = make_case()
    model.train()
    start = copy.deepcopy(model)
    eager = Training(model, make_optimizer(model), loss_fn)
    torch.manual_seed(5)
    # Traced, nn.LSTM runs its time steps and not one fused oneDNN call.
    with without_one_dnn() if family == "lstm" else nullcontext():
        expected = [eager.step(batch) for _ in range(3)]

    def trained(budget: int | None) -> packlight.TrainStep:
        mine = Training(copy.deepcopy(start), None, loss_fn)
        mine.optimizer = make_optimizer(mine.model)
        step = packlight.fit(
            mine.model, loss_fn, mine.optimizer, batch, budget, moves=IN_BACKWARD, progress=False
        )
        torch.manual_seed(5)
        losses = [step(batch), step(batch)]
        measured = step.measured(batch)
        assert_equal_losses([*losses, measured.loss], expected)
        assert_same_bits(mine, eager)
        assert budget is None or measured.peak_bytes <= budget
        assert abs(measured.peak_bytes - step.peak_bytes) <= 0.005 * measured.peak_bytes
        return step

    plain_bytes = trained(None).peak_bytes
    smallest_bytes = smallest_budget(start, loss_fn, make_optimizer, batch)
    assert smallest_bytes < plain_bytes
    if family != "t5":  # takes long
        trained((smallest_bytes + plain_bytes) // 2)
    step = trained(smallest_bytes)
    assert "update-in-backward" in step.describe()
    assert max(step.plan.schedule.run_counts().values()) > 1, "something is recomputed"


ACCUMULATING = {"moves": ("microbatch",), "allow": {"microbatch-batch-norm"}}


@pytest.mark.parametrize(("rows", "options"), [(256, {"moves": IN_BACKWARD}), (8, ACCUMULATING)])
def test_with_batch_norm_no_gradient_waits_for_the_end_of_the_backward(
    rows: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(128, 128), nn.BatchNorm1d(128), nn.ReLU()) for _ in range(5)]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    batch = torch.randn(rows, 128), torch.randint(0, 10, (rows,))
    smallest_bytes = smallest_budget(model, models.classify, sgd, batch, **options)
    step = packlight.fit(
        model, models.classify, sgd(model), batch, smallest_bytes, progress=False, **options
    )
    graph = step.profile.graph
    gradients = {
        b for o in graph.operations if o.phase is Phase.UPDATE for b in o.reads
        if graph.buffers[b].kind is BufferKind.GRADIENT
    }
    live: set[int] = set()
    most_bytes = 0
    for instruction in step.plan.schedule.instructions:
        if instruction.action is Action.RUN:
            live |= gradients.intersection(graph.operations[instruction.target].creates)
        elif instruction.action is Action.FREE:
            live.discard(instruction.target)
        most_bytes = max(most_bytes, sum(graph.buffers[b].bytes for b in live))
    assert 0 < most_bytes <= 2 * 128 * 128 * 4  # of two layers, not of all five


def smallest_budget(
    model: nn.Module, loss_fn: Any, make_optimizer: MakeOptimizer, batch: Any, **options: Any
) -> int:
    """Return the smallest budget as the error names it."""
    options = {"moves": IN_BACKWARD, "progress": False, **options}
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.fit(model, loss_fn, make_optimizer(model), batch, 1, **options)
    return caught.value.smallest_bytes
