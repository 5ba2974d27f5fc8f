"""Ensembles: members beside themselves trained alone, in budgets, with settings of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight import ensemble
from packlight.ensemble.optimizer import member_settings, optimizer_of, steps_stacks
from packlight.ensemble.train import chunk_sizes
from packlight.errors import InfeasibleBudgetError, MemberError

NUM_MEMBERS = 4
WIDTH, NUM_CLASSES, NUM_ROWS = 24, 5, 96
EXACT: Any = {"moves": packlight.EXACT_MOVES}


def make() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU(),
        nn.Linear(WIDTH, NUM_CLASSES),
    )  # fmt: skip


def loss_fn(member: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(member(batch[0]), batch[1])


def batches(count: int, *, own: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    lead = (NUM_MEMBERS, NUM_ROWS) if own else (NUM_ROWS,)
    return [
        (torch.randn(*lead, 8, generator=generator),
         torch.randint(0, NUM_CLASSES, lead, generator=generator))
        for _ in range(count)
    ]


def trained_alone(
    members: list[nn.Module], own: list[dict[str, Any]], kind: type[torch.optim.Optimizer],
    data: list[Any], *, own_batches: bool, dtype: torch.dtype = torch.float32,
) -> list[list[float]]:
    """Train members in eager PyTorch, each by itself; return their losses step by step."""
    losses = []
    for index, (member, settings) in enumerate(zip(members, own, strict=True)):
        member.to(dtype)
        optimizer = kind(member.parameters(), **settings)
        held = []
        for x, y in data:
            batch = (x[index], y[index]) if own_batches else (x, y)
            optimizer.zero_grad()
            loss = loss_fn(member, (batch[0].to(dtype), batch[1]))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            held.append(loss.item())
        losses.append(held)
    return [list(step) for step in zip(*losses, strict=True)]


SETTINGS = {
    "lr": ensemble.Each([1e-3, 3e-3, 1e-2, 3e-2]),
    "weight_decay": ensemble.Each([0.0, 0.1, 0.0, 0.2]),
}


@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, pytest.param(torch.optim.SGD, marks=pytest.mark.slow)]
)
def test_one_member_at_a_time_has_the_bits_that_it_has_alone(
    kind: type[torch.optim.Optimizer],
) -> None:
    members = ensemble.Ensemble(make, range(NUM_MEMBERS))
    alone = members.members()
    data = batches(3, own=True)
    step = ensemble.fit(
        members, loss_fn, kind, data[0], "8MiB", settings=SETTINGS, own_batches=True,
        most_members=1, **EXACT,
    )
    assert step.chunk_size == 1
    losses = [step(batch).tolist() for batch in data]
    own = member_settings(SETTINGS, NUM_MEMBERS)
    assert losses == trained_alone(alone, own, kind, data, own_batches=True)
    for mine, theirs in zip(members.members(), alone, strict=True):
        assert all(
            torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True)
        )


@pytest.mark.parametrize("own_batches", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_members_at_once_are_those_trained_alone_up_to_the_order_of_sums(
    own_batches: bool,
) -> None:
    members = ensemble.Ensemble(make, range(NUM_MEMBERS))
    alone = members.members()
    exactly = copy.deepcopy(alone)
    data = batches(4, own=own_batches)
    step = stacked_step(members, data[0], own_batches)
    losses = torch.tensor([step(batch).tolist() for batch in data])
    own = member_settings(SETTINGS, NUM_MEMBERS)
    eager = torch.tensor(
        trained_alone(alone, own, torch.optim.AdamW, data, own_batches=own_batches)
    )
    exact = torch.tensor(trained_alone(
        exactly, own, torch.optim.AdamW, data, own_batches=own_batches, dtype=torch.float64
    ))  # fmt: skip
    # No farther from float64 than float32 alone is, but for a factor.
    allowed = 4 * (eager - exact).abs().max() + 1e-6
    assert (losses - exact).abs().max() <= allowed


def stacked_step(
    members: ensemble.Ensemble, batch: Any, own_batches: bool, budget: str | int = "8MiB"
) -> Any:
    """Return a step of all members at once, whatever is faster here."""
    (chunk,) = members.stacks
    optimizer = optimizer_of(
        list(chunk.parameters()), torch.optim.AdamW, member_settings(SETTINGS, NUM_MEMBERS)
    )
    step = packlight.fit(
        chunk, chunk.loss_function(loss_fn, own_batches=own_batches), optimizer, batch, budget,
        progress=False, **EXACT,
    )
    return lambda batch: step(batch)[1]


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.RMSprop, {}), (torch.optim.Adagrad, {}), (torch.optim.NAdam, {}),
    ],
)  # fmt: skip
def test_a_stacked_optimizer_gives_each_member_the_bits_of_its_own(
    kind: type[torch.optim.Optimizer], more: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    own = member_settings({**SETTINGS, **more}, NUM_MEMBERS)
    shapes = [(NUM_MEMBERS, 7, 33), (NUM_MEMBERS, 129)]
    stacked = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    alone = [[nn.Parameter(s.detach()[i].clone()) for s in stacked] for i in range(NUM_MEMBERS)]
    optimizer = optimizer_of(stacked, kind, own)
    others = [kind(held, **settings) for held, settings in zip(alone, own, strict=True)]
    assert isinstance(optimizer, ensemble.MemberOptimizer)
    for step in range(4):
        if step == 2:  # a saved state is the same optimizer's
            saved = optimizer.state_dict()
            optimizer = optimizer_of(stacked, kind, own)
            optimizer.load_state_dict(saved)
        for place, parameter in enumerate(stacked):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            for i in range(NUM_MEMBERS):
                alone[i][place].grad = parameter.grad[i].clone()
        optimizer.step()
        for other in others:
            other.step()
        for place, parameter in enumerate(stacked):
            assert torch.equal(parameter, torch.stack([held[place] for held in alone])), step


def test_members_with_equal_settings_are_stepped_at_once_where_that_keeps_their_bits() -> None:
    own = member_settings({"lr": 1e-2}, NUM_MEMBERS)
    parameters = [nn.Parameter(torch.zeros(NUM_MEMBERS, 3))]
    assert type(optimizer_of(parameters, torch.optim.AdamW, own)) is torch.optim.AdamW

    class Normed(torch.optim.SGD):
        """Divides by the norm of a whole parameter: of a stack that is another number."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad = p.grad / p.grad.norm()
            return super().step()

    assert not steps_stacks(Normed, {"lr": 1e-2})
    assert isinstance(optimizer_of(parameters, Normed, own), ensemble.MemberOptimizer)


