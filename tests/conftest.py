"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# What a test says of searching, every run has to search for.
os.environ.setdefault("PACKLIGHT_NO_WAY_CACHE", "1")


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """Processes that a shell starts in the background ignore SIGINT, and so would their tests."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
