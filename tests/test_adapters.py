"""Low-rank adapters on a frozen Hugging Face model whose blocks are checkpointed by itself.

Adapters are written out as the peft library has them (Hu et al., 2021): a frozen layer, and beside
it two small ones. `enable_input_require_grads` is what peft calls, so that reentrant checkpoints of
frozen blocks have a gradient to hand on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight.costs.peak import measure_peak
from packlight.errors import InfeasibleBudgetError
from tests.oracles.eager_loop import Training, assert_same_bits

transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
RANK, WIDTH, LENGTH = 4, 32, 16


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    torch._dynamo.reset()


class Adapted(nn.Module):
    """A frozen layer and a low-rank one beside it."""

    def __init__(self, layer: nn.Module, wide: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Linear(WIDTH, RANK, bias=False)
        self.up = nn.Linear(RANK, wide, bias=False)
        nn.init.normal_(self.up.weight, std=0.1)  # peft begins with zeros: nothing to compare

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.up(self.down(nn.functional.dropout(x, 0.1, self.training)))


def adapted(reentrant: bool) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=2, n_head=2, vocab_size=64, n_positions=LENGTH,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )
    model = transformers.GPT2LMHeadModel(config)
    model.requires_grad_(False)
    for block in model.transformer.h:
        block.attn.c_attn = Adapted(block.attn.c_attn, 3 * WIDTH)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def loss_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)


def trainings(reentrant: bool) -> tuple[Training, Training]:
    model = adapted(reentrant)
    other = adapted(reentrant)  # a copy would share the hook on the first one's embedding
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    mine, eager = (Training(m, adamw(m), loss_of) for m in (model, other))
    return mine, eager


def tokens_of(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (4, LENGTH), generator=generator)


def losses(step: Callable[[Any], torch.Tensor]) -> list[float]:
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        found.append(step(tokens_of(seed)).item())
    return found


def test_fit_trains_adapters_of_checkpointed_blocks_with_eager_bits() -> None:
    mine, eager = trainings(reentrant=False)
    arguments = mine.model, loss_of, mine.optimizer, tokens_of(0)
    moves = ("update-in-backward",)
    with pytest.raises(InfeasibleBudgetError) as caught:
        packlight.fit(*arguments, 1, progress=False, moves=moves)
    budget = caught.value.smallest_bytes
    step = packlight.fit(*arguments, budget, progress=False, moves=moves)

    def within(tokens: torch.Tensor) -> torch.Tensor:
        measured = step.measured(tokens)
        assert measured.peak_bytes <= budget
        return measured.loss

    assert losses(within) == losses(eager.step)
    assert_same_bits(mine, eager)
    assert all(p.grad is None for p in mine.model.parameters())


@pytest.mark.filterwarnings("ignore:.*reentrant.*")
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_backend_trains_them_in_a_loop_of_ones_own(reentrant: bool) -> None:
    mine, eager = trainings(reentrant)

    def forward_backward(net: Any, tokens: torch.Tensor) -> torch.Tensor:
        loss = loss_of(net, tokens)
        loss.backward()
        return loss.detach()

    torch.manual_seed(0)
    held = measure_peak(lambda: forward_backward(eager.model, tokens_of(0)))
    eager.model.zero_grad()
    budget = int(1.05 * held.peak_bytes)
    net = torch.compile(
        mine.model, backend="packlight", options={"budget": budget, "progress": False}
    )

    def step(tokens: torch.Tensor) -> torch.Tensor:
        peak = measure_peak(lambda: forward_backward(net, tokens))
        assert peak.peak_bytes <= budget
        mine.optimizer.step()
        mine.optimizer.zero_grad()
        return peak.result

    assert losses(step) == losses(eager.step)
    assert_same_bits(mine, eager)
