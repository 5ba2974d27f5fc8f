"""What stages send one another: whole storages, point to point."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from packlight.cluster.instructions import Instruction, PipelineSchedule, Work
from packlight.pipeline.split import Value
from packlight.ranks.group import Ranks
from packlight.step import Speed

MOST_VALUES = 1024  # of one message
PROBE_BYTES, NUM_PROBES = 2**20, 5


@dataclass
class Channel:
    """Messages between the ranks of a pipeline.

    Attributes:
        ranks: who they are.
        schedule: that is run.
        device: of what they send.
    """

    ranks: Ranks
    schedule: PipelineSchedule
    device: torch.device
    _under_way: dict[Instruction, list[tuple[dist.Work, torch.Tensor]]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        members = dist.get_process_group_ranks(self.ranks.group)
        timeout = timedelta(seconds=self.ranks.timeout_seconds)
        # Of its own: what others send meanwhile does not get in between.
        backend = "gloo" if self.device.type == "cpu" else None
        self._group = dist.new_group(
            members, timeout, backend,
            use_local_synchronization=self.ranks.size < dist.get_world_size(),
        )

    def measured(self) -> Speed:
        """Return how fast messages go, all ranks sending at once: the slowest rank's."""
        size, rank = self.ranks.size, self.ranks.rank
        seconds = []
        for num_bytes in (1, PROBE_BYTES) if size > 1 else ():
            sent, come = (
                torch.zeros(num_bytes, dtype=torch.uint8, device=self.device) for _ in range(2)
            )
            took = []
            for _ in range(NUM_PROBES):
                self.ranks.exchange(0)
                begin = time.perf_counter()
                work = [
                    dist.isend(sent, group=self._group, group_dst=(rank + 1) % size),
                    dist.irecv(come, group=self._group, group_src=(rank - 1) % size),
                ]
                self.ranks.wait_for_messages([each for each in work if each is not None])
                took.append(time.perf_counter() - begin)
            seconds.append(max(t for (t,) in self.ranks.exchange_numbers([min(took)])))
        if not seconds:
            return Speed(math.inf, 0.0)
        latency, whole = seconds
        return Speed(PROBE_BYTES / max(whole - latency, 1e-9), latency)

    def send(self, source: Instruction, tensors: Sequence[torch.Tensor], to: int) -> None:
        """Start sending what an instruction made; it stays in memory until it was received."""
        self.ranks.refuse_parted()
        self._under_way[source] = [
            (work, flat)
            for index, tensor in enumerate(tensors)
            if (flat := _bytes_of(tensor)).numel()
            and (work := dist.isend(
                flat, group=self._group, group_dst=to, tag=self._tag(source, index)
            )) is not None
        ]

    def let_go(self, source: Instruction) -> None:
        """Wait until what an instruction sent was received."""
        sent = self._under_way.pop(source, [])
        if sent:
            self.ranks.wait_for_messages([work for work, _ in sent])

    def let_go_of_all(self) -> None:
        """Wait until everything was received."""
        for source in list(self._under_way):
            self.let_go(source)

    def receive(
        self, source: Instruction, values: Sequence[Value], place: int
    ) -> list[torch.Tensor]:
        """Return what an instruction of another rank has made, when it is there."""
        self.ranks.refuse_parted()
        works, received = [], []
        for index, value in enumerate(values):
            flat = torch.empty(value.num_bytes, dtype=torch.uint8, device=self.device)
            if value.num_bytes:
                tag = self._tag(source, index)
                work = dist.irecv(flat, group=self._group, group_src=place, tag=tag)
                assert work is not None, "this rank is one of the group"
                works.append(work)
            tensor = torch.empty(0, dtype=value.dtype, device=self.device)
            received.append(tensor.set_(flat.untyped_storage(), 0, value.shape, value.stride))
        if works:
            self.ranks.wait_for_messages(works)
        return received

    def close(self, error: BaseException) -> None:
        """Tell the others that this rank has failed."""
        self._under_way.clear()
        self.ranks.fail(error)

    def _tag(self, source: Instruction, index: int) -> int:
        assert index < MOST_VALUES
        number = source.microbatch * self.schedule.num_stages + source.stage
        return (2 * number + (source.work is Work.FORWARD)) * MOST_VALUES + index


def as_sent(tensor: torch.Tensor, value: Value) -> torch.Tensor:
    """Return a tensor that fills a storage of its own as the receiver expects it."""
    is_whole = tensor.untyped_storage().nbytes() == value.num_bytes
    if is_whole and tensor.storage_offset() == 0 and tensor.stride() == value.stride:
        return tensor
    flat = torch.empty(value.num_bytes, dtype=torch.uint8, device=tensor.device)
    copied = torch.empty(0, dtype=value.dtype, device=tensor.device)
    copied.set_(flat.untyped_storage(), 0, value.shape, value.stride)
    return copied.copy_(tensor)


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    storage = tensor.untyped_storage()
    return flat.set_(storage, 0, (storage.nbytes(),), (1,))
