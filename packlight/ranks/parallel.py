"""What `fit` is told about several ranks, and which of them train together."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DataParallel, DistributedDataParallel

from packlight.errors import OptionError, UnsupportedModelError
from packlight.ranks.collectives import talk_through
from packlight.ranks.group import Ranks
from packlight.ranks.pieces import Placement

PLANNED = "planned"

_known: WeakKeyDictionary[dist.ProcessGroup, Ranks] = WeakKeyDictionary()


@dataclass(frozen=True)
class RankGroups:
    """Ranks that train one model together, and which of them share what with this one.

    Attributes:
        all: of them: they run one plan.
        data: those that have parts of the batch each, and the same weights.
        tensor: those that have parts of the weights each, and the same batch.
        shard: those of `data` that have pieces of parameters each, where these are not all.
        replicas: those with the same pieces, where there are several.
    """

    all: Ranks
    data: Ranks | None = None
    tensor: Ranks | None = None
    shard: Ranks | None = None
    replicas: Ranks | None = None


@dataclass(frozen=True)
class Parallel:
    """How ranks share the work of a step.

    Attributes:
        data: name of the mesh's dimension along which each rank has its part of the batch, and all
            of them the same model. With a mesh of one dimension it can be left out.
        shard: name of the dimension along which parameters lie in pieces: each rank updates some
            rows of them. It is the same dimension as `data`, and then need not be named twice; or
            another one: ranks along `data` have the same rows (hybrid sharding), and ranks along
            both have parts of the batch.
        pieces: what of them is then kept by whoever has the rows: "state", the optimizer's
            (ZeRO-1); "gradient", gradients, too (ZeRO-2); "parameter", values, too, which are
            gathered around their uses (ZeRO-3); "planned", as much as the budget asks for, but
            gradients at least.
        tensor: name of the dimension along which weights lie in parts (`packlight.localize`): all
            ranks along it have the same batch. Alone, or beside one of the others.
        space: name of the dimension (or names of several) along which samples are cut
            (`packlight.convolution`): each rank has its rows of each sample, and all weights. Along
            `data`, if that is given, ranks have other samples.
        timeout_seconds: how long a rank waits for another one, in planning too.

    >>> Parallel(data="data").timeout_seconds
    1800.0
    """

    data: str | None = None
    shard: str | None = None
    pieces: str = Placement.PARAMETER.value
    tensor: str | None = None
    space: str | tuple[str, ...] | None = None
    timeout_seconds: float = 1800.0

    def __post_init__(self) -> None:
        if self.tensor is not None and self.tensor in (self.data, self.shard):
            raise OptionError(
                f"ranks along {self.tensor!r} have either parts of the weights or parts of the "
                "batch\nhint: a mesh of two dimensions, with one name for each"
            )
        if self.is_hybrid and self.tensor is not None:
            raise OptionError(
                f"data={self.data!r}, shard={self.shard!r} and tensor={self.tensor!r} are three "
                f"dimensions\nhint: two of them, such as packlight.Parallel(shard={self.shard!r}, "
                f"tensor={self.tensor!r})"
            )
        if self.space is not None and (self.tensor or self.shard):
            raise OptionError(
                "space= beside tensor= or shard= is not there yet\nhint: beside data= it is"
            )
        known = [*map(str, Placement), PLANNED]
        if self.pieces not in known:
            raise OptionError(
                f"pieces={self.pieces!r} of parameters are none\nhint: {', '.join(known)}"
            )

    @property
    def is_hybrid(self) -> bool:
        """Whether several ranks have the same pieces of parameters."""
        return self.shard is not None and self.data not in (None, self.shard)

    @property
    def space_dims(self) -> tuple[str, ...]:
        """The dimensions along which samples are cut."""
        if self.space is None:
            return ()
        return (self.space,) if isinstance(self.space, str) else tuple(self.space)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where parameters may lie, the fastest first; none where all is whole on all ranks."""
        if self.shard is None:
            return ()
        if self.pieces == PLANNED:
            return (Placement.GRADIENT, Placement.PARAMETER)
        return (Placement(self.pieces),)


