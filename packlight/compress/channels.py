"""Channels that are removed: the model is smaller, not only emptier.

Which weights go together with a channel (what makes it, what normalises it, what reads it, and all
of that for whatever is added to it) is torch-pruning's knowledge (Fang et al. 2023, arXiv
2301.12900). Which channels go is decided here, by what the weights on both sides of each say.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from packlight.compress.errors import CompressionError
from packlight.compress.packages import torch_pruning
from packlight.errors import OptionError
from packlight.torch_internals.modules import BATCH_NORM, CONVOLUTION

_NORMS = (BATCH_NORM, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)
_LAYERS = (nn.Linear, CONVOLUTION)


@dataclass
class _Group:
    """Channels that can be removed one by one, each with all that belongs to it.

    Attributes:
        root: a layer that makes them.
        remove: torch-pruning's function for its channels.
        writes, norms, reads: for each layer concerned, (layer, its indices, the channel of each).
    """

    root: nn.Module
    remove: Any
    writes: list[tuple[nn.Module, list[int], torch.Tensor]]
    norms: list[tuple[nn.Module, list[int], torch.Tensor]]
    reads: list[tuple[nn.Module, list[int], torch.Tensor]]

    @property
    def num_channels(self) -> int:
        """Of the layer that makes them."""
        return int(self.root.weight.shape[0])  # type: ignore[index]

    def squares(self) -> torch.Tensor:
        """Return the sum of squared weights on both sides of each channel."""
        total = torch.zeros(self.num_channels, dtype=torch.float64)
        for (layer, indices, channels), dim in self._sides():
            weights = layer.weight.detach().transpose(0, dim)[indices]  # type: ignore
            total.index_add_(0, channels, weights.double().square().flatten(1).sum(1).cpu())
        return total

    def is_dead(self) -> torch.Tensor:
        """Return which channels nobody reads, or are zero whatever the input."""
        is_read = self._any(self.reads, lambda layer: layer.weight.transpose(0, 1))
        if self.norms:
            # Batch norm makes of anything its own weight and bias; where it is all zero, so is what
            # comes out, whatever goes in. Every writer has to have one.
            gates = [n for n in self.norms if n[0].weight is not None]
            is_closed = len(gates) == len(self.norms) == len(self.writes)
            is_written = self._any(gates, _weight_and_bias) if is_closed else torch.tensor(True)
        else:
            is_written = self._any(self.writes, _weight_and_bias)
        return ~(is_read & is_written)

    def _sides(self) -> list[tuple[tuple[nn.Module, list[int], torch.Tensor], int]]:
        return [(item, 0) for item in self.writes] + [(item, 1) for item in self.reads]

    def _any(
        self,
        items: Sequence[tuple[nn.Module, list[int], torch.Tensor]],
        weights_of: Callable[[Any], torch.Tensor],
    ) -> torch.Tensor:
        """Return for which channels any of the layers' weights is not zero."""
        found = torch.zeros(self.num_channels, dtype=torch.int64)
        for layer, indices, channels in items:
            weights = weights_of(layer).detach()[indices].flatten(1)
            found.index_add_(0, channels, (weights != 0).any(dim=1).long().cpu())
        return found > 0


def remove_channels(
    model: nn.Module,
    example_inputs: Any,
    kept: float,
    *,
    scope: str = "global",
    fixed: Iterable[str] | None = None,
) -> dict[str, tuple[int, int]]:
    """Remove the channels with the smallest weights, and all that hangs on them.

    A channel's score is the root of the sum of squared weights that make and read it, over the
    mean of its group's.

    Args:
        model: changed: layers have fewer channels. Parameters are new, so an optimizer has to be
            made afterwards.
        example_inputs: the model is run on them: a tensor, or a tuple of them.
        kept: the share of channels to keep, above 0 and at most 1; each group keeps one at least.
        scope: "global": of all channels; "layer": of each group's.
        fixed: names of layers whose outputs keep their channels; None is the last linear layer or
            convolution that runs.

    Returns:
        By layer's name, its output channels before and after, where they changed.

    Raises:
        OptionError: `kept` or `scope` is out of range.
        CompressionError: no such layer, or the model's outputs would change their shape; the model
            is as it was.
        MissingExtraError: torch-pruning is not installed.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> remove_channels(model, torch.ones(1, 4), kept=0.25)
    {'0': (8, 2)}
    >>> model
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=3, bias=True)
    )
    """
    if not 0 < kept <= 1:
        raise OptionError(f"kept={kept!r}; it must be above 0 and at most 1")
    if scope not in ("global", "layer"):
        raise OptionError(f"scope={scope!r}\nhint: one of global, layer")

    def choose(groups: list[_Group]) -> list[torch.Tensor]:
        scores = []
        for group in groups:
            norms = group.squares().sqrt()
            scores.append(norms / norms.mean().clamp_min(1e-30))
        if scope == "layer":
            thresholds = [_threshold(score, kept) for score in scores]
        else:
            thresholds = [_threshold(torch.cat(scores), kept)] * len(scores) if scores else []
        removed = [
            score < threshold for score, threshold in zip(scores, thresholds, strict=True)
        ]
        for mask, score in zip(removed, scores, strict=True):
            mask[score.argmax()] = False
        return removed

    return _remove(model, example_inputs, fixed, choose)


