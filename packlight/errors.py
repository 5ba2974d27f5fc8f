"""Every error that Packlight raises for something its user can change.

Each one says what, where and the numbers, carries those numbers as attributes, and ends in a hint
that was computed. `str(error)` is meant to be read on a terminal.
"""

from __future__ import annotations

from typing import Any


class PacklightError(Exception):
    """Base class of all errors in this module."""


def _hinted(hint: str) -> str:
    return f"\nhint: {hint}" if hint else ""


class BudgetFormatError(PacklightError, ValueError):
    """A budget that is not a positive number of bytes."""

    def __init__(self, budget: Any, hint: str) -> None:
        self.budget = budget
        super().__init__(f"not a memory budget: {budget!r}" + _hinted(hint))


class InfeasibleBudgetError(PacklightError, ValueError):
    """No schedule fits in the budget.

    Attributes:
        budget_bytes: what was asked for.
        smallest_bytes: the smallest budget for which a schedule was found.
        peak_operation: the operation at which that schedule peaks.
        peak_buffers: (name, bytes) of what is live there, largest first.
        hint: what would lower it.
    """

    def __init__(
        self,
        budget_bytes: int,
        smallest_bytes: int,
        peak_operation: str,
        peak_buffers: list[tuple[str, int]],
        hint: str = "",
    ) -> None:
        from packlight.units import format_bytes

        self.budget_bytes = budget_bytes
        self.smallest_bytes = smallest_bytes
        self.peak_operation = peak_operation
        self.peak_buffers = peak_buffers
        self.hint = hint
        live = " + ".join(f"{format_bytes(size)} {name}" for name, size in peak_buffers[:4])
        rest = [size for _, size in peak_buffers[4:]]
        more = f" + {format_bytes(sum(rest))} in {len(rest)} smaller" if rest else ""
        super().__init__(
            f"budget {format_bytes(budget_bytes)} is below the smallest feasible peak, "
            f"{format_bytes(smallest_bytes)} ({smallest_bytes} bytes)\n"
            f"  the peak is at {peak_operation}: {live}{more}" + _hinted(hint)
        )


class ScheduleError(PacklightError, ValueError):
    """A schedule that cannot run: a buffer read, freed or returned while it is not in memory."""

    def __init__(self, instruction_index: int, message: str) -> None:
        self.instruction_index = instruction_index
        super().__init__(f"instruction {instruction_index}: {message}")


class PipelineError(PacklightError, ValueError):
    """A pipeline's schedule that cannot run: found before anything does.

    Attributes:
        rank: whose instruction it is.
        position: in that rank's instructions; None where one is missing.
    """

    def __init__(self, rank: int, position: int | None, message: str) -> None:
        self.rank = rank
        self.position = position
        where = f"rank {rank}" if position is None else f"rank {rank}, instruction {position}"
        super().__init__(f"{where}: {message}")


class ClusterPlanError(PacklightError, ValueError):
    """No layout of a model fits on a cluster.

    Attributes:
        least_bytes: what the first stage of the layout that comes closest takes on each GPU.
        budget_bytes: what there is.
    """

    def __init__(self, message: str, *, least_bytes: int, budget_bytes: int) -> None:
        self.least_bytes = least_bytes
        self.budget_bytes = budget_bytes
        super().__init__(message)


class GraphBreakError(PacklightError, ValueError):
    """The model does not trace into one graph, so its step cannot be planned as a whole.

    Attributes:
        file, line: where the graph breaks, in the user's code.
        cause: why.
        hint: what could be done.
        can_be_cut: whether `fit` can run the pieces on either side of it.
    """

    def __init__(
        self, file: str, line: int, cause: str, hint: str, *, can_be_cut: bool = True
    ) -> None:
        self.file = file
        self.line = line
        self.cause = cause
        self.hint = hint
        self.can_be_cut = can_be_cut
        super().__init__(
            f"the model breaks into several graphs at {file}:{line}\n  {cause}\nhint: {hint}"
        )


class UnsupportedModelError(PacklightError, ValueError):
    """The model (or what is asked of it) is outside of what can be planned."""


class OptionError(PacklightError, ValueError):
    """An unknown option, or an option with a value that it does not take."""


class MoveError(PacklightError, RuntimeError):
    """A move that an installed package brings does not work; nothing was planned with it.

    Attributes:
        move: its name.
        package: where it comes from.
        problem: what is in the way.
    """

    def __init__(self, move: str, package: str, problem: str) -> None:
        self.move, self.package, self.problem = move, package, problem
        super().__init__(
            f"the move {move!r} of {package!r}: {problem}\n"
            f"hint: moves= without {move!r} leaves it out; if it does not load at all, mend or "
            f"uninstall {package!r}"
        )


