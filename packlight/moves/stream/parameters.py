"""Which parameters (and large buffers of the model) can lie on a disk between uses.

A parameter moves by being given other memory (`parameter.data = ...`); the object stays the same.
Who looked at its memory before would go on looking at the old one. So a parameter moves only if
nobody else does, which the reference count of its storage tells.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from packlight.capture.step_capture import CapturedLoss
from packlight.memory.tier import SlotSpec
from packlight.moves.stream.state import MIN_STREAMED_BYTES, has_viewers
from packlight.updates.gradients import fills_storage

ParameterSlots = dict[torch.Tensor, SlotSpec]


@dataclass(frozen=True, eq=False)
class ParameterHolder:
    """A parameter or buffer, which keeps its identity and gets other memory."""

    tensor: torch.Tensor

    def get(self) -> torch.Tensor | None:
        """Return its values."""
        return self.tensor.data

    @property
    def has_viewers(self) -> bool:
        """Whether others look at its memory."""
        return has_viewers(self.tensor)

    def set(self, value: torch.Tensor) -> None:
        """Give it other memory."""
        self.tensor.data = value


def parameter_slots(model: nn.Module) -> ParameterSlots:
    """Return the parameters and buffers of a model that could be streamed.

    Left out are small ones, integers, tensors of other classes, and those that share their memory
    with anything else: a part of themselves, another parameter, a view that somebody has taken.
    """
    return {
        tensor: SlotSpec.of(tensor.data, name)
        for name, tensor in _large(model).items()
        if type(tensor) in (nn.Parameter, torch.Tensor)
        and tensor.layout is torch.strided
        and (tensor.is_floating_point() or tensor.is_complex())
        and not _is_shared(tensor)
    }


def why_not_all(model: nn.Module, slots: ParameterSlots) -> str | None:
    """Return why large parameters share their memory and stay, in words; None if none does."""
    names = [n for n, t in _large(model).items() if t not in slots and _is_shared(t)]
    if not names:
        return None
    others = f" and that of {len(names) - 1} others" if len(names) > 1 else ""
    return (
        f"something else looks at the memory of {names[0]!r}{others}: a view, a state_dict that is "
        "kept, another parameter"
    )


def _large(model: nn.Module) -> dict[str, torch.Tensor]:
    named = dict([*model.named_parameters(), *model.named_buffers()])
    return {n: t for n, t in named.items() if t.nbytes >= MIN_STREAMED_BYTES}


def _is_shared(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided or type(tensor) not in (nn.Parameter, torch.Tensor):
        return False
    return not fills_storage(tensor) or has_viewers(tensor)


def without_results(slots: ParameterSlots, loss: CapturedLoss) -> ParameterSlots:
    """Return those that a captured loss only reads: neither writes nor returns, and passes once."""
    num_passed = Counter(id(argument) for argument in loss.arguments)
    staying = {primal for primal in loss.written_back.values()}
    placeholders = [n for n in loss.joint.graph.nodes if n.op == "placeholder"]
    staying |= {placeholders.index(n) for n in _returned_views(loss) if n.op == "placeholder"}
    ids = {id(a) for i, a in enumerate(loss.arguments) if i in staying or num_passed[id(a)] > 1}
    return {
        tensor: spec
        for tensor, spec in slots.items()
        # An attribute that is assigned to may be a buffer, which is another tensor afterwards.
        if id(tensor) not in ids and not (loss.assigned and not isinstance(tensor, nn.Parameter))
    }


def _returned_views(loss: CapturedLoss) -> Iterator[fx.Node]:
    """Yield what the forward's results are, or look at."""
    output = next(n for n in reversed(loss.joint.graph.nodes) if n.op == "output")
    for node in output.args[0][: loss.num_forward_outputs]:
        while isinstance(node, fx.Node):
            yield node
            is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
            node = node.args[0] if is_view else None
