"""Planning changes nothing of the user's, and noise is drawn where eager PyTorch draws it."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import packlight
from packlight.capture.undisturbed import undisturbed
from packlight.errors import (
    GraphBreakError,
    InfeasibleBudgetError,
    MicrobatchError,
    UnsupportedModelError,
)
from packlight.moves.microbatch.independence import check_rows_independent, few_rows
from packlight.moves.microbatch.split import loss_weights

GENERATOR, NUMPY, COUNTS = random.Random(0), np.random.default_rng(0), {"calls": 0}
CALLS = 0


class Busy(nn.Module):
    """Counts, remembers and draws wherever it can, and gives what a linear layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls, self.last = nn.Linear(4, 2), 0, None
        self.log: list[int] = []
        self.recent: deque[int] = deque([0, 0], maxlen=2)
        self.by_rows: dict[int, list[int]] = {3: [1]}
        self.seen = {0}
        self.queue = torch.zeros(3)
        self.noise = torch.Generator().manual_seed(0)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global CALLS
        CALLS += 1
        COUNTS["calls"] += 1
        self.calls += 1
        self.log.append(self.calls)
        self.recent.append(self.calls)
        self.by_rows.setdefault(len(x), []).append(self.calls)
        self.seen.add(self.calls)
        self.queue += 1
        self.queue = self.queue.roll(1)
        self.steps += 1
        self.last = x.detach()
        self.extra = x
        GENERATOR.random(), NUMPY.random(), random.random(), np.random.rand()
        torch.rand(1), torch.rand(1, generator=self.noise)
        return self.linear(x)


def state_of(model: Busy) -> Any:
    return (
        model.calls, list(model.log), list(model.recent), str(model.by_rows), sorted(model.seen),
        model.queue.tolist(), model.steps.tolist(), model.last, hasattr(model, "extra"),
        id(model.queue), [m.training for m in model.modules()], CALLS, dict(COUNTS),
        GENERATOR.getstate(), str(NUMPY.bit_generator.state), random.getstate(),
        np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(),
        model.noise.get_state().tolist(),
    )


def mse(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def test_looking_at_a_few_rows_changes_nothing_that_the_model_reaches() -> None:
    model, batch = Busy(), (torch.randn(6, 4), torch.randn(6, 2))
    model.linear.eval()
    before = state_of(model)
    rows = few_rows(batch, "rows")
    with pytest.raises(MicrobatchError, match="every microbatch would do anew"):
        check_rows_independent(model, mse, rows, lambda parts: loss_weights("rows", parts))
    assert state_of(model) == before
    model(batch[0])
    assert state_of(model) != before


def test_what_functions_close_over_and_objects_hold_is_put_back() -> None:
    count, held = 0, []

    class Recorder:
        def __init__(self) -> None:
            self.calls, self.names = 0, ["a"]

        def loss(self, model: Any, batch: Any) -> int:
            nonlocal count
            count += 1
            held.append(count)
            self.calls += 1
            self.names[:] = ["b", "c"]
            return count

    recorder = Recorder()
    with undisturbed(recorder.loss):
        assert [recorder.loss(None, None) for _ in range(2)] == [1, 2]
        assert (recorder.calls, recorder.names, held) == (2, ["b", "c"], [1, 2])
    assert (count, held, recorder.calls, recorder.names) == (0, [], 0, ["a"])


class Counting(nn.Module):
    """Two layers that count their calls in one of several ways."""

    def __init__(self, count: Callable[[Counting], None]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        self.count, self.calls, self.log = count, 0, [0]
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count(self)
        return self.layers(x)


def attribute(model: Counting) -> None:
    model.calls += 1


def list_of_calls(model: Counting) -> None:
    model.log.append(1)


def global_variable(model: Counting) -> None:
    global CALLS
    CALLS += 1


def buffer(model: Counting) -> None:
    model.steps += 1


@pytest.mark.parametrize(
    "count", [attribute, list_of_calls, global_variable, buffer], ids=lambda count: count.__name__
)
def test_what_a_loss_counts_is_counted_once_a_step(count: Callable[[Counting], None]) -> None:
    model, batch = Counting(count), (torch.randn(64, 8), torch.randn(64, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options: Any = {"moves": ("microbatch", "update-in-backward"), "progress": False}

    def counted() -> list[Any]:
        return [model.calls, len(model.log), CALLS, model.steps.item()]

    before = counted()
    with pytest.raises(InfeasibleBudgetError, match="every microbatch would do anew") as caught:
        packlight.fit(model, mse, optimizer, batch, 1000, **options)
    step = packlight.fit(model, mse, optimizer, batch, caught.value.smallest_bytes, **options)
    assert step.way.num_microbatches == 1 and counted() == before
    step(batch), step(batch)
    assert sum(counted()) == sum(before) + 2


# -- noise of Python and numpy


def numpys_array(x: torch.Tensor) -> torch.Tensor:
    return x + torch.from_numpy(np.random.randn(*x.shape).astype(np.float32))


def numpys_number(x: torch.Tensor) -> torch.Tensor:
    return x * float(np.random.uniform(0.5, 1.5))


def numpys_rows(x: torch.Tensor) -> torch.Tensor:
    return x + torch.as_tensor(np.random.rand(4), dtype=torch.float32)


def pythons_integer(x: torch.Tensor) -> torch.Tensor:
    return x * random.randint(1, 9)


def pythons_float(x: torch.Tensor) -> torch.Tensor:
    return x * random.uniform(0.5, 1.5)


def pythons_choice(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if random.random() < 0.5 else x


def an_objects_integer(x: torch.Tensor) -> torch.Tensor:
    return x * GENERATOR.randint(1, 9)


def an_objects_float(x: torch.Tensor) -> torch.Tensor:
    return x * GENERATOR.uniform(0.5, 1.5)


class Noisy(nn.Module):
    """A linear layer of noisy inputs."""

    def __init__(self, noise: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.noise = nn.Linear(4, 2), noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.noise(x))


def trained(door: str, noise: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
    torch.manual_seed(3), random.seed(3), np.random.seed(3), GENERATOR.seed(3)
    batch = torch.randn(8, 4), torch.randn(8, 2)
    model = Noisy(noise)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if door == "fit":
        step = packlight.fit(model, mse, optimizer, batch, progress=False)
        return [float(step(batch)) for _ in range(4)]
    net: nn.Module = model
    if door == "backend":
        options = {"budget": "1MiB", "progress": False}
        net = torch.compile(model, backend="packlight", options=options)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = mse(net, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("door", ["fit", "backend"])
@pytest.mark.parametrize(
    "noise",
    [numpys_array, numpys_number, numpys_rows, pythons_integer, pythons_float, pythons_choice,
     an_objects_integer, an_objects_float],
    ids=lambda noise: noise.__name__,
)
def test_noise_is_eagers_or_refused(
    noise: Callable[[torch.Tensor], torch.Tensor], door: str
) -> None:
    eager = trained("eager", noise)
    try:
        assert trained(door, noise) == eager
    except (GraphBreakError, UnsupportedModelError):
        assert door == "fit"
    except torch._dynamo.exc.BackendCompilerFailed as error:
        assert isinstance(error.inner_exception, UnsupportedModelError)
