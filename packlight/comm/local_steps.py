"""Steps without communication: ranks train on their own, and now and then average what changed.

    change = anchor - parameter,  averaged over ranks (compressed, weighed)
    buffer <- momentum buffer + change;   anchor <- anchor - lr (change + momentum buffer)
    parameter <- anchor

Post-local SGD (Lin et al. 2020), federated averaging (McMahan et al. 2017), DiLoCo (Douillard et
al. 2023) and streaming DiLoCo (Douillard et al. 2025) are this with other numbers. The anchor is
the same, to the last bit, on all ranks.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from packlight.comm.average import Choice, CompressedAverage
from packlight.comm.transport import Transport
from packlight.errors import FormatError, OptionError, RankMismatchError


@dataclass(frozen=True)
class Schedule:
    """When ranks average what changed, and what they do with it.

    Attributes:
        every: steps between two averages of a parameter.
        start: until this step parameters are averaged after each step.
        lr: of the outer step; 1 without momentum takes over the average.
        momentum: of the outer step.
        nesterov: look ahead.
        fragments: parts of the model that are averaged at different times, one after the other.
        overlap: steps that go on between the start of an average and its use.
        mixing: how much of the rank's own parameters stays when an average arrives.
        fraction: share of ranks that take part, drawn anew for each average.
        seed: of that draw.

    Raises:
        OptionError: a number outside of its range, or numbers that do not go together.
    """

    every: int = 30
    start: int = 0
    lr: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False
    fragments: int = 1
    overlap: int = 0
    mixing: float = 0.0
    fraction: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("start", 0), ("fragments", 1), ("overlap", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise OptionError(f"{name}={value!r}; it must be a whole number, {least} or larger")
        if not self.lr > 0:
            raise OptionError(f"lr={self.lr!r} of the outer step; it must be above 0")
        for name in ("momentum", "mixing"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"{name}={getattr(self, name)!r}; at least 0 and below 1")
        if not 0 < self.fraction <= 1:
            raise OptionError(f"fraction={self.fraction!r}; above 0 and at most 1")
        if self.fragments > self.every:
            raise OptionError(
                f"{self.fragments} fragments in every={self.every} steps: no more than one a step"
            )
        if self.overlap >= self.every:
            raise OptionError(
                f"overlap={self.overlap}: an average has to be used before the next one of the "
                f"same parameters begins\nhint: overlap below every={self.every}"
            )
        if self.start and (self.overlap or self.fragments > 1):
            raise OptionError("start= averages after each step, which leaves nothing to overlap")

    def due(self, fragment: int, step: int) -> bool:
        """Whether a fragment's average begins after a step, counted from 1."""
        if step <= self.start:
            return True
        return (step - fragment * self.every // self.fragments) % self.every == 0


@dataclass
class _UnderWay:
    fragment: int
    due: int  # the step after which it is used
    averages: Future[dict[str, torch.Tensor]]


class LocalSteps:
    """Averages a model's changes after some of its steps; see `post_local_sgd`, `diloco` and so on.

        local = packlight.comm.diloco(model, every=30, compressor="topk:0.01+q2")
        for batch in loader:
            ...                      # forward, backward, optimizer.step(), as on one device
            local.step()

    Made by all ranks at once; rank 0's parameters are everybody's. Buffers (batch-norm statistics)
    stay each rank's own.

    Args:
        model: in no DDP.
        schedule: when, and what then.
        compressor: of changes; see `CompressedAverage`.
        weight: how much this rank's changes count, beside the others'; such as its number of
            samples.
        together: compress all parameters of a fragment as one vector.
        group: of the ranks; None for all.
        timeout_seconds: how long a rank waits for another one.

    Attributes:
        average: compressors and their states.
        transport: to the other ranks, with its count of bytes.
        num_steps: so far.

    Raises:
        OptionError: a weight below 0, an unknown compressor.
        RankMismatchError: ranks differ in parameters, compressors or schedule; nothing has run.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        compressor: Choice = "fp32",
        *,
        weight: float = 1.0,
        together: bool = False,
        group: dist.ProcessGroup | None = None,
        timeout_seconds: float = 1800.0,
    ) -> None:
        self.schedule = schedule
        self.transport = Transport(group, timeout_seconds)
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._fragments = _cut(self._parameters, schedule.fragments)
        groups = self._fragments if together else None
        self.average = CompressedAverage(self._parameters, compressor, self.transport, groups)
        self._weights = self._gathered(weight)
        self.transport.share([p.data for p in self._parameters.values()])
        self._anchors = {n: p.detach().clone() for n, p in self._parameters.items()}
        self._buffers: dict[str, torch.Tensor] = {}
        self._under_way: list[_UnderWay] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packlight-comm")
        self.num_steps = self.num_averages = 0

    def _gathered(self, weight: float) -> list[float]:
        everybody = self.transport.gather(lambda: (self.schedule, float(weight)))
        for rank, (schedule, other) in enumerate(everybody):
            if schedule != everybody[0][0]:
                raise RankMismatchError("the schedule", rank, everybody[0][0], schedule)
            if not other >= 0:
                raise OptionError(f"weight={other!r} on rank {rank}; it must be 0 or larger")
        weights = [other for _, other in everybody]
        if not sum(weights):
            raise OptionError("all ranks have weight 0")
        return weights

    def taking_part(self) -> list[int]:
        """Return the ranks whose changes count in the next average.

        Others may leave out their steps; they call `step` all the same.
        """
        size = self.transport.size
        count = max(1, round(self.schedule.fraction * size))
        able = [rank for rank in range(size) if self._weights[rank]]
        draw = random.Random(f"{self.schedule.seed} {self.num_averages}")
        return sorted(draw.sample(able, min(count, len(able))))

    @torch.no_grad()
    def step(self) -> bool:
        """Average, if it is time, what steps have changed; after each of the optimizer's steps.

        Returns:
            Whether parameters were overwritten.

        Raises:
            RankError: another rank failed meanwhile, or is gone.
        """
        self.num_steps += 1
        for fragment in range(len(self._fragments)):
            if self.schedule.due(fragment, self.num_steps):
                self._begin(fragment)
        ready = [u for u in self._under_way if u.due <= self.num_steps]
        for under_way in ready:
            self._under_way.remove(under_way)
            self._use(under_way.fragment, under_way.averages.result())
        return bool(ready)

    def _begin(self, fragment: int) -> None:
        others = self.taking_part()
        rank = self.transport.rank
        total = sum(self._weights[other] for other in others)
        share = self._weights[rank] * self.transport.size / total if rank in others else 0.0
        changes = {
            name: (self._anchors[name].float() - self._parameters[name].float()).mul_(share)
            for name in self._fragments[fragment]
        }
        self.num_averages += 1
        due = self.num_steps + self.schedule.overlap
        averages = self._thread.submit(self.average.average, changes)
        self._under_way.append(_UnderWay(fragment, due, averages))

    def _use(self, fragment: int, averages: Mapping[str, torch.Tensor]) -> None:
        schedule = self.schedule
        for name in self._fragments[fragment]:
            anchor, parameter = self._anchors[name], self._parameters[name]
            change = averages[name].to(anchor.device)
            if schedule.momentum:
                buffer = self._buffers.setdefault(name, torch.zeros_like(change))
                buffer.mul_(schedule.momentum).add_(change)
                ahead = change.add(buffer, alpha=schedule.momentum)
                change = ahead if schedule.nesterov else buffer
            anchor.sub_((schedule.lr * change).to(anchor.dtype))
            parameter.copy_(anchor.lerp(parameter, schedule.mixing) if schedule.mixing else anchor)

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of this rank needs, what is under way included."""
        return {
            "schedule": repr(self.schedule),
            "num_steps": self.num_steps,
            "num_averages": self.num_averages,
            "anchors": {n: t.clone() for n, t in self._anchors.items()},
            "buffers": {n: t.clone() for n, t in self._buffers.items()},
            "under_way": [(u.fragment, u.due, u.averages.result()) for u in self._under_way],
            "average": self.average.state_dict(),
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what this rank saved, bit for bit; parameters are loaded with the model.

        Raises:
            FormatError: it is of another schedule, of other compressors, or of other ranks; nothing
                was loaded.
        """
        if saved["schedule"] != repr(self.schedule):
            raise FormatError(f"saved with {saved['schedule']}, and now it is {self.schedule}")
        self.average.load_state_dict(saved["average"])
        self.num_steps, self.num_averages = saved["num_steps"], saved["num_averages"]
        self._anchors = {n: t.clone() for n, t in saved["anchors"].items()}
        self._buffers = {n: t.clone() for n, t in saved["buffers"].items()}
        self._under_way = []
        for fragment, due, averages in saved["under_way"]:
            done: Future[dict[str, torch.Tensor]] = Future()
            done.set_result(averages)
            self._under_way.append(_UnderWay(fragment, due, done))


def _cut(parameters: Mapping[str, torch.Tensor], count: int) -> list[list[str]]:
    """Return names in `count` parts, in order, of about as many elements each."""
    total = sum(p.numel() for p in parameters.values())
    parts: list[list[str]] = [[] for _ in range(count)]
    before = 0
    for name, parameter in parameters.items():
        middle = before + parameter.numel() / 2
        parts[min(int(middle * count / max(total, 1)), count - 1)].append(name)
        before += parameter.numel()
    return parts


def post_local_sgd(
    model: nn.Module, every: int = 8, start: int = 0, compressor: Choice = "fp32", **options: Any
) -> LocalSteps:
    """Return post-local SGD (Lin et al. 2020): averages after each step, later after `every`.

    Args:
        model: see `LocalSteps`.
        every: steps between two averages.
        start: from which step on.
        compressor: of changes.
        options: see `LocalSteps`.
    """
    return LocalSteps(model, Schedule(every, start), compressor, **options)


def fed_avg(
    model: nn.Module,
    every: int,
    num_samples: float,
    fraction: float = 1.0,
    compressor: Choice = "fp32",
    seed: int = 0,
    **options: Any,
) -> LocalSteps:
    """Return federated averaging (McMahan et al. 2017): ranks count as much as they have samples.

    Args:
        model: see `LocalSteps`.
        every: a rank's steps in a round.
        num_samples: of this rank.
        fraction: share of ranks that take part in a round; see `LocalSteps.taking_part`.
        compressor: of changes.
        seed: of who takes part.
        options: see `LocalSteps`.
    """
    schedule = Schedule(every, fraction=fraction, seed=seed)
    return LocalSteps(model, schedule, compressor, weight=num_samples, **options)


def diloco(
    model: nn.Module,
    every: int = 30,
    lr: float = 0.7,
    momentum: float = 0.9,
    compressor: Choice = "fp32",
    **options: Any,
) -> LocalSteps:
    """Return DiLoCo (Douillard et al. 2023): AdamW on each rank, outside SGD with Nesterov.

    With `compressor=ErrorFeedback(TopK(0.03, "q2"), decay=0.95)`, `lr=1` and `momentum=0` it is
    SparseLoCo (Sarfi et al. 2025), whose residual is the momentum.

    Args:
        model: see `LocalSteps`.
        every: steps between two averages.
        lr: of the outer step.
        momentum: of the outer step.
        compressor: of changes.
        options: see `LocalSteps`.
    """
    schedule = Schedule(every, lr=lr, momentum=momentum, nesterov=bool(momentum))
    return LocalSteps(model, schedule, compressor, **options)


def streaming_diloco(
    model: nn.Module,
    every: int = 30,
    fragments: int = 3,
    overlap: int = 2,
    lr: float = 0.7,
    momentum: float = 0.9,
    mixing: float = 0.5,
    compressor: Choice = "fp32",
    **options: Any,
) -> LocalSteps:
    """Return streaming DiLoCo (Douillard et al. 2025): a part at a time, while steps go on.

    Args:
        model: see `LocalSteps`.
        every: steps between two averages of the same parameters.
        fragments: parts.
        overlap: steps until an average is used.
        lr: of the outer step.
        momentum: of the outer step.
        mixing: how much of a rank's own parameters stays.
        compressor: of changes.
        options: see `LocalSteps`.
    """
    schedule = Schedule(
        every, lr=lr, momentum=momentum, nesterov=bool(momentum), fragments=fragments,
        overlap=overlap, mixing=mixing,
    )
    return LocalSteps(model, schedule, compressor, **options)
