"""What a model does with tensors that are cut: seen once, on tensors without memory.

A model runs on fake tensors of whole samples. Of each tensor it is known along which dimensions it
is cut, and each call outside of the layers that are replaced is looked at: whether it does on a
rank's rows what it does on all. Where it does not (or nobody knows), that is said with the path of
the module that calls it, and nothing is ever computed wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# For each axis, the dimension of a tensor that is cut along it; None for a whole one.
Cut = tuple[int | None, ...]

_SAME = {
    aten.clone.default, aten.detach.default, aten.alias.default, aten._to_copy.default,
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.empty_like.default, aten.lift_fresh.default, aten.copy_.default,
}
# (position of dimensions among the arguments)
_ALONG = {
    aten.sum.dim_IntList: 1, aten.mean.dim: 1, aten.amax.default: 1, aten.amin.default: 1,
    aten.var.correction: 1, aten.std.correction: 1, aten.linalg_vector_norm.default: 2,
    aten._softmax.default: 1, aten._log_softmax.default: 1, aten.cumsum.default: 1,
    aten.select.int: 1, aten.slice.Tensor: 1, aten.split.Tensor: 2, aten.unbind.int: 1,
    aten.split_with_sizes.default: 2, aten.glu.default: 1, aten.index_select.default: 1,
    aten.max.dim: 1, aten.min.dim: 1, aten.flip.default: 1, aten.argmax.default: 1,
    aten.squeeze.dim: 1, aten.unsqueeze.default: 1, aten.channel_shuffle.default: 1,
}
_DROPS = {
    aten.sum.dim_IntList: 2, aten.mean.dim: 2, aten.amax.default: 2, aten.amin.default: 2,
    aten.max.dim: 2, aten.min.dim: 2, aten.argmax.default: 2,
}
_DEFAULT_DIM = {aten.slice.Tensor: 0, aten.split.Tensor: 0, aten.split_with_sizes.default: 0,
                aten.unbind.int: 0, aten.glu.default: -1}
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}


class Strange(Exception):
    """A call that would be another one on a rank's rows."""


