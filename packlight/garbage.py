"""Python's garbage collector, while many objects are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# So many are made before the collector looks through the youngest.
YOUNG_OBJECTS = 50_000


@contextmanager
def old_objects_kept() -> Iterator[None]:
    """Collect only garbage among the objects that are made inside, and less often.

    Graphs and plans are millions of small objects that stay. The collector would go through all
    there are again and again: a third of a second each time where transformers is loaded.
    """
    if gc.get_freeze_count():  # somebody else's, or an outer one of these
        yield
        return
    thresholds = gc.get_threshold()
    gc.freeze()
    if thresholds[0]:  # nobody has switched it off
        gc.set_threshold(max(YOUNG_OBJECTS, thresholds[0]), *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
