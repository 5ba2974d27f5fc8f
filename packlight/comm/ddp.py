"""Compression in `DistributedDataParallel`: a communication hook."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from packlight.comm.average import Choice, CompressedAverage
from packlight.comm.transport import Transport
from packlight.errors import OptionError


def hook(
    model: DistributedDataParallel,
    compressor: Choice,
    *,
    together: bool = False,
    timeout_seconds: float = 1800.0,
) -> Communication:
    """Have DDP send gradients compressed; all ranks call it, after DDP was made.

        model = DistributedDataParallel(model)
        communication = packlight.comm.hook(model, "topk:0.001+q2")

    Gradients of a bucket are compressed and sent while the backward goes on. A checkpoint needs
    `communication.state_dict()` of each rank, else what has not been sent is lost.

    Args:
        model: on the CPU or a GPU; gradients are compressed on the CPU.
        compressor: see `CompressedAverage`.
        together: compress all parameters as one vector, when the backward is over: fewer bytes and
            rounds, where both count more than what could be sent beside it.
        timeout_seconds: how long a rank waits for another one.

    Raises:
        OptionError: an unknown compressor, a model that is not in DDP.
        RankMismatchError: ranks differ in parameters or compressors; nothing has run.
    """
    if not isinstance(model, DistributedDataParallel):
        raise OptionError(
            f"hook takes a DistributedDataParallel, and no {type(model).__name__}\n"
            "hint: packlight.comm.hook(DistributedDataParallel(model), ...)"
        )
    transport = Transport(model.process_group, timeout_seconds)
    communication = Communication(model, compressor, transport, together)
    model.register_comm_hook(None, communication.reduce_bucket)
    return communication


@dataclass(frozen=True)
class _Bucket:
    gradients: dict[str, torch.Tensor]  # parts of the buffer
    buffer: torch.Tensor
    future: torch.futures.Future[torch.Tensor]


class Communication:
    """What a DDP model's ranks say to one another.

    Attributes:
        average: the compressors and their states.
        transport: with its count of bytes.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        compressor: Choice,
        transport: Transport,
        together: bool = False,
    ) -> None:
        named = {n: p for n, p in model.module.named_parameters() if p.requires_grad}
        self._name_of = {parameter: name for name, parameter in named.items()}
        self.transport = transport
        self._together = together
        self._waiting: list[_Bucket] = []
        groups = [list(named)] if together else None
        self.average = CompressedAverage(named, compressor, transport, groups)
        # One thread, so that exchanges keep the order of buckets, which is that of all ranks.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packlight-comm")

    # torch wants the argument's name, and takes no annotation that is a string.
    def reduce_bucket(self, _state, bucket):  # type: ignore[no-untyped-def]
        """Average a bucket of gradients: what DDP calls."""
        return self._start(bucket)

    def _start(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        names = [self._name_of[parameter] for parameter in bucket.parameters()]
        gradients = dict(zip(names, bucket.gradients(), strict=True))
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._waiting.append(_Bucket(gradients, bucket.buffer(), future))
        if bucket.is_last() or not self._together:
            buckets, self._waiting = self._waiting, []
            self._thread.submit(self._finish, buckets)
        return future

    def _finish(self, buckets: list[_Bucket]) -> None:
        try:
            gradients = {n: g for bucket in buckets for n, g in bucket.gradients.items()}
            averages = self.average.average(gradients)
            for name, gradient in gradients.items():
                gradient.copy_(averages[name])
            for bucket in buckets:
                bucket.future.set_result(bucket.buffer)
        except Exception as error:
            for bucket in buckets:
                bucket.future.set_exception(error)  # type: ignore[arg-type]  # torch says T

    def summary(self) -> str:
        """Return which compressors there are, what they keep and what was sent."""
        return self.average.summary()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint of this rank needs."""
        return self.average.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what this rank saved; see `CompressedAverage.load_state_dict`."""
        self.average.load_state_dict(saved)
