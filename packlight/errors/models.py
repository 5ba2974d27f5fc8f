"""Models, losses and batches that cannot be trained as they are."""

from __future__ import annotations

from packlight.errors.base import PacklightError, hinted


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
        super().__init__(f"{where} {problem}" + hinted(hint))


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
            f"this loss does not split into microbatches{where}: {problem}" + hinted(hint)
        )
