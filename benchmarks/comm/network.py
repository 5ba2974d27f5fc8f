"""A network to measure on: a namespace and a link of a given rate for each worker, on one bridge.

Needs root, `ip` and `tc` with the token bucket filter; the kernel's network emulator, which would
add latency, is not everywhere, so only rates are shaped. What a worker sends waits in its own
link's queue.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

PREFIX = "plcomm"


@contextmanager
def namespaces(count: int, rate: str) -> Iterator[list[str]]:
    """Make namespaces that reach one another at a rate, and take them away again.

    Args:
        count: how many.
        rate: as `tc` writes it: "100mbit", "1gbit".

    Yields:
        Their names. The interface in each is "eth0".
    """
    names = [f"{PREFIX}{index}" for index in range(count)]
    try:
        _ip("link", "add", PREFIX, "type", "bridge")
        _ip("link", "set", PREFIX, "up")
        for index, name in enumerate(names):
            _ip("netns", "add", name)
            _ip("link", "add", f"{name}v", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", f"{name}v", "master", PREFIX)
            _ip("link", "set", f"{name}v", "up")
            _ip("-n", name, "addr", "add", f"10.93.7.{index + 1}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _run(
                "tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", rate,
                "burst", "64kb", "latency", "2s",
            )
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", PREFIX], capture_output=True)


def start_in(name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Start `python -m` in a namespace."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0"}
    command = ["ip", "netns", "exec", name, sys.executable, "-m", *arguments]
    return subprocess.Popen(command, env=environment)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}\n(root is needed)")
