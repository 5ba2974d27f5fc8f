"""Parameters, optimizer states and sparse tensors that cannot be held as asked."""

from __future__ import annotations

from typing import Any

from packlight.errors.base import PacklightError, hinted


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
            + hinted(hint)
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
            "; nothing was loaded" + hinted(hint)
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
            f"the pattern of {name!r}, of shape {shape}, does not fit: {problem}{hinted(hint)}"
        )


class SparseTensorError(PacklightError, ValueError):
    """A tensor that the kernels of `packlight.sparse` do not take."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(f"packlight.sparse got {problem}" + hinted(hint))
