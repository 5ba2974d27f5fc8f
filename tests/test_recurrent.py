"""Recurrent layers train with eager's dropout between them, and on inputs without gradients.

Eager PyTorch runs `nn.LSTM` by oneDNN's fused kernel, which sums in another order. With that
switched off it is an oracle for every bit.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from tests.oracles.eager_loop import Training, without_one_dnn

LAYERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
TWO_WAYS = {"batch_first": True, "bidirectional": True}


class Tagger(nn.Module):
    """A recurrent net over vectors, or over what a layer makes of them."""

    def __init__(self, kind: str, is_first: bool, packs: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Identity() if is_first else nn.Linear(6, 6)
        self.recurrent = LAYERS[kind](6, 8, **{"num_layers": 3, "dropout": 0.4, **options})
        self.packs = packs

    def forward(self, x: torch.Tensor) -> Any:
        x = self.embed(x)
        if not self.packs:
            return self.recurrent(x)[0]
        packed = nn.utils.rnn.pack_padded_sequence(x, [5, 4, 2])
        return nn.utils.rnn.pad_packed_sequence(self.recurrent(packed)[0])[0]


def loss_fn(model: nn.Module, x: torch.Tensor) -> Any:
    return model(x).square().mean()


def eager_losses(model: nn.Module, x: torch.Tensor) -> list[float]:
    training = Training(model, torch.optim.SGD(model.parameters(), 0.5), loss_fn)
    torch.manual_seed(1)
    with without_one_dnn():
        return [training.step(x).item() for _ in range(3)]


@pytest.mark.parametrize("options", [{}, TWO_WAYS, {"packs": True}], ids=["", "two ways", "packed"])
@pytest.mark.parametrize(
    ("kind", "is_first"), [("rnn", True), ("gru", False), ("lstm", True), ("lstm", False)]
)
def test_dropout_between_layers_is_eagers(
    kind: str, is_first: bool, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    mine, x = Tagger(kind, is_first, **options), torch.randn(5, 3, 6)
    eager = copy.deepcopy(mine)
    expected = eager_losses(eager, x)
    step = packlight.fit(
        mine, loss_fn, torch.optim.SGD(mine.parameters(), 0.5), x, moves=(), progress=False
    )
    torch.manual_seed(1)
    losses = [step(x).item() for _ in range(3)]
    if kind == "gru":  # whose traced weights add up their gradients in another order
        assert losses == pytest.approx(expected, rel=1e-6)
    else:
        assert losses == expected
    for ours, theirs in zip(mine.parameters(), eager.parameters(), strict=True):
        if kind == "gru":
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(ours, theirs)


def test_the_backend_draws_the_same_and_evaluation_draws_nothing() -> None:
    torch.manual_seed(0)
    mine, x = Tagger("lstm", True), torch.randn(5, 3, 6)
    eager = copy.deepcopy(mine)
    compiled = torch.compile(mine, backend="packlight", options={"budget": 10**6})
    torch.manual_seed(1)
    loss = loss_fn(compiled, x)
    loss.backward()
    torch.manual_seed(1)
    with without_one_dnn():
        expected = loss_fn(eager, x)
        expected.backward()
    assert loss.item() == expected.item()
    for ours, theirs in zip(mine.parameters(), eager.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    mine.eval()
    with torch.no_grad():
        assert torch.equal(mine(x), mine(x))
        assert torch.equal(compiled(x), compiled(x))


def test_recomputed_layers_draw_their_masks_once() -> None:
    torch.manual_seed(0)
    mine, x = Tagger("lstm", False), torch.randn(5, 3, 6)
    eager = copy.deepcopy(mine)
    expected = eager_losses(eager, x)
    optimizer = torch.optim.SGD(mine.parameters(), 0.5)
    with pytest.raises(packlight.InfeasibleBudgetError) as refused:
        packlight.fit(mine, loss_fn, optimizer, x, 1, moves=(), progress=False)
    step = packlight.fit(
        mine, loss_fn, optimizer, x, refused.value.smallest_bytes, moves=(), progress=False
    )
    assert step.plan.num_reruns > 0
    torch.manual_seed(1)
    assert [step(x).item() for _ in range(3)] == expected
