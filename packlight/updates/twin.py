"""Stepping other parameters, or one alone, with a user's optimizer without touching the optimizer.

A twin is an object of the optimizer's class with its attributes, whose parameter groups and state
are given. A twin that shares the state steps one parameter of the original; a twin with parameters
and state of its own (a stand-in) shows what a step would do.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from packlight.after_step import AfterStep
from packlight.torch_internals.optimizers import (
    STEP_HOOKS,
    has_global_step_hooks,
    is_replaced_step,
    plain_step,
)

State = dict[str, Any]
Group = dict[str, Any]


def twin_of(
    optimizer: torch.optim.Optimizer, groups: list[Group], state: Any
) -> torch.optim.Optimizer:
    """Return an optimizer with the same attributes but these groups and this state, and no hooks.

    Args:
        optimizer: the original.
        groups: the twin's `param_groups`.
        state: the twin's `state`, not copied: a mapping of parameters to state dicts.
    """
    twin: torch.optim.Optimizer = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    twin.__dict__.pop("step", None)  # LR schedulers patch in a step that marks the original
    twin.__dict__.update({name: OrderedDict() for name in STEP_HOOKS})
    twin.param_groups = groups
    twin.state = state
    return twin


def stand_in(
    optimizer: torch.optim.Optimizer, groups: list[Group], parameters: list[list[torch.Tensor]]
) -> torch.optim.Optimizer:
    """Return a twin with fresh state that steps other parameters and shares no tensor.

    Args:
        optimizer: the original.
        groups: those of its `param_groups` that the twin has.
        parameters: what the twin's groups hold instead of the original's parameters.
    """
    originals = {id(p) for group in optimizer.param_groups for p in group["params"]}

    def private(leaf: Any) -> Any:
        is_own = isinstance(leaf, torch.Tensor) and id(leaf) not in originals
        return leaf.detach().clone() if is_own else leaf

    twin = twin_of(
        optimizer,
        [
            {**pytree.tree_map(private, _hyperparameters(group)), "params": held}
            for group, held in zip(groups, parameters, strict=True)
        ],
        defaultdict(dict),
    )
    for name, value in _attributes(twin).items():
        twin.__dict__[name] = pytree.tree_map(private, value)
    return twin


def step_alone(
    optimizer: torch.optim.Optimizer,
    group: Group,
    parameter: torch.Tensor,
    gradient: torch.Tensor,
    state: Any,
) -> None:
    """Step one parameter as `optimizer.step()` would if nothing else had a gradient.

    Args:
        optimizer: whose class and attributes to use; it is not changed.
        group: the hyperparameters, an entry of its `param_groups`.
        parameter: what to update, of any shape and dtype; its `grad` is left as it was.
        gradient: of the parameter's shape and dtype; the optimizer may overwrite it.
        state: mapping of parameters to state dicts, read and written.
    """
    step_several(optimizer, [(group, [parameter])], [gradient], state)


def step_several(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[tuple[Group, Sequence[torch.Tensor]]],
    gradients: Sequence[torch.Tensor],
    state: Any,
) -> None:
    """Step some parameters as `optimizer.step()` would if no others had a gradient.

    Args:
        optimizer: whose class and attributes to use; it is not changed.
        groups: entries of its `param_groups`, each with those of its parameters to update; what
            they have as `grad` is left as it was.
        gradients: theirs, in that order; the optimizer may overwrite them.
        state: mapping of parameters to state dicts, read and written.
    """
    twin = twin_of(optimizer, [{**group, "params": [*held]} for group, held in groups], state)
    parameters = [parameter for _, held in groups for parameter in held]
    previous = [parameter.grad for parameter in parameters]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    try:
        plain_step(type(optimizer))(twin)
    finally:
        for parameter, gradient_before in zip(parameters, previous, strict=True):
            parameter.grad = gradient_before


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `step()` cannot be called without arguments (LBFGS)."""
    try:
        inspect.signature(plain_step(type(optimizer))).bind(optimizer)
    except TypeError:
        return True
    return False


def interception(optimizer: torch.optim.Optimizer) -> str | None:
    """Return what else runs in this very object's `step()`, in words, or None if nothing does."""
    hooks = [hook for name in STEP_HOOKS for hook in getattr(optimizer, name, {}).values()]
    if not all(isinstance(hook, AfterStep) for hook in hooks):
        return "step hooks are registered on it, and they expect all gradients at once"
    if has_global_step_hooks():
        return "step hooks are registered for all optimizers, and they expect all gradients at once"
    if is_replaced_step(optimizer):
        return "its step() was replaced on the object"
    return None


def wrapped_optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    """Return the attribute in which an optimizer holds another one that it would step, if any."""
    for name, value in _attributes(optimizer).items():
        if any(isinstance(leaf, torch.optim.Optimizer) for leaf in pytree.tree_leaves(value)):
            return name
    return None


def forwards_to(optimizer: torch.optim.Optimizer) -> str | None:
    """Return what an optimizer that has no parameter groups or state of its own takes them from.

    Libraries hand out such optimizers (accelerate's, Lightning's) to decide when the one inside
    steps. A twin of one would reach the original's groups.

    Returns:
        The attribute that holds the optimizer inside, "" if there is none to be seen; None for an
        optimizer that has its own.
    """
    if {"param_groups", "state"} <= optimizer.__dict__.keys():
        return None
    return wrapped_optimizer(optimizer) or ""


def settings(optimizer: torch.optim.Optimizer) -> dict[str, list[Any]]:
    """Return everything an optimizer holds besides parameters and their state, to be compared.

    Tensors are told by identity and version, so that a write to one shows.
    """

    def describe(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return id(leaf), leaf._version
        return leaf if isinstance(leaf, (int, float, str, type(None))) else id(leaf)

    named = {f"self.{name}": value for name, value in _attributes(optimizer).items()}
    for group in optimizer.param_groups:
        for name, value in _hyperparameters(group).items():
            named[f"group[{name!r}]"] = [named.get(f"group[{name!r}]"), value]
    return {name: [describe(v) for v in pytree.tree_leaves(value)] for name, value in named.items()}


def kinds_of_settings(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the hyperparameters as far as they change what a step computes, to be compared.

    Of numbers only whether they are zero counts: schedulers change learning rates and momenta.
    """

    def describe(name: str, leaf: Any) -> Any:
        if isinstance(leaf, (bool, str, type(None))):
            return leaf
        if isinstance(leaf, (int, float)):
            return name == "lr" or leaf == 0
        return type(leaf)

    return [
        (name, [describe(name, v) for v in (value if isinstance(value, tuple) else (value,))])
        for group in optimizer.param_groups
        for name, value in _hyperparameters(group).items()
        if name != "initial_lr"  # added by schedulers
    ]


def state_tensors(state: Any) -> list[torch.Tensor]:
    """Return the tensors in one parameter's state."""
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def trainable(group: Group) -> Iterable[torch.Tensor]:
    """Return the parameters of a group that get a gradient."""
    return (p for p in group["params"] if p.requires_grad)


def _hyperparameters(group: Group) -> Group:
    return {name: value for name, value in group.items() if name != "params"}


def _attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    ours = {"state", "param_groups", "step", "_opt_called"}
    return {
        name: value
        for name, value in optimizer.__dict__.items()
        if name not in ours and not name.endswith("_hooks")
    }
