"""Megatron's split of transformers' models in one line: heads and hidden units lie with ranks.

Of each attention and each MLP the first matrices are cut by columns (of their outputs) and the last
by rows, so that ranks add up once behind each (Shoeybi et al. 2019, arXiv 1909.08053). Embeddings
and norms stay whole, and loss heads if nobody asks for parts.

`SPLITS` says which matrix is which, by the name of the class that has them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from packlight.errors import OptionError, UnsupportedModelError
from packlight.ranks.heads import split_head
from packlight.ranks.tensor import localized


@dataclass(frozen=True)
class Split:
    """How the matrices of a class are cut.

    Attributes:
        columns: by their outputs.
        rows: by their inputs.
        num_blocks: how many matrices lie beside one another in one that is cut by columns; 1 for
            those that are not named.
        inputs: what several matrices read: its gradient is added up once, and not of each of them.
        head_size: the attribute that has the size of a head, which stays whole; "" for no heads.
        counts: attributes that count heads or their features, each rank's then.
    """

    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    num_blocks: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    head_size: str = ""
    counts: tuple[str, ...] = ()


_QKV, _HIDDEN = ("q_proj", "k_proj", "v_proj"), ("hidden_states",)
SPLITS: Mapping[str, Split] = {
    "LlamaAttention": Split(_QKV, ("o_proj",), inputs=_HIDDEN, head_size="head_dim"),
    "LlamaMLP": Split(("gate_proj", "up_proj"), ("down_proj",), inputs=("x",)),
    "GPT2Attention": Split(
        ("c_attn",), ("c_proj",), {"c_attn": 3}, head_size="head_dim",
        counts=("num_heads", "split_size"),
    ),
    "GPT2MLP": Split(("c_fc",), ("c_proj",)),
    "BertSelfAttention": Split(
        ("query", "key", "value"), inputs=_HIDDEN, head_size="attention_head_size",
        counts=("num_attention_heads", "all_head_size"),
    ),
    "BertSelfOutput": Split(rows=("dense",)),
    "BertIntermediate": Split(("dense",)),
    "BertOutput": Split(rows=("dense",)),
    "T5Attention": Split(
        ("q", "k", "v", "relative_attention_bias"), ("o",),
        inputs=("hidden_states", "key_value_states"), head_size="key_value_proj_dim",
        counts=("n_heads", "inner_dim"),
    ),
    "T5DenseActDense": Split(("wi",), ("wo",)),
    "T5DenseGatedActDense": Split(("wi_0", "wi_1"), ("wo",), inputs=_HIDDEN),
    "ViTAttention": Split(
        _QKV, ("o_proj",), inputs=_HIDDEN, head_size="head_dim", counts=("num_attention_heads",)
    ),
    "ViTMLP": Split(("fc1",), ("fc2",)),
}


def megatron(model: nn.Module, mesh: DeviceMesh, *, splits_head: bool = False) -> nn.Module:
    """Give each rank its heads and hidden units of a model of transformers; before an optimizer.

    Known are the layers of Llama, GPT-2, BERT, T5 and ViT, with whatever head. All ranks have to
    have the same model; `fit` then takes the mesh and `Parallel(tensor=...)`.

    Args:
        model: whole; changed in place. Its parameters become each rank's parts (see `localize`).
        mesh: of one dimension: `mesh["tensor"]`.
        splits_head: each rank also has its words of a causal language model's head, which is no
            embedding. The logits that the model returns are those of this rank's words then.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: layers have matrices of which it is not known how they are split, or
            heads and hidden units that these ranks cannot share equally; names all of them, and
            nothing is changed.
        OptionError: the mesh has several dimensions.
    """
    if mesh.ndim != 1:
        raise OptionError(
            f"megatron splits over one dimension, and the mesh has {mesh.ndim}\n"
            "hint: mesh['tensor']"
        )
    found = [*_found(model)]
    _refuse_unknown(model, found)
    _refuse_uneven(found, mesh.size())
    if splits_head:
        split_head(model, mesh)
    num_blocks: dict[str, int] = {}
    for matrix in found:
        matrix.split_over(mesh)
        if matrix.num_blocks > 1:
            num_blocks |= {f"{matrix.path}.{n}": matrix.num_blocks for n in ("weight", "bias")}
    for module in model.modules():
        split = SPLITS.get(type(module).__name__, Split())
        for count in split.counts:
            setattr(module, count, getattr(module, count) // mesh.size())
        if split.inputs:
            _share_inputs(module, mesh, split.inputs)
    return localized(model, num_blocks)


@dataclass(frozen=True)
class _Matrix:
    """A linear layer or embedding that is split.

    Attributes:
        path: in the model.
        module: it.
        by_columns: of its outputs; else by rows.
        num_blocks: of matrices beside one another.
        unit: how many features stay together.
    """

    path: str
    module: nn.Module
    by_columns: bool
    num_blocks: int
    unit: int

    @property
    def num_features(self) -> int:
        """How many there are to share."""
        inputs, outputs = _sizes(self.module)
        return outputs // self.num_blocks if self.by_columns else inputs

    def split_over(self, mesh: DeviceMesh) -> None:
        """Make its parameters DTensors, and have it exchange what it needs."""
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            RowwiseParallel,
            parallelize_module,
        )

        if _is_transposed(self.module):
            _split_transposed(self.module, mesh, self.by_columns, self.num_blocks)
        else:
            style = ColwiseParallel() if self.by_columns else RowwiseParallel()
            parallelize_module(self.module, mesh, style)


def _found(model: nn.Module) -> Iterator[_Matrix]:
    for path, module in model.named_modules():
        split = SPLITS.get(type(module).__name__)
        if split is None:
            continue
        head_size = getattr(module, split.head_size) if split.head_size else 1
        for by_columns, names in ((True, split.columns), (False, split.rows)):
            for name in names:
                matrix = getattr(module, name, None)  # (not every layer has a bias of positions)
                if matrix is not None:
                    unit = 1 if isinstance(matrix, nn.Embedding) else head_size
                    num_blocks = split.num_blocks.get(name, 1) if by_columns else 1
                    yield _Matrix(f"{path}.{name}", matrix, by_columns, num_blocks, unit)


def _refuse_unknown(model: nn.Module, found: list[_Matrix]) -> None:
    """Raise where layers, which stand in a list, have other matrices than those that are split."""
    known = {id(matrix.module) for matrix in found}
    unknown: dict[str, str] = {}
    for path, layers in model.named_modules():
        for name, module in layers.named_modules() if isinstance(layers, nn.ModuleList) else ():
            if _sizes(module) != (0, 0) and id(module) not in known:
                parent = model.get_submodule(f"{path}.{name}".rpartition(".")[0])
                unknown.setdefault(f"{type(parent).__name__}.{name.rpartition('.')[2]}", path)
    if unknown or not found:
        what = ", ".join(unknown) if unknown else "it has no layers that are known"
        raise UnsupportedModelError(
            f"megatron does not know how {type(model).__name__} is split: {what}\n"
            f"hint: known are {', '.join(SPLITS)}; others are split by torch's parallelize_module, "
            "and packlight.localize behind it"
        )


def _refuse_uneven(found: list[_Matrix], num_ranks: int) -> None:
    uneven = [m for m in found if m.num_features % (m.unit * num_ranks)]
    if uneven:
        first = uneven[0]
        what = "heads" if first.unit > 1 else "features"
        raise UnsupportedModelError(
            f"{first.path} has {first.num_features // first.unit} {what}, of which {num_ranks} "
            f"ranks cannot have as many each ({len(uneven)} such matrices)\n"
            "hint: a mesh whose tensor dimension divides them"
        )


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Return how many inputs and outputs a matrix has; of other modules 0."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if _is_transposed(module):
        inputs, outputs = module.weight.shape  # type: ignore[misc]
        return inputs, outputs
    return 0, 0


def _share_inputs(module: nn.Module, mesh: DeviceMesh, names: tuple[str, ...]) -> None:
    """Make inputs DTensors, once: what reads them leaves the sums of their gradients to be made."""
    from torch.distributed.tensor import DTensor, Replicate

    def shared(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
            return value
        return DTensor.from_local(value, mesh, [Replicate()], run_check=False)

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        first = [shared(value) for value in args[:1]]  # the first of the names, where it is there
        kwargs = {k: shared(v) if k in names else v for k, v in kwargs.items()}
        return (*first, *args[1:]), kwargs

    module.register_forward_pre_hook(before, with_kwargs=True)


def _is_transposed(module: nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is (inputs, outputs)."""
    return type(module).__name__ == "Conv1D" and isinstance(module.weight, torch.Tensor)


