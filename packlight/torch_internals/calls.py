"""When calls of compiled functions begin and end, whether or not anything of them is compiled."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

# What was passed to `torch.compile` as its backend, as dynamo has it -> what its calls run within.
Around = Callable[[Any], AbstractContextManager[None]]


def watch_calls(backend: Callable[..., Any], around: Around) -> None:
    """Have every call of a function that is compiled for a backend run within a context.

    Relied upon: dynamo enters the context that `backend_ctx_ctor` of a backend returns around each
    call, and leaves it (saying nothing of exceptions) also where it was never asked to compile
    anything. What it asks for that is a `WrapBackendDebug`, which has `torch.compile`'s wrapper of
    a backend as `_torchdynamo_orig_backend`, that the backend as `compiler_fn`, and no such
    attribute; a `nullcontext` is what dynamo takes for a backend without one.
    """
    from torch._dynamo.repro.after_dynamo import WrapBackendDebug

    others: Any = getattr(WrapBackendDebug, "backend_ctx_ctor", None)

    def context_of(wrapped: Any) -> Any:
        given = wrapped._torchdynamo_orig_backend
        if getattr(given, "compiler_fn", None) is backend:
            return lambda: around(given)
        return contextlib.nullcontext if others is None else others.fget(wrapped)

    WrapBackendDebug.backend_ctx_ctor = property(context_of)  # type: ignore[attr-defined]


def is_failing() -> bool:
    """Whether an exception is on its way through the context around a call."""
    return sys.exc_info()[1] is not None


def num_recorded() -> int:
    """Return how many operations autograd has recorded in this thread so far.

    Relied upon: it numbers them.
    """
    return torch._C._autograd._get_sequence_nr()


def is_compiling_off() -> bool:
    """Whether the user has asked for eager PyTorch (`torch.compiler.set_stance("force_eager")`).

    Relied upon: dynamo has the stance as `eval_frame._stance`.
    """
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance == "force_eager"


def calling_line() -> tuple[str, int]:
    """Return the file and the line of the user's that called what is running."""
    inside = [str(Path(torch.__file__).parent), str(Path(__file__).parent.parent)]
    for frame in reversed(traceback.extract_stack()):
        is_known = any(frame.filename.startswith(folder) for folder in inside)
        if not is_known and not frame.filename.startswith("<"):
            if Path(frame.filename).name != "contextlib.py":
                return frame.filename, frame.lineno or 0
    return "<unknown>", 0