def ranks_of(
    mesh: DeviceMesh | None, parallel: Parallel | None, device: torch.device
) -> RankGroups | None:
    """Return the ranks that train with this one; None where it trains alone.

    Args:
        mesh: of the ranks, None for this process alone.
        parallel: what its dimensions are for.
        device: of the model.

    Raises:
        OptionError: the one does not fit the other.
    """
    if mesh is None:
        if parallel is not None:
            raise OptionError(
                "parallel= needs the mesh of the ranks\nhint: pass mesh=torch.distributed."
                "device_mesh.init_device_mesh('cpu', (world_size,), mesh_dim_names=('data',)), in "
                "a process that torchrun started"
            )
        return None
    if not isinstance(mesh, DeviceMesh):
        raise OptionError(f"mesh is a {type(mesh).__name__}, and no DeviceMesh")
    parallel = parallel or Parallel()
    if not isinstance(parallel, Parallel):
        raise OptionError(
            f"parallel is a {type(parallel).__name__}\nhint: packlight.Parallel(data=...)"
        )
    if not dist.is_initialized():
        raise OptionError(
            "the mesh has no process group any more\nhint: torch.distributed.init_process_group()"
        )
    if mesh.device_type != device.type:
        raise OptionError(f"the mesh is of {mesh.device_type}, the model is on {device.type}")
    timeout = parallel.timeout_seconds
    if parallel.space_dims:
        _refuse_others(mesh, parallel)
        group = mesh.get_group(parallel.space_dims[0])
        everybody = _ranks(group, device, timeout, members=mesh.mesh.flatten().tolist())
        for name in spoken_groups(mesh, parallel):
            if everybody.size == dist.get_world_size(group):  # a part of them speaks by itself
                talk_through(name, everybody)
        return RankGroups(everybody, everybody)
    if parallel.is_hybrid:
        _refuse_others(mesh, parallel)
        replicas, shard = map((mesh.mesh_dim_names or ()).index, (parallel.data, parallel.shard))
        everybody, *both = _in_two_dimensions(mesh, replicas, shard, device, timeout)
        return RankGroups(everybody, everybody, None, both[1], both[0])
    data, tensor = _dimensions(mesh, parallel)
    if data is None or tensor is None:
        place = data if tensor is None else tensor
        assert place is not None, "a mesh has a dimension"
        everybody = _ranks(mesh.get_group(place), device, timeout)
        groups = RankGroups(everybody, *((everybody,) if tensor is None else (None, everybody)))
    else:
        groups = RankGroups(*_in_two_dimensions(mesh, data, tensor, device, timeout))
    if tensor is not None:
        assert groups.tensor is not None
        talk_through(mesh.get_group(tensor).group_name, groups.tensor)
    return groups


def spoken_groups(mesh: Any, parallel: Parallel | None) -> tuple[str, ...]:
    """Return the names of torch's groups in which a model's own ranks may tell one another things.

    They are in the order of what `parallel` says, which is that of other ranks, too, whose names
    may be others.

    Args:
        mesh: of the ranks.
        parallel: what its dimensions are for.
    """
    if parallel is None or not isinstance(mesh, DeviceMesh):
        return ()
    if parallel.tensor is not None and mesh.ndim == 1:
        return (str(mesh.get_group().group_name),)
    names = (*filter(None, (parallel.tensor,)), *parallel.space_dims)
    return tuple(str(mesh.get_group(name).group_name) for name in names)


def _refuse_others(mesh: DeviceMesh, parallel: Parallel) -> None:
    """Raise where a mesh has not the dimensions that have names, and no others."""
    names, wanted = mesh.mesh_dim_names or (), {*parallel.space_dims}
    wanted |= {*filter(None, (parallel.data, parallel.shard))}
    if {*names} != wanted:
        raise OptionError(
            f"the mesh has dimensions {', '.join(names) or 'without names'}, and parallel= says "
            f"what {', '.join(sorted(wanted))} are for\nhint: name all of them, and no others, in "
            f"packlight.Parallel({'space' if parallel.space else 'shard'}=..., data=...)"
        )


