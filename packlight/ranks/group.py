"""The ranks of one training step: what they tell one another, and how they fail together.

All that is said here is said by all ranks, in the same order. Where something can go wrong on one
of them alone, it goes through `gather`: then the same error is raised on all. While a rank waits
for others it looks whether one of them has said that it failed: nobody waits for a rank that has
left its step.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from packlight.errors import PacklightError, RankError
from packlight.torch_internals.processes import default_store
from packlight.torch_internals.storages import num_storage_references

Value = TypeVar("Value")

# While something is under way: how long a rank sleeps between two looks at it, and how long until
# it looks whether another one has failed.
SHORT_SLEEP_SECONDS, LONG_SLEEP_SECONDS, LOOK_SECONDS = 2e-5, 1e-3, 0.2


@dataclass(frozen=True)
class _Failure:
    """An exception of one rank, as the others are told of it."""

    pickled: bytes
    text: str

    @classmethod
    def of(cls, error: BaseException) -> _Failure:
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, PacklightError):
            return cls(b"", text)
        try:
            return cls(pickle.dumps((type(error), error.args, error.__dict__)), text)
        except Exception:  # what it carries cannot be sent: its words can
            return cls(b"", text)

    def error(self, rank: int) -> PacklightError:
        if not self.pickled:
            return RankError(f"rank {rank} failed\n  {self.text}", rank)
        kind, args, attributes = pickle.loads(self.pickled)
        error: PacklightError = kind.__new__(kind, *args)
        error.args = args
        error.__dict__.update(attributes)
        return error


@dataclass(frozen=True)
class Sent:
    """Something under way.

    Attributes:
        work: torch's handle.
        is_on_host: whether it is in the host's memory.
    """

    work: dist.Work
    is_on_host: bool


@dataclass
class _Fate:
    """What ranks share that fail together.

    Attributes:
        key: under which the first failure is told.
        rank: this one.
        has_failed: whether one of them left the others alone.
    """

    key: str
    rank: int
    has_failed: bool = False


class Ranks:
    """Processes that train one model together.

    Args:
        members: their ranks in the default process group.
        device: of the model.
        timeout_seconds: how long a rank waits for the others at most.
        within: all that train together, where these are some of them: they fail together.

    Attributes:
        size: how many there are.
        rank: which of them this process is, from 0.
        numbers: which of all that train together they are.
        timeout_seconds: as given.
    """

    def __init__(
        self,
        members: Sequence[int],
        device: torch.device,
        timeout_seconds: float,
        within: Ranks | None = None,
    ) -> None:
        self.members = tuple(members)
        self.size, self.rank = len(members), self.members.index(dist.get_rank())
        everybody = self.members if within is None else within.members
        self.numbers = tuple(map(everybody.index, self.members))
        self.timeout_seconds = timeout_seconds
        timeout = timedelta(seconds=timeout_seconds)

        def new_group(backend: str | None) -> dist.ProcessGroup:
            # Others make groups of their own meanwhile: only members wait for one another.
            is_part = self.size < dist.get_world_size()
            group: dist.ProcessGroup = dist.new_group(
                [*members], timeout, backend, use_local_synchronization=is_part
            )
            return group

        # Of their own: what the user sends meanwhile on theirs does not get in between.
        group = new_group("gloo")
        self._group: dist.ProcessGroup | None = group
        # Of the device's memory, where that is another one.
        self._data_group = None if device.type == "cpu" else new_group(None)
        self._fate = _Fate(f"packlight/failed/{group.group_name}", self.rank)
        if within is not None:
            self._fate = within._fate
        self._words = torch.zeros(self.size, dtype=torch.int64)

    @property
    def has_failed(self) -> bool:
        """Whether one of all left the others alone: nothing more can be said."""
        return self._fate.has_failed

    @has_failed.setter
    def has_failed(self, value: bool) -> None:
        self._fate.has_failed = value

    @property
    def group(self) -> dist.ProcessGroup:
        """Through which they talk, on the host; nobody else does."""
        if self._group is None:
            raise RankError("this rank left the others alone: the ranks have parted")
        return self._group

    # -- anything, seldom

    def gather(self, make: Callable[[], Value]) -> list[Value]:
        """Return what a function returns on each rank.

        Raises:
            Exception: what it raises on the first rank where it raises, on all of them.
        """
        error: Exception | None = None
        try:
            mine = pickle.dumps(make())
        except Exception as raised:
            error, mine = raised, pickle.dumps(_Failure.of(raised))
        sizes = self.exchange(len(mine))
        parts = torch.split(torch.empty(sum(sizes), dtype=torch.uint8), [*sizes])
        parts[self.rank].copy_(torch.frombuffer(bytearray(mine), dtype=torch.uint8))
        self._share_parts(parts)
        everybody: list[Any] = [pickle.loads(part.numpy().tobytes()) for part in parts]
        failed = [rank for rank, value in enumerate(everybody) if isinstance(value, _Failure)]
        if failed:
            if failed[0] == self.rank:
                assert error is not None
                raise error
            told = everybody[failed[0]].error(self.numbers[failed[0]])
            # (its own error, where there is one, is of no interest: it has the same cause)
            raise told from None
        return everybody

    def broadcast(self, value: Value | None, source: int) -> Value:
        """Return the value that one rank has."""
        told = pickle.dumps(value) if self.rank == source else b""
        whole = torch.empty(self.exchange(len(told))[source], dtype=torch.uint8)
        if self.rank == source:
            whole.copy_(torch.frombuffer(bytearray(told), dtype=torch.uint8))
        self.wait(self.start_sharing(whole, source))
        found: Value = pickle.loads(whole.numpy().tobytes())
        return found

    def _share_parts(self, parts: Sequence[torch.Tensor]) -> None:
        """Give all ranks what each has in its part, and look whether one has failed meanwhile."""
        for one in [self.start_sharing(part, owner) for owner, part in enumerate(parts)]:
            self.wait(one)

    # -- numbers, every step

    def exchange(self, word: int) -> tuple[int, ...]:
        """Return a 64-bit number of every rank: quick, and without memory of its own."""
        self._words.zero_()
        self._words[self.rank] = word
        self.wait(self.start(self._words))
        return tuple(self._words.tolist())

    def exchange_numbers(self, numbers: Sequence[float]) -> list[list[float]]:
        """Return as many floats of every rank, to the last bit."""
        table = torch.zeros(self.size, len(numbers), dtype=torch.float64)
        table[self.rank] = torch.tensor(numbers, dtype=torch.float64)
        self.wait(self.start(table))
        found: list[list[float]] = table.tolist()
        return found

    def start(
        self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> Sent:
        """Start adding up, in place, what all ranks have in a contiguous tensor."""
        group = self._group_for(tensor)
        return self._sent(dist.all_reduce(tensor, operation, group=group, async_op=True), tensor)

    def start_for(self, tensor: torch.Tensor, owner: int) -> Sent:
        """Start adding up for one rank; what the others' tensors then hold is of no use."""
        group = self._group_for(tensor)
        return self._sent(dist.reduce(tensor, group=group, group_dst=owner, async_op=True), tensor)

    def start_sharing(self, tensor: torch.Tensor, owner: int) -> Sent:
        """Start giving all ranks what one of them has in a contiguous tensor."""
        group = self._group_for(tensor)
        work = dist.broadcast(tensor, group=group, group_src=owner, async_op=True)
        return self._sent(work, tensor)

    def start_exchange(
        self, received: torch.Tensor, sent: torch.Tensor, come: list[int], gone: list[int]
    ) -> Sent:
        """Start sending rows of a tensor to each rank, and getting theirs, in the order of ranks.

        Args:
            received: filled; contiguous.
            sent: contiguous.
            come: how many rows each rank sends to this one.
            gone: how many this one sends to each.
        """
        group = self._group_for(sent)
        work = dist.all_to_all_single(received, sent, come, gone, group=group, async_op=True)
        return self._sent(work, sent)

    def refuse_parted(self) -> None:
        """Raise where a rank has left an earlier step: nothing more can be said."""
        if self.has_failed:
            raise RankError("this rank left an earlier step alone: the ranks have parted")

    def _group_for(self, tensor: torch.Tensor) -> dist.ProcessGroup:
        self.refuse_parted()
        if tensor.device.type == "cpu" or self._data_group is None:
            return self.group
        return self._data_group

    def _sent(self, work: dist.Work | None, tensor: torch.Tensor) -> Sent:
        assert work is not None, "this rank is one of the group"
        return Sent(work, tensor.device.type == "cpu")

    def wait(self, sent: Sent) -> None:
        """Wait until that is done.

        Raises:
            RankError: another rank failed meanwhile, or is gone.
        """
        work = sent.work
        if not sent.is_on_host:  # its device waits
            work.wait()
            return
        pause = SHORT_SLEEP_SECONDS
        looked = time.monotonic()
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, LONG_SLEEP_SECONDS)
            if time.monotonic() - looked > LOOK_SECONDS:
                self._raise_failure()
                looked = time.monotonic()
        with self.naming_losses():
            work.wait()

    def wait_for_messages(self, works: Sequence[dist.Work]) -> None:
        """Wait until messages from rank to rank have come, or have gone.

        gloo does not say before whether they have: a thread waits for them, and this one looks
        whether another rank has failed.

        Raises:
            RankError: another rank failed meanwhile, or is gone.
        """
        errors: list[BaseException] = []
        done = threading.Event()

        def wait() -> None:
            try:
                for work in works:
                    work.wait()
            except BaseException as error:
                errors.append(error)
            finally:
                done.set()

        threading.Thread(target=wait, name="packlight-messages", daemon=True).start()
        while not done.wait(LOOK_SECONDS):
            self._raise_failure()
        with self.naming_losses():
            if errors:
                raise errors[0]

    def wait_let_go(self, tensor: torch.Tensor, references: int) -> None:
        """Wait until nobody but the caller holds the memory of a tensor that was sent.

        The thread that sent lets go of it a moment after the wait is over: freed by it, it would be
        freed late.

        Args:
            tensor: it.
            references: of its storage before it was sent.
        """
        until = time.monotonic() + LOOK_SECONDS
        while tensor.device.type == "cpu" and num_storage_references(tensor) > references:
            if time.monotonic() > until:
                break
            time.sleep(SHORT_SLEEP_SECONDS)

    # -- failing together

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank leaves a step in which they count on it."""
        if self.has_failed:
            return
        self.has_failed = True
        try:
            words = f"{self._fate.rank} {type(error).__name__}: {error}"
            default_store().set(self._fate.key, words)
        except Exception:  # whoever holds the store is gone, and so is this training
            pass

    def leave(self, error: BaseException) -> None:
        """Leave the others in something that is waited for without a look at failures.

        Connections are closed, so whoever waits for this rank ends, too. Nothing is under way.
        """
        self.fail(error)
        group, self._group = self._group, None
        if group is not None:
            dist.destroy_process_group(group)

    def _raise_failure(self) -> None:
        store = default_store()
        if store.check([self._fate.key]):
            self.has_failed = True
            rank, _, text = store.get(self._fate.key).decode().partition(" ")
            raise RankError(f"rank {rank} failed in the middle of a step\n  {text}", int(rank))

    def naming_losses(self) -> _NamingLosses:
        """Have errors of the network raised as what they mean."""
        return _NamingLosses(self)


class _NamingLosses:
    """Has the network's errors raised as what they mean: a rank is gone, or is stuck."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __enter__(self) -> None:
        self.ranks.refuse_parted()

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, PacklightError):
            return
        ranks = self.ranks
        try:
            ranks._raise_failure()
        except RankError as told:
            raise told from error
        except Exception:  # the store is gone, too
            pass
        ranks.has_failed = True
        first_line = str(error).partition("\n")[0]
        raise RankError(
            f"another rank is gone, or has not answered for {ranks.timeout_seconds:g} s\n"
            f"  {first_line}\nhint: its own output says why; checkpoints are whole"
        ) from error