def test_a_smaller_budget_trains_fewer_members_at_once_and_one_too_small_is_refused() -> None:
    def small() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, NUM_CLASSES))

    def fitted(budget: int | None, most_members: int | None = None) -> ensemble.EnsembleStep:
        members = ensemble.Ensemble(small, [0, 1])
        return ensemble.fit(
            members, loss_fn, torch.optim.SGD, batch, budget, most_members=most_members,
            settings={"lr": 0.1}, moves=(),
        )

    (batch,) = batches(1, own=False)
    smallest = fitted(None, 1).peak_bytes
    step = fitted(smallest)
    assert step.chunk_size == 1 and step.peak_bytes <= smallest
    assert step.steps[1].measured(batch).peak_bytes <= smallest
    with pytest.raises(InfeasibleBudgetError) as caught:
        fitted(smallest // 3)
    assert smallest // 3 < caught.value.smallest_bytes <= smallest


def test_members_may_have_buffers_and_dropout_of_their_own() -> None:
    def make_normed() -> nn.Module:
        return nn.Sequential(
            nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Dropout(0.5),
            nn.Linear(WIDTH, NUM_CLASSES),
        )  # fmt: skip

    (x, y), *_ = batches(1, own=False)
    members = ensemble.Ensemble(make_normed, [3, 3])
    step = ensemble.fit(
        members, loss_fn, torch.optim.SGD, (x, y), settings={"lr": 0.1}, **EXACT
    )
    losses = step((x, y))
    assert losses[0] != losses[1]  # equal members, other masks
    for member in members.members():
        norm = member[1]  # type: ignore[index]
        seen = 0.9 * torch.zeros(WIDTH) + 0.1 * member_inputs(make_normed, x).mean(0)
        torch.testing.assert_close(norm.running_mean, seen)


def member_inputs(make_normed: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what the first layer of a member of seed 3 does before it is trained."""
    torch.manual_seed(3)
    first: torch.Tensor = make_normed()[0](x).detach()
    return first


# -- what is refused


def test_members_of_different_shapes_are_refused_with_both() -> None:
    with pytest.raises(MemberError) as caught:
        ensemble.Ensemble.of([nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 5)])
    assert caught.value.name == "weight"
    assert caught.value.shapes == (((3, 4), "float32"), ((5, 4), "float32"))
    assert "(3, 4) float32 in member 0 and (5, 4) float32 in member 2" in str(caught.value)
    with pytest.raises(MemberError, match="missing in member 0"):
        ensemble.Ensemble.of([nn.Linear(4, 3, bias=False), nn.Linear(4, 3)])
    with pytest.raises(MemberError, match="without members"):
        ensemble.Ensemble(make, [])


def test_settings_and_batches_are_for_all_members() -> None:
    members = ensemble.Ensemble(make, range(NUM_MEMBERS))
    (batch,) = batches(1, own=False)
    with pytest.raises(MemberError, match="'lr' has 2 values for 4 members"):
        ensemble.fit(members, loss_fn, torch.optim.SGD, batch,
                     settings={"lr": ensemble.Each([0.1, 0.2])})  # fmt: skip
    with pytest.raises(MemberError, match=r"tensor of shape \(96, 8\) for 4 members"):
        ensemble.fit(members, loss_fn, torch.optim.SGD, batch, own_batches=True)


# -- predictions


def test_predictions_are_those_of_the_members() -> None:
    members = ensemble.Ensemble(make, range(NUM_MEMBERS))
    (x, _), *_ = batches(1, own=False)
    expected = torch.stack([member.eval()(x) for member in members.members()])
    torch.testing.assert_close(members.predict(x), expected)
    members.rechunk(3)
    assert [chunk.num_members for chunk in members.stacks] == [3, 1]
    torch.testing.assert_close(members.predict(x), expected)


def test_votes_means_and_disagreement_by_hand() -> None:
    # Three members, four examples, two classes: chosen are 0 0 1 | 1 1 1 | 0 1 0 | 0 0 0.
    one = torch.tensor([[0.9, 0.6, 0.2], [0.1, 0.4, 0.3], [0.6, 0.05, 0.6], [0.7, 0.8, 0.9]])
    logits = torch.stack([one, 1 - one], dim=-1).log().transpose(0, 1)
    assert ensemble.vote(logits).tolist() == [0, 1, 0, 0]
    means = ensemble.mean_probabilities(logits)
    torch.testing.assert_close(means[:, 0], one.mean(1))
    assert means.argmax(-1).tolist() == [0, 1, 1, 0]  # the third: two weak voices, one strong
    # Of the three pairs two differ in the first and third example, none in the others.
    assert ensemble.disagreement(logits).item() == pytest.approx((2 / 3 + 2 / 3) / 4)
    assert ensemble.mutual_information(logits[:1]).abs().max().item() < 1e-6
    assert (ensemble.mutual_information(logits) >= 0).all()
    with pytest.raises(ValueError, match="two or more"):
        ensemble.disagreement(logits[:1])


def test_a_tied_vote_goes_to_the_more_probable_class() -> None:
    probabilities = torch.tensor([[[0.5, 0.45, 0.05]], [[0.05, 0.9, 0.05]]])
    assert ensemble.vote(probabilities.log()).tolist() == [1]


def test_calibration_error_is_that_of_a_loop_over_bins() -> None:
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(500, 4, generator=generator, dtype=torch.float64).mul(3).softmax(-1)
    labels = torch.randint(0, 4, (500,), generator=generator)
    expected = 0.0
    confidence, chosen = probabilities.max(-1)
    for low in range(10):
        inside = (confidence > low / 10) & (confidence <= (low + 1) / 10)
        if inside.any():
            accuracy = (chosen[inside] == labels[inside]).double().mean()
            expected += inside.double().mean() * (accuracy - confidence[inside].mean()).abs()
    found = ensemble.calibration_error(probabilities, labels, num_bins=10)
    assert found.item() == pytest.approx(float(expected))


def test_sizes_of_chunks() -> None:
    assert chunk_sizes(1) == [1]
    assert chunk_sizes(7) == [7, 4, 3, 2, 1]
