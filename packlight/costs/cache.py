"""What was observed, remembered on disk between runs: of calls and of optimizers' steps.

One file for each kind of things, device, instruction set and torch version: facts seen on one CPU
do not hold on another. A file has a line of JSON for each thing, and what is new is added at its
end, so that many plans cost each what it has seen itself; a process reads a line once, and a forked
one none that its parent has read. A cache that cannot be read is an empty one, and one that cannot
be written costs only time: neither changes what is computed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from packlight.costs.measure import CallFacts, OutputFacts

FORMAT_VERSION = 8
# Files with more lines, most of which later ones have replaced, are written anew.
MOST_OLD_LINES = 1000


def cache_directory() -> Path:
    """Return where caches live: `PACKLIGHT_CACHE`, else the user's cache directory."""
    if "PACKLIGHT_CACHE" in os.environ:
        return Path(os.environ["PACKLIGHT_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "packlight"


def device_name(device: torch.device) -> str:
    """Return a name that changes when measured times would: the chip and how much of it is used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_told_by_cpu('model name') or 'cpu'}, {torch.get_num_threads()} threads"


def instruction_set(device: torch.device) -> str:
    """Return what tells kernels that may run on a device from those of another one like it."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_capability(device))
    limits = [os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "MKL_CBWR")]
    flags = _told_by_cpu("flags") or _told_by_cpu("Features")
    return f"{torch.backends.cpu.get_cpu_capability()}, {limits}, {flags}"


@functools.cache
def _told_by_cpu(name: str) -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith(name)), "")


@dataclass
class _Lines:
    """What this process has read of a file.

    Attributes:
        inode: of the file: another one is another cache.
        num_read: how many bytes of it were read, up to the end of a line.
        num_lines: how many lines those were.
        values: by key, the latest of each.
    """

    inode: int = 0
    num_read: int = 0
    num_lines: int = 0
    values: dict[str, Any] = field(default_factory=dict)


_lines_of: dict[Path, _Lines] = {}


def _read(path: Path) -> dict[str, Any]:
    """Return what a file holds by now; not to be changed."""
    lines = _lines_of.setdefault(path, _Lines())
    try:
        with path.open("rb") as file:
            told = os.fstat(file.fileno())
            if told.st_ino != lines.inode or told.st_size < lines.num_read:
                lines = _lines_of[path] = _Lines(told.st_ino)
            file.seek(lines.num_read)
            content = file.read()
    except OSError:
        _lines_of.pop(path, None)
        return {}
    whole = content[: content.rfind(b"\n") + 1]
    for line in whole.splitlines():
        try:
            key, value = json.loads(line)
        except (ValueError, TypeError):
            continue  # a process ended while it wrote
        lines.values[key] = value
        lines.num_lines += 1
    lines.num_read += len(whole)
    return lines.values


def _rewrite(path: Path) -> None:
    """Leave a file with the latest line of each key. What is added meanwhile is forgotten."""
    values = _read(path)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.writelines(json.dumps([key, value]) + "\n" for key, value in values.items())
    os.replace(file.name, path)


def _is_mostly_old(path: Path) -> bool:
    lines = _lines_of.get(path, _Lines())
    return lines.num_lines > MOST_OLD_LINES and lines.num_lines > 2 * len(lines.values)


def read_ahead() -> None:
    """Read what was added to all caches that this process knows, for processes it forks."""
    for path in list(_lines_of):
        _read(path)


class Cache:
    """Values that JSON knows, by key, for one device; what is new is written by `save`.

    Args:
        kind: of what is remembered; a part of the file's name.
        device: where it was seen.
        directory: of the file, by default `cache_directory()`.
    """

    def __init__(self, kind: str, device: torch.device, directory: Path | None = None) -> None:
        key = (
            f"{device_name(device)}|{instruction_set(device)}|{torch.__version__}|{FORMAT_VERSION}"
        )
        name = f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.jsonl"
        self.path = (directory or cache_directory()) / name
        self._known = _read(self.path)
        self._new: dict[str, Any] = {}
        self._unsaved: set[str] = set()

    @property
    def num_known(self) -> int:
        """How many things are known."""
        return len(self._known.keys() | self._new.keys())

    def __contains__(self, key: str) -> bool:
        return key in self._new or key in self._known

    def __getitem__(self, key: str) -> Any:
        return self._new[key] if key in self._new else self._known[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._new[key] = value
        self._unsaved.add(key)

    def save(self) -> None:
        """Add what is new to the file: one write, which those of other processes do not cut."""
        if not self._unsaved:
            return
        lines = "".join(json.dumps([key, self._new[key]]) + "\n" for key in sorted(self._unsaved))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                # Behind half a line that somebody left, a line of its own is whole.
                os.write(file, f"{self._gap()}{lines}".encode())
            finally:
                os.close(file)
            if _is_mostly_old(self.path):
                _rewrite(self.path)
        except OSError:
            return
        self._unsaved.clear()

    def _gap(self) -> str:
        """Return a line's end if the file ends without one."""
        with self.path.open("rb") as file:
            if not file.seek(0, os.SEEK_END):
                return ""
            file.seek(-1, os.SEEK_END)
            return "" if file.read(1) == b"\n" else "\n"


class CallCache:
    """`CallFacts` by call signature, for one device."""

    def __init__(self, device: torch.device, directory: Path | None = None) -> None:
        self._cache = Cache("calls", device, directory)
        self.path, self.save = self._cache.path, self._cache.save

    @property
    def num_known(self) -> int:
        """How many calls are known."""
        return self._cache.num_known

    def get(self, signature: str) -> CallFacts | None:
        """Return what is known of a call."""
        try:
            return _from_json(self._cache[signature])
        except (KeyError, TypeError, ValueError):
            return None

    def put(self, signature: str, facts: CallFacts) -> None:
        """Remember what was seen of a call."""
        self._cache[signature] = asdict(facts)


def _from_json(stored: dict[str, Any]) -> CallFacts:
    return CallFacts(
        seconds=float(stored["seconds"]),
        workspace_bytes=int(stored["workspace_bytes"]),
        outputs=tuple(
            OutputFacts(**{**o, "stride": None if o["stride"] is None else tuple(o["stride"])})
            for o in stored["outputs"]
        ),
        in_place=stored["in_place"],
        in_step_seconds=stored["in_step_seconds"],
        missing=tuple(stored["missing"]),
    )