class Watch(TorchDispatchMode):
    """Follows tensors that are cut through a model's calls.

    Args:
        num_axes: along which samples are cut.
        complain: told what cannot be, in words.
        meets_whole: whether calls may be given what is cut beside what is whole on all ranks:
            each rank's gradient of that is then a part of it.

    Attributes:
        is_inside: whether a layer is running that is replaced: what it does there is its own.
    """

    def __init__(
        self, num_axes: int, complain: Callable[[str], None], meets_whole: bool = True
    ) -> None:
        super().__init__()
        self._meets_whole = meets_whole
        self.whole: Cut = (None,) * num_axes
        self.is_inside = False
        self._complain = complain
        self._cuts: dict[int, tuple[torch.Tensor, Cut]] = {}

    def cut_of(self, tensor: torch.Tensor) -> Cut:
        """Return along which dimensions a tensor is cut."""
        found = self._cuts.get(id(tensor))
        return self.whole if found is None else found[1]

    def is_cut(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is cut at all."""
        return self.cut_of(tensor) != self.whole

    def note(self, tensor: torch.Tensor, cut: Cut) -> None:
        """Know of a tensor along which dimensions it is cut."""
        self._cuts[id(tensor)] = tensor, cut

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run a call, and know what its results are."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        results = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        if self.is_inside or not results or not any(map(self.is_cut, given)):
            return out
        try:
            cut = self._cut_after(func, args, kwargs, given, results)
        except Strange as strange:
            self._complain(f"{func.overloadpacket} {strange}")
            cut = self.cut_of(next(filter(self.is_cut, given)))
        for result in results:
            fits = all(dim is None or dim < result.ndim for dim in cut)
            self.note(result, cut if fits else self.whole)
        return out

    def _cut_after(
        self, func: Any, args: Any, kwargs: Any, given: Sequence[torch.Tensor],
        results: Sequence[torch.Tensor],
    ) -> Cut:
        if func in _ALONG:
            return self._along(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise Strange("draws a number for each of its own rows")
        if not self._meets_whole:
            for tensor in given:
                if tensor.is_floating_point() and not self.is_cut(tensor):
                    raise Strange(
                        f"meets a tensor of {tuple(tensor.shape)}, whole on each rank, of whose "
                        "gradient each has a part"
                    )
        x: Any = args[0]
        if func in _SAME:
            return self.cut_of(given[-1]) if func is aten.copy_.default else self.cut_of(x)
        if func in _VIEWS:
            return self._viewed(x, results[0])
        if func is aten.permute.default:
            order = [dim % x.ndim for dim in args[1]]
            return self._moved(x, order.index)
        if func in (aten.transpose.int, aten.t.default):
            one, other = (dim % x.ndim for dim in args[1:]) if len(args) > 1 else (0, 1)
            return self._moved(x, lambda dim: {one: other, other: one}.get(dim, dim))
        if func is aten.expand.default:
            return self._moved(x, lambda dim: dim + results[0].ndim - x.ndim)
        if func is aten.cat.default:
            return self._joined(x, args[1] if len(args) > 1 else kwargs.get("dim", 0))
        if func is aten.native_layer_norm.default:
            return self._untouched(x, range(x.ndim - len(args[1]), x.ndim))
        if torch.Tag.pointwise in func.tags:
            return self._pointwise(given, max(result.ndim for result in results))
        raise Strange("is not known to do the same on a rank's rows as on all")

    def _moved(self, x: torch.Tensor, place: Callable[[int], int]) -> Cut:
        return tuple(None if dim is None else place(dim) for dim in self.cut_of(x))

    def _untouched(self, x: torch.Tensor, dims: Sequence[int]) -> Cut:
        cut = self.cut_of(x)
        touched = [dim for dim in cut if dim is not None and dim in dims]
        if touched:
            raise Strange(f"looks over all rows of dimension {touched[0]}, which is cut")
        return cut

    def _along(self, func: Any, args: Any, kwargs: Any) -> Cut:
        x, place = args[0], _ALONG[func]
        dims = args[place] if len(args) > place else kwargs.get("dim", _DEFAULT_DIM.get(func))
        if dims is None or dims == []:
            dims = [*range(x.ndim)]
        several = dims if isinstance(dims, (list, tuple)) else [dims]
        if func is aten.unsqueeze.default:
            at = several[0] % (x.ndim + 1)
            return self._moved(x, lambda dim: dim + (dim >= at))
        dims = [dim % x.ndim for dim in several]
        is_all = func is aten.slice.Tensor and _is_everything(x, args)
        cut = self.cut_of(x) if is_all else self._untouched(x, dims)
        keeps = _DROPS.get(func)
        if keeps is not None:
            dropped = [] if len(args) > keeps and args[keeps] else dims
            dropped = [] if kwargs.get("keepdim") else dropped
        else:
            gone = {aten.select.int, aten.unbind.int, aten.squeeze.dim}
            dropped = dims if func in gone and not (
                func is aten.squeeze.dim and x.shape[dims[0]] != 1
            ) else []
        return tuple(
            None if dim is None else dim - sum(other < dim for other in dropped) for dim in cut
        )

    def _viewed(self, x: torch.Tensor, result: torch.Tensor) -> Cut:
        """Find each dimension that is cut again: as large, with as much before it."""
        found: list[int | None] = []
        for dim in self.cut_of(x):
            if dim is None:
                found.append(None)
                continue
            before = x.shape[:dim].numel()
            places = [
                place for place in range(result.ndim)
                if result.shape[place] == x.shape[dim]
                and result.shape[:place].numel() == before
            ]
            if not places:
                raise Strange(f"puts dimension {dim}, which is cut, together with others")
            found.append(places[-1])
        return tuple(found)

    def _joined(self, tensors: Sequence[torch.Tensor], dim: int) -> Cut:
        cuts = {self.cut_of(t) for t in tensors if t.numel()}
        if len(cuts) > 1:
            raise Strange("puts together what is cut and what is whole")
        (cut,) = cuts
        if dim % tensors[0].ndim in cut:
            raise Strange(f"puts tensors together along dimension {dim}, which is cut")
        return cut

    def _pointwise(self, given: Sequence[torch.Tensor], num_dims: int) -> Cut:
        places: list[int | None] = []
        for axis in range(len(self.whole)):
            cuts = [(t, self.cut_of(t)[axis]) for t in given]
            aligned = {dim + num_dims - t.ndim for t, dim in cuts if dim is not None}
            if not aligned:
                places.append(None)
                continue
            if len(aligned) > 1:
                raise Strange("meets tensors that are cut along different dimensions")
            (place,) = aligned
            for tensor, dim in cuts:
                own = place - (num_dims - tensor.ndim)
                if dim is None and own >= 0 and tensor.shape[own] != 1:
                    raise Strange(
                        f"meets a tensor of {tuple(tensor.shape)}, whole on each rank, along "
                        f"dimension {own}, which is cut"
                    )
            places.append(place)
        return tuple(places)


def _is_everything(x: torch.Tensor, args: Any) -> bool:
    """Whether a slice takes all of a dimension."""
    dim, start, end, step = [*args[1:], *[0, None, None, 1][len(args) - 1 :]][:4]
    size = x.shape[dim]
    return not start and (end is None or end >= size) and step == 1
