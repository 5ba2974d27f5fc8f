"""Python's garbage collector, while many objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_objects_kept() -> Iterator[None]:
    """Collect only garbage among the objects that are made inside.

    Tracing and planning make so many that the collector goes through all there are again and again:
    a third of a second each time where transformers is loaded.
    """
    if gc.get_freeze_count():  # somebody else's, or an outer one of these
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
