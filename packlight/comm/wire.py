"""How many bytes this process has sent, as the kernel counts them, whoever sent them.

Every TCP connection counts what it has been given, gloo's as well: so DDP, torch's communication
hooks and `packlight.comm` are measured by one counter, without formulas. Counted is the content of
connections, without packets' headers.
"""

from __future__ import annotations

import os
import socket
import struct
import sys

from packlight.errors import OptionError

_OFFSET_OF_BYTES_SENT = 200  # in Linux's struct tcp_info, since 4.19
_INFO_BYTES = 232


class WireCounter:
    """Bytes sent through this process's TCP connections since the counter was made.

    Connections that were closed meanwhile are left out, what was sent again counts twice.

    Raises:
        OptionError: no Linux, whose counters these are.
    """

    def __init__(self) -> None:
        if not sys.platform.startswith("linux"):
            raise OptionError(f"bytes on the wire are counted by Linux, and this is {sys.platform}")
        self._before = _sent_bytes()

    def sent_bytes(self) -> int:
        """Return how many bytes have been sent since."""
        return sum(count - self._before.get(inode, 0) for inode, count in _sent_bytes().items())


def _sent_bytes() -> dict[str, int]:
    """Return the bytes that each connection has sent, by the number of its socket."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            if not target.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.type != socket.SOCK_STREAM or connection.family == socket.AF_UNIX:
                    continue
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except OSError:  # closed meanwhile
            continue
        found[target] = struct.unpack_from("<Q", info, _OFFSET_OF_BYTES_SENT)[0]
    return found