def _split_transposed(
    module: nn.Module, mesh: DeviceMesh, by_columns: bool, num_blocks: int
) -> None:
    """Do what torch's column and row styles do, which know nn.Linear alone."""
    from torch.distributed.tensor import (
        DTensor,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
    )

    outputs = Shard(-1) if by_columns else Replicate()
    inputs = Replicate() if by_columns else Shard(-1)
    placements = {
        "weight": Shard(1) if by_columns else Shard(0),
        "bias": Shard(0) if by_columns else Replicate(),
    }

    def partition(_: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for name, placement in placements.items():
            parameter = module.get_parameter(name)
            value = _beside_one_another(parameter.detach(), num_blocks, mesh.size())
            split = distribute_tensor(value, mesh, [placement])
            module.register_parameter(name, nn.Parameter(split, parameter.requires_grad))

    def distributed(_: nn.Module, given: Any, mesh: DeviceMesh) -> Any:
        return DTensor.from_local(given[0], mesh, [inputs], run_check=False), *given[1:]

    def local(_: nn.Module, made: Any, mesh: DeviceMesh) -> Any:
        return made.redistribute(placements=[outputs]).to_local()

    distribute_module(module, mesh, partition, distributed, local)


def _beside_one_another(value: torch.Tensor, num_blocks: int, num_ranks: int) -> torch.Tensor:
    """Return a tensor whose last dimension has each rank's part of all blocks together.

    >>> _beside_one_another(torch.arange(8), num_blocks=2, num_ranks=2).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    if num_blocks == 1:
        return value
    blocks = value.reshape(*value.shape[:-1], num_blocks, num_ranks, -1)
    return blocks.transpose(-3, -2).reshape(value.shape)
