"""A model with sparse weights as a small file that needs nothing of Packlight to be read.

A safetensors file with the model's `state_dict`: of a sparse weight `<layer>.weight.values` and
`<layer>.weight.index` (uint8). The header's entry "sparse" is JSON: the shape of each such weight.
The index is described in `packlight.sparse.pattern`; written out with numpy, a weight is

    rows, columns = shape[0], prod(shape[1:])
    counts = index[: rows * ceil(columns / 255)].reshape(rows, -1)
    starts = rows_of_counts * columns + blocks_of_counts * 255
    dense.flat[repeat(starts, counts) + index[counts.size :]] = values
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from packlight.errors import FormatError
from packlight.sparse import pattern
from packlight.sparse.weight import SparseWeight

_FORMAT = "packlight-sparse"


def save_compact(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's parameters and buffers to a safetensors file, sparse weights as they are.

    Args:
        model: any, with sparse weights or without.
        path: of the file.
    """
    shapes = {
        name: list(module.shape)
        for name, module in model.named_modules()
        if isinstance(module, SparseWeight)
    }
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    same: dict[str, str] = {}
    for name, tensor in model.state_dict().items():
        first = seen.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
        if first != name and tensors[first].shape == tensor.shape:  # shared weights are there once
            same[name] = first
        else:
            tensors[name] = tensor.contiguous()
    metadata = {"format": _FORMAT, "sparse": json.dumps(shapes), "same": json.dumps(same)}
    save_file(tensors, path, metadata=metadata)


def load_compact(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """Return the dense `state_dict` of a file that `save_compact` wrote.

    Raises:
        FormatError: it is another kind of file.
        SparsePatternError: an index that does not fit its weight.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise FormatError(f"{os.fspath(path)} was not written by packlight.sparse")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{os.fspath(path)} cannot be read: {error}") from error
    same: dict[str, Any] = json.loads(metadata["same"])
    tensors |= {name: tensors[first] for name, first in same.items()}
    for name, shape in json.loads(metadata["sparse"]).items():
        values, index = tensors.pop(f"{name}.values"), tensors.pop(f"{name}.index")
        # What the method remembers for each value is for training.
        for other in [key for key in tensors if key.startswith(f"{name}.")]:
            del tensors[other]
        pattern.check_pattern(name, values, index, shape)
        weight = SparseWeight(values, pattern.decode(index, shape), shape)
        tensors[name] = weight.dense()
    return tensors
