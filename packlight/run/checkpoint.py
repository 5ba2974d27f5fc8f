"""Checkpoints of a training run: one safetensors file each, written atomically, resumed to the bit.

A checkpoint holds the model's `state_dict`, the optimizer's, every random number generator (torch
on CPU and CUDA, Python, numpy) and what the caller wants to find again (the step, the position in
the data). Tensors are stored as they are; all else is JSON in the file's header. A SHA-256 digest
over both tells a damaged file from a good one before anything in the model is touched.

A file appears under its name complete or not at all: it is written beside, flushed to the disk and
renamed. The last two are kept, so a file that goes bad later leaves one to go back to.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from packlight.errors import FormatError, PacklightError
from packlight.torch_internals.modules import uncompiled
from packlight.units import format_bytes

VERSION = 1
NUM_KEPT = 2

_NAME = re.compile(r"step-(\d{8,})\.safetensors")
_REFERENCE = "$tensor"


def save_checkpoint(
    directory: str | Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    extra: Mapping[str, Any] | None = None,
    num_kept: int = NUM_KEPT,
    generators: Sequence[Any] | None = None,
) -> Path:
    """Write `step-<step>.safetensors` and return its path; older files beyond `num_kept` go.

    Args:
        directory: created if it does not exist.
        model: its `state_dict` is saved; tensors that share memory (tied weights) are saved once.
        optimizer: its `state_dict` is saved.
        step: number of steps done; part of the file's name.
        extra: anything that JSON can hold, returned by `read_checkpoint`.
        num_kept: how many checkpoints stay in the directory, this one included.
        generators: of every rank, from `generator_states`; by default this process's.

    Raises:
        PacklightError: the file cannot be written; the checkpoints that are there stay as they are.

    Cost: one pass over the tensors for the digest and one to write them; contiguous tensors on the
    CPU are not copied.
    """
    directory = Path(directory)
    tensors: dict[str, torch.Tensor] = {}
    first, *others = generators or [generator_states()]
    state = {
        "step": step,
        "extra": dict(extra or {}),
        "model": pack(uncompiled(model).state_dict(), "model", tensors, {}),
        "optimizer": pack(optimizer.state_dict(), "optimizer", tensors, {}),
        "optimizer_class": type(optimizer).__name__,
        "rng": pack(first, "rng", tensors, {}),
        "rng_of_others": pack(others, "rng_of_others", tensors, {}),
    }
    state_json = json.dumps(state, sort_keys=True)
    metadata = {
        "format": "packlight-checkpoint",
        "version": str(VERSION),
        "state": state_json,
        "sha256": _digest(tensors, state_json),
    }
    path = directory / f"step-{step:08d}.safetensors"
    temporary = directory / f".{path.name}.tmp"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for leftover in directory.glob(".step-*.safetensors.tmp"):
            leftover.unlink()
        save_file(tensors, temporary, metadata=metadata)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(directory)
        for _, old in _numbered(directory)[num_kept:]:
            if old != path:
                old.unlink()
    except (OSError, SafetensorError) as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise PacklightError(
            f"cannot write the checkpoint {path}: {error}\n"
            f"  it needs {format_bytes(needed)}{_free_space(directory)}; "
            "checkpoints written before are intact"
        ) from error
    finally:
        if temporary.exists():
            temporary.unlink()
    return path


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and found whole.

    Attributes:
        path: where it was.
        step: number of steps done when it was written.
        extra: what the caller of `save_checkpoint` added.
    """

    path: Path
    step: int
    extra: dict[str, Any]
    _state: dict[str, Any]
    _tensors: dict[str, torch.Tensor]

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put the saved values into a model and its optimizer, which keep their own tensors' place.

        Raises:
            FormatError: the checkpoint is of another model or optimizer; neither was changed.
        """
        model = uncompiled(model)
        saved_model = unpack(self._state["model"], self._tensors)
        saved_optimizer = unpack(self._state["optimizer"], self._tensors)
        self._check_model(saved_model, model.state_dict())
        self._check_optimizer(saved_optimizer, optimizer)
        model.load_state_dict(saved_model)
        optimizer.load_state_dict(saved_optimizer)
        _undo_casts(saved_optimizer, optimizer)

    def restore_rng(self, rank: int = 0) -> None:
        """Set every random number generator to where it was when the checkpoint was written.

        Call it last, right before the next step: building and planning a model may draw numbers.

        Args:
            rank: whose generators; those of a rank that there was not stay as they are.
        """
        others = unpack(self._state.get("rng_of_others", []), self._tensors)
        if rank > len(others):
            return
        set_generators([unpack(self._state["rng"], self._tensors), *others][rank])

    def _check_model(self, saved: dict[str, Any], current: dict[str, Any]) -> None:
        problems = [f"the model has no {name!r}" for name in saved if name not in current]
        problems += [f"the checkpoint has no {name!r}" for name in current if name not in saved]
        for name in saved.keys() & current.keys():
            ours, theirs = current[name], saved[name]
            if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
                if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                    problems.append(
                        f"{name!r} is {_shape(theirs)} in the checkpoint, "
                        f"{_shape(ours)} in the model"
                    )
        self._refuse(problems, "model")

    def _check_optimizer(self, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        problems = []
        if self._state["optimizer_class"] != type(optimizer).__name__:
            problems.append(
                f"saved from {self._state['optimizer_class']}, not {type(optimizer).__name__}"
            )
        theirs = [len(group["params"]) for group in saved["param_groups"]]
        ours = [len(group["params"]) for group in optimizer.param_groups]
        if theirs != ours:
            problems.append(f"parameter groups of {theirs} tensors in the checkpoint, {ours} here")
        self._refuse(problems, "optimizer")

    def _refuse(self, problems: list[str], of_what: str) -> None:
        if problems:
            more = f"\n  and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise FormatError(
                f"the checkpoint {self.path} is of another {of_what}:\n  "
                + "\n  ".join(problems[:3])
                + more
            )


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Return a checkpoint after checking every byte of it.

    Raises:
        FormatError: the file is damaged, is no checkpoint of Packlight, or is of another version.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FormatError(f"the checkpoint {path} cannot be read: {error}") from error
    if metadata.get("format") != "packlight-checkpoint":
        raise FormatError(f"{path} is a safetensors file, but no checkpoint of Packlight")
    if metadata.get("version") != str(VERSION):
        raise FormatError(
            f"the checkpoint {path} has version {metadata.get('version')}; "
            f"this release reads version {VERSION}"
        )
    state_json = metadata.get("state", "")
    if metadata.get("sha256") != _digest(tensors, state_json):
        raise FormatError(f"the checkpoint {path} is damaged: its digest does not match")
    state = json.loads(state_json)
    return Checkpoint(path, state["step"], state["extra"], state, tensors)


def newest_checkpoint(directory: str | Path) -> Checkpoint | None:
    """Return the newest checkpoint of a directory, or None where there is none.

    Raises:
        FormatError: the newest one is damaged. Going back is the user's choice, so the error names
            the newest one that is whole instead of loading it.
    """
    numbered = _numbered(Path(directory))
    if not numbered:
        return None
    (_, newest), *older = numbered
    try:
        return read_checkpoint(newest)
    except FormatError as error:
        hint = "no older checkpoint is left; start again with an empty directory"
        for step, path in older:
            try:
                read_checkpoint(path)
            except FormatError:
                continue
            hint = f"{path} is whole: delete {newest.name} to resume from step {step}"
            break
        raise FormatError(f"{error}\nhint: {hint}") from error


def _numbered(directory: Path) -> list[tuple[int, Path]]:
    """Return (step, path) of the checkpoints of a directory, newest first."""
    if not directory.is_dir():
        return []
    matches = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted(((int(m.group(1)), path) for m, path in matches if m), reverse=True)


def pack(
    value: Any, name: str, tensors: dict[str, torch.Tensor], seen: dict[Any, str]
) -> Any:
    """Return a value as JSON can hold it; its tensors go to `tensors`, shared ones once."""
    if isinstance(value, torch.Tensor):
        return _pack_tensor(value.detach(), name, tensors, seen)
    if isinstance(value, Mapping):
        items = [
            [key, pack(item, f"{name}.{key}", tensors, seen)] for key, item in value.items()
        ]
        return {"$items": items}
    if isinstance(value, (tuple, list)):
        packed = [pack(item, f"{name}.{i}", tensors, seen) for i, item in enumerate(value)]
        return {"$tuple": packed} if isinstance(value, tuple) else packed
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PacklightError(
        f"a checkpoint cannot hold {name}: it is a {type(value).__name__}, "
        "not a tensor, number, string, list, tuple or dict"
    )


def _pack_tensor(
    tensor: torch.Tensor, name: str, tensors: dict[str, torch.Tensor], seen: dict[Any, str]
) -> dict[str, Any]:
    storage = tensor.untyped_storage()
    place = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
    identity = (*place, tensor.dtype, tensor.device)
    reference: dict[str, Any] = {_REFERENCE: seen.get(identity, name)}
    if not tensor.is_contiguous():
        # The layout (channels_last, say) comes back too, so a resumed run uses the same kernels.
        reference["stride"] = list(torch.empty_like(tensor, device="meta").stride())
    if reference[_REFERENCE] == name:
        if tensor.numel():
            seen[identity] = name
        content = tensor.cpu().contiguous()
        if content.untyped_storage().nbytes() != content.nbytes:
            content = content.clone()
        tensors[name] = content
    return reference


def unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return what `pack` was given."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if isinstance(value, dict) and _REFERENCE in value:
        content = tensors[value[_REFERENCE]]
        # A copy: what safetensors hands out is a window into the file.
        copy = torch.empty_strided(
            content.shape, value.get("stride", content.stride()), dtype=content.dtype
        )
        return copy.copy_(content)
    if isinstance(value, dict) and "$tuple" in value:
        return tuple(unpack(item, tensors) for item in value["$tuple"])
    if isinstance(value, dict):
        return {key: unpack(item, tensors) for key, item in value["$items"]}
    return value


def generator_states() -> dict[str, Any]:
    """Return where this process's random number generators are."""
    is_cuda_used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if is_cuda_used else [],
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
    }


def set_generators(rng: dict[str, Any]) -> None:
    """Put this process's random number generators where others were (`generator_states`)."""
    torch.set_rng_state(rng["torch"])
    if rng["cuda"] and torch.cuda.is_available():
        for device, state in enumerate(rng["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state, device)
    random.setstate(rng["python"])
    numpy_state = rng["numpy"]
    numpy_state["state"]["key"] = np.array(numpy_state["state"]["key"], dtype=np.uint32)
    np.random.set_state(numpy_state)


def _undo_casts(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Put back state whose dtype `Optimizer.load_state_dict` cast to that of its parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in saved["param_groups"] for n in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            current = optimizer.state[parameter].get(key)
            if isinstance(value, torch.Tensor) and current.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(current.device)


def _digest(tensors: dict[str, torch.Tensor], state_json: str) -> str:
    digest = hashlib.sha256(state_json.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_space(directory: Path) -> str:
    try:
        return f", {format_bytes(shutil.disk_usage(directory).free)} are free"
    except OSError:
        return ""


def _shape(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
