"""Processes that stay and run the functions that tests send them, each with its own rank."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

TIMEOUT_SECONDS = 240


def mesh() -> DeviceMesh:
    """Return the mesh of all ranks, in one of them."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("data",))


def part(batch: Any) -> Any:
    """Return a rank's part of a tuple of tensors; the first ranks' are larger by a row."""
    rank, size = dist.get_rank(), dist.get_world_size()
    return tuple(t.tensor_split(size)[rank].clone() for t in batch)


class RankPool:
    """Ranks of one gloo group.

    Args:
        size: how many.
        directory: for the file through which they find one another.
    """

    def __init__(self, size: int, directory: Path) -> None:
        # Forked from a process that has imported torch and nothing else, which takes long.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self.pipes, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, str(directory / "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what a function returns on each rank; what it raises is raised here, too."""
        results = self.outcomes(function, *arguments)
        for rank, result in enumerate(results):
            if isinstance(result, Raised):
                raise AssertionError(f"rank {rank}: {result.trace}")
        return results

    def outcomes(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what a function returns on each rank, or a `Raised`; None where a rank ended."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results: list[Any] = []
        for pipe in self.pipes:
            assert pipe.poll(TIMEOUT_SECONDS), "a rank hangs"
            try:
                results.append(pipe.recv())
            except EOFError:
                results.append(None)
        return results

    def assert_refused(
        self, words: str | Sequence[str], function: Callable[..., Any], *arguments: Any,
        kind: str | None = None,
    ) -> None:
        """See that all ranks raise the same: an error with some words, of some class."""
        outcomes = self.outcomes(function, *arguments)
        for outcome in outcomes:
            assert isinstance(outcome, Raised), "a rank raised nothing"
            assert kind in (None, outcome.kind), outcome.trace
            for word in [words] if isinstance(words, str) else words:
                assert word in outcome.text, outcome.trace

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()
            process.join()


class Raised:
    """An exception of a rank: its class's name, its text, and all of it."""

    def __init__(self, error: BaseException) -> None:
        self.kind, self.text = type(error).__name__, str(error)
        self.trace = "".join(traceback.format_exception(error))


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    os.environ["PACKLIGHT_NO_WAY_CACHE"] = "1"
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size,
        timeout=timedelta(seconds=TIMEOUT_SECONDS),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result = function(*arguments)
        except BaseException as error:
            result = Raised(error)
        pipe.send(result)
