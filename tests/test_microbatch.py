"""Microbatches: their weighted gradients are the whole batch's, and losses without weights fail."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from packlight.capture.dynamo import prepare_dynamo, specialize
from packlight.capture.step_capture import StepCapture
from packlight.errors import BatchError, MicrobatchError
from packlight.moves.microbatch.batch_statistics import batch_statistics
from packlight.moves.microbatch.denominator import Denominator
from packlight.moves.microbatch.independence import check_rows_independent, few_rows, settle
from packlight.moves.microbatch.loss_weight import find_denominator
from packlight.moves.microbatch.split import (
    leaves_of_primals,
    loss_weights,
    num_rows,
    split,
    tensor_leaves,
)
from tests import models

Loss = Callable[[nn.Module, Any], torch.Tensor]
IGNORED = -100


@dataclass
class Captured:
    """A joint graph as the backend sees it."""

    module: fx.GraphModule
    num_forward_outputs: int
    real_inputs: list[Any]


class Stop(Exception):
    """Ends a capture."""


def capture(model: nn.Module, loss_fn: Loss, batch: Any) -> Captured:
    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    prepare_dynamo()
    found: list[Captured] = []

    def backend(module: fx.GraphModule, example_inputs: Any) -> Any:
        specialize(example_inputs)
        reals = [x for x in example_inputs if isinstance(x, torch.Tensor)]

        def partition(joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any) -> Any:
            found.append(Captured(joint, num_fwd_outputs, reals))
            raise Stop

        compiler = aot_autograd(
            fw_compiler=lambda m, _: m, bw_compiler=lambda m, _: m, partition_fn=partition
        )
        return compiler(module, example_inputs)

    compiled = torch.compile(
        lambda model, batch: loss_fn(model, batch), backend=backend, fullgraph=True, dynamic=False
    )
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        compiled(model, batch)
    return found[0]


def denominator_of(
    model: nn.Module, loss_fn: Loss, batch: Any, num_microbatches: int
) -> Denominator:
    """What the step captured on the first microbatch divides by."""
    first = split(batch, num_microbatches)[0]
    captured = capture(model, loss_fn, first)
    return find_denominator(
        captured.module,
        captured.num_forward_outputs,
        num_rows(first),
        leaves_of_primals(captured.real_inputs, first),
        captured.real_inputs,
    )


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [torch.zeros(1) if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_weighted_gradients_are_the_batches(
    model: nn.Module, loss_fn: Loss, batch: Any, num_microbatches: int, weight: Any
) -> list[float]:
    """Eager PyTorch on the whole batch is the oracle."""
    model.eval()  # dropout would draw other masks
    whole = loss_fn(model, batch)
    expected = gradients(model, whole)
    parts = split(batch, num_microbatches)
    weights = loss_weights(weight, parts)
    assert len(weights) == num_microbatches
    total = sum(w * loss_fn(model, part) for w, part in zip(weights, parts, strict=True) if w != 0)
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients(model, total), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    return weights


def net(num_outputs: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, num_outputs))


def batch_of(num: int, **others: torch.Tensor) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "x": torch.randn(num, 4),
        "y": torch.randint(0, 5, (num,)),
        "z": torch.rand(num, 5),
        "mask": torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0])[:num],
        **others,
    }


CLASS_WEIGHT = torch.tensor([0.1, 2.0, 0.5, 1.0, 3.0])
NUM = 10


def per_row(m: nn.Module, b: Any) -> torch.Tensor:
    return (m(b["x"]) - b["z"]).square().mean(-1)


LOSSES: dict[str, Loss] = {
    "mse": lambda m, b: F.mse_loss(m(b["x"]), b["z"]),
    "l1 and huber and smooth l1": lambda m, b: (
        F.l1_loss(m(b["x"]), b["z"])
        + 2 * F.huber_loss(m(b["x"]), b["z"])
        - F.smooth_l1_loss(m(b["x"]), b["z"]) / 7
    ),
    "squared error, summed": lambda m, b: F.mse_loss(m(b["x"]), b["z"], reduction="sum"),
    "sum": lambda m, b: per_row(m, b).sum(),
    "sum of two sums": lambda m, b: per_row(m, b).sum() + 0.3 * m(b["x"]).abs().sum(),
    "mean over rows of a sum": lambda m, b: m(b["x"]).square().sum(-1).mean(0),
    "mean of means": lambda m, b: m(b["x"]).square().mean(0).mean(),
    "sum of means over rows": lambda m, b: m(b["x"]).square().mean(0).sum(),
    "sum over the number of rows": lambda m, b: per_row(m, b).sum() / b["x"].shape[0],
    "sum times one over elements": lambda m, b: m(b["x"]).square().sum() * (1 / b["z"].numel()),
    "sum over a constant": lambda m, b: per_row(m, b).sum() / 5,
    "mean times rows": lambda m, b: per_row(m, b).mean() * len(b["x"]),
    "divided by rows before the sum": lambda m, b: (m(b["x"]).square() / len(b["x"])).sum(),
    "mean of stacked losses": lambda m, b: torch.stack(
        [F.mse_loss(m(b["x"]), b["z"]), m(b["x"]).abs().mean()]
    ).mean(),
    "binary cross entropy": lambda m, b: F.binary_cross_entropy(m(b["x"]).sigmoid(), b["z"]),
    "binary cross entropy of logits": lambda m, b: F.binary_cross_entropy_with_logits(
        m(b["x"]), b["z"], pos_weight=CLASS_WEIGHT
    ),
    "divergence": lambda m, b: F.kl_div(m(b["x"]).log_softmax(-1), b["z"], reduction="batchmean"),
    "cross entropy": lambda m, b: F.cross_entropy(m(b["x"]), b["y"]),
    "cross entropy of probabilities": lambda m, b: F.cross_entropy(m(b["x"]), b["z"]),
    "class weights": lambda m, b: F.cross_entropy(m(b["x"]), b["y"], CLASS_WEIGHT),
    "ignored index": lambda m, b: F.cross_entropy(m(b["x"]), b["y"], ignore_index=2),
    "label smoothing": lambda m, b: F.cross_entropy(
        m(b["x"]), b["y"], label_smoothing=0.1, ignore_index=2
    ),
    "label smoothing and class weights": lambda m, b: F.cross_entropy(
        m(b["x"]), b["y"], CLASS_WEIGHT, label_smoothing=0.1, ignore_index=2
    ),
    "summed cross entropy over counted targets": lambda m, b: (
        F.cross_entropy(m(b["x"]), b["y"], reduction="sum", ignore_index=2) / (b["y"] != 2).sum()
    ),
    "masked mean": lambda m, b: (per_row(m, b) * b["mask"]).sum() / b["mask"].sum(),
    "masked mean as a product": lambda m, b: per_row(m, b) @ b["mask"] / b["mask"].sum(),
    "masked mean with where": lambda m, b: (
        torch.where(b["mask"] > 0, per_row(m, b), 0.0).sum() / b["mask"].count_nonzero()
    ),
    "mask normalised before the sum": lambda m, b: (
        per_row(m, b) * b["mask"] / b["mask"].sum()
    ).sum(),
    "masked mean with a clamp": lambda m, b: (
        (per_row(m, b) * b["mask"]).sum() / b["mask"].sum().clamp(min=1)
    ),
    "masked mean with an epsilon": lambda m, b: (
        (per_row(m, b) * b["mask"]).sum() / (b["mask"].sum() + 1e-3)
    ),
    "mean over the mask's mean": lambda m, b: (per_row(m, b) * b["mask"]).mean() / b["mask"].mean(),
    "two masked means of one mask": lambda m, b: (
        (per_row(m, b) * b["mask"]).sum() / b["mask"].sum()
        + 0.1 * (m(b["x"])[:, 0] * b["mask"]).sum() / (b["mask"] > 0).sum()
    ),
    "mean and cross entropy that ignores nothing": lambda m, b: (
        F.cross_entropy(m(b["x"]), b["y"]) + 0.5 * F.mse_loss(m(b["x"]), b["z"])
    ),
    "weight decay in the loss": lambda m, b: (
        F.mse_loss(m(b["x"]), b["z"]) + 1e-2 * sum(p.square().sum() for p in m.parameters()) + 0.5
    ),
    "learned weight of the loss": lambda m, b: (
        F.mse_loss(m(b["x"]), b["z"]) * (-m[0].bias[0]).exp() + m[0].bias[0]
    ),
    "shared count": lambda m, b: per_row(m, b).sum() / b["count"],
}


@pytest.mark.parametrize("name", LOSSES)
def test_weighted_gradients_are_the_whole_batches(name: str) -> None:
    model, loss_fn = net(), LOSSES[name]
    batch = batch_of(NUM, count=torch.tensor(7.0))
    found = denominator_of(model, loss_fn, batch, 4)  # of 3, 3, 2 and 2 rows
    chosen = settle(model, loss_fn, few_rows(batch, found), found)
    assert_weighted_gradients_are_the_batches(model, loss_fn, batch, 4, chosen)


@pytest.mark.parametrize("num_rows_captured", [1, 2, 5, 10])
@pytest.mark.parametrize("name", ["label smoothing", "masked mean with a clamp", "divergence"])
def test_the_capture_may_be_of_any_number_of_rows(name: str, num_rows_captured: int) -> None:
    model, loss_fn, batch = net(), LOSSES[name], batch_of(NUM)
    found = denominator_of(model, loss_fn, batch, NUM // num_rows_captured)
    chosen = settle(model, loss_fn, few_rows(batch, found), found)
    for num_microbatches in (2, 3):
        assert_weighted_gradients_are_the_batches(model, loss_fn, batch, num_microbatches, chosen)


def test_a_microbatch_whose_targets_are_all_ignored_has_weight_zero() -> None:
    model, loss_fn, batch = net(), LOSSES["cross entropy"], batch_of(NUM)
    batch["y"][:3] = IGNORED
    batch["y"][4] = IGNORED
    found = denominator_of(model, loss_fn, batch, 4)
    weights = assert_weighted_gradients_are_the_batches(model, loss_fn, batch, 4, found)
    assert weights == [0, 2 / 6, 2 / 6, 2 / 6]
    assert loss_fn(model, split(batch, 4)[0]).isnan(), "what the weight keeps out"


def test_a_batch_of_which_nothing_counts_is_an_error() -> None:
    model, loss_fn, batch = net(), LOSSES["cross entropy"], batch_of(NUM)
    found = denominator_of(model, loss_fn, batch, 2)
    batch["y"][:] = IGNORED
    with pytest.raises(MicrobatchError, match="0/0"):
        loss_weights(found, split(batch, 2))


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_token_losses_of_transformers(family: str) -> None:
    from transformers import BatchEncoding

    sizes = dict(layers=1, width=16, heads=2, vocabulary=40, batch_size=6, length=12)
    torch.manual_seed(0)
    model, tensors, loss_fn = getattr(models, family)(**sizes)
    model.eval()
    for row, num_ignored in enumerate((0, 11, 5, 12, 12, 3)):
        tensors["labels"][row, :num_ignored] = IGNORED
    batch = BatchEncoding(tensors)
    found = denominator_of(model, loss_fn, batch, 3)
    chosen = settle(model, loss_fn, few_rows(batch, found), found)
    weights = assert_weighted_gradients_are_the_batches(model, loss_fn, batch, 3, chosen)
    labels = tensors["labels"][:, 1:] if family == "gpt2" else tensors["labels"]
    counts = [(labels[i : i + 2] != IGNORED).sum().item() for i in (0, 2, 4)]
    assert weights == [c / sum(counts) for c in counts]
    # The last microbatch may be smaller than the captured one.
    assert_weighted_gradients_are_the_batches(model, loss_fn, batch, 4, chosen)


def test_images_with_a_label_per_pixel() -> None:
    model = nn.Conv2d(2, 3, 3, padding=1)
    batch = torch.randn(5, 2, 4, 4), torch.randint(0, 3, (5, 4, 4))
    batch[1][0, 1:] = IGNORED

    def loss_fn(model: nn.Module, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    found = denominator_of(model, loss_fn, batch, 2)
    assert_weighted_gradients_are_the_batches(model, loss_fn, batch, 2, found)


# -- refused by the graph


def contrastive(m: nn.Module, b: Any) -> torch.Tensor:
    features = F.normalize(m(b["x"]), dim=-1)
    return F.cross_entropy(features @ features.T / 0.1, torch.arange(len(features)))


REFUSED: dict[str, tuple[Loss, str]] = {
    "root of a mean": (lambda m, b: F.mse_loss(m(b["x"]), b["z"]).sqrt(), "sqrt"),
    "norm": (lambda m, b: torch.linalg.norm(m(b["x"])), "linalg_vector_norm"),
    "largest row": (lambda m, b: per_row(m, b).max(), "max"),
    "mean and sum": (
        lambda m, b: per_row(m, b).mean() + 0.37 * m(b["x"]).abs().sum(),
        "sum",
    ),
    "cross entropy and sum": (
        lambda m, b: F.cross_entropy(m(b["x"]), b["y"]) + per_row(m, b).sum(),
        "sum",
    ),
    "sum and weight decay": (
        lambda m, b: per_row(m, b).sum() + m[0].weight.square().sum(),
        "sum",
    ),
    "ratio of two learned sums": (
        lambda m, b: per_row(m, b).sum() / m(b["x"]).exp().sum(),
        "div",
    ),
    "divided by a maximum": (lambda m, b: per_row(m, b).sum() / b["mask"].max(), "max"),
    "divided by the root of a maximum of sums": (
        lambda m, b: per_row(m, b).sum() / (b["mask"] / b["mask"].sum()).square().sum(),
        "sum",
    ),
    "normalised inside": (lambda m, b: (per_row(m, b) / b["mask"].sum()).exp().mean(), "sum"),
    "centred on the batch": (lambda m, b: (m(b["x"]) - m(b["x"]).mean()).square().mean(), "mean"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_loss_without_weights_is_refused_at_the_operation(name: str) -> None:
    loss_fn, operation = REFUSED[name]
    with pytest.raises(MicrobatchError, match="loss_weight=") as caught:
        denominator_of(net(), loss_fn, batch_of(NUM), 2)
    assert operation in caught.value.operation


def test_terms_that_count_differently_are_refused_in_the_batch_where_they_do() -> None:
    loss_fn = LOSSES["mean and cross entropy that ignores nothing"]
    batch = batch_of(NUM)
    found = denominator_of(net(), loss_fn, batch, 2)
    assert loss_weights(found, split(batch, 2)) == [0.5, 0.5]
    batch["y"][0] = IGNORED
    with pytest.raises(MicrobatchError, match="microbatch 0 .* weighs 0.444"):
        loss_weights(found, split(batch, 2))


# -- refused because rows depend on one another


def load_balancing(m: nn.Module, b: Any) -> torch.Tensor:
    probabilities = m(b["x"]).softmax(-1)
    balance = (probabilities.mean(0) * F.one_hot(b["y"], 5).float().mean(0)).sum()
    return F.cross_entropy(m(b["x"]), b["y"]) + 0.01 * balance


@pytest.mark.parametrize("loss_fn", [contrastive, load_balancing])
def test_rows_that_depend_on_one_another_are_observed(loss_fn: Loss) -> None:
    with pytest.raises(MicrobatchError, match="depend on one another"):
        settle(net(), loss_fn, few_rows(batch_of(NUM), "rows"), "rows")


class DividedByNorm(torch.autograd.Function):
    """Divides its gradient by the norm over the batch."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] / gradients[0].norm()