def _ranks(
    group: dist.ProcessGroup,
    device: torch.device,
    timeout: float,
    members: list[int] | None = None,
) -> Ranks:
    """Return the ranks of a group, or its members; those known from before where they talk."""
    members = members or dist.get_process_group_ranks(group)
    known = _known.get(group)
    is_other = known is None or known.timeout_seconds != timeout or known.size != len(members)
    if known is None or known.has_failed or is_other:
        known = _known[group] = Ranks(members, device, timeout)
    return known


_known_groups: WeakKeyDictionary[dist.ProcessGroup, tuple[Ranks, Ranks, Ranks]] = (
    WeakKeyDictionary()
)


def _in_two_dimensions(
    mesh: DeviceMesh, one: int, other: int, device: torch.device, timeout: float
) -> tuple[Ranks, Ranks, Ranks]:
    """Return all ranks of a mesh, and those along each of its dimensions with this one."""
    group = mesh.get_group(one)
    known = _known_groups.get(group)
    if known is None or known[0].has_failed or known[0].timeout_seconds != timeout:
        everybody = Ranks(sorted(mesh.mesh.flatten().tolist()), device, timeout)
        along = [
            Ranks(dist.get_process_group_ranks(mesh.get_group(dim)), device, timeout, everybody)
            for dim in (one, other)
        ]
        known = _known_groups[group] = (everybody, along[0], along[1])
    return known


def _dimensions(mesh: DeviceMesh, parallel: Parallel) -> tuple[int | None, int | None]:
    """Return which dimensions of a mesh are for data and for weights in parts."""
    names = mesh.mesh_dim_names or ("",) * mesh.ndim
    shape = ", ".join(f"{name or '(no name)'}={mesh.size(i)}" for i, name in enumerate(names))
    data, tensor = parallel.data or parallel.shard, parallel.tensor
    if data is None and tensor is None and mesh.ndim == 1:
        return 0, None
    for name in (data, tensor) if tensor is not None and data is not None else (data or tensor,):
        if name not in names:
            raise OptionError(
                f"{name!r} is no dimension of the mesh ({shape})\nhint: give the mesh "
                "mesh_dim_names, and parallel=packlight.Parallel(data=...) one of them"
            )
    others = [
        n for i, n in enumerate(names) if n not in (data, tensor) and mesh.size(i) > 1
    ]
    if others:
        named = data or tensor
        raise OptionError(
            f"nothing says what the mesh's dimension {others[0]!r} is for ({shape})\nhint: pass "
            f"mesh[{named!r}]: ranks along the others then train models of their own"
        )
    return (
        None if data is None else names.index(data),
        None if tensor is None else names.index(tensor),
    )


def refuse_wrapped(model: nn.Module) -> None:
    """Raise if a model talks to other ranks by itself: its calls would be in nobody's plan.

    Raises:
        UnsupportedModelError: it does; says what to pass.
    """
    if isinstance(model, (DistributedDataParallel, DataParallel)):
        raise UnsupportedModelError(
            f"the model is wrapped in {type(model).__name__}, which reduces gradients by itself\n"
            "hint: fit the model inside, model.module, with mesh=: its gradients are reduced as "
            "operations of the planned step"
        )
    for name, module in model.named_modules():
        if _is_a(module, "torch.distributed.fsdp", "FSDPModule", "FullyShardedDataParallel"):
            raise UnsupportedModelError(
                f"{name or 'the model'} is sharded by FSDP, whose hooks gather parameters by "
                "themselves\nhint: fit the model before it is wrapped; with mesh= its gradients "
                "are reduced as operations of the planned step"
            )
    for name, parameter in model.named_parameters():
        if _is_a(parameter, "torch.distributed.tensor", "DTensor"):
            raise UnsupportedModelError(
                f"parameter {name!r} is a DTensor, of which an optimizer steps all ranks' parts\n"
                "hint: packlight.localize(model) behind parallelize_module and before the "
                "optimizer, then fit(..., mesh=, parallel=packlight.Parallel(tensor=...))"
            )


def _is_a(thing: Any, module: str, *names: str) -> bool:
    """Whether something is of a class whose module takes long to import, and is perhaps not."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(thing, tuple(getattr(loaded, name) for name in names))
