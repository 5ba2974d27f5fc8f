"""`fit`, `plan` and `profile`: a model, a loss and an optimizer as one planned training step."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import nn

from packlight.capture.step_capture import LossFunction
from packlight.capture.undisturbed import generators_kept
from packlight.capture.weightless import give_unwritten_memory, is_weightless
from packlight.errors import OptionError
from packlight.moves.data_parallel import DataParallel
from packlight.moves.in_backward import UpdateInBackward
from packlight.moves.lossy.move import Lossy
from packlight.moves.microbatch.move import Microbatch
from packlight.moves.precision import chosen_precision, loss_scaler
from packlight.moves.registry import (
    checked_techniques,
    chosen_names,
    technique_names,
    techniques_of,
)
from packlight.moves.request import Beside, Request
from packlight.ranks.modelled import ModelledMesh
from packlight.ranks.parallel import Parallel, ranks_of, spoken_groups
from packlight.run.train_step import TrainStep
from packlight.search.saved import read_way
from packlight.search.way import Way
from packlight.step import Plan, StepProfile
from packlight.units import parse_bytes
from packlight.updates.gradients import Clipping
from packlight.updates.several import SeveralOptimizers

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


class Options(TypedDict, total=False):
    """What `fit`, `plan` and `profile` take by name; all of it may be left out.

    Attributes:
        moves: names of what may be done to fit beside recomputation; all of `MOVES` if None. Those
            that compile have to be named: (*MOVES, "fuse"), (*EXACT_MOVES, "fuse-exactly").
        allow: names of approximate techniques. "bf16" or "fp16" run the loss under
            `torch.autocast`, as a block around `loss_fn` would; parameters, gradients and updates
            keep their dtype. "packed" keeps in few bits what the backward reads.
        max_gradient_error: how wrong those techniques that approximate the backward may make the
            gradient on the example batch, relative to its norm; 0.02 if None.
        clip_grad_norm: clip the norm of all gradients together, as `clip_grad_norm_` does.
        clip_grad_value: clip every element of the gradients, as `clip_grad_value_` does.
        scaler: scales the loss as in a loop with `torch.amp.GradScaler`. With "fp16" one is made
            if None; it is the result's `scaler`.
        loss_weight: how much a microbatch counts: a function of a batch that returns a number, or
            "sum" for losses that are sums. Found in the captured loss if None.
        offload_directory: where activations, optimizer state and parameters may lie while nobody
            needs them. What lies there between steps is memory-mapped: it can be read and written
            as ever, also when the training step is let go of; its file is there as long. None
            keeps all in memory.
        way: how to run the step on batches like this one: another step's `way`, or a file that
            `save_way` wrote. It is checked, and nothing is searched. By default, what was found
            before for the same step (on this machine, with the same arguments) is used again,
            unless the environment variable PACKLIGHT_NO_WAY_CACHE is set.
        mesh: of the ranks that train one model together (`torch.distributed.device_mesh`); every
            one of them calls this with the same arguments and its own part of the batch. For `plan`
            and `profile` it may be a `ModelledMesh` of ranks that are not there.
        parallel: what the mesh's dimensions are for; can be left out if there is one.
        progress: show what profiling does; True.
        accumulate: keep room for gradients between steps, which `step.backward` then adds to and
            `step.update` uses up. Of steps that share an optimizer, each backward adds to the same.
        beside: what else the loop keeps while this step runs, to be counted: optimizers (their
            state, made yet or not), modules (an averaged copy) and tensors.
    """

    moves: Iterable[str] | None
    allow: str | Iterable[str]
    max_gradient_error: float | None
    clip_grad_norm: float | None
    clip_grad_value: float | None
    scaler: torch.amp.GradScaler | None
    loss_weight: Any
    offload_directory: str | os.PathLike[str] | None
    way: Way | str | os.PathLike[str] | None
    mesh: Any
    parallel: Parallel | None
    progress: bool
    accumulate: bool
    beside: Iterable[Beside] | Beside


def fit(
    model: nn.Module,
    loss_fn: LossFunction,
    optimizer: Optimizers,
    batch: Any,
    budget: str | int | None = None,
    **options: Unpack[Options],
) -> TrainStep:
    """Return a training step that keeps everything it holds within a budget.

    Args:
        model: in the mode (train or eval) that it will be trained in.
        loss_fn: `loss_fn(model, batch)` returns a scalar tensor, or a tuple that begins with one;
            `step(batch)` returns what it does, detached.
        optimizer: over parameters of the model, and of the loss where that has some. Several in a
            list step one model together, each its own parameters.
        batch: an example; only its shapes and dtypes matter, nothing is trained yet.
        budget: bytes, or a string such as "1GiB": parameters, model buffers, batch, gradients,
            optimizer state, activations and workspace together. None for no limit.
        **options: see `Options`.

    Raises:
        InfeasibleBudgetError: with the smallest budget for which a schedule was found.
        WayError: `way` is for another step, torch, device or budget.
        FormatError: `way` is a file that holds no way.
        OffloadError: the directory cannot hold what is offloaded.
        PrecisionError: an operation does not run in the precision that is allowed.
        RankMismatchError: with `mesh=`, ranks were asked for different things; says which.
        RankError: another rank failed, or is gone.
        GraphBreakError, UnsupportedModelError, OptionError, BudgetFormatError.

    >>> import torch, packlight
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> loss_fn = lambda model, batch: model(batch).square().mean()
    >>> step = packlight.fit(model, loss_fn, optimizer, torch.ones(8, 4), budget="1MiB")
    >>> losses = [float(step(torch.ones(8, 4))) for _ in range(3)]
    >>> losses[2] < losses[0]
    True
    """
    if isinstance(options.get("mesh"), ModelledMesh):
        raise OptionError(
            "ranks of a modelled mesh are not there and cannot train\nhint: packlight.plan plans "
            "for them; fit takes a DeviceMesh"
        )
    if is_weightless(model):
        raise OptionError(
            "the model's parameters are on the meta device: there is nothing to train\n"
            "hint: packlight.plan plans models without values"
        )
    step = planned_step(model, loss_fn, optimizer, batch, budget, **options)
    step.arrange()
    return step


def plan(
    model: nn.Module,
    loss_fn: LossFunction,
    optimizer: Optimizers | None,
    batch: Any,
    budget: str | int | None = None,
    **options: Unpack[Options],
) -> Plan:
    """Return the plan that `fit` would run; trains nothing.

    Args and errors: as `fit`; without an optimizer its state counts as nothing. Where microbatches
    differ in size, it is the larger ones' plan. A model on the meta device is planned for the CPU,
    without memory for it, and is there afterwards: its times are those of single calls.
    """
    return planned_step(model, loss_fn, optimizer, batch, budget, **options).plan


def profile(
    model: nn.Module,
    loss_fn: LossFunction,
    optimizer: Optimizers | None,
    batch: Any,
    **options: Unpack[Options],
) -> StepProfile:
    """Return the plain training step as data (all gradients, then the update); trains nothing.

    Args and errors: as `fit`; without an optimizer its state counts as nothing.
    """
    options.setdefault("moves", ())
    return planned_step(model, loss_fn, optimizer, batch, **options).profile


def planned_step(
    model: nn.Module,
    loss_fn: LossFunction,
    optimizer: Optimizers | None,
    batch: Any,
    budget: str | int | None = None,
    **options: Unpack[Options],
) -> TrainStep:
    """Return a prepared step for looking at; without an optimizer it cannot train."""
    if isinstance(optimizer, (list, tuple)) and optimizer:
        if all(isinstance(part, torch.optim.Optimizer) for part in optimizer):
            optimizer = SeveralOptimizers(optimizer) if len(optimizer) > 1 else optimizer[0]
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise OptionError(
            f"the third argument is a {type(optimizer).__name__} and no optimizer\n"
            "hint: fit, plan and profile take (model, loss_fn, optimizer, batch), and fit and plan "
            "the budget after that; without an optimizer, plan and profile take None"
        )
    give_unwritten_memory(model)
    way = options.get("way")
    if isinstance(way, (str, os.PathLike)):
        way = read_way(way)
    with generators_kept():  # modules that are imported now may draw numbers, too
        step = TrainStep(_request(model, loss_fn, optimizer, budget, options), way)
        step.prepare(batch)
    return step


def _request(
    model: nn.Module,
    loss_fn: LossFunction,
    optimizer: torch.optim.Optimizer | None,
    budget: str | int | None,
    options: Options,
) -> Request:
    known = list(Options.__annotations__)
    for name in sorted(set(options) - set(known)):
        near = difflib.get_close_matches(name, known, 1)
        meant = f"did you mean {near[0]!r}? " if near else ""
        raise OptionError(f"unknown option {name!r}\nhint: {meant}known are {', '.join(known)}")
    allowed = frozenset(checked_techniques(options.get("allow", ()), technique_names()))
    precision, device = chosen_precision(allowed), next(model.parameters(), torch.empty(0)).device
    mesh = options.get("mesh")
    modelled = mesh if isinstance(mesh, ModelledMesh) else None
    parallel = options.get("parallel")
    if modelled is not None:
        modelled.check(parallel)
    groups = None if modelled else ranks_of(mesh, parallel, device)
    ranks = None if groups is None else groups.all
    data_ranks = None if groups is None else groups.data
    accumulates = options.get("accumulate", False)
    if accumulates and mesh is not None:
        raise OptionError(
            "accumulate=True cannot be combined with mesh=: gradients of ranks are reduced in "
            "every step\nhint: one larger batch, which fit cuts into microbatches that are reduced "
            "once"
        )
    names = chosen_names(options.get("moves"))
    if data_ranks is not None or modelled is not None:
        names |= {DataParallel.name}
    spoken = () if groups is None else spoken_groups(mesh, parallel)
    loss_weight = options.get("loss_weight")
    if spoken and data_ranks is ranks:  # samples in rows, of which few cannot be looked at alone
        names -= {Microbatch.name}
        if loss_weight is None:
            loss_weight = "rows"  # as many on all ranks: all losses count the same
    placements = () if parallel is None else parallel.placements
    if placements:  # each gradient's piece goes to its rank, where it is used up
        names |= {UpdateInBackward.name}
    scaler, directory = options.get("scaler"), options.get("offload_directory")
    if precision is not None:
        scaler = loss_scaler(model, precision, device, scaler)
    return Request(
        model,
        loss_fn,
        optimizer,
        None if budget is None else parse_bytes(budget),
        names,
        allowed,
        Clipping(options.get("clip_grad_norm"), options.get("clip_grad_value")),
        scaler,
        loss_weight,
        None if directory is None else Path(directory),
        options.get("progress", True) and (ranks is None or ranks.rank == 0),
        ranks,
        data_ranks,
        None if groups is None else groups.tensor,
        modelled,
        placements,
        spoken,
        accumulates,
        _beside(options.get("beside", ())),
        _checked_error(options.get("max_gradient_error"), allowed),
        shard_ranks=None if groups is None else groups.shard or groups.data,
        replica_ranks=None if groups is None else groups.replicas,
        is_weightless=is_weightless(model),
    )


def _beside(given: Iterable[Beside] | Beside) -> tuple[Beside, ...]:
    """Return what a loop keeps beside a step, one by one."""
    kept = (given,) if isinstance(given, Beside) else tuple(given)
    for one in kept:
        if not isinstance(one, Beside):
            raise OptionError(
                f"beside= has a {type(one).__name__}, whose bytes are not known\n"
                "hint: optimizers, modules and tensors can be counted"
            )
    return kept


def _checked_error(limit: Any, allowed: Collection[str]) -> float | None:
    """Return the limit on the gradient's error, checked."""
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
        raise OptionError(
            f"max_gradient_error={limit!r} is no error relative to the gradient's norm\nhint: 0.02 "
            "lets it be wrong by 2%"
        )
    names = techniques_of(Lossy)
    if not set(allowed) & set(names):
        raise OptionError(
            f"max_gradient_error={limit!r} limits what is not allowed\nhint: allow= has to name "
            f"one of {', '.join(map(repr, names))}"
        )
    return float(limit)
