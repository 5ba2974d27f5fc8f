"""Joint graphs kept on disk compute what AOTAutograd's do, and stand in for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils import _pytree as pytree

from packlight.capture import kept, step_capture
from packlight.capture.read_joint import read_joint_graph
from packlight.capture.step_capture import CapturedLoss, StepCapture
from packlight.costs.measure import CallFacts, call_signature, observe_call, same_bits
from tests.models import FAMILIES, make

SMALL = {"resnet50": {"batch_size": 2, "side": 64}}


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[fx.GraphModule]]:
    """An empty cache, and a list of the graphs for which AOTAutograd is asked."""
    monkeypatch.setenv("PACKLIGHT_CACHE", str(tmp_path))
    asked: list[fx.GraphModule] = []
    joint_graph = step_capture._joint_graph

    def noting(module: fx.GraphModule, inputs: Any) -> Any:
        asked.append(module)
        return joint_graph(module, inputs)

    monkeypatch.setattr(step_capture, "_joint_graph", noting)
    yield asked


def results_of(loss: CapturedLoss) -> list[Any]:
    """Return what a joint graph computes from its captured inputs, call by call."""
    torch.manual_seed(1)
    tangent = loss.joint.graph.find_nodes(op="output")[0].args[0][loss.loss_index].meta["val"]
    one = torch.ones(tangent.shape, dtype=tangent.dtype)
    with torch.no_grad():
        arguments = [a.clone() if isinstance(a, torch.Tensor) else a for a in loss.arguments]
        run = fx.Interpreter(loss.joint).run
        return list(run(*arguments, one, enable_io_processing=False))


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_graph_from_disk_computes_the_same_bits_and_is_read_alike(
    name: str, traced: list[fx.GraphModule]
) -> None:
    model, batch, loss_fn = make(name, **SMALL.get(name, {}))
    facts: dict[str, CallFacts] = {}

    def measure(target: Any, args: Any, kwargs: Any) -> CallFacts:
        key = call_signature(target, args, kwargs)
        if key not in facts:
            facts[key] = observe_call(target, args, kwargs)
        return facts[key]

    made, loaded = (StepCapture(loss_fn, model).capture(batch) for _ in range(2))
    assert len(traced) == 1
    assert loaded.joint is not made.joint
    for one, other in zip(results_of(made), results_of(loaded), strict=True):
        assert (one is None) == (other is None)
        assert one is None or same_bits(one, other)
    assert (loaded.written_back, loaded.returned, loaded.loss_index) == (
        made.written_back, made.returned, made.loss_index
    )
    graphs = [
        read_joint_graph(loss.joint, loss.num_forward_outputs, measure).graph
        for loss in (made, loaded)
    ]
    assert graphs[0] == graphs[1]


def captured(
    loss_fn: Callable[[nn.Module, Any], torch.Tensor], model: nn.Module, batch: Any
) -> CapturedLoss:
    return StepCapture(loss_fn, model).capture(batch)


def test_whatever_is_traced_differently_is_traced_anew(traced: list[fx.GraphModule]) -> None:
    model, batch = nn.Linear(8, 8), torch.randn(4, 8)

    def loss_fn(m: nn.Module, x: torch.Tensor, power: float = 2.0) -> torch.Tensor:
        return m(x).pow(power).mean()

    captured(loss_fn, model, batch)
    others = [
        (loss_fn, model, torch.randn(5, 8)),  # another shape
        (loss_fn, model, torch.randn(8, 4).T),  # another layout
        (loss_fn, model, torch.randn(4, 8, requires_grad=True)),
        (loss_fn, nn.Linear(8, 8, dtype=torch.float64), batch.double()),
        (loss_fn, nn.Linear(8, 8, bias=False), batch),
        (lambda m, x: loss_fn(m, x, 3.0), model, batch),  # another literal
    ]
    for index, other in enumerate(others):
        captured(*other)
        assert len(traced) == 2 + index
    captured(loss_fn, nn.Linear(8, 8), torch.randn(4, 8))  # other values
    assert len(traced) == 1 + len(others)
    frozen = nn.Linear(8, 8)
    frozen.bias.requires_grad_(False)
    captured(loss_fn, frozen, batch)
    assert len(traced) == 2 + len(others)


def test_a_setting_that_chooses_other_kernels_is_part_of_the_key(
    traced: list[fx.GraphModule],
) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            return F.scaled_dot_product_attention(y, y, y)

    model, batch = Attention(), torch.randn(2, 4, 8, 16)
    targets = []
    for flash in (True, False):
        with _flash(flash):
            loss = captured(lambda m, x: m(x).sum(), model, batch)
        targets.append({str(n.target) for n in loss.joint.graph.nodes})
    assert len(traced) == 2
    assert targets[0] != targets[1]


def _flash(enabled: bool) -> Any:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if enabled else
                       [SDPBackend.MATH])


@torch.library.custom_op("packlight_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


twice.register_fake(lambda x: torch.empty_like(x))
twice.register_autograd(lambda ctx, gradient: 2 * gradient)


def test_a_users_operator_whose_backward_may_change_is_not_kept(
    traced: list[fx.GraphModule], tmp_path: Path
) -> None:
    model, batch = nn.Linear(8, 8), torch.randn(4, 8)
    for _ in range(2):
        captured(lambda m, x: twice(m(x)).sum(), model, batch)
    assert len(traced) == 2
    assert not list(tmp_path.rglob("*.z"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"{}"])
def test_a_damaged_file_is_none(
    damage: Callable[[bytes], bytes], traced: list[fx.GraphModule], tmp_path: Path
) -> None:
    model, batch = nn.Linear(8, 8), torch.randn(4, 8)
    captured(lambda m, x: m(x).sum(), model, batch)
    (file,) = tmp_path.rglob("*.z")
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    captured(lambda m, x: m(x).sum(), model, batch)
    assert len(traced) == 2
    assert file.read_bytes() == whole


def test_only_the_latest_files_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kept, "MOST_FILES", 2)
    model = nn.Linear(8, 8)
    for rows in range(2, 6):
        captured(lambda m, x: m(x).sum(), model, torch.randn(rows, 8))
    assert len(list(tmp_path.rglob("*.z"))) == 2


def test_every_fake_tensor_lies_in_memory_as_it_was_traced(traced: list[fx.GraphModule]) -> None:
    model, batch, loss_fn = make("gpt2")
    made, loaded = (StepCapture(loss_fn, model).capture(batch) for _ in range(2))
    storages: dict[int, int] = {}
    for one, other in zip(made.joint.graph.nodes, loaded.joint.graph.nodes, strict=True):
        pairs = zip(
            pytree.tree_leaves(one.meta.get("val")), pytree.tree_leaves(other.meta.get("val")),
            strict=True,
        )
        for a, b in pairs:
            if isinstance(a, torch.Tensor):
                assert (a.shape, a.stride(), a.storage_offset(), a.dtype, a.requires_grad) == (
                    b.shape, b.stride(), b.storage_offset(), b.dtype, b.requires_grad
                )
                same = storages.setdefault(a.untyped_storage()._cdata, b.untyped_storage()._cdata)
                assert same == b.untyped_storage()._cdata
