"""Methods of sparse training: density is kept to the element, patterns are legal, state follows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import packlight
from packlight.errors import OptionError, SparsityError
from packlight.optim import LowBit, adamw
from packlight.sparse import (
    DSR,
    METHODS,
    SET,
    DeepR,
    GradualPruning,
    GuidedExploration,
    Method,
    RigL,
    SparseWeight,
    Sparsity,
    Static,
    Thin,
)
from packlight.sparse.method import apportioned

pytest.importorskip("numba", reason="sparse kernels need the extra 'sparse'")

DENSITY = 0.25
ALL: dict[str, Method] = {
    "dsr": DSR(every=3, fraction=0.2, threshold=0.02),
    "set": SET(every=3),
    "deepr": DeepR(l1=0.02, temperature=1e-6),
    "rigl": RigL(every=3, until=20),
    "gse": GuidedExploration(every=3, densities="uniform"),
    "static": Static(),
    "pruning": GradualPruning(every=3, until=8),
    "thin": Thin(),
}


def small_net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(108, 40), nn.ReLU(), nn.Linear(40, 5),
    )


def batches(num: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(16, 3, 8, 8, generator=generator),
            torch.randint(5, (16,), generator=generator),
        )
        for _ in range(num)
    ]


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, data: Any) -> list[float]:
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def started(
    method: Method, low_bit: bool = False
) -> tuple[nn.Module, torch.optim.Optimizer, Sparsity]:
    model = small_net()
    sparsity = packlight.sparsify(model, DENSITY, method)
    optimizer: torch.optim.Optimizer
    if low_bit:
        optimizer = LowBit(model.parameters(), adamw(lr=1e-2), states="8bit")
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.attach(optimizer)
    return model, optimizer, sparsity


def test_all_methods_are_tested() -> None:
    assert set(ALL) == set(METHODS)


@pytest.mark.parametrize("name", ALL)
def test_density_is_kept_patterns_are_legal_and_state_follows(name: str) -> None:
    model, optimizer, sparsity = started(ALL[name])
    total = sum(weight.numel() for weight in sparsity.weights.values())
    before = {n: w.positions() for n, w in sparsity.weights.items()}
    for number, batch in enumerate(batches(9), 1):
        train(model, optimizer, [batch])
        wanted = DENSITY
        if isinstance(sparsity.method, GradualPruning):  # as of its latest change
            due = max((s for s in range(1, number + 1) if sparsity.method.is_due(s)), default=0)
            wanted = sparsity.method.density_at(due, DENSITY)
        assert sparsity.num_nonzeros == round(wanted * total)
        for weight in sparsity.weights.values():
            positions = weight.positions()
            assert len(positions) == weight.num_nonzeros > 0
            assert (positions.diff() > 0).all() and positions[-1] < weight.numel()
            state = optimizer.state[weight.values]
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == weight.values.shape
    has_moved = any(
        not torch.equal(before[n], w.positions()) for n, w in sparsity.weights.items()
    )
    assert has_moved is (name not in ("static", "thin"))


@pytest.mark.parametrize("name", ["dsr", "set", "rigl", "gse"])
def test_what_is_kept_keeps_value_and_state_and_what_is_new_starts_at_zero(name: str) -> None:
    model, optimizer, sparsity = started(ALL[name])
    train(model, optimizer, batches(2))

    def dense(weight: SparseWeight, vector: torch.Tensor) -> torch.Tensor:
        return torch.zeros(weight.numel()).index_copy(0, weight.positions(), vector.detach())

    seen: list[tuple[set[int], list[torch.Tensor]]] = []
    rewire = sparsity.rewire

    def watched() -> None:
        for w in sparsity.weights.values():
            state = optimizer.state[w.values]
            vectors = (w.values, state["exp_avg"], state["exp_avg_sq"])
            seen.append((set(w.positions().tolist()), [dense(w, v) for v in vectors]))
        rewire()

    sparsity.rewire = watched  # type: ignore[method-assign]
    train(model, optimizer, batches(1, seed=5))
    assert len(seen) == len(sparsity.weights)
    num_new = 0
    for w, (old, vectors) in zip(sparsity.weights.values(), seen, strict=True):
        state = optimizer.state[w.values]
        positions = w.positions()
        is_old = torch.tensor([p in old for p in positions.tolist()])
        num_new += int((~is_old).sum())
        vectors_now = (w.values, state["exp_avg"], state["exp_avg_sq"])
        for now, before in zip(vectors_now, vectors, strict=True):
            # Those that were dropped and drawn again at once are new, too.
            same = now.detach() == before[positions]
            assert (same | (now == 0))[is_old].all() and same[is_old].float().mean() > 0.5
            assert (now[~is_old] == 0).all()
    assert num_new > 0


@pytest.mark.parametrize(
    ("name", "low_bit"), [*((name, False) for name in ALL), ("dsr", True), ("rigl", True)]
)
def test_a_run_that_is_resumed_is_the_same_run(name: str, low_bit: bool) -> None:
    data = batches(9)
    model, optimizer, sparsity = started(ALL[name], low_bit)
    train(model, optimizer, data[:4])
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), sparsity.state_dict()])
    losses = train(model, optimizer, data[4:])
    others = started(ALL[name], low_bit)
    for part, state in zip(others, saved, strict=True):
        part.load_state_dict(state)
    assert train(others[0], others[1], data[4:]) == losses
    for mine, theirs in zip(
        model.state_dict().values(), others[0].state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_dsr_moves_nonzeros_to_layers_of_which_more_survives() -> None:
    """Algorithm 1 written out for one change."""
    model = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 20, bias=False))
    method = DSR(every=1, target=50, threshold=0.5)
    sparsity = packlight.sparsify(model, 0.5, method)
    first, second = sparsity.weights.values()
    with torch.no_grad():
        first.values.copy_(torch.linspace(0.1, 0.9, 600))  # 300 below 0.5
        second.values.copy_(torch.linspace(-0.6, -1.2, 300))  # none
    before = first.positions()[300:]
    sparsity.rewire()
    grown = [round(300 * 300 / 600), round(300 * 300 / 600)]
    assert [first.num_nonzeros, second.num_nonzeros] == [300 + grown[0], 300 + grown[1]]
    assert sparsity.run.numbers["threshold"] == 0.25  # 300 is more than 1.1 * 50
    stays = first.positions()[first.values != 0]
    assert torch.equal(stays, before)
    sparsity.rewire()  # the new zeros go again: 300, more than 55
    assert sparsity.run.numbers["threshold"] == 0.125


def test_rigl_grows_where_the_dense_gradient_is_largest() -> None:
    model = small_net()
    sparsity = packlight.sparsify(model, DENSITY, RigL(every=1, fraction=0.2))
    oracle = packlight.sparse.to_dense(copy.deepcopy(model)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsity.attach(optimizer)
    (batch,) = batches(1)
    loss_fn(oracle, (batch[0].double(), batch[1])).backward()
    before = [w.positions() for w in sparsity.weights.values()]
    train(model, optimizer, [batch])
    gradients = [m.weight.grad for m in oracle if isinstance(m, (nn.Linear, nn.Conv2d))]
    for weight, old, gradient in zip(sparsity.weights.values(), before, gradients, strict=True):
        score = gradient.abs().flatten().clone()
        score[old] = -1
        num = int(0.2 * len(old))
        num = min(num, weight.numel() - len(old))
        expected = set(score.topk(num).indices.tolist())
        assert set(weight.positions().tolist()) - set(old.tolist()) == expected


def test_guided_exploration_takes_the_best_of_its_sample() -> None:
    model = nn.Sequential(nn.Linear(300, 40, bias=False))
    method = GuidedExploration(every=1, fraction=0.1, samples=30, densities="uniform")
    sparsity = packlight.sparsify(model, 0.05, method)
    (weight,) = sparsity.weights.values()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsity.attach(optimizer)
    old = set(weight.positions().tolist())
    x = torch.randn(8, 300) * torch.linspace(0, 1, 300)
    dy = torch.randn(8, 40) * torch.linspace(0, 1, 40)[torch.randperm(40)]
    model(x).backward(dy)
    optimizer.step()
    grown = set(weight.positions().tolist()) - old
    ranks = (dy.T @ x).abs().flatten().argsort(descending=True).argsort()
    # 18,000 draws among 12,000 places: most of the best are drawn.
    assert len(grown) == 60 and ranks[list(grown)].float().median() < 80


def test_deepr_weights_never_change_their_sign() -> None:
    model, optimizer, sparsity = started(ALL["deepr"])
    (name, weight), *_ = sparsity.weights.items()
    for batch in batches(4):
        signs = weight.per_value()["is_negative"]
        old = dict(zip(weight.positions().tolist(), signs.tolist(), strict=True))
        train(model, optimizer, [batch])
        values, signs = weight.values, weight.per_value()["is_negative"]
        assert ((values <= 0) == signs)[values != 0].all()
        is_alive = values != 0
        places = weight.positions()[is_alive].tolist()
        assert [old.get(place) for place in places] == signs[is_alive].tolist()


def test_a_thin_network_is_a_dense_one_of_fewer_channels() -> None:
    model = nn.Sequential(
        nn.Linear(20, 40, bias=False), nn.ReLU(), nn.Linear(40, 40, bias=False), nn.ReLU(),
        nn.Linear(40, 10, bias=False),
    )
    sparsity = packlight.sparsify(model, 0.4, "thin")
    first, middle, last = (w.dense() for w in sparsity.weights.values())
    width = int((first != 0).any(1).sum())
    assert (first[: width - 1] != 0).all() and not first[width:].any()
    assert not middle[width:].any() and not middle[:, width:].any() and not last[:, width:].any()
    assert (last[:9, : width - 1] != 0).all()


def test_shares_are_exact_and_respect_rooms() -> None:
    assert apportioned(7, [1.0, 1.0, 1.0], [5, 5, 5]) == [3, 2, 2]
    assert apportioned(12, [10.0, 1.0, 1.0], [3, 50, 50]) == [3, 5, 4]
    with pytest.raises(SparsityError, match="do not fit"):
        apportioned(12, [1.0, 0.0], [3, 50])


def test_bad_requests_are_refused_by_name() -> None:
    for arguments, problem in [
        ({"density": 0.0}, "density=0.0; it must be above 0"),
        ({"density": 1.5}, "at most 1"),
        ({"method": "rigg"}, r"did you mean 'rigl'\? known are dsr, set"),
        ({"method": "pruning"}, r"until=None\); it must be the step .* GradualPruning\(until=1000"),
        ({"exclude": ["fc"]}, "'fc' is no module"),
    ]:
        with pytest.raises(OptionError, match=problem):
            packlight.sparsify(small_net(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"SET\(fraction=2\)"):
        SET(fraction=2)
    with pytest.raises(SparsityError, match=r"'0' of shape \(2, 4\) is too small"):
        packlight.sparsify(nn.Sequential(nn.Linear(4, 2)), 0.01)
    with pytest.raises(SparsityError, match="no layer to be made sparse"):
        packlight.sparsify(nn.Sequential(nn.ReLU()))
    with pytest.raises(SparsityError, match=r"put it into nn.Sequential"):
        packlight.sparsify(nn.Linear(40, 40))
    model, _, sparsity = started(SET())
    with pytest.raises(SparsityError, match="'0' is sparse already"):
        packlight.sparsify(model)
    with pytest.raises(SparsityError, match="attached to an optimizer already"):
        sparsity.attach()


def test_optimizers_whose_state_cannot_follow_are_refused_with_those_that_can() -> None:
    model = small_net()
    sparsity = packlight.sparsify(model, DENSITY)
    early = torch.optim.SGD(small_net().parameters(), lr=0.1)
    with pytest.raises(SparsityError, match="SGD does not hold the values of '0.weight'"):
        sparsity.attach(early)
    with pytest.raises(SparsityError, match="(?s)Adafactor cannot hold .* AdamW.* can"):
        sparsity.attach(torch.optim.Adafactor(model.parameters()))


def test_a_layer_that_loses_all_its_weights_is_an_error_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 30))
    sparsity = packlight.sparsify(model, 0.2, DSR(threshold=0.5))
    first, second = sparsity.weights.values()
    with torch.no_grad():
        first.values.fill_(0.1)
        second.values.fill_(0.9)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(SparsityError, match="all weights of '0.weight' were pruned"):
        sparsity.rewire()
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_several_ranks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises(SparsityError, match="on 4 ranks"):
        packlight.sparsify(small_net())
