"""Where a program's seconds go, seen from outside: which code the main thread is in, every few ms.

Nothing of what runs is changed or even imported, so two checkouts with differently named modules
can be looked at. A sample gives the processor time since the one before to the innermost frame that
belongs to a part.
"""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections import defaultdict
from types import FrameType, TracebackType

SAMPLE_SECONDS = 0.004
ELSE = "everything else"
GARBAGE = "of all that, collecting garbage"

# (part, a file's path or the beginning of it, function in it or "" for any): the first that fits;
# a part without a name leaves it to the callers.
PARTS: tuple[tuple[str, str, str], ...] = (
    ("AOTAutograd: the joint graph", "torch/_functorch/aot_autograd.py", "aot_module_simplified"),
    ("TorchDynamo: tracing, guards", "packlight/capture/step_capture.py", ""),
    ("TorchDynamo: tracing, guards", "packlight/runtime/step_capture.py", ""),
    ("observing calls", "packlight/costs/measure.py", "observe_call"),
    ("observing calls", "packlight/capture/measure.py", "observe_call"),
    ("observing the optimizer", "packlight/updates/", ""),
    ("observing the optimizer", "packlight/runtime/accounting.py", "measure_optimizer"),
    ("observing the optimizer", "packlight/runtime/update.py", ""),
    ("observing the optimizer", "packlight/runtime/observe.py", ""),
    ("rehearsal", "packlight/search/rehearse.py", "rehearse"),
    ("rehearsal", "packlight/runtime/rehearse.py", "_least_seconds"),
    ("whether rows are independent", "packlight/moves/microbatch/independence.py", ""),
    ("whether rows are independent", "packlight/runtime/independence.py", ""),
    ("rewriting graphs", "packlight/moves/", ""),
    ("rewriting graphs", "packlight/capture/chunk", ""),
    ("rewriting graphs", "packlight/capture/pack.py", ""),
    ("rewriting graphs", "packlight/capture/batch", ""),
    ("reading joint graphs", "packlight/capture/read_joint.py", ""),
    ("reading joint graphs", "packlight/capture/joint.py", ""),
    ("completing the step", "packlight/capture/whole_step.py", ""),
    ("completing the step", "packlight/runtime/whole_step.py", ""),
    ("planning", "packlight/planner/", ""),
    ("", "packlight/lower/frame.py", ""),  # runs programs
    ("writing the program", "packlight/lower/", ""),
    ("writing the program", "packlight/runtime/program.py", ""),
    ("writing the program", "packlight/runtime/emit.py", ""),
)


class Sampler:
    """Use as a context manager around what the main thread does.

    Attributes:
        seconds: part -> processor seconds of the main thread.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._main = threading.main_thread()
        assert self._main.ident is not None
        self._clock = time.pthread_getcpuclockid(self._main.ident)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._garbage_began = 0.0
        self._part_of_code: dict[object, str | None] = {}

    def __enter__(self) -> Sampler:
        gc.callbacks.append(self._note_garbage)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        gc.callbacks.remove(self._note_garbage)

    def _watch(self) -> None:
        before = time.clock_gettime(self._clock)
        while not self._stop.wait(SAMPLE_SECONDS):
            frame = sys._current_frames().get(self._main.ident or 0)
            now = time.clock_gettime(self._clock)
            self.seconds[self._part(frame)] += now - before
            before = now

    def _part(self, frame: FrameType | None) -> str:
        while frame is not None:
            code = frame.f_code
            if code not in self._part_of_code:
                self._part_of_code[code] = part_of(code.co_filename, code.co_name)
            part = self._part_of_code[code]
            if part is not None:
                return part
            frame = frame.f_back
        return ELSE

    def _note_garbage(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._garbage_began = time.clock_gettime(self._clock)
        else:
            self.seconds[GARBAGE] += time.clock_gettime(self._clock) - self._garbage_began


def part_of(file: str, function: str) -> str | None:
    """Return the part that a function belongs to by itself, None if its callers decide.

    >>> part_of("/home/me/packlight/planner/chain.py", "solve")
    'planning'
    >>> part_of("/usr/lib/python3.11/inspect.py", "signature") is None
    True
    """
    for part, place, name in PARTS:
        if f"/{place}" in file and name in ("", function):
            return part or None
    return None
