"""Checkpoints through torch.distributed.checkpoint: saved by some ranks, loaded by any number.

Each rank writes the rows that are its own; whoever loads reads the rows that it needs, be it on as
many ranks, on others, or in a process that is alone. Names are those of a `state_dict`:
`model.<name>`, `optimizer.state.<name>.<state>`, `optimizer.param_groups.<number>.<setting>`.

A state of a parameter in pieces that has the piece's shape lies as the parameter does; one with a
single dimension (codes and scales of quantized states) goes on from rank to rank; others (a step
counter) are the same on all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from packlight.errors import FormatError, PacklightError, RankError
from packlight.ranks.group import Ranks
from packlight.ranks.pieces import Pieces
from packlight.ranks.sharded import Lying
from packlight.ranks.tensor import plain_names
from packlight.run.checkpoint import generator_states, pack, set_generators, unpack
from packlight.run.piece_of_tensor import PieceOfTensor
from packlight.torch_internals.modules import uncompiled
from packlight.updates.several import parts_of


def save_distributed(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks | None,
    lying: Lying,
    extra: Any,
    writes: Callable[[torch.Tensor], bool] | None = None,
) -> None:
    """Write a checkpoint, all ranks together; it appears whole, or not at all.

    Args:
        directory: of the checkpoint; one that is there is replaced.
        model: parameters in pieces have this rank's.
        optimizer: of the model.
        ranks: None for a process that is alone.
        lying: what is in pieces.
        extra: anything that JSON can hold.
        writes: whether this rank writes a parameter (and its optimizer states) or a buffer; by
            default the first one writes all that is in no pieces.
    """
    rank = 0 if ranks is None else ranks.rank
    content: dict[str, Any] = {
        name: value for name, value in _state(model, optimizer, lying, writes).items()
        if rank == 0 or isinstance(value, PieceOfTensor)
        or (writes is not None and not name.startswith("optimizer.param_groups."))
    }
    generators: dict[str, torch.Tensor] = {}
    content[f"generators.{rank}"] = json.dumps(
        pack(generator_states(), f"generators.{rank}", generators, {})
    )
    content.update(generators)
    if rank == 0:
        content["extra"] = json.dumps(extra)
    temporary = directory.with_name(f".{directory.name}.tmp")
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        directory.parent.mkdir(parents=True, exist_ok=True)
    _wait(ranks)
    _together(ranks, lambda: save(content, checkpoint_id=temporary, **_among(ranks)))
    _wait(ranks)
    if rank == 0:
        old = directory.with_name(f".{directory.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if directory.exists():
            os.replace(directory, old)
        os.replace(temporary, directory)
        shutil.rmtree(old, ignore_errors=True)
    _wait(ranks)


def load_distributed(
    directory: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks | None = None,
    lying: Lying | None = None,
    has: Callable[[torch.Tensor], bool] = lambda _: True,
) -> Any:
    """Put a checkpoint's values into a model and its optimizer, all ranks together.

    Random number generators go on where those of this rank were, if there was such a rank.

    Args:
        directory: of the checkpoint, saved by any number of ranks.
        model: parameters in pieces have this rank's.
        optimizer: of the model.
        ranks: None for a process that is alone.
        lying: what is in pieces.
        has: whether this rank has a parameter at all.

    Returns:
        What was saved as `extra`.

    Raises:
        FormatError: it is no such checkpoint, or one of another model; nothing was changed.
    """
    rank, lying = 0 if ranks is None else ranks.rank, lying or Lying()
    try:
        saved = FileSystemReader(directory).read_metadata().state_dict_metadata
    except (OSError, CheckpointException) as error:
        raise FormatError(f"{directory} is no checkpoint of ranks: {error}") from error
    if "extra" not in saved:
        raise FormatError(f"{directory} is no checkpoint that step.save wrote")
    content = _targets(model, optimizer, lying, saved, has)
    settings = [name for name in saved if name.startswith("optimizer.param_groups.")]
    mine = f"generators.{rank}"
    generators = [name for name in saved if name == mine or name.startswith(f"{mine}.")]
    for name in ("extra", *settings, *generators):
        content[name] = _like(saved[name])
    states = {n: v for n, v in content.items() if n.startswith("optimizer.state.")}
    _together(ranks, lambda: load(content, checkpoint_id=directory, **_among(ranks)))
    names = _names(model)
    for part in parts_of(optimizer):
        for group in part.param_groups:
            for parameter in group["params"]:
                prefix = f"optimizer.state.{names[id(parameter)]}."
                state = {
                    name.removeprefix(prefix): _plain(content[name])
                    for name in states if name.startswith(prefix)
                }
                if state:
                    part.state[parameter] = state
    for number, group in enumerate(_groups(optimizer)):
        prefix = f"optimizer.param_groups.{number}."
        group.update(
            (name.removeprefix(prefix), content[name])
            for name in settings if name.startswith(prefix)
        )
    if mine in content:
        tensors = {name: content[name] for name in generators if name != mine}
        set_generators(unpack(json.loads(content[mine]), tensors))
    return json.loads(content["extra"])


def _targets(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lying: Lying,
    saved: Mapping[str, Any],
    has: Callable[[torch.Tensor], bool],
) -> dict[str, Any]:
    """Return what is to be read: the model's tensors, and states as they were saved."""
    everything = _model_state(model, lying)
    missing = [name for name in everything if name not in saved]
    strange = [n for n in saved if n.startswith("model.") and n not in everything]
    content: dict[str, Any] = _model_state(model, lying, has)
    other = [
        name for name, value in content.items()
        if name in saved and tuple(saved[name].size) != tuple(value.size())
    ]
    for wrong, words in (
        (missing, "it has no"), (strange, "the model has no"), (other, "of another shape is")
    ):
        if wrong:
            raise FormatError(
                f"the checkpoint is of another model: {words} {wrong[0].removeprefix('model.')!r}"
                f" ({len(wrong)} such)"
            )
    names = _names(model)
    for group in _groups(optimizer):
        for parameter in group["params"]:
            prefix = f"optimizer.state.{names[id(parameter)]}."
            pieces = lying.states.get(parameter)
            if not has(parameter) or (pieces is not None and not pieces.num_rows(lying.rank)):
                continue  # all of it is another rank's
            for name in (name for name in saved if name.startswith(prefix)):
                content[name] = _state_like(saved[name], parameter, lying)
    return content