class WayError(PacklightError, ValueError):
    """A saved way to run a step that is not one for this step, here and now.

    Attributes:
        what: differs: "step", "torch", "device", "budget", "moves".
        saved, found: what the way says, and what is the case.
    """

    def __init__(self, what: str, saved: Any, found: Any, hint: str) -> None:
        self.what, self.saved, self.found = what, saved, found
        super().__init__(f"the saved way is for another {what}: {saved}, not {found}\nhint: {hint}")


class FormatError(PacklightError, ValueError):
    """A saved plan, graph or checkpoint that cannot be read."""


class OffloadError(PacklightError, RuntimeError):
    """A buffer could not be sent to the tier that it is offloaded to, or did not come back.

    Attributes:
        directory: where the tier keeps its file, None for a tier in memory.
        needed_bytes, free_bytes: what was to be reserved and what was free, where that matters.
    """

    def __init__(
        self,
        message: str,
        *,
        directory: str | None = None,
        needed_bytes: int | None = None,
        free_bytes: int | None = None,
        hint: str = "",
    ) -> None:
        self.directory, self.needed_bytes, self.free_bytes = directory, needed_bytes, free_bytes
        super().__init__(message + _hinted(hint))


class MissingExtraError(PacklightError, ImportError):
    """A feature needs a package that is not installed; names the extra that brings it."""

    def __init__(self, package: str, extra: str, feature: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(
            f"{feature} needs the package {package!r}\nhint: pip install 'packlight[{extra}]'"
        )


class NonFiniteLossError(PacklightError, ArithmeticError):
    """The loss became NaN or infinite; nothing was updated.

    Attributes:
        step_index: how many steps had been trained before.
        loss: its value.
        microbatch_index: in which microbatch, None where the batch runs as a whole.
        rank: on which of several ranks; None where there is one.
    """

    def __init__(
        self, step_index: int, loss: float, microbatch_index: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.step_index = step_index
        self.loss = loss
        self.microbatch_index = microbatch_index
        self.rank = rank
        where = "" if microbatch_index is None else f" in microbatch {microbatch_index + 1}"
        where += "" if rank is None else f" on rank {rank}"
        super().__init__(
            f"the loss of step {step_index + 1} is {loss}{where}; parameters and optimizer are "
            "untouched\n"
            "hint: lower the learning rate, or clip gradients; the batch is the one passed last"
        )


class RankError(PacklightError, RuntimeError):
    """Another rank failed, is gone, or does not do what this one does.

    Attributes:
        rank: which, where that is known.
    """

    def __init__(self, message: str, rank: int | None = None) -> None:
        self.rank = rank
        super().__init__(message)


class RankMismatchError(RankError):
    """Ranks that were asked for different things; nothing has run.

    Attributes:
        what: differs, such as "parameter 'head.weight'".
        rank: the first that differs from the other.
        expected, found: what the other has, and that rank.
        other: rank 0, or the first of those that have to have the same.
    """

    def __init__(
        self, what: str, rank: int, expected: Any, found: Any, hint: str = "", other: int = 0
    ) -> None:
        self.what, self.expected, self.found, self.other = what, expected, found, other
        super().__init__(
            f"rank {rank} differs from rank {other} in {what}: {found}, where rank {other} has "
            f"{expected}{_hinted(hint)}", rank,
        )


class PrecisionError(PacklightError, RuntimeError):
    """Something that runs in float32 cannot run in the precision that was asked for.

    Attributes:
        operation: what cannot.
        precision: "bf16" or "fp16".
        device_type: where.
    """

    def __init__(self, operation: str, precision: str, device_type: str, reason: str) -> None:
        self.operation = operation
        self.precision = precision
        self.device_type = device_type
        first_line = reason.partition("\n")[0]
        other = "allow={'bf16'}, or " if precision == "fp16" else ""
        super().__init__(
            f"{operation} does not run in {precision} on {device_type}: {first_line}\n"
            f"hint: {other}put that part of the model into torch.autocast({device_type!r}, "
            "enabled=False) and give it float32 inputs"
        )


class LossScaleError(PacklightError, ArithmeticError):
    """Gradients overflowed again and again until the loss scale was too small for any of them.

    Attributes:
        step_index: how many steps had been trained before, skipped ones included.
        scale: the loss scale now.
        parameters: names of those whose gradients are not finite.
    """

    def __init__(self, step_index: int, scale: float, parameters: list[str]) -> None:
        self.step_index = step_index
        self.scale = scale
        self.parameters = parameters
        more = f" and {len(parameters) - 1} more" if len(parameters) > 1 else ""
        which = f" of {parameters[0]!r}{more}" if parameters else ""
        super().__init__(
            f"the loss scale collapsed to {scale:g} in step {step_index + 1}: the gradients{which} "
            "are still not finite; parameters and optimizer are as before the skipped updates\n"
            "hint: no scale mends NaNs of the backward (a square root or a division at zero); "
            "allow={'bf16'} needs no loss scale"
        )


class BatchError(PacklightError, ValueError):
    """A batch that cannot be cut into rows.

    Attributes:
        path: where in the batch, such as "batch['labels']".
        shape: of the tensor there, None if it is no tensor.
    """

    def __init__(
        self, path: str, shape: tuple[int, ...] | None, problem: str, hint: str = ""
    ) -> None:
        self.path, self.shape = path, shape
        where = path if shape is None else f"{path} of shape {shape}"
        super().__init__(f"{where} {problem}" + _hinted(hint))


class MicrobatchError(PacklightError, ValueError):
    """A loss that is not known to be a weighted sum of its microbatches' losses.

    Attributes:
        operation: the operation of the loss at which the search stopped, or "" if it was run.
        problem: what is in the way.
    """

    WEIGHTS = (
        "a function of a batch whose values, normalised, weigh the microbatches (such as lambda "
        "batch: (batch['labels'] != -100).sum()), 'rows' for a mean over rows or 'sum' for a sum"
    )
    HINT = "pass loss_weight=, " + WEIGHTS

    def __init__(self, problem: str, operation: str = "", hint: str = HINT) -> None:
        self.operation = operation
        self.problem = problem
        where = f" at {operation}" if operation else ""
        super().__init__(
            f"this loss does not split into microbatches{where}: {problem}" + _hinted(hint)
        )


class UnsupportedParameterError(PacklightError, ValueError):
    """A parameter, or its gradient, that an optimizer of `packlight.optim` does not step.

    Attributes:
        shape, dtype, device: of the parameter.
        problem: what is in the way.
    """

    def __init__(self, parameter: Any, problem: str, hint: str = "") -> None:
        self.shape = tuple(parameter.shape)
        self.dtype = str(parameter.dtype).removeprefix("torch.")
        self.device = str(parameter.device)
        self.problem = problem
        super().__init__(
            f"a parameter of shape {self.shape} ({self.dtype} on {self.device}) {problem}"
            + _hinted(hint)
        )


class OptimizerStateError(PacklightError, ValueError):
    """A saved optimizer state in another form than the optimizer that is to load it.

    Attributes:
        what: the setting or the tensor that differs.
        saved, expected: what was saved, and what the optimizer has.
    """

    def __init__(self, what: str, saved: Any, expected: Any, hint: str = "") -> None:
        self.what = what
        self.saved = saved
        self.expected = expected
        super().__init__(
            f"{what} of the saved optimizer state is {saved!r}, that of this optimizer {expected!r}"
            "; nothing was loaded" + _hinted(hint)
        )


class SparsityError(PacklightError, ValueError):
    """A model, a setting or an optimizer with which there is no sparse training."""


class SparsePatternError(PacklightError, ValueError):
    """Values and an index that are no pattern of a weight.

    Attributes:
        name: of the weight.
        shape: of the weight.
        problem: what does not fit.
    """

    def __init__(self, name: str, shape: tuple[int, ...], problem: str, hint: str = "") -> None:
        self.name, self.shape, self.problem = name, shape, problem
        super().__init__(
            f"the pattern of {name!r}, of shape {shape}, does not fit: {problem}{_hinted(hint)}"
        )


class SparseTensorError(PacklightError, ValueError):
    """A tensor that the kernels of `packlight.sparse` do not take."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(f"packlight.sparse got {problem}" + _hinted(hint))


class NoFeasibleTrialError(PacklightError, ValueError):
    """No trial of a study fits in its memory.

    Attributes:
        memory_bytes: of all the study's processes.
        num_trials: how many were looked at.
        smallest_bytes: the smallest memory with which one of them would fit, None if none is known.
        trial: its number.
    """

    def __init__(
        self, memory_bytes: int, num_trials: int, smallest_bytes: int | None, trial: int | None
    ) -> None:
        from packlight.units import format_bytes

        self.memory_bytes, self.num_trials = memory_bytes, num_trials
        self.smallest_bytes, self.trial = smallest_bytes, trial
        hint = "a space with smaller models or batches"
        if smallest_bytes is not None:
            hint = f"trial {trial} fits in {format_bytes(smallest_bytes)} ({smallest_bytes} bytes)"
        super().__init__(
            f"none of {num_trials} trials fits in {format_bytes(memory_bytes)}" + _hinted(hint)
        )


class MemberError(PacklightError, ValueError):
    """Members that make no ensemble, or settings and batches that are not for its members.

    Attributes:
        name: of the tensor in which two members differ, "" if it is something else.
        shapes: of it in both: (shape, dtype), or None where a member has none.
    """

    def __init__(
        self, problem: str, name: str = "", shapes: tuple[Any, ...] = (), hint: str = ""
    ) -> None:
        self.name, self.shapes = name, shapes
        super().__init__(problem + _hinted(hint))
