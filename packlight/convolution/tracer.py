"""A model's run on whole samples without memory: which layers run on what, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from packlight.convolution.watch import Cut, Watch
from packlight.errors import UnsupportedModelError
from packlight.torch_internals.dispatch import FakeTensorMode


@dataclass(frozen=True)
class Call:
    """A layer that ran.

    Attributes:
        module: it.
        path: its path in the model.
        kind: its class's name.
        cut: along which dimensions its input is cut.
        shape: of its input, all ranks together.
        out_shape: of its result.
    """

    module: nn.Module
    path: str
    kind: str
    cut: Cut
    shape: tuple[int, ...]
    out_shape: tuple[int, ...]


class Tracer:
    """Runs a model, and watches it outside of layers that have a rule.

    Args:
        model: it.
        kinds: classes of layers with a rule: what they do inside is not looked at.
        start: along which dimensions the model's inputs are cut, where they have these.
        after: returns along which the result of such a layer is, given its input's; None where
            that cannot be, of which `problems` say more later.
        meets_whole: as in `Watch`.

    Attributes:
        calls: of layers with a rule, in order.
        problems: what cannot be, in words; an ordered set.
        is_cut_after: whether results of the model are cut.
    """

    def __init__(
        self, model: nn.Module, kinds: Collection[type[nn.Module]], start: Cut,
        after: Callable[[nn.Module, Cut], Cut], meets_whole: bool = True,
    ) -> None:
        self.model, self._kinds, self._start, self._after = model, kinds, start, after
        self.calls: list[Call] = []
        self.problems: dict[str, None] = {}
        self.path_of = {module: path for path, module in model.named_modules()}
        self.is_cut_after = False
        self._running: list[nn.Module] = []
        self._training: set[nn.Module] = set()
        self._watch = Watch(len(start), self.complain, meets_whole)

    def complain(self, words: str, module: nn.Module | None = None) -> None:
        """Note what cannot be, with the path of a module: by default the one that runs."""
        module = module or (self._running[-1] if self._running else self.model)
        self.problems[f"{self.path_of[module] or 'the model itself'}: {words}"] = None

    def refuse(self, hint: str) -> None:
        """Raise if something cannot be.

        Raises:
            UnsupportedModelError: names all of it.
        """
        if self.problems:
            raise UnsupportedModelError(
                "not everything in the model can work on a rank's part\n  "
                + "\n  ".join(text.replace("\n", "\n    ") for text in self.problems)
                + f"\nhint: {hint}"
            )

    def trace(self, arguments: tuple[Any, ...]) -> None:
        """Run the model once."""
        handles = []
        for module in self.path_of:
            handles.append(module.register_forward_pre_hook(self._enter))
            handles.append(module.register_forward_hook(
                self._leave, with_kwargs=True, always_call=True
            ))
        try:
            with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), self._watch:
                self._watch.is_inside = True
                device = next(self.model.parameters(), torch.empty(0)).device
                made = pytree.tree_map_only(
                    torch.Tensor,
                    lambda t: torch.empty(t.shape, dtype=t.dtype, device=device), arguments,
                )
                self._watch.is_inside = False
                for tensor in pytree.tree_leaves(made):
                    if isinstance(tensor, torch.Tensor) and all(
                        dim is None or dim < tensor.ndim for dim in self._start
                    ):
                        self._watch.note(tensor, self._start)
                self.is_cut_after = any(map(self._watch.is_cut, _tensors(self.model(*made))))
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        if type(module) in self._kinds:
            self._watch.is_inside = True
            if module.training:  # sizes are the same, and nothing is counted or followed
                self._training.add(module)
                module.training = False

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._running.pop()
        if module in self._training:
            self._training.remove(module)
            module.training = True
        if type(module) not in self._kinds or any(type(m) in self._kinds for m in self._running):
            return
        self._watch.is_inside = False
        outputs, given = _tensors(output), [*args, *kwargs.values()]
        if not outputs or not given:
            return  # it raised
        x, cut = given[0], self._watch.cut_of(given[0])
        path, kind = self.path_of[module], type(module).__name__
        self.calls.append(Call(module, path, kind, cut, tuple(x.shape), tuple(outputs[0].shape)))
        after = self._after(module, cut)
        if cut == after == self._watch.whole:
            return
        if len(given) > 1 or kwargs:
            self.complain(f"{kind} with arguments beside its input", module)
        for each in outputs:
            self._watch.note(each, after)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(values) if isinstance(t, torch.Tensor)]
