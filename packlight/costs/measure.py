"""What one ATen call costs on the real device: seconds, workspace, and which storages it makes.

Each call is run on real tensors of the traced shapes, strides and dtypes, one call at a time, so
measuring never needs more memory than the largest single operation. Whether an output is a view,
how large its storage is and whether the call may run in place are observed, not looked up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from packlight.costs.made_up import (
    Fill,
    constant,
    fillings,
    made_up,
    spanned_bytes,
    tensor_arguments,
)
from packlight.costs.peak import allocator_peak
from packlight.errors import UnsupportedModelError
from packlight.torch_internals.dispatch import outside_of_tracing
from packlight.torch_internals.storages import storage_identity

# A call is timed until it ran so often, or once it took so long in all.
MAX_REPEATS = 12
SECONDS_PER_CALL_SITE = 0.04
# Calls that take longer are not repeated: what is set up once is a small part of them, and times
# inside the step, which count more, are still to come.
SLOW_SECONDS = 0.1
# Row-wise kernels that read all of a row before they write it. Whether one really may run in place
# is still checked, bit by bit, on the device (see `_in_place_argument`).
_ROW_WISE = ("_softmax", "_log_softmax", "_softmax_backward_data", "_log_softmax_backward_data")
# The namespace of operators that are several calls in one kernel (kernels/kernel.py).
FUSED_NAMESPACE = "packlight_fused"
# Kernels that add to their first argument, and so may add to it where it is.
_ACCUMULATING = ("addmm", "index_add")


@dataclass(frozen=True, slots=True)
class OutputFacts:
    """One tensor that a call returns.

    Attributes:
        alias_of: index (among the call's tensor arguments) of the argument whose storage it shares.
        same_storage_as: index of an earlier output with the same storage.
        storage_bytes: size of its storage as the allocator counts it.
        dtype: its name in torch; "" where it was not looked at.
        stride: of the tensor; None where it was not looked at.
    """

    alias_of: int | None
    same_storage_as: int | None
    storage_bytes: int
    dtype: str = ""
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class CallFacts:
    """What was observed when a call ran.

    Attributes:
        seconds: median duration, alone and warm.
        workspace_bytes: the most that it held beyond the storages that it returned.
        outputs: facts of each tensor that it returns, in order, nested lists flattened.
        in_place: index (among the call's tensor arguments) of the argument that it may overwrite.
        in_step_seconds: median duration inside a training step, once one was rehearsed.
        missing: places among its results (flattened) where it returns nothing: gradients that it
            was told to leave out, for which fake kernels may return tensors all the same.
    """

    seconds: float
    workspace_bytes: int
    outputs: tuple[OutputFacts, ...]
    in_place: int | None
    in_step_seconds: float | None = None
    missing: tuple[int, ...] = ()

    @property
    def expected_seconds(self) -> float:
        """The best estimate of the call's duration in a step."""
        return self.seconds if self.in_step_seconds is None else self.in_step_seconds

    @property
    def is_view(self) -> bool:
        """Whether the call allocates nothing that it returns."""
        return bool(self.outputs) and all(o.alias_of is not None for o in self.outputs)


@contextmanager
def real_tensors() -> Iterator[None]:
    """Leave every tracing mode: inside a compile call, tensors made here are real ones."""
    with (
        outside_of_tracing(),
        torch.no_grad(),
        torch.amp.autocast("cpu", enabled=False),
        _preserved_generators(),
    ):
        yield


@contextmanager
def _preserved_generators() -> Iterator[None]:
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def call_signature(target: torch._ops.OpOverload, args: Any, kwargs: Any) -> str:
    """Return a text that is equal for two calls that cost the same.

    It names the operator, every literal argument, and dtype, shape, stride and device of every
    tensor; its storage's size where it is a part of that, and whether it is lazily conjugated or
    negated. Arguments that are one and the same tensor are told from equal ones.
    """
    seen: dict[int, int] = {}

    def describe(value: Any) -> str:
        if isinstance(value, torch.Tensor):
            order = seen.setdefault(id(value), len(seen))
            shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
            num_bytes = int(value.untyped_storage().nbytes())
            is_part = num_bytes > spanned_bytes(shape, stride, value.dtype)
            part = f"of{num_bytes}" if is_part else ""
            lazy = "*" * value.is_conj() + "-" * value.is_neg()
            return f"{order}:{value.dtype}{shape}{stride}{part}{lazy}@{value.device}"
        if isinstance(value, (list, tuple)):
            return f"[{','.join(map(describe, value))}]"
        return repr(value)

    named = (f"{name}={describe(value)}" for name, value in kwargs.items())
    return f"{target}({','.join((*map(describe, args), *named))})"


def observe_call(target: torch._ops.OpOverload, args: Any, kwargs: Any) -> CallFacts:
    """Run a call on made-up tensors like its (fake) arguments and return what was seen.

    Args:
        target: the operator.
        args: its positional arguments; tensors may be fake, only their metadata is used.
        kwargs: its keyword arguments, likewise.

    Integer tensors are zeros, which every indexing operator accepts; where zeros are refused
    (a division, lengths of parts), others are tried.
    """
    error: Exception | None = None
    for fill in fillings(args, kwargs):
        try:
            with real_tensors():
                return _observe(target, args, kwargs, fill)
        except (RuntimeError, IndexError, ZeroDivisionError) as caught:
            error = error or caught
    assert error is not None
    raise error


def _observe(target: torch._ops.OpOverload, args: Any, kwargs: Any, fill: Fill) -> CallFacts:
    if any(result.alias_info is not None for result in target._schema.returns):
        # What looks at its arguments' memory and nowhere else does not read what is in there.
        empty_args, empty_kwargs = made_up(args, kwargs, None)
        inputs = tensor_arguments(empty_args, empty_kwargs)
        result = target(*empty_args, **empty_kwargs)
        outputs = _output_facts(result, inputs, _device_of(inputs, kwargs))
        if outputs and all(o.alias_of is not None for o in outputs):
            return CallFacts(0.0, 0, outputs, None)
    real_args, real_kwargs = made_up(args, kwargs, fill)
    inputs = tensor_arguments(real_args, real_kwargs)
    device = _device_of(inputs, kwargs)

    def call() -> Any:
        return target(*real_args, **real_kwargs)

    begin = time.perf_counter()
    result, high_bytes, _ = allocator_peak(call, device)
    first_seconds = time.perf_counter() - begin
    outputs = _output_facts(result, inputs, device)
    created = sum(
        o.storage_bytes for o in outputs if o.alias_of is None and o.same_storage_as is None
    )
    is_view = bool(outputs) and all(o.alias_of is not None for o in outputs)
    leaves = pytree.tree_leaves(result)
    missing = tuple(place for place, leaf in enumerate(leaves) if leaf is None)
    del result, leaves
    if is_view:
        return CallFacts(0.0, 0, outputs, None)
    if high_bytes > created:  # what is set up once (library handles, tables) is not workspace
        high_bytes = allocator_peak(call, device)[1]
    is_slow = first_seconds > SLOW_SECONDS and device.type == "cpu"
    seconds = first_seconds if is_slow else median_seconds(call, device)
    in_place = None
    if (len(outputs) == 1 or target.namespace == FUSED_NAMESPACE) and created > 0:
        in_place = _in_place_argument(target, args, kwargs, device)
    workspace_bytes = max(0, high_bytes - created)
    return CallFacts(seconds, workspace_bytes, outputs, in_place, missing=missing)


def _device_of(inputs: list[torch.Tensor], kwargs: Any) -> torch.device:
    for tensor in inputs:
        if tensor.device.type != "cpu":
            return tensor.device
    return torch.device(kwargs.get("device") or "cpu")


def _output_facts(
    result: Any, inputs: list[torch.Tensor], device: torch.device
) -> tuple[OutputFacts, ...]:
    input_storages = {storage_identity(t): i for i, t in reversed(list(enumerate(inputs)))}
    seen: dict[int, int] = {}
    facts = []
    tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    for index, tensor in enumerate(tensors):
        if tensor.layout is not torch.strided:
            raise UnsupportedModelError(
                f"a tensor of layout {tensor.layout} and shape {tuple(tensor.shape)} has no "
                "storage whose bytes could be planned\n"
                "hint: nn.Embedding(..., sparse=False) and dense tensors can be"
            )
        storage = storage_identity(tensor)
        same = seen.get(storage)
        seen.setdefault(storage, index)
        size = allocated_bytes(tensor.untyped_storage().nbytes(), tensor.device)
        dtype = str(tensor.dtype).removeprefix("torch.")
        alias_of = input_storages.get(storage)
        facts.append(OutputFacts(alias_of, same, size, dtype, tuple(tensor.stride())))
    return tuple(facts)


def allocated_bytes(num_bytes: int, device: torch.device) -> int:
    """Return what the device's allocator counts for a storage of so many bytes."""
    return -(-num_bytes // 512) * 512 if device.type == "cuda" else num_bytes


def median_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Return the median duration of a few runs of `call()`, of one run if that takes long."""
    samples: list[float] = []
    while not samples or (len(samples) < MAX_REPEATS and sum(samples) < SECONDS_PER_CALL_SITE):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            torch.cuda.synchronize(device)
            samples.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


# ---------------------------------------------------------------------------------------------
# In place


def in_place_call(
    target: torch._ops.OpOverload, tensor_index: int, num_args: int
) -> tuple[torch._ops.OpOverload, str | None] | None:
    """Return the overload of an operator that writes into one of its inputs.

    Args:
        target: the functional operator.
        tensor_index: which tensor argument to overwrite.
        num_args: how many positional arguments the call has.

    Returns:
        (overload, keyword that takes the output), keyword None for `add_`-like calls that write
        into their first argument; None where there is no such overload.
    """
    if target.namespace not in ("aten", FUSED_NAMESPACE):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), target._schema.name.split("::")[1])
    names = [a.name for a in target._schema.arguments]
    types = [str(a.type) for a in target._schema.arguments]
    if tensor_index == 0 and num_args > 0 and target.namespace == "aten":
        inplace = getattr(torch.ops.aten, packet.__name__ + "_", None)
        candidate = getattr(inplace, target._overloadname, None) if inplace is not None else None
        if candidate is not None and [a.name for a in candidate._schema.arguments] == names:
            return candidate, None
    for overload_name in packet.overloads():
        candidate = getattr(packet, overload_name)
        extra = [a for a in candidate._schema.arguments if a.is_out]
        plain = [a for a in candidate._schema.arguments if not a.is_out]
        if len(extra) == 1 and [a.name for a in plain] == names:
            if [str(a.type) for a in plain] == types:
                return candidate, extra[0].name
    return None


def _in_place_argument(
    target: torch._ops.OpOverload, args: Any, kwargs: Any, device: torch.device
) -> int | None:
    """Return the tensor argument that the call may overwrite with bit-identical results, if any."""
    name = target._schema.name.split("::")[1]
    is_known = torch.Tag.pointwise in target.tags or name in (*_ROW_WISE, *_ACCUMULATING)
    if not is_known and target.namespace != FUSED_NAMESPACE:
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    num_tensors = len(tensor_arguments(args, kwargs))
    for index in range(1 if name in _ACCUMULATING else num_tensors):
        found = in_place_call(target, index, len(args))
        if found is None:
            continue
        real_args, real_kwargs = made_up(args, kwargs, constant(1), random=True)
        inputs = tensor_arguments(real_args, real_kwargs)
        victim = inputs[index]
        if sum(t is victim for t in inputs) > 1:
            continue
        try:
            expected = _tensors(target(*real_args, **real_kwargs))
            fits = _same_rows if target.namespace == FUSED_NAMESPACE else _same_layout
            if not fits(expected[0], victim):
                continue
            overload, keyword = found
            out = {} if keyword is None else {keyword: victim}

            def call(
                overload: Any = overload, out: Any = out, a: Any = real_args, k: Any = real_kwargs
            ) -> Any:
                return overload(*a, **k, **out)

            result, high_bytes, _ = allocator_peak(call, device)
        except (RuntimeError, NotImplementedError):
            continue
        written = _tensors(result)
        is_cheaper = high_bytes < sum(t.untyped_storage().nbytes() for t in expected)
        shares = storage_identity(written[0]) == storage_identity(victim)
        if is_cheaper and shares and all(map(same_bits, written, expected)):
            return index
    return None


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _same_layout(expected: torch.Tensor, victim: torch.Tensor) -> bool:
    return (
        expected.dtype == victim.dtype
        and expected.shape == victim.shape
        and expected.stride() == victim.stride()
        and expected.device == victim.device
        and expected.untyped_storage().nbytes() == victim.untyped_storage().nbytes()
    )


def _same_rows(expected: torch.Tensor, victim: torch.Tensor) -> bool:
    """Whether two tensors have the same layout, perhaps but for the dims that rows are cut into."""
    if expected.is_contiguous() and victim.is_contiguous():
        expected, victim = expected.view(-1), victim.view(-1)
    return _same_layout(expected, victim)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one dtype agree in shape and in every bit, NaNs and -0.0 included."""
    if a.dtype.is_complex:
        return torch.equal(torch.view_as_real(a), torch.view_as_real(b))
    if a.dtype.is_floating_point and a.dtype.itemsize in (2, 4, 8):
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
        return torch.equal(a.view(integer), b.view(integer))
    return torch.equal(a, b)
