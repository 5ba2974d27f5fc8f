"""Carries messages between ranks: packed ones to everybody, linear ones summed on the way.

On torch.distributed with gloo. What is packed has another size on each rank and in each step, but
seldom a very different one: it goes in a slot that is a little larger than the largest of the last
time, with its size in front, and only what does not fit goes in a second exchange. What is linear
is cut into a piece for each rank, which adds up that piece of all and sends it to all: as many
bytes as a ring sends, in the order of ranks at any number of them, so that the sums are those of
one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from packlight.comm.compressor import Message
from packlight.comm.packing import Reader, integer
from packlight.errors import OptionError
from packlight.ranks.group import Ranks, Sent

SIZE_BYTES = 8
# What a slot has beside the largest payload of the last time.
SPARE_SHARE, SPARE_BYTES = 1 / 64, 4


class Transport(Ranks):
    """The ranks that exchange messages, and how many bytes that took.

    Args:
        group: of whose ranks; None for all. Messages go through a gloo group of their own.
        timeout_seconds: how long a rank waits for the others at most.

    Attributes:
        sent_bytes: what this rank has handed over for other ranks so far: payloads and their sizes.
        num_rounds: how many exchanges that were.

    Raises:
        OptionError: there is no process group.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, timeout_seconds: float = 1800.0
    ) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise OptionError(
                "there is no process group to communicate in\n"
                "hint: torch.distributed.init_process_group('gloo'), in a process that torchrun "
                "started"
            )
        members = dist.get_process_group_ranks(group or dist.group.WORLD)
        super().__init__(members, torch.device("cpu"), timeout_seconds)
        self.sent_bytes = self.num_rounds = 0
        self._slots: dict[tuple[torch.Size, ...], int] = {}  # by what is sent: bytes

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite tensors by those of rank 0."""
        for tensor in tensors:
            copy = tensor.detach().cpu().contiguous()
            with self.naming_losses():
                dist.broadcast(copy, group=self._group, group_src=0)
            tensor.copy_(copy)

    def carry(self, messages: Sequence[Message]) -> list[Sequence[Message]]:
        """Return, for each of this rank's messages, what arrives of everybody's.

        Args:
            messages: as many on each rank, of the same gradients in the same order.

        Raises:
            RankError: another rank failed meanwhile, or is gone.
        """
        self.num_rounds += 1
        linear = [m for m in messages if m.is_linear]
        packed = [m for m in messages if not m.is_linear]
        averages = iter(self._average(linear) if linear else ())
        everybody = iter(self._gather(packed) if packed else ())
        return [[next(averages)] if m.is_linear else next(everybody) for m in messages]

    def _average(self, messages: Sequence[Message]) -> list[Message]:
        payload = torch.cat([message.payload for message in messages])
        pieces = list(payload.tensor_split(self.size))
        mine = len(pieces[self.rank])
        arrived = self._swap(pieces, [mine] * self.size)
        total = torch.zeros(mine)
        for piece in arrived:
            total += piece
        total /= self.size
        average = torch.cat(self._swap([total] * self.size, [len(piece) for piece in pieces]))
        parts = torch.split(average, [message.payload.numel() for message in messages])
        return [replace(m, payload=part) for m, part in zip(messages, parts, strict=True)]

    def _gather(self, messages: Sequence[Message]) -> list[list[Message]]:
        sizes = np.concatenate([integer(message.payload.numel()) for message in messages])
        payload = torch.cat([torch.from_numpy(sizes), *(m.payload for m in messages)])
        arrived = self._through_slots(payload, tuple(message.shape for message in messages))
        everybody: list[list[Message]] = [[] for _ in messages]
        for content in arrived:
            reader = Reader(content.numpy())
            lengths = [reader.integer() for _ in messages]
            for message, length, found in zip(messages, lengths, everybody, strict=True):
                part = torch.from_numpy(reader.take(length))
                found.append(replace(message, payload=part))
        return everybody

    def _through_slots(
        self, payload: torch.Tensor, what: tuple[torch.Size, ...]
    ) -> list[torch.Tensor]:
        """Return everybody's payload, whose sizes nobody knows before."""
        room = self._slots.get(what, 0)
        slot = torch.zeros(SIZE_BYTES + room, dtype=torch.uint8)
        slot[:SIZE_BYTES] = torch.tensor([len(payload)]).view(torch.uint8)
        slot[SIZE_BYTES : SIZE_BYTES + len(payload)] = payload[:room]
        slots = self._swap([slot] * self.size, [len(slot)] * self.size)
        sizes = [int(other[:SIZE_BYTES].clone().view(torch.int64)) for other in slots]
        arrived = [
            other[SIZE_BYTES : SIZE_BYTES + size]
            for other, size in zip(slots, sizes, strict=True)
        ]
        if max(sizes) > room:
            more = [max(size - room, 0) for size in sizes]
            rests = self._swap([payload[room:]] * self.size, more)
            arrived = [torch.cat(parts) for parts in zip(arrived, rests, strict=True)]
        self._slots[what] = max(sizes) + int(SPARE_SHARE * max(sizes)) + SPARE_BYTES
        return arrived

    def _swap(self, pieces: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[torch.Tensor]:
        """Return a piece of each rank; what a rank has for itself does not travel.

        Args:
            pieces: one for each rank, of one dtype.
            sizes: how many elements each rank has for this one.
        """
        mine = pieces[self.rank]
        others = [rank for rank in range(self.size) if rank != self.rank]
        if not others:
            return [mine]
        outgoing = torch.cat([pieces[rank] for rank in others])
        splits = [0 if rank == self.rank else len(pieces[rank]) for rank in range(self.size)]
        expected = [0 if rank == self.rank else sizes[rank] for rank in range(self.size)]
        incoming = torch.empty(sum(expected), dtype=mine.dtype)
        with self.naming_losses():
            work = dist.all_to_all_single(
                incoming, outgoing, expected, splits, group=self._group, async_op=True
            )
        assert work is not None
        self.wait(Sent(work, is_on_host=True))
        self.sent_bytes += outgoing.numel() * outgoing.element_size()
        arrived = list(torch.split(incoming, expected))
        arrived[self.rank] = mine
        return arrived
