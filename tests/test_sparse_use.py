"""Sparse models in `fit`, in files, and back."""

from __future__ import annotations

import copy
import json
from math import ceil, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

import packlight
from packlight.errors import FormatError
from packlight.run.checkpoint import newest_checkpoint, save_checkpoint
from packlight.sparse import DSR, SET, RigL, SparseLinear, load_compact, save_compact, to_dense
from tests.test_sparse_methods import batches, loss_fn, small_net, started, train

pytest.importorskip("numba", reason="sparse kernels need the extra 'sparse'")


@pytest.mark.parametrize("method", [RigL(every=2), DSR(every=2, threshold=0.02, fraction=0.2)])
def test_fit_trains_a_sparse_model_as_a_plain_loop_does(method: Any) -> None:
    """Patterns change after steps whose updates were made in the backward; sizes, too."""
    data = batches(5)
    plain, plain_optimizer, plain_sparsity = started(method)
    expected = train(plain, plain_optimizer, data)
    model, optimizer, sparsity = started(method)
    step = packlight.fit(model, loss_fn, optimizer, data[0], budget="1MiB", progress=False)
    assert [step(batch).item() for batch in data] == expected
    assert sparsity.history == plain_sparsity.history
    for mine, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert "update-in-backward" in step.describe()
    assert "of these, sparse" in step.describe() and "index" in step.describe()
    assert "optimizer state" in sparsity.describe()


def test_the_predicted_peak_is_the_measured_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 800), nn.ReLU(), nn.Linear(800, 400))
    packlight.sparsify(model, 0.1, "static")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batch = torch.randn(64, 400)
    step = packlight.fit(
        model, lambda m, b: m(b).square().mean(), optimizer, batch, progress=False
    )
    step(batch)
    dense_bytes = 3 * 4 * 2 * 400 * 800
    assert step.measured(batch).peak_bytes <= step.peak_bytes < dense_bytes / 2


def test_checkpoints_hold_sparse_models(tmp_path: Path) -> None:
    model, optimizer, _ = started(SET(every=2))
    train(model, optimizer, batches(3))
    save_checkpoint(tmp_path, model, optimizer, step=3)
    other, other_optimizer, _ = started(SET(every=2))
    checkpoint = newest_checkpoint(tmp_path)
    assert checkpoint is not None
    checkpoint.restore(other, other_optimizer)
    for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_compact_files_hold_what_is_stored_and_load_dense(tmp_path: Path) -> None:
    model, optimizer, sparsity = started(DSR(every=2, threshold=0.02))
    train(model, optimizer, batches(3))
    path = tmp_path / "model.safetensors"
    save_compact(model, path)
    held = sparsity.bytes_held()
    biases = sum(b.nbytes for n, b in model.state_dict().items() if n.endswith("bias"))
    assert path.stat().st_size < held["values"] + held["index"] + biases + 4096
    dense = small_net()
    dense.load_state_dict(load_compact(path))
    x = batches(1)[0][0]
    torch.testing.assert_close(dense(x), model(x), rtol=1e-5, atol=1e-5)
    expected = to_dense(model).state_dict()
    assert all(torch.equal(expected[name], tensor) for name, tensor in dense.state_dict().items())


def test_compact_files_can_be_read_as_the_docstring_says(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(40, 6, 3))
    sparsity = packlight.sparsify(model, 0.2)
    (weight,) = sparsity.weights.values()
    path = tmp_path / "model.safetensors"
    save_compact(model, path)
    with safe_open(path, framework="np") as file:
        shape = json.loads(file.metadata()["sparse"])["0.weight"]
        values = file.get_tensor("0.weight.values")
        index = file.get_tensor("0.weight.index")
    rows, columns = shape[0], prod(shape[1:])
    counts = index[: rows * ceil(columns / 255)].reshape(rows, -1)
    starts = np.arange(rows)[:, None] * columns + np.arange(counts.shape[1]) * 255
    dense = np.zeros(shape, np.float32)
    dense.flat[np.repeat(starts, counts.reshape(-1)) + index[counts.size :]] = values
    assert np.array_equal(dense, weight.dense().numpy())


def test_other_files_are_no_compact_ones(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("nothing of the kind, and long enough to be looked at")
    with pytest.raises(FormatError, match="cannot be read"):
        load_compact(tmp_path / "a")


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(rows))  # type: ignore[no-any-return]

    model = Tied()
    oracle = copy.deepcopy(model)
    sparsity = packlight.sparsify(model, 0.5, "static")
    assert len(sparsity.weights) == 1 and len(list(model.parameters())) == 1
    (weight,) = sparsity.weights.values()
    with torch.no_grad():
        oracle.embed.weight.copy_(weight.dense())
    rows = torch.randint(50, (4, 3))
    for net in (model, oracle):
        net(rows).square().sum().backward()
    expected = oracle.embed.weight.grad.flatten()[weight.positions()]
    torch.testing.assert_close(weight.values.grad, expected, rtol=1e-4, atol=1e-4)
    dense: Any = to_dense(model)
    assert dense.embed.weight is dense.head.weight


def test_layers_that_cannot_be_sparse_stay_dense_and_are_named() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(20, 20), Own(20, 20), nn.utils.parametrizations.weight_norm(
        nn.Linear(20, 20)
    ))
    sparsity = packlight.sparsify(model, 0.5)
    assert list(sparsity.weights) == ["0.weight"] and list(sparsity.left) == ["1", "2"]
    assert "Own is a class of its own" in sparsity.describe()
    assert "parametrized" in sparsity.left["2"]


def test_layers_can_be_made_sparse_from_the_start() -> None:
    layer = SparseLinear(512, 256, density=0.1)
    assert layer.weight.num_nonzeros == round(0.1 * 512 * 256)
    assert layer.weight.values.abs().max() <= 512**-0.5
    assert layer(torch.ones(2, 512)).shape == (2, 256)
