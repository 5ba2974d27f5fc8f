"""Embedding gradients are added where the other gradient of the weight lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

from packlight.capture.step_capture import CapturedLoss, StepCapture
from packlight.moves.chunk.embedding import with_added_rows
from tests.models import make


def captured(family: str) -> CapturedLoss:
    model, batch, loss_fn = make(family)
    return StepCapture(loss_fn, model.eval()).capture(batch)


def run(module: fx.GraphModule, loss: CapturedLoss) -> list[Any]:
    results = fx.Interpreter(module).run(*loss.arguments, torch.ones(()))
    return [r for r in pytree.tree_leaves(results) if isinstance(r, torch.Tensor)]


def calls(module: fx.GraphModule, name: str) -> int:
    return sum(name in str(node.target) for node in module.graph.nodes)


# How many sums of gradients of one weight have an embedding's among them; BERT's embedding has a
# padding index, whose row gets nothing.
@pytest.mark.parametrize(("family", "num_sums"), [("gpt2", 1), ("t5", 2), ("bert", 1)])
def test_shared_embeddings_get_the_same_gradient_row_by_row(family: str, num_sums: int) -> None:
    loss = captured(family)
    rewritten = with_added_rows(loss.joint)
    assert calls(rewritten, "index_add") == num_sums
    assert calls(rewritten, "embedding_dense_backward") == (
        calls(loss.joint, "embedding_dense_backward") - num_sums
    )
    for mine, theirs in zip(run(rewritten, loss), run(loss.joint, loss), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_model_without_shared_embeddings_is_left_alone() -> None:
    loss = captured("mlp")
    assert with_added_rows(loss.joint) is loss.joint