def remove_dead_channels(
    model: nn.Module, example_inputs: Any, *, fixed: Iterable[str] | None = None
) -> dict[str, tuple[int, int]]:
    """Remove channels that nobody reads, or that are zero whatever the input.

    The model computes the same, in another order of sums. Activations must map 0 to 0, as ReLU,
    GELU, tanh and pooling do; sigmoid does not.

    Args:
        model: changed; a pruned one, say.
        example_inputs: the model is run on them: a tensor, or a tuple of them.
        fixed: as for `remove_channels`.

    Returns:
        By layer's name, its output channels before and after, where they changed.

    Raises:
        CompressionError: as for `remove_channels`.
        MissingExtraError: torch-pruning is not installed.
    """
    changes: dict[str, tuple[int, int]] = {}
    while True:  # what reads a dead channel alone may be dead itself once that is gone

        def choose(groups: list[_Group]) -> list[torch.Tensor]:
            removed = [group.is_dead() for group in groups]
            for mask in removed:
                if mask.all():
                    mask[0] = False
            return removed

        now = _remove(model, example_inputs, fixed, choose)
        for name, (before, after) in now.items():
            changes[name] = (changes.get(name, (before, before))[0], after)
        if not now:
            return changes


def _remove(
    model: nn.Module,
    example_inputs: Any,
    fixed: Iterable[str] | None,
    choose: Callable[[list[_Group]], list[torch.Tensor]],
) -> dict[str, tuple[int, int]]:
    """Remove what `choose` says, once on a copy to see that the outputs keep their shapes."""
    before = _channels(model)
    fixed_names = _fixed_names(model, example_inputs, fixed)
    wanted = _output_shapes(model, example_inputs)
    trial = copy.deepcopy(model)
    _cut(trial, example_inputs, fixed_names, choose)
    found = _output_shapes(trial, example_inputs)
    if found != wanted:
        raise CompressionError(
            type(model).__name__, f"would have outputs of shape {found}, not {wanted}",
            "name in fixed= the layers that make them",
        )  # fmt: skip
    _cut(model, example_inputs, fixed_names, choose)
    after = _channels(model)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def _cut(
    model: nn.Module,
    example_inputs: Any,
    fixed_names: set[str],
    choose: Callable[[list[_Group]], list[torch.Tensor]],
) -> None:
    graph = torch_pruning().DependencyGraph()
    was_training = model.training
    graph.build_dependency(model.eval(), example_inputs=example_inputs, verbose=False)
    ignored = [model.get_submodule(name) for name in fixed_names]
    groups = [
        _group_of(graph, found)
        for found in graph.get_all_groups(ignored_layers=ignored, root_module_types=_LAYERS)
    ]
    for group, removed in zip(groups, choose(groups), strict=True):
        indices = removed.nonzero()[:, 0].tolist()
        if indices:
            graph.get_pruning_group(group.root, group.remove, indices).prune()
    model.train(was_training)


def _group_of(graph: Any, found: Any) -> _Group:
    group = _Group(found[0].dep.target.module, found[0].dep.handler, [], [], [])
    for item in found:
        layer = item.dep.target.module
        entry = (layer, list(item.idxs), torch.tensor(item.root_idxs, dtype=torch.int64))
        if isinstance(layer, _NORMS):
            group.norms.append(entry)
        elif isinstance(layer, _LAYERS):
            is_written = graph.is_out_channel_pruning_fn(item.dep.handler)
            (group.writes if is_written else group.reads).append(entry)
    return group


def _threshold(scores: torch.Tensor, kept: float) -> float:
    """Return the smallest score that is kept."""
    num_kept = max(1, round(kept * len(scores)))
    return float(scores.topk(num_kept).values[-1])


def _weight_and_bias(layer: Any) -> torch.Tensor:
    weight: torch.Tensor = layer.weight.reshape(len(layer.weight), -1)
    return weight if layer.bias is None else torch.cat([weight, layer.bias[:, None]], dim=1)


def _channels(model: nn.Module) -> dict[str, int]:
    return {
        name: int(module.weight.shape[0])
        for name, module in model.named_modules()
        if isinstance(module, _LAYERS)
    }


def _fixed_names(
    model: nn.Module, example_inputs: Any, fixed: Iterable[str] | None
) -> set[str]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, _LAYERS)}
    if not layers:
        raise CompressionError(type(model).__name__, "has no linear layer and no convolution")
    if fixed is not None:
        for name in set(fixed) - set(layers):
            raise CompressionError(
                name, "is no linear layer or convolution",
                f"there are {', '.join(list(layers)[:8])}",
            )  # fmt: skip
        return set(fixed)
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in layers.items()
    ]
    _output_shapes(model, example_inputs)
    for hook in hooks:
        hook.remove()
    return set(ran[-1:])


def _output_shapes(model: nn.Module, example_inputs: Any) -> list[tuple[int, ...]]:
    was_training = model.training
    inputs = example_inputs if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    with torch.no_grad():
        outputs = model.eval()(*inputs)
    model.train(was_training)
    leaves = tree_leaves(outputs)
    return [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)]
