"""What calls were observed to cost, remembered on disk between runs.

One JSON file per device and torch version. A cache that cannot be read is an empty one, and one
that cannot be written costs only time: neither changes what is computed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from packlight.costs.measure import CallFacts, OutputFacts

FORMAT_VERSION = 6


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
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "")
    return f"{model or 'cpu'}, {torch.get_num_threads()} threads"


class CallCache:
    """`CallFacts` by call signature, for one device; loaded at once, written by `save`."""

    def __init__(self, device: torch.device, directory: Path | None = None) -> None:
        key = f"{device_name(device)}|{torch.__version__}|{FORMAT_VERSION}"
        name = f"calls-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        self.path = (directory or cache_directory()) / name
        self._facts = self._read()
        self._is_changed = False

    def _read(self) -> dict[str, CallFacts]:
        try:
            stored = json.loads(self.path.read_text())
            return {k: _from_json(v) for k, v in stored["calls"].items()}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def get(self, signature: str) -> CallFacts | None:
        """Return what is known of a call."""
        return self._facts.get(signature)

    def put(self, signature: str, facts: CallFacts) -> None:
        """Remember what was seen of a call."""
        self._facts[signature] = facts
        self._is_changed = True

    def save(self) -> None:
        """Write the cache, whole or not at all, with what other processes added meanwhile."""
        if not self._is_changed:
            return
        self._facts = {**self._read(), **self._facts}
        text = json.dumps({"calls": {k: asdict(v) for k, v in self._facts.items()}})
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                file.write(text)
            os.replace(file.name, self.path)
        except OSError:
            return
        self._is_changed = False


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
