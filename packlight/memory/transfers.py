"""Transfers in the order in which they were asked for: by a worker thread, or on a CUDA stream.

A transfer is a function that returns a generator, which moves one piece at a time. So that whoever
runs it can stop between pieces, and so that dropping it drops the tensor.
"""

from __future__ import annotations

import copy
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from packlight.errors import OffloadError

Pieces = Callable[[], Iterator[None]]

# A wake-up may be lost to a Ctrl-C; whoever waits looks again after this long.
_LOOK_AGAIN_SECONDS = 0.5


class Transfer:
    """One transfer. It refers to its tensor until it is done.

    Attributes:
        what: "writing 'relu' (12.0 MiB)", for messages.
        is_over: nothing of it is going to happen any more.
        is_complete: it is over, and all of it has happened.
    """

    def __init__(self, what: str, pieces: Pieces | None) -> None:
        self.what = what
        self.pieces = pieces
        self.is_over = False
        self.is_complete = False


class Transfers(Protocol):
    """Runs transfers one after the other."""

    def submit(self, what: str, pieces: Pieces) -> Transfer:
        """Put a transfer behind the others and return at once."""
        ...

    def wait(self, transfer: Transfer) -> None:
        """Return when a transfer and all before it are complete; raise if one of them failed."""
        ...

    def check(self) -> None:
        """Raise what a transfer has raised since the last reset."""
        ...

    def reset(self) -> None:
        """Stop what is under way, drop the rest and forget failures."""
        ...

    def stop(self) -> None:
        """End for good, and give back what the transfers use. May be called from anywhere."""
        ...


class Worker:
    """Runs transfers in a thread of its own.

    What is done is told by attributes of the transfers, which the thread sets; the lock only wakes
    who waits. So a Ctrl-C at any moment leaves nothing behind that could block anybody.
    The first failure ends all transfers until `reset`: what follows could rest on what was lost.

    Args:
        release: called by the thread as its last act; closes what transfers use, which nobody may
            do while one is under way.
    """

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._waiting: queue.SimpleQueue[Transfer | None] = queue.SimpleQueue()
        self._wake = threading.Lock()
        self._wake.acquire()
        self._is_stopping = False
        self._failure: OffloadError | None = None
        self._process_id = os.getpid()
        self._thread = threading.Thread(target=self._run, name="packlight-offload", daemon=True)
        self._thread.start()

    def submit(self, what: str, pieces: Pieces) -> Transfer:
        """Put a transfer behind the others and return at once."""
        transfer = Transfer(what, pieces)
        self._waiting.put(transfer)
        return transfer

    def wait(self, transfer: Transfer) -> None:
        """Block until the transfer is complete; raise if it or one before it failed."""
        self._wait_until_over(transfer)
        if not transfer.is_complete:
            self.check()
            raise OffloadError(f"{transfer.what} was cancelled", hint="start a new step")

    def check(self) -> None:
        """Raise what a transfer has raised since the last reset."""
        if self._failure is not None:
            # A copy: the failure stays here until the next reset, and what is raised keeps a
            # traceback, that is its frames' tensors.
            raise copy.copy(self._failure) from self._failure.__cause__

    def reset(self) -> None:
        """Stop after the piece under way, drop the rest and forget failures."""
        self._is_stopping = True
        barrier = self.submit("reset", lambda: iter(()))
        self._wait_until_over(barrier)
        self._failure = None
        self._is_stopping = False

    def stop(self) -> None:
        """End the thread after the piece under way."""
        if os.getpid() != self._process_id:
            return  # a forked child has the attributes, but neither the thread nor a say
        self._is_stopping = True
        self._waiting.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _wait_until_over(self, transfer: Transfer) -> None:
        while not transfer.is_over:
            self._wake.acquire(timeout=_LOOK_AGAIN_SECONDS)
            if not transfer.is_over and not self._thread.is_alive():
                raise OffloadError(
                    f"{transfer.what}: the thread that transfers buffers is gone",
                    hint="a tier cannot be used after close() nor in a forked process; make one",
                )

    def _run(self) -> None:
        try:
            while (transfer := self._waiting.get()) is not None:
                self._transfer(transfer)
                transfer.is_over = True
                try:
                    self._wake.release()
                except RuntimeError:
                    pass  # it was released already, and nobody has waited since
                del transfer
        finally:
            self._release()

    def _transfer(self, transfer: Transfer) -> None:
        pieces, transfer.pieces = transfer.pieces, None
        assert pieces is not None
        if self._is_stopping or self._failure is not None:
            return
        try:
            for _ in pieces():
                if self._is_stopping:
                    return
            transfer.is_complete = True
        except BaseException as error:  # whatever it is, the thread that waits must hear of it
            failure = error
            if not isinstance(failure, OffloadError):
                failure = OffloadError(f"{transfer.what} failed: {error!r}")
                failure.__cause__ = error
            cause = failure.__cause__
            if cause is not None:
                cause.__traceback__ = None
            self._failure = failure.with_traceback(None)


class CopyStream:
    """Runs transfers on a CUDA stream of its own; the host never waits.

    Memory is safe by order alone. The stream begins a transfer after what the current stream was
    given before: what is written has been computed, and what a fetched tensor's memory was used for
    before is over. `wait` makes the current stream go on after the transfer, and only then lets go
    of the tensor, whose memory goes back to that stream. Not yet run on a GPU.
    """

    def __init__(self, device: torch.device, release: Callable[[], None]) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._events: dict[Transfer, torch.cuda.Event] = {}
        self._release = release

    def submit(self, what: str, pieces: Pieces) -> Transfer:
        """Launch the transfer's copies and return."""
        transfer = Transfer(what, pieces)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for _ in pieces():
                pass
            self._events[transfer] = self._stream.record_event()
        return transfer

    def wait(self, transfer: Transfer) -> None:
        """Let the current stream go on only after the transfer."""
        event = self._events.pop(transfer, None)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
            transfer.pieces = None
            transfer.is_over = transfer.is_complete = True
        if not transfer.is_complete:
            raise OffloadError(f"{transfer.what} was cancelled", hint="start a new step")

    def check(self) -> None:
        """Do nothing: copies fail where they are launched, or at the device's next call."""

    def reset(self) -> None:
        """Let copies end, then drop their tensors."""
        self._stream.synchronize()
        for transfer in self._events:
            transfer.pieces = None
            transfer.is_over = True
        self._events.clear()

    def stop(self) -> None:
        """Let copies end, then give the memory back."""
        self.reset()
        self._release()
