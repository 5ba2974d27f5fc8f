"""The process that trials are forked from: torch is loaded and warm, and memory is shared.

One process loads torch and the FILE, plans and trains a tiny step, and then forks a process for
each trial: it starts in milliseconds, shares what it does not write, and knows of no earlier trial
what could change its results. It runs no threads, so that forking is safe. On the control socket it
gets one end of each trial's connection; once that is closed it ends, and its trials with it.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from packlight.errors import PacklightError
from packlight.trials.limits import anonymous_bytes, die_with_parent, private_bytes
from packlight.trials.messages import Job
from packlight.trials.settings import Settings

if TYPE_CHECKING:
    from packlight.example import Example


@dataclass(frozen=True)
class Ready:
    """What the nursery tells of itself once trials can be forked.

    Attributes:
        own_bytes: that it holds, shared with the trials.
        trial_bytes: that a trial's process comes to hold beside its step, measured on a tiny one.
        refusal: why there can be no trials, in which case it ends.
    """

    own_bytes: int = 0
    trial_bytes: int = 0
    refusal: str = ""


def main() -> None:
    """See the head of this file; arguments are the control socket's descriptor, and the FILE."""
    control = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent()
    try:
        import packlight.trials.trial  # noqa: F401
        from packlight.example import load_example

        warm_up(16)
        example = load_example(sys.argv[2])
        gc.collect()
        gc.freeze()  # so that collections do not write to what is shared
        control.sendall(pickle.dumps(Ready(anonymous_bytes(), _bytes_of_a_trial())))
    except PacklightError as error:
        control.sendall(pickle.dumps(Ready(refusal=str(error))))
        return
    _serve(control, example)


def warm_up(width: int) -> None:
    """Plan and train a tiny step, so that all that is imported late is there."""
    import torch
    from torch import nn

    import packlight

    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.ones(4 * width, width)

    def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(batch).square().mean()
        return loss

    step = packlight.fit(
        model, loss_fn, optimizer, batch, "1GiB", moves=packlight.EXACT_MOVES, progress=False
    )
    step.measured(batch)
    step.evaluate(batch)


def _bytes_of_a_trial() -> int:
    """Return what a process of a trial holds alone once it has planned and trained."""
    reader, writer = os.pipe()
    if not os.fork():
        warm_up(17)
        os.write(writer, str(private_bytes()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = int(pipe.read())
    os.wait()
    return told


def _serve(control: socket.socket, example: Example) -> None:
    """Fork trials until whoever started this is gone."""
    from packlight.costs.cache import read_ahead

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody has to wait for them
    while True:
        data, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not data:
            return
        (descriptor,) = descriptors
        read_ahead()  # what other trials have seen meanwhile, once for all that follow
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control.close()
            _run_trial(descriptor, example)
        os.close(descriptor)


def _run_trial(descriptor: int, example: Example) -> None:
    """Be the process of a trial, to its end."""
    from packlight.trials.trial import TrialProcess

    status = 1
    try:
        die_with_parent()
        connection = Connection(descriptor)
        settings, job = connection.recv()
        assert isinstance(settings, Settings) and isinstance(job, Job)
        TrialProcess(example, settings, job, connection).run()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