class DividedByRows(torch.autograd.Function):
    """Divides its gradient by the number of rows."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] / len(gradients[0])


class Reversed(torch.autograd.Function):
    """Turns its gradient round, row by row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


def hooked(hook: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def through(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.requires_grad:
            hidden.register_hook(hook)
        return hidden

    return through


def straight_through(hidden: torch.Tensor) -> torch.Tensor:
    """The values as they are, with gradients of values normalised over the batch."""
    normalised = (hidden - hidden.mean(0)) / (hidden.var(0, unbiased=False) + 1e-3).sqrt()
    return hidden.detach() + normalised - normalised.detach()


class Words(nn.Module):
    """An embedding between two layers through which gradients go back as `through` has it."""

    def __init__(self, through: Any = lambda hidden: hidden, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.last = nn.Embedding(6, 4, **settings), nn.Linear(4, 5)
        self.through = through

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.through(self.embedding((x > 0).long().sum(-1)))
        return self.last(hidden)


COUPLED_BACKWARDS: dict[str, Callable[[], nn.Module]] = {
    "gradients divided by an index's frequency": lambda: Words(scale_grad_by_freq=True),
    "gradients divided by their norm": lambda: Words(DividedByNorm.apply),
    "gradients divided by their rows": lambda: Words(DividedByRows.apply),
    "gradients centred by a hook": lambda: Words(hooked(lambda g: g - g.mean(0))),
    "gradients scaled by a hook": lambda: Words(hooked(lambda g: g / (g.abs().max() + 1e-6))),
    "a straight-through estimate": lambda: Words(straight_through),
}


@pytest.mark.parametrize("name", COUPLED_BACKWARDS)
def test_rows_that_depend_on_one_another_in_the_backward_are_observed(name: str) -> None:
    model, loss_fn = COUPLED_BACKWARDS[name](), LOSSES["cross entropy"]
    with pytest.raises(MicrobatchError, match="depend on one another in the backward"):
        settle(model, loss_fn, few_rows(batch_of(NUM), "rows"), "rows")


def sure_of_its_backward(model: nn.Module, loss_fn: Any, batch: Any) -> bool:
    """Whether a captured loss counts as one whose gradients need no look."""
    captured = StepCapture(loss_fn, model).capture(batch)
    return captured.key is not None and captured.is_derivative


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("name", COUPLED_BACKWARDS)
def test_gradients_are_looked_at_where_they_may_be_no_derivatives(name: str) -> None:
    model, loss_fn = COUPLED_BACKWARDS[name](), LOSSES["cross entropy"]
    assert not sure_of_its_backward(model, loss_fn, batch_of(NUM))


def test_gradients_of_plain_models_need_no_look() -> None:
    assert sure_of_its_backward(Words(), LOSSES["cross entropy"], batch_of(NUM))
    for family in ("gpt2", "wrn"):  # neither has anything of its own
        model, batch, loss_fn = models.make(family)
        assert sure_of_its_backward(model, loss_fn, batch)


@pytest.mark.parametrize("name", COUPLED_BACKWARDS)
def test_their_gradients_do_differ(name: str) -> None:
    model, loss_fn, batch = COUPLED_BACKWARDS[name](), LOSSES["cross entropy"], batch_of(NUM)
    with pytest.raises(AssertionError):
        assert_weighted_gradients_are_the_batches(model, loss_fn, batch, 4, "rows")


@pytest.mark.parametrize(
    "through", [Reversed.apply, hooked(lambda g: g.clamp(-0.02, 0.02)), hooked(lambda g: g * 3)],
    ids=["reversed", "clamped", "scaled"],
)
def test_backwards_that_look_at_rows_alone_are_let_through(through: Any) -> None:
    model, loss_fn, batch = Words(through), LOSSES["cross entropy"], batch_of(NUM)
    assert settle(model, loss_fn, few_rows(batch, "rows"), "rows") == "rows"
    assert_weighted_gradients_are_the_batches(model, loss_fn, batch, 4, "rows")


def test_gradients_that_are_there_are_left_alone_and_large_ones_compared_folded() -> None:
    from packlight.moves.microbatch.gradient_sums import FOLDED_ELEMENTS, folded_gradients

    model = nn.Linear(FOLDED_ELEMENTS // 100, 300)
    weight = model.weight
    weight.grad = before = torch.ones_like(weight)
    x = torch.randn(2, weight.shape[1])
    folded = folded_gradients(model, model(x).square().sum(), 0.5)
    assert weight.grad is before and torch.equal(before, torch.ones_like(before))
    weight.grad = None
    model(x).square().sum().mul(0.5).backward()
    assert weight.grad is not None
    flat = weight.grad.flatten().double()  # type: ignore[unreachable]
    flat = F.pad(flat, (0, -len(flat) % FOLDED_ELEMENTS)).view(-1, FOLDED_ELEMENTS)
    torch.testing.assert_close(folded["weight"], flat.sum(0), rtol=1e-5, atol=1e-3)
    assert model.bias.grad is not None
    torch.testing.assert_close(folded["bias"], model.bias.grad.double())


def test_wrong_weights_are_observed() -> None:
    batch = few_rows(batch_of(NUM), "rows")
    with pytest.raises(MicrobatchError, match=r"cut before row 2 .* = 1\.035"):
        check_rows_independent(
            net(), LOSSES["mse"], batch, lambda parts: loss_weights("sum", parts)
        )


def test_the_check_leaves_modes_buffers_and_generators_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5))
    model[1].eval()

    class Draws(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            self.seen += torch.rand(1)
            return x

    model.append(Draws())
    rows = few_rows(batch_of(4), "rows")
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    generator = torch.get_rng_state()
    check_rows_independent(model, LOSSES["mse"], rows, lambda p: loss_weights("rows", p))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_noise_that_the_loss_draws_does_not_look_like_dependence() -> None:
    def denoise(m: nn.Module, b: Any) -> torch.Tensor:
        noise, time = torch.randn_like(b["z"]), torch.randint(1, 9, (len(b["x"]), 1))
        return F.mse_loss(m(b["x"]), b["z"] + noise / time)

    def mixed(m: nn.Module, b: Any) -> torch.Tensor:
        return F.mse_loss(m(b["x"]), b["z"][torch.randperm(len(b["z"]))])

    batch = few_rows(batch_of(4), "rows")
    assert settle(net(), denoise, batch, "rows") == "rows"
    with pytest.raises(MicrobatchError):
        settle(net(), mixed, batch, "rows")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_tolerance_fits_the_precision(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch_of(4).items()}
    rows = few_rows(batch, "rows")
    assert settle(model, LOSSES["cross entropy"], rows, "rows") == "rows"
    with pytest.raises(MicrobatchError):
        settle(model, contrastive, rows, "rows")


def test_a_model_that_needs_more_than_one_row_says_so() -> None:
    def squeezed(m: nn.Module, b: Any) -> torch.Tensor:
        return F.mse_loss(m(b["x"]).squeeze().sum(1), b["z"].sum(1))

    with pytest.raises(MicrobatchError, match="fails on row 0 alone: IndexError"):
        settle(net(), squeezed, few_rows(batch_of(4), "rows"), "rows")


def test_rows_that_weigh_nothing_and_yet_add_to_the_loss_are_observed() -> None:
    def unmasked(m: nn.Module, b: Any) -> torch.Tensor:
        return per_row(m, b).sum() / b["mask"].sum()

    batch = batch_of(NUM)
    found = denominator_of(net(), unmasked, batch, 2)
    with pytest.raises(MicrobatchError, match="0 \\* 0"):
        settle(net(), unmasked, few_rows(batch, found), found)


def test_few_rows_differ_and_count() -> None:
    batch = batch_of(8)
    batch["x"][:6], batch["z"][:6], batch["y"][:6], batch["mask"][:6] = 0, 0, 1, 1
    batch["mask"][6], batch["mask"][7] = 2, 0
    rows = few_rows(batch, lambda b: b["mask"].sum())
    assert rows["mask"].tolist() == [0, 1, 2, 1], (
        "one that does not count, one of six equal ones, another, and one of them again"
    )


# -- batch statistics


def test_layers_with_batch_statistics_are_named() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 4, 1)
            self.batch, self.frozen = nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval()
            self.instance, self.group = nn.InstanceNorm2d(4), nn.GroupNorm(2, 4)
            self.untracked = nn.BatchNorm2d(4, track_running_stats=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.frozen(self.batch(self.conv(x)))
            return self.untracked(self.group(self.instance(x)))

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    model = Block()
    for rows in (1, 3):
        joint = capture(model, loss_fn, torch.randn(rows, 2, 3, 3)).module
        assert batch_statistics(joint, rows) == ["batch", "untracked"]
    model.untracked = nn.Identity()
    model.eval()
    joint = capture(model, loss_fn, torch.randn(3, 2, 3, 3)).module
    assert batch_statistics(joint, 3) == []


# -- weights by the user


def test_weights_by_the_user() -> None:
    batch = batch_of(NUM)
    batch["y"][:4] = IGNORED
    loss_fn = LOSSES["cross entropy"]
    weights = assert_weighted_gradients_are_the_batches(
        net(), loss_fn, batch, 2, lambda b: (b["y"] != IGNORED).sum()
    )
    assert weights == [1 / 6, 5 / 6]
    assert loss_weights("sum", split(batch, 2)) == [1, 1]
    assert loss_weights("rows", split(batch, 3)) == [0.4, 0.3, 0.3]


@pytest.mark.parametrize("weight", [lambda b: -1, lambda b: 0, lambda b: float("nan"), "mean"])
def test_weights_by_the_user_that_cannot_be(weight: Any) -> None:
    with pytest.raises(MicrobatchError, match="loss_weight"):
        loss_weights(weight, split(batch_of(4), 2))


# -- batches

Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Frozen:
    """A batch that cannot be assigned to."""

    x: torch.Tensor
    name: str


def test_a_batch_is_split_evenly_into_views() -> None:
    x = torch.arange(20).view(10, 2)
    parts = split((x, "text", torch.tensor(3)), 4)
    assert [len(p[0]) for p in parts] == [3, 3, 2, 2]
    assert torch.equal(torch.cat([p[0] for p in parts]), x)
    assert all(p[0].untyped_storage()._cdata == x.untyped_storage()._cdata for p in parts)
    assert all(p[1] == "text" and p[2] == 3 for p in parts)
    for rows in range(1, 30):
        for num in range(1, rows + 1):
            sizes = [len(p) for p in split(torch.zeros(rows), num)]
            assert sum(sizes) == rows and len(sizes) == num
            assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


def test_a_split_batch_keeps_its_types() -> None:
    from transformers import BatchEncoding
    from transformers.modeling_outputs import BaseModelOutput

    x = torch.arange(4)
    batches: list[tuple[Any, Callable[[Any], torch.Tensor]]] = [
        (x, lambda b: b),
        ({"a": {"b": [x, 1]}}, lambda b: b["a"]["b"][0]),
        (UserDict(x=x), lambda b: b["x"]),
        (BatchEncoding({"input_ids": x}), lambda b: b.input_ids),
        (BaseModelOutput(last_hidden_state=x), lambda b: b.last_hidden_state),
        (Pair(x, None), lambda b: b.first),
        (Frozen(x, "a"), lambda b: b.x),
        ([(UserDict(x=x),)], lambda b: b[0][0]["x"]),
    ]
    for batch, get in batches:
        first, second = split(batch, 2)
        assert type(first) is type(batch)
        assert get(first).tolist() == [0, 1] and get(second).tolist() == [2, 3]
        assert get(batch).tolist() == [0, 1, 2, 3], "the batch itself is left alone"
        assert len(tensor_leaves(first)) == 1
    first, _ = split(BatchEncoding({"input_ids": x}), 2)
    assert (lambda input_ids: input_ids)(**first).tolist() == [0, 1]
    assert dataclasses.replace(split(Frozen(x, "a"), 2)[0], name="b").name == "b"


def test_bad_batches() -> None:
    with pytest.raises(BatchError, match=r"batch\['w'\] of shape \(5,\) has 5 rows, 2 others 4"):
        split({"x": torch.zeros(4, 2), "y": torch.zeros(4), "w": torch.zeros(5)}, 2)
    with pytest.raises(BatchError, match="4 rows cannot be cut into 5 microbatches\nhint: .* 4 "):
        split(torch.zeros(4), 5)
    with pytest.raises(BatchError, match="no tensor with rows"):
        split({"x": 3, "y": torch.tensor(1)}, 2)
    with pytest.raises(BatchError, match="no tensor with rows"):
        num_rows([])

    class Graph:
        def __init__(self) -> None:
            self.edges = torch.zeros(4)

    with pytest.raises(BatchError, match=r"batch\[1\] is a Graph, whose tensor 'edges'"):
        split((torch.zeros(4), Graph()), 2)
