"""Where trials' processes come from: a nursery that is started once, and asked for each."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from packlight.errors import OptionError
from packlight.trials.messages import Job
from packlight.trials.nursery import Ready
from packlight.trials.settings import Settings

_COMMAND = "from packlight.trials.nursery import main; main()"
# What is freed goes back to the kernel, which else counts it.
_ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "262144",
}


class Workers(Protocol):
    """Starts processes of trials.

    Attributes:
        own_bytes: what there is beside them.
        trial_bytes: what each holds beside its step.
    """

    own_bytes: int
    trial_bytes: int

    def start(self, settings: Settings, job: Job) -> Connection:
        """Start a trial's process and return the connection to it."""

    def close(self) -> None:
        """End all of them."""


@dataclass
class Nursery:
    """Forks trials' processes from one that has loaded torch and the FILE.

    Args:
        file: that defines the trials.
        lock: a descriptor that all processes keep open: a lock on it is held until all are gone.

    Raises:
        OptionError, ExampleError: the FILE cannot be loaded.
    """

    file: str
    lock: int | None = None

    def __post_init__(self) -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, **_ALLOCATOR, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        kept = [theirs.fileno(), *([] if self.lock is None else [self.lock])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _COMMAND, str(theirs.fileno()), self.file],
            env=environment, pass_fds=kept,
        )
        theirs.close()
        self._control = ours
        self._control.setblocking(True)
        told = self._told()
        if told.refusal:
            self.close()
            raise OptionError(told.refusal)
        self.own_bytes, self.trial_bytes = told.own_bytes, told.trial_bytes

    def _told(self) -> Ready:
        with self._control.makefile("rb") as stream:
            try:
                ready: Ready = pickle.load(stream)
            except EOFError:
                status = self._process.wait()
                raise OptionError(
                    f"{Path(self.file).name}: the process that loads it has ended with status "
                    f"{status}"
                ) from None
        return ready

    def start(self, settings: Settings, job: Job) -> Connection:
        """Fork a trial's process and return the connection to it."""
        ours, theirs = socket.socketpair()
        socket.send_fds(self._control, [b"t"], [theirs.fileno()])
        theirs.close()
        connection = Connection(ours.detach())
        connection.send((settings, job))
        return connection

    def close(self) -> None:
        """End the nursery, and with it all its trials."""
        self._control.close()
        self._process.kill()
        self._process.wait()
