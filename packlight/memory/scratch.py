"""An anonymous file in a directory: whether there can be one, making it, reserving its space."""

from __future__ import annotations

import errno
import os
import stat
import sys
import tempfile
from pathlib import Path

from packlight.errors import OffloadError
from packlight.units import format_bytes


def check_directory(directory: Path, allow_memory: bool) -> None:
    """Raise an `OffloadError` that says why a directory cannot hold a tier's file, if it cannot."""
    where = f"cannot offload to {directory}"
    if sys.platform != "linux":
        raise OffloadError(f"{where}: this needs Linux, and runs on {sys.platform}")
    try:
        is_directory = stat.S_ISDIR(os.stat(directory).st_mode)
    except FileNotFoundError:
        parent = next(p for p in directory.absolute().parents if p.exists())
        hint = f"{parent} exists; make the rest, or name another directory"
        message = f"{where}: it does not exist"
        raise OffloadError(message, directory=str(directory), hint=hint) from None
    except OSError as error:
        raise OffloadError(f"{where}: {error}", directory=str(directory)) from error
    if not is_directory:
        hint = f"name a directory, for example {directory.absolute().parent}"
        raise OffloadError(f"{where}: it is not a directory", directory=str(directory), hint=hint)
    kind = file_system(directory)
    if kind in ("tmpfs", "ramfs") and not allow_memory:
        hint = "name a directory on a disk"
        message = f"{where}: its files are kept in memory ({kind}), so that would save none"
        raise OffloadError(message, directory=str(directory), hint=hint)


def file_system(directory: Path) -> str:
    """Return the kind of file system that a directory is on ("ext4"), "" if the system hides it."""
    number = os.stat(directory).st_dev
    device = f"{os.major(number)}:{os.minor(number)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for fields in map(str.split, lines):
        if fields[2] == device:
            return fields[fields.index("-") + 1]
    return ""


def open_anonymous(directory: Path) -> int:
    """Return the descriptor of a new file without a name."""
    try:
        try:
            return os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
        file, path = tempfile.mkstemp(prefix="packlight-", dir=directory)
        os.unlink(path)
        return file
    except OSError as error:
        raise OffloadError(
            f"cannot make a file in {directory}: {error}",
            directory=str(directory),
            hint="name a directory that you may write to",
        ) from error


def reserve(file: int, directory: Path, num_bytes: int) -> None:
    """Have the file system set aside all of the space now, not in the middle of a step."""
    if num_bytes == 0:
        return
    num_free = free_bytes(file)
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        free = "unknown" if num_free is None else format_bytes(num_free)
        hint = "name a directory on a larger disk, or raise the memory budget"
        if num_free is not None and num_free < num_bytes:
            hint = f"free {format_bytes(num_bytes - num_free)} there, or n{hint[1:]}"
        raise OffloadError(
            f"cannot reserve {format_bytes(num_bytes)} ({num_bytes} bytes) in {directory}: "
            f"{error}\n  free there: {free}",
            directory=str(directory),
            needed_bytes=num_bytes,
            free_bytes=num_free,
            hint=hint,
        ) from error


def free_bytes(file: int) -> int | None:
    """Return what an unprivileged user can still write on a file's file system."""
    try:
        status = os.fstatvfs(file)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize
