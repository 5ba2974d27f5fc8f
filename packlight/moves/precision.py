"""Mixed precision as users know it: the loss under autocast, parameters and updates as they are.

Nothing here computes in low precision: autocast is put around the user's loss, the capture sees the
casts that it makes as operations like any others, and the schedule decides which of their results
stay in memory. What has to be looked after is what autocast does in silence: a device without it,
kernels that a device lacks, and a loss scale that falls until nothing is left of the gradients.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from packlight.capture.step_capture import LossFunction
from packlight.costs.measure import CallFacts, observe_call
from packlight.errors import (
    LossScaleError,
    OptionError,
    PacklightError,
    PrecisionError,
    UnsupportedModelError,
)
from packlight.moves.draft import Draft
from packlight.moves.move import Effect, Move, Refusal, Room, Stage

Result = TypeVar("Result")
Measure = Callable[[Any, Any, Any], CallFacts]

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# A gradient of one becomes zero in fp16 when it is scaled by less than this, fp16's smallest
# number. It is an absolute limit, so that a scaler's own state says how far the collapse is.
SMALLEST_SCALE = 2.0**-24


def chosen_precision(allow: Iterable[str]) -> str | None:
    """Return the one name of `PRECISIONS` that was allowed, or None.

    Raises:
        OptionError: there are several.
    """
    names = sorted(set(allow) & PRECISIONS.keys())
    if len(names) > 1:
        raise OptionError(
            f"allow has {' and '.join(map(repr, names))}: a loss runs under one autocast\n"
            "hint: 'bf16' has float32's range and needs no loss scaling; 'fp16' has 3 bits more"
        )
    return names[0] if names else None


@dataclass(frozen=True)
class Autocast(Move):
    """The loss runs under autocast.

    Attributes:
        precision: one of `PRECISIONS`.
    """

    name: ClassVar[str] = "autocast"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    stage: ClassVar[Stage] = Stage.LOSS
    techniques: ClassVar[tuple[str, ...]] = tuple(PRECISIONS)

    precision: str

    @classmethod
    def space(cls, draft: Draft, room: Room) -> Iterator[Autocast | Refusal]:
        """Yield the precision that is allowed."""
        precision = chosen_precision(draft.request.allow)
        if precision is not None:
            yield Autocast(precision)

    def apply(self, draft: Draft) -> Draft:
        """Return the draft with another loss function.

        Raises:
            OptionError: the device has no autocast to that dtype.
        """
        device = draft.costs.device
        return draft.changed(loss_fn=under_autocast(draft.loss_fn, self.precision, device))

    def describe(self, draft: Draft) -> str:
        """Return the precision."""
        return f"{self.precision} under autocast"


@dataclass(frozen=True)
class LossUnderAutocast:
    """A loss function that runs as if the user had put it into an autocast block.

    Blocks inside of it mean what they mean in eager PyTorch: the innermost one decides.

    Attributes:
        loss_fn: the user's.
        name: one of `PRECISIONS`.
        device_type: of the model.
    """

    loss_fn: LossFunction
    name: str
    device_type: str

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        """Return the loss, or what begins with it."""
        with torch.autocast(self.device_type, PRECISIONS[self.name]):
            return self.loss_fn(model, batch)


def under_autocast(loss_fn: LossFunction, name: str, device: torch.device) -> LossUnderAutocast:
    """Return a loss function under autocast.

    Raises:
        OptionError: the device has no autocast to that dtype.
    """
    dtype = PRECISIONS[name]
    if not _has_autocast(device.type, dtype):
        raise OptionError(f"allow={{{name!r}}}: {device.type} has no autocast to {dtype}")
    return LossUnderAutocast(loss_fn, name, device.type)


def _has_autocast(device_type: str, dtype: torch.dtype) -> bool:
    """Observed: where a dtype is not supported, autocast warns and does nothing, or raises."""
    try:
        with warnings.catch_warnings(action="ignore"), torch.autocast(device_type, dtype):
            return torch.is_autocast_enabled(device_type)
    except RuntimeError:
        return False


def loss_scaler(
    model: nn.Module, name: str, device: torch.device, given: torch.amp.GradScaler | None
) -> torch.amp.GradScaler | None:
    """Return the loss scaler of a step: the user's, else one of torch's where fp16 needs it.

    Raises:
        UnsupportedModelError: fp16 is asked for, and parameters are no master weights.
    """
    if name != "fp16":
        return given
    half = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if half:
        raise UnsupportedModelError(
            f"allow={{'fp16'}} updates float32 parameters, and {len(half)} are float16, the first "
            f"{half[0]!r}: their gradients cannot be unscaled\nhint: model.float()"
        )
    return torch.amp.GradScaler(device.type) if given is None else given


def refuse_collapsed_scale(
    scaler: torch.amp.GradScaler,
    scale_before: float,
    gradients: Iterable[tuple[str, torch.Tensor | None]],
    num_steps: int,
) -> None:
    """Look at a scaler that has just been updated.

    Args:
        scaler: after `update()`.
        scale_before: before it; larger than now where the optimizer's step was skipped.
        gradients: with their parameters' names, unscaled.
        num_steps: trained so far.

    Raises:
        LossScaleError: gradients still overflow at a scale at which there is nothing left of them.
    """
    scale = scaler.get_scale()
    if SMALLEST_SCALE <= scale or scale >= scale_before:
        return
    broken = [n for n, g in gradients if g is not None and not bool(torch.isfinite(g).all())]
    raise LossScaleError(num_steps, scale, broken)


def naming_missing_kernels(measure: Measure, name: str | None) -> Measure:
    """Return a function that measures calls, and tells which of them a precision has no kernel for.

    Args:
        measure: as `CallProfiler.measure`.
        name: one of `PRECISIONS`, None to tell nothing.
    """
    if name is None:
        return measure
    dtype = PRECISIONS[name]

    def lowered(leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.dtype is dtype

    def raised(leaf: Any) -> Any:
        return leaf.to(torch.float32) if lowered(leaf) else torch.float32 if leaf is dtype else leaf

    def measure_or_name(target: Any, args: Any, kwargs: Any) -> CallFacts:
        try:
            return measure(target, args, kwargs)
        except RuntimeError as error:
            low = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if lowered(leaf)]
            if not low or isinstance(error, PacklightError):
                raise
            try:
                observe_call(target, *pytree.tree_map(raised, (args, kwargs)))
            except RuntimeError:
                raise error from None  # float32 would not help
            raise PrecisionError(str(target), name, low[0].device.type, str(error)) from error

    return measure_or_name


def blaming_precision(
    what: str, loss_fn: LossFunction, run: Callable[[LossFunction], Result]
) -> Result:
    """Return what is made of a loss function.

    Args:
        what: is made, for the error.
        loss_fn: under autocast or not.
        run: makes it; if that fails under autocast, it is asked for the plain loss, too.

    Raises:
        PrecisionError: it fails under autocast, and only there.
    """
    try:
        return run(loss_fn)
    except RuntimeError as error:
        if not isinstance(loss_fn, LossUnderAutocast) or isinstance(error, PacklightError):
            raise
        try:
            run(loss_fn.loss_fn)
        except RuntimeError:
            raise error from None
        raise PrecisionError(what, loss_fn.name, loss_fn.device_type, str(error)) from error
