"""The tools, each as the few lines that somebody who uses it writes around the same model."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.common import MEBIBYTE
from tests.models import GPTBlock, make

WIDTH, HEADS, VOCABULARY, LENGTH, BATCH = 768, 12, 8192, 256, 4
LEARNING_RATE = 1e-4

# What a tool reports beside training: see the attributes of `trial.Trial`.
Notes = dict[str, Any]
Train = Callable[[], torch.Tensor]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]  # of parameters


@dataclass(frozen=True)
class Setting:
    """What one trial is run with.

    Attributes:
        depth: number of blocks.
        width: of the stream.
        limit_bytes: what the process may hold; None for no limit.
        spare_bytes: a function of nothing: how much of it is left now.
        directory: on a disk, for whoever offloads.
    """

    depth: int
    width: int
    limit_bytes: int | None
    spare_bytes: Callable[[], int]
    directory: Path


@dataclass(frozen=True)
class Tool:
    """One way to train.

    Attributes:
        name: in results and tables.
        prepare: setting and notes -> a function that trains one step and returns the loss.
        changes: what it changes in the results of training, in words; "" for nothing.
        bytes_per_parameter: about what a block needs, to guess where to begin.
        module: the library that it needs.
    """

    name: str
    prepare: Callable[[Setting, Notes], Train]
    bytes_per_parameter: float
    changes: str = ""
    module: str = "torch"


# -- the model


def build(setting: Setting, dtype: torch.dtype = torch.float32, on_disk: bool = False) -> Any:
    """Return the model, a batch and the loss; the model grows block by block.

    Args:
        setting: of the trial.
        dtype: of the parameters, from the start.
        on_disk: each block's parameters are moved to a file before the next block is made.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model, batch, loss_fn = make(
            "reference_gpt", 0, layers=0, width=setting.width, heads=HEADS, length=LENGTH,
            vocabulary=VOCABULARY, batch_size=BATCH,
        )
        for _ in range(setting.depth):
            model.blocks.append(GPTBlock(setting.width, HEADS, 0.0))  # type: ignore[union-attr, operator]
            if on_disk:
                _to_disk(model.blocks[-1], setting.directory)  # type: ignore[index, arg-type]
    finally:
        torch.set_default_dtype(default)
    return model.train(), batch, loss_fn


def _to_disk(module: nn.Module, directory: Path) -> None:
    """Have parameters memory-mapped from files without a name, which their memory keeps."""
    for parameter in module.parameters():
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            mapped = torch.from_file(
                file.name, shared=True, size=parameter.numel(), dtype=parameter.dtype
            )
        parameter.data = mapped.view_as(parameter).copy_(parameter.data)


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)


def _of_library(module: str, parameters: Any) -> torch.optim.Optimizer:
    library = __import__(module, fromlist=["AdamW8bit"])
    made = library.AdamW8bit(parameters, lr=LEARNING_RATE)
    assert isinstance(made, torch.optim.Optimizer)
    return made


# -- PyTorch


def _eager(
    setting: Setting,
    notes: Notes,
    make_optimizer: MakeOptimizer = _adamw,
    checkpoints: bool = True,
) -> Train:
    model, batch, loss_fn = build(setting)
    if checkpoints:
        _checkpoint_blocks(model)
    optimizer = make_optimizer(model.parameters())

    def step() -> torch.Tensor:
        loss: torch.Tensor = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def _checkpoint_blocks(model: Any) -> None:
    for block in model.blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def _update_in_hooks(
    setting: Setting, notes: Notes, make_optimizer: MakeOptimizer = _adamw
) -> Train:
    """PyTorch's tutorial on fusing the optimizer's step into the backward: one for each tensor."""
    model, batch, loss_fn = build(setting)
    _checkpoint_blocks(model)
    optimizers = {p: make_optimizer([p]) for p in model.parameters()}

    def hook(parameter: torch.Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(hook)

    def step() -> torch.Tensor:
        loss: torch.Tensor = loss_fn(model, batch)
        loss.backward()
        return loss.detach()

    return step


# -- Packlight

# What is the process's and not the step's: captured graphs and plans as Python objects, the heap's
# own accounts. More ways to run the step are looked at where all moves are allowed.
RESERVED_BYTES = {"exact": 32 * MEBIBYTE, "all moves": 64 * MEBIBYTE}
RESERVED_BYTES_PER_BLOCK = 5 * MEBIBYTE // 2


def _packlight(
    setting: Setting,
    notes: Notes,
    is_exact: bool = False,
    optimizer: str = "",
    dtype: torch.dtype = torch.float32,
    offloads: bool = False,
) -> Train:
    import packlight
    from packlight.optim import AdamW8bit, LowBit, adamw
    from packlight.search.words import moves_of

    budget_bytes = None
    if setting.limit_bytes is not None:
        reserved_bytes = RESERVED_BYTES["exact" if is_exact else "all moves"]
        reserved_bytes += RESERVED_BYTES_PER_BLOCK * setting.depth
        budget_bytes = setting.spare_bytes() - reserved_bytes
    notes["budget_bytes"] = budget_bytes
    model, batch, loss_fn = build(setting, dtype, on_disk=offloads)
    updates: torch.optim.Optimizer = _adamw(model.parameters())
    if optimizer == "8bit":
        updates = AdamW8bit(model.parameters(), lr=LEARNING_RATE)
    elif optimizer:
        updates = LowBit(model.parameters(), adamw(LEARNING_RATE), "8bit", weights=optimizer)
    step = packlight.fit(
        model, loss_fn, updates, batch, budget_bytes, progress=False,
        moves=packlight.EXACT_MOVES if is_exact else None,
        offload_directory=setting.directory if offloads else None,
    )
    notes.update(predicted_bytes=step.peak_bytes, moves=moves_of(step.way))
    return functools.partial(step, batch)


_8BIT = "optimizer state in 8 bits"
_BNB = functools.partial(_of_library, "bitsandbytes.optim")
_AO = functools.partial(_of_library, "torchao.optim")

TOOLS = {
    tool.name: tool
    for tool in (
        Tool("plain PyTorch", functools.partial(_eager, checkpoints=False), 24.0),
        Tool("checkpoint per block", _eager, 17.0),
        Tool("checkpoint + update in hooks", _update_in_hooks, 13.0),
        Tool(
            "checkpoint + bitsandbytes 8-bit", functools.partial(_eager, make_optimizer=_BNB),
            11.0, _8BIT, "bitsandbytes",
        ),
        Tool(
            "checkpoint + torchao 8-bit", functools.partial(_eager, make_optimizer=_AO),
            11.0, _8BIT, "torchao",
        ),
        Tool(
            "checkpoint + update in hooks + bitsandbytes 8-bit",
            functools.partial(_update_in_hooks, make_optimizer=_BNB), 6.6, _8BIT, "bitsandbytes",
        ),
        Tool("Packlight, exact", functools.partial(_packlight, is_exact=True), 12.5),
        Tool("Packlight, all moves", _packlight, 12.5, "order of sums"),
        Tool(
            "Packlight, 8-bit state", functools.partial(_packlight, optimizer="8bit"), 6.4,
            f"order of sums, {_8BIT}", "numba",
        ),
        Tool(
            "Packlight, 8-bit state, bf16 weights",
            functools.partial(
                _packlight, optimizer="bf16-stochastic", dtype=torch.bfloat16
            ),
            4.4, f"{_8BIT}; all else in bf16, rounded stochastically", "numba",
        ),
        Tool(
            "Packlight, exact, offload to disk",
            functools.partial(_packlight, is_exact=True, offloads=True), 3.0,
        ),
    )
}
