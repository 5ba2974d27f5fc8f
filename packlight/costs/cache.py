"""What was observed, remembered on disk between runs: of calls and of optimizers' steps.

One JSON file for each kind of things, device, instruction set and torch version: facts seen on one
CPU do not hold on another. A cache that cannot be read is an empty one, and one that cannot be
written costs only time: neither changes what is computed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from packlight.costs.measure import CallFacts, OutputFacts

FORMAT_VERSION = 7


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


class Cache:
    """Values that JSON knows, by key, for one device; loaded at once, written by `save`.

    Args:
        kind: of what is remembered; a part of the file's name.
        device: where it was seen.
        directory: of the file, by default `cache_directory()`.
    """

    def __init__(self, kind: str, device: torch.device, directory: Path | None = None) -> None:
        key = (
            f"{device_name(device)}|{instruction_set(device)}|{torch.__version__}|{FORMAT_VERSION}"
        )
        name = f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        self.path = (directory or cache_directory()) / name
        self._values = self._read()
        self._is_changed = False

    def _read(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self.path.read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._values[key] = value
        self._is_changed = True

    def save(self) -> None:
        """Write the cache, whole or not at all, with what other processes added meanwhile."""
        if not self._is_changed:
            return
        self._values = {**self._read(), **self._values}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                file.write(json.dumps(self._values))
            os.replace(file.name, self.path)
        except OSError:
            return
        self._is_changed = False


class CallCache:
    """`CallFacts` by call signature, for one device."""

    def __init__(self, device: torch.device, directory: Path | None = None) -> None:
        self._cache = Cache("calls", device, directory)
        self.path, self.save = self._cache.path, self._cache.save

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
