"""Models that are hard to trace: what `fit` does about them, and what it says where it cannot."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import packlight
from packlight.errors import GraphBreakError, UnsupportedModelError
from tests.models import classify, hf_loss
from tests.oracles.eager_loop import assert_equal_losses, assert_same_bits, twins
from tests.zoo.build import tokens, transformer
from tests.zoo.text import DECODER


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing depends on calls seen in another test."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_model_that_collects_hidden_states_is_captured_before_its_first_call() -> None:
    # transformers hooks the layers when they are called for the first time, under a lock.
    torch.manual_seed(0)
    settings = DECODER | dict(num_hidden_layers=1, output_hidden_states=True)
    model = transformer("GPTNeoXForCausalLM", 0.0, **settings)
    mine, eager = twins(model, hf_loss, sgd)
    batch = tokens(length=16)
    with pytest.raises(Exception, match="lock"):  # what stands in the way is still there
        torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)(**batch)
    step = packlight.fit(mine.model, hf_loss, mine.optimizer, batch, progress=False)
    assert_equal_losses([step(batch)], [eager.step(batch)])
    assert_same_bits(mine, eager)


class FailsWhenTraced(nn.Linear):
    """Leaves something out in eager PyTorch only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y + torch.ones(3, 7) if torch.compiler.is_compiling() else y


class RaisesWhenTraced(nn.Linear):
    """Expects something that eager PyTorch has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = None if torch.compiler.is_compiling() else [1]
        return super().forward(x) * mask[0]  # type: ignore[index]


class AsksForValues(nn.Linear):
    """A branch on a number that is read from a tensor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_any = (x > 3).any().item()
        if is_any:
            x = x / 2
        return super().forward(x)


def batch_of() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 4), torch.randint(0, 4, (8,))


@pytest.mark.parametrize(
    "model_class, line, failure",
    [
        (FailsWhenTraced, "return y +", "RuntimeError.*(7|broadcast)"),
        (RaisesWhenTraced, "* mask[0]", "TypeError.*not subscriptable"),
    ],
)
def test_a_model_that_fails_only_when_it_is_traced_is_named(
    model_class: type[nn.Linear], line: str, failure: str
) -> None:
    model = model_class(4, 4)
    source, first = inspect.getsourcelines(model_class.forward)
    number = next(i for i, text in enumerate(source, first) if line in text)
    where = rf"test_tracing\.py:{number}\n.*{failure}.*\nhint:.*is_compiling"
    with pytest.raises(UnsupportedModelError, match=where):
        packlight.fit(model, classify, sgd(model), batch_of(), progress=False)


def test_a_branch_that_depends_on_values_is_shown() -> None:
    model = AsksForValues(4, 4)
    with pytest.raises(GraphBreakError, match="`if is_any:` depends on the values") as caught:
        packlight.plan(model, classify, sgd(model), batch_of(), progress=False)
    assert caught.value.file == __file__


def test_torchs_decoder_trains_when_told_that_its_mask_is_causal() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerDecoder(layer, 1)
    batch = torch.randn(2, 5, 16)

    def loss_fn(is_causal: bool | None) -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(5)
        return lambda decoder, x: (
            decoder(x, x, tgt_mask=mask, tgt_is_causal=is_causal).square().mean()
        )

    with pytest.raises(GraphBreakError, match="multi_head_attention_forward.*\n.*tgt_is_causal="):
        packlight.plan(model, loss_fn(None), sgd(model), batch, progress=False)
    expected = loss_fn(True)(model, batch).detach()
    step = packlight.fit(model, loss_fn(True), sgd(model), batch, progress=False)
    assert torch.equal(step(batch), expected)
