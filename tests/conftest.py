"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Node ids, a line each, of tests that take long and whose claims quicker ones make in small.
SLOW = Path(__file__).with_name("slow.txt")

# What a test says of searching, every run has to search for.
os.environ.setdefault("PACKLIGHT_NO_WAY_CACHE", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is listed as slow: `make test` leaves it out, `make test-all` runs it."""
    slow = set(SLOW.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def ctrl_c_raises() -> Iterator[None]:
    """Processes that a shell starts in the background ignore SIGINT, and so would their tests."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)
