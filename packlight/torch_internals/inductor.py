"""Inductor: a small graph of ATen calls becomes the source of one compiled function."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

# What the generated function is called in the source.
ENTRY = "call"


def compiler_problem(device: torch.device) -> str | None:
    """Return why nothing can be compiled for a device, None where it can.

    Relied upon: `get_cpp_compiler` finds the C++ compiler or raises; Triton is imported where a GPU
    is compiled for.
    """
    if device.type != "cpu":
        from torch.utils._triton import has_triton

        return None if has_triton() else f"Triton, which compiles for {device.type}, is not here"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        compiler = get_cpp_compiler()
    except Exception as error:  # several kinds, one of them for each way of looking
        return str(error).strip().partition("\n")[0] or type(error).__name__
    if shutil.which(compiler) is None:
        return f"the C++ compiler {compiler!r} was not found"
    return None


def compiled_source(
    function: Callable[..., Sequence[Any]],
    inputs: Sequence[torch.Tensor],
    *,
    rounds_as_eager: bool,
) -> str:
    """Return Python source that defines `call(list of tensors)`, compiled by inductor.

    Args:
        function: of ATen calls; it may write into its arguments (`copy_`), and returns nothing.
        inputs: fake tensors, of a mode without symbols.
        rounds_as_eager: results in 16 bits are rounded wherever a call of eager PyTorch's ends.

    Relied upon: `compile_fx_inner` takes a graph of inductor's operators (as its own decomposition
    table leaves them) and fake inputs; what it returns has the generated Python as `source_code`,
    and tensors that this needs beside its arguments as `constants`. It runs by itself: kernels
    stand in it as text, and are looked up, or compiled, as it is loaded.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    mode: Any = next(t for t in inputs if hasattr(t, "fake_mode"))
    with config.patch({**_settings(), "emulate_precision_casts": rounds_as_eager}), torch.no_grad():
        with mode.fake_mode:
            graph = make_fx(function, decomposition_table=select_decomp_table())(*inputs)
            if not rounds_as_eager:
                joint_graph_passes(graph)
        with tracing(TracingContext(mode.fake_mode)):
            compiled: Any = compile_fx_inner(graph, list(inputs))
    if getattr(compiled, "constants", None):
        raise NotImplementedError("it needs constants beside its arguments")
    source: str = compiled.source_code
    return source


def taken_apart(node: fx.Node) -> fx.GraphModule:
    """Return a call as the simpler calls that inductor makes of it: a graph of its tensors.

    Relied upon: inductor's decomposition table has a function for the operator.
    """
    from torch._inductor.decomposition import select_decomp_table

    table, tensors = select_decomp_table(), node.all_input_nodes

    def function(*values: torch.Tensor) -> Any:
        args, kwargs = fx.map_arg(
            (node.args, dict(node.kwargs)), dict(zip(tensors, values, strict=True)).__getitem__
        )
        return table[node.target](*args, **kwargs)

    values = [tensor.meta["val"] for tensor in tensors]
    with torch.no_grad(), values[0].fake_mode:
        return make_fx(function, decomposition_table=table)(*values)


def _settings() -> dict[str, Any]:
    """Return inductor's settings, the same when source is written and when it is compiled."""
    return {
        "cpp.enable_floating_point_contract_flag": "off",
        "cpp.threads": torch.get_num_threads(),
        "cpp_wrapper": False,
        "compile_threads": 1,
        "fallback_random": True,
        "triton.cudagraphs": False,
        "max_autotune": False,
    }


def loaded(source: str, name: str) -> Callable[[list[Any]], Any]:
    """Return the function that `compiled_source` describes.

    Relied upon: the source is a module whose `call` takes a list, which it empties. On a CPU its
    kernels are looked up in inductor's cache by what is in them, and compiled where they are not.
    """
    from torch._inductor import config

    scope: dict[str, Any] = {"__name__": name}
    with config.patch(_settings()):
        exec(compile(source, name, "exec"), scope)
    call: Callable[[list[Any]], Any] = scope[ENTRY]
    return call