def _state(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    lying: Lying,
    writes: Callable[[torch.Tensor], bool] | None,
) -> dict[str, Any]:
    content: dict[str, Any] = _model_state(model, lying, writes)
    names = _names(model)
    for number, group in enumerate(_groups(optimizer)):
        for name, value in group.items():
            if name != "params":
                content[f"optimizer.param_groups.{number}.{name}"] = value
    for part in parts_of(optimizer):
        for parameter, state in part.state.items():
            for name, value in state.items() if writes is None or writes(parameter) else ():
                key = f"optimizer.state.{names[id(parameter)]}.{name}"
                content[key] = _state_as_it_lies(value, parameter, lying)
    return content


def _model_state(
    model: nn.Module, lying: Lying, which: Callable[[torch.Tensor], bool] | None = None
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    model, plain = uncompiled(model), plain_names(uncompiled(model))
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            raise FormatError(f"{name!r} of the model's state_dict is no tensor")
        if which is not None and not which(value):
            continue
        pieces = lying.values.get(value) if isinstance(value, nn.Parameter) else None
        content[f"model.{plain.get(name, name)}"] = _rows(value, value, pieces, lying)
    return content


def _rows(
    value: torch.Tensor, parameter: torch.Tensor, pieces: Pieces | None, lying: Lying
) -> torch.Tensor:
    """Return what this rank has of a tensor that lies as a parameter does."""
    part = lying.parts.get(parameter) if isinstance(parameter, nn.Parameter) else None
    first = 0 if pieces is None else pieces.rows[lying.rank][0]
    if part is not None:
        return PieceOfTensor.of_part(value, part, first)
    return value.detach() if pieces is None else PieceOfTensor.of(value, pieces.shape, first)


def _state_as_it_lies(value: Any, parameter: torch.Tensor, lying: Lying) -> Any:
    pieces = lying.states.get(parameter) if isinstance(parameter, nn.Parameter) else None
    is_part = isinstance(parameter, nn.Parameter) and parameter in lying.parts
    if not isinstance(value, torch.Tensor) or value.ndim == 0 or not (pieces or is_part):
        return value
    if value.shape == _own_shape(parameter, pieces, lying):
        return _rows(value, parameter, pieces, lying)
    if is_part:
        raise FormatError(
            f"an optimizer state of shape {tuple(value.shape)} of a part of a weight of shape "
            f"{tuple(parameter.shape)} cannot be saved: where it lies in the whole one's is not "
            "known\nhint: states of the shape of their parameters can"
        )
    assert pieces is not None
    return _cut(value, pieces, lying.rank)


def _own_shape(
    parameter: torch.Tensor, pieces: Pieces | None, lying: Lying
) -> tuple[int, ...]:
    """Return the shape of what this rank updates of a parameter."""
    if pieces is None:
        return tuple(parameter.shape)
    return pieces.num_rows(lying.rank), *pieces.shape[1:]


def _cut(value: torch.Tensor, pieces: Pieces, rank: int) -> PieceOfTensor:
    """Return a state of another shape than its piece's as a part of the whole parameter's."""
    own = (pieces.num_rows(rank), *pieces.shape[1:])
    mine, all_of_it = pieces.num_elements(rank), sum(map(pieces.num_elements, _ranks_of(pieces)))
    if mine == all_of_it:  # the owner of all
        return PieceOfTensor.of(value, tuple(value.shape), 0)
    if value.ndim != 1:
        raise FormatError(
            f"an optimizer state of shape {tuple(value.shape)} of a piece of shape {own} cannot be "
            "saved: where it lies in the whole parameter's is not known"
        )
    before = sum(pieces.num_elements(other) for other in range(rank))
    # Quantized states: as many of each as elements, or as blocks of them.
    is_last = before + mine == all_of_it
    each = _elements_of_each(pieces, rank, value.numel())
    whole = -(-all_of_it // each) if not is_last else before // each + value.numel()
    return PieceOfTensor.of(value, (whole,), before // each)


def _elements_of_each(pieces: Pieces, rank: int, count: int) -> int:
    """Return how many elements one of `count` values stands for: a power of two."""
    each = 1
    while -(-pieces.num_elements(rank) // each) > count:
        each *= 2
    return each


def _state_like(saved: Any, parameter: nn.Parameter, lying: Lying) -> Any:
    """Return what a saved state is read into."""
    pieces, part, rank = lying.states.get(parameter), lying.parts.get(parameter), lying.rank
    if not (pieces or part) or not isinstance(saved, TensorStorageMetadata) or not saved.size:
        return _like(saved)
    shape, dtype = tuple(saved.size), saved.properties.dtype
    whole = part.shape if part else pieces.shape if pieces else ()
    if shape == whole:
        own = parameter.new_empty(_own_shape(parameter, pieces, lying), dtype=dtype)
        return _rows(own, parameter, pieces, lying)
    if part is not None or pieces is None:
        raise FormatError(
            f"an optimizer state of shape {shape} cannot be read into a part of a weight of shape "
            f"{whole}"
        )
    total = sum(map(pieces.num_elements, _ranks_of(pieces)))
    if pieces.num_elements(rank) == total:
        return PieceOfTensor.of(parameter.new_empty(shape, dtype=dtype), shape, 0)
    each = 1
    while -(-total // each) > shape[0]:
        each *= 2
    first = sum(pieces.num_elements(other) for other in range(rank)) // each
    own = parameter.new_empty(-(-pieces.num_elements(rank) // each), dtype=dtype)
    return PieceOfTensor.of(own, shape, first)


def _ranks_of(pieces: Pieces) -> range:
    return range(len(pieces.rows))


def _like(saved: Any) -> Any:
    """Return what a saved value is read into."""
    if isinstance(saved, TensorStorageMetadata):
        return torch.empty(saved.size, dtype=saved.properties.dtype)
    return None


def _plain(value: Any) -> Any:
    return value.plain if isinstance(value, PieceOfTensor) else value


def _names(model: nn.Module) -> dict[int, str]:
    model, plain = uncompiled(model), plain_names(uncompiled(model))
    return {id(p): plain.get(name, name) for name, p in model.named_parameters()}


def _groups(optimizer: torch.optim.Optimizer) -> Iterable[dict[str, Any]]:
    return (group for part in parts_of(optimizer) for group in part.param_groups)


def _among(ranks: Ranks | None) -> dict[str, Any]:
    return {"no_dist": True} if ranks is None else {"process_group": ranks.group}


def _together(ranks: Ranks | None, do: Callable[[], Any]) -> None:
    """Have torch's checkpoints do something on all ranks, and none wait for one that is gone.

    Raises:
        RankError: another rank is gone.
    """
    try:
        with _quiet(ranks):
            do()
        return
    except RuntimeError as error:  # of the network: all else is gathered, and on all ranks alike
        if ranks is None or isinstance(error, PacklightError):
            raise
        lost = RankError(
            "another rank is gone, or has left, while a checkpoint was written or read\n"
            f"  {str(error).partition(chr(10))[0]}\nhint: the checkpoint before is whole"
        )
    # Behind the exception, whose traceback holds on to the connections.
    ranks.leave(lost)
    raise lost


@contextmanager
def _quiet(ranks: Ranks | None) -> Iterator[None]:
    """Have nobody warned that a process is alone which is."""
    with warnings.catch_warnings():
        if ranks is None:
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _wait(ranks: Ranks | None) -> None:
    if ranks is not None:
        ranks.exchange(0)
