"""From one parameter with its state to a kernel of its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from packlight.errors import UnsupportedParameterError
from packlight.extras import require_numba
from packlight.optim.formats import RESIDUAL, WEIGHT_FORMATS, state_format
from packlight.optim.rules import Coefficients, coefficients, kind_of, moments_of
from packlight.optim.trust import LAMB, gradient_factor, step_by_lamb
from packlight.threads import run_in_threads

# Below this, waking a thread takes longer than what it would do.
MIN_ELEMENTS_PER_THREAD = 2**16

_GRADIENT_CODES = {
    torch.float32: WEIGHT_FORMATS["fp32"].code,
    torch.bfloat16: WEIGHT_FORMATS["bf16-nearest"].code,
    torch.float16: WEIGHT_FORMATS["fp16-stochastic"].code,
}


class StoredMoment(NamedTuple):
    """A moment as a kernel gets it: a format's code, -1 for none, and what it is stored in."""

    code: int
    values: torch.Tensor | None
    scale: torch.Tensor | None


class Update(NamedTuple):
    """What a kernel gets: dense tensors of equal layout, and numbers.

    Attributes:
        parameter, gradient: of as many elements.
        residual: see `packlight.optim.formats`.
        weight_code, gradient_code: codes of formats.
        first, second: moments.
        rule: see `packlight.optim.rules.kind_of`.
        sign: -1 to maximize; or what else the gradient is multiplied by.
        numbers: see `packlight.optim.rules.Coefficients`.
        seed, number, step: what random bits depend on beside the element.
    """

    parameter: torch.Tensor
    gradient: torch.Tensor
    residual: torch.Tensor | None
    weight_code: int
    gradient_code: int
    first: StoredMoment
    second: StoredMoment
    rule: int
    sign: float
    numbers: Coefficients
    seed: int
    number: int
    step: int


def update_parameter(
    group: Mapping[str, Any], parameter: torch.Tensor, state: Mapping[str, Any], number: int
) -> None:
    """Step one parameter that has a gradient; its state's `step` counts this step already.

    Args:
        group: the hyperparameters.
        parameter: see `check_parameter`.
        state: see `packlight.optim.formats.state_layout`.
        number: tells this parameter from others where random numbers are drawn.

    Raises:
        UnsupportedParameterError: the gradient is none that can be used.
        MissingExtraError: what compiles the kernel is not installed.
    """
    gradient = _usable_gradient(parameter)
    num_elements = parameter.numel()
    if num_elements == 0:
        return
    stored = [
        StoredMoment(
            state_format(group, moment.name, num_elements).code,
            state[moment.name],
            state.get(f"{moment.name}_scale"),
        )
        for moment in moments_of(group)
    ]
    none = StoredMoment(-1, None, None)
    first, second = (*stored, none, none)[:2]
    factor = gradient_factor(group, parameter, gradient)
    numbers = coefficients(group, state["step"])
    numbers = numbers._replace(l2=factor * numbers.l2)
    is_lamb = group.get("layer_rate") == LAMB
    stepped = parameter
    if is_lamb:  # Adam's step of lr = 1 from zero is its direction
        lr = float(group["lr"])
        stepped = torch.zeros_like(parameter, requires_grad=False)
        numbers = numbers._replace(decay=1.0, rate=numbers.rate / lr if lr else 0.0)
    update = Update(
        stepped,
        gradient,
        state.get(RESIDUAL),
        WEIGHT_FORMATS[group["weights"]].code,
        _GRADIENT_CODES[gradient.dtype],
        first,
        second,
        kind_of(group),
        -factor if group["maximize"] else factor,
        numbers,
        group["seed"],
        number,
        state["step"],
    )
    _KERNELS[parameter.device.type](update)
    if is_lamb:
        step_by_lamb(group, parameter, stepped)
        return
    # Kernels write through addresses; autograd has to know.
    torch.autograd.graph.increment_version(parameter)


