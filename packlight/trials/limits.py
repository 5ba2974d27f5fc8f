"""What a process holds, and the kernel's limit on it (Linux)."""

from __future__ import annotations

import ctypes
import resource
import signal
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def data_bytes() -> int:
    """Return what the kernel compares with RLIMIT_DATA: all private writable memory."""
    return _of_status("VmData")


def anonymous_bytes() -> int:
    """Return what of a process is in memory and in no file."""
    return _of_status("RssAnon")


def private_bytes() -> int:
    """Return what a process has written since it was forked, which no other shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty:"))


def limit_data(num_bytes: int) -> None:
    """Let the kernel refuse this process all memory beyond so many bytes of `data_bytes`."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, hard))


def give_back() -> None:
    """Give freed memory back to the kernel, which else counts it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # (glibc's)
    if trim is not None:
        trim(0)


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that forked it is gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _of_status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