def check_parameter(parameter: torch.Tensor, weights: str) -> None:
    """Refuse a parameter that cannot be stepped where it is or as what it is.

    Args:
        parameter: any.
        weights: name of the format in which it is to be stored.

    Raises:
        UnsupportedParameterError: it says why.
    """
    if parameter.device.type not in _KERNELS:
        raise UnsupportedParameterError(
            parameter, f"is on no device with a kernel: {', '.join(_KERNELS)}"
        )
    expected = WEIGHT_FORMATS[weights].dtype
    if parameter.dtype != expected:
        fitting = [name for name, form in WEIGHT_FORMATS.items() if form.dtype == parameter.dtype]
        hint = f"convert it to {expected}"
        if fitting:
            hint += f", or give its group weights={' or '.join(map(repr, fitting))}"
        raise UnsupportedParameterError(parameter, f"cannot be stored as {weights!r}", hint)
    if not _is_dense(parameter):
        raise UnsupportedParameterError(
            parameter,
            f"of strides {parameter.stride()} has gaps or elements that share memory",
            "make the parameter of a contiguous tensor",
        )


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their piece of memory, each once, in whatever order."""
    if tensor.is_contiguous():
        return True
    num_inside = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != num_inside:
                return False
            num_inside *= size
    return True


def _usable_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Return the gradient in the parameter's layout, in which autograd accumulates it."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise UnsupportedParameterError(
            parameter,
            f"has a sparse gradient ({gradient.layout})",
            "make it dense (sparse=False in nn.Embedding), or use torch.optim.SparseAdam",
        )
    if gradient.dtype not in _GRADIENT_CODES:
        raise UnsupportedParameterError(parameter, f"has a gradient of {gradient.dtype}")
    if gradient.stride() == parameter.stride():
        return gradient
    sizes = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    if all(mine == theirs or size == 1 for size, mine, theirs in sizes):
        return gradient
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)


# -- CPU


def _step_on_cpu(update: Update) -> None:
    kernel, tile, num_rows = _compiled()
    num_elements = update.parameter.numel()
    num_tiles = -(-num_elements // tile)
    num_threads = min(torch.get_num_threads(), max(num_elements // MIN_ELEMENTS_PER_THREAD, 1))
    # Allocated by torch so that measured peaks include it.
    scratch = torch.empty((num_threads, num_rows, tile), dtype=torch.float32)
    shared = (
        num_elements,
        update.rule,
        update.sign,
        update.weight_code,
        _address(update.parameter),
        _address(update.residual),
        update.gradient_code,
        _address(update.gradient),
        update.first.code,
        _address(update.first.values),
        _address(update.first.scale),
        update.second.code,
        _address(update.second.values),
        _address(update.second.scale),
        *update.numbers,
        update.seed,
        update.number,
        update.step,
    )
    bounds = [num_tiles * i // num_threads for i in range(num_threads + 1)]
    pieces = [
        (bounds[i], bounds[i + 1], *shared, scratch[i].data_ptr()) for i in range(num_threads)
    ]
    run_in_threads(kernel, pieces)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


_kernel: tuple[Callable[..., None], int, int] | None = None


def _compiled() -> tuple[Callable[..., None], int, int]:
    """Return the kernel, its tile's number of elements and how many rows of scratch it needs."""
    global _kernel
    if _kernel is None:
        require_numba("optim", "packlight.optim on the CPU")
        from packlight.optim import cpu_kernel

        _kernel = (cpu_kernel.step_tiles, cpu_kernel.TILE, cpu_kernel.NUM_SCRATCH_ROWS)
    return _kernel


# -- CUDA


def _step_on_cuda(update: Update) -> None:
    try:
        from packlight.optim.cuda_kernel import step_on_cuda
    except ImportError as error:
        raise UnsupportedParameterError(
            update.parameter,
            f"is on CUDA, and its kernel cannot be made: {error}",
            "install the triton that belongs to this torch, or use torch.optim with fused=True",
        ) from error
    step_on_cuda(update)


_KERNELS: dict[str, Callable[[Update], None]] = {"cpu": _step_on_cpu, "cuda": _step_on_cuda}
