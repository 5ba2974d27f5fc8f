"""`LowBit`: one optimizer made of a rule, a way to store its state, and a way to store weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from packlight.errors import OptimizerStateError, OptionError, UnsupportedParameterError
from packlight.optim.backend import check_parameter, update_parameter
from packlight.optim.formats import (
    MIN_QUANTIZED_ELEMENTS,
    check_formats,
    is_small,
    new_state,
    state_bytes,
    state_layout,
)
from packlight.optim.rearrange import rearranged_state
from packlight.optim.rules import Rule, check_group
from packlight.optim.trust import check_layer_rate
from packlight.units import format_bytes

States = str | Mapping[str, str]

# What decides the form of a state: it must agree between who saved it and who loads it.
_FORM = ("rule", "states", "weights")


class LowBit(torch.optim.Optimizer):
    """An optimizer whose state, weights or both take fewer bits than 32.

    It is named for what its pieces have in common; which of them has few bits is what they say:

    - `rule`: what is computed; see `sgd`, `adam`, `adamw`, `lion` in `packlight.optim`.
    - `states`: how moments are stored. "fp32"; "bf16" (rounded stochastically); "8bit": codes in
      blocks of 256 (Dettmers et al. 2021); "4bit": blocks of 128 (Li et al. 2023). Or a name for
      each moment: {"exp_avg": "4bit", "exp_avg_sq": "8bit"}.
    - `weights`: how the parameter itself is stored, which must have that dtype. "fp32";
      "bf16-stochastic", "fp16-stochastic" (Zamirai et al. 2020); "bf16-kahan": with the rounding
      error beside it in bfloat16 (same paper); "bf16+8bit": with the error in 8 bits, half a last
      place cut into 127 (FlashOptim, arXiv 2602.23349), 24 bits in all; "bf16-nearest": each
      update smaller than half a last place is lost, so training stalls; there to compare with.

    | states | bytes per parameter of AdamW's state | | weights | bytes per parameter |
    | --- | --- | --- | --- | --- |
    | fp32 | 8 | | fp32 | 4 |
    | bf16 | 4 | | bf16-kahan | 4 |
    | 8bit | 2.03 | | bf16+8bit | 3 |
    | 4bit | 1.06 | | bf16-, fp16-stochastic | 2 |

    All are entries of the parameter groups, so groups may differ in them; a group's "rule" may be a
    `Rule`. Parameters of fewer than 4096 elements keep their moments in fp32 where others have
    them quantized; `summary()` says how many.

    A step decodes, updates and encodes 256 elements at a time and allocates a few KiB. It runs
    in `torch.get_num_threads()` threads. On the CPU it needs numba (`packlight[optim]`), which
    compiles for some 20 s in the very first step on a machine and keeps the result on disk.
    A gradient in another memory layout than its parameter (autograd makes none) is copied.

    Each parameter's step depends on nothing but its own gradient, state and number, so stepping
    one at a time and in any order gives the same bits. Random bits are a function of (seed, the
    parameter's number in `state_dict()`, its count of steps, the element).

    A gradient that is NaN or infinite spoils its own weight, as in torch. A quantized block shares
    one scale, so that from the next step on the whole block is spoilt.

    Args:
        params: parameters or groups of them, as in torch. They must be dense.
        rule: with its hyperparameters.
        states: see above.
        weights: see above.
        seed: of stochastic rounding, from 0 to 2^32 - 1.
        maximize: ascend instead.

    Raises:
        OptionError: an unknown name, or a number outside of its range.
        UnsupportedParameterError: a parameter of another dtype than `weights` asks for, or one on a
            device without a kernel; in `step`, a sparse gradient, too.
        MissingExtraError: in `step`: numba is not installed.

    >>> from packlight.optim import adamw
    >>> weight = torch.nn.Parameter(torch.ones(64, 64))
    >>> optimizer = LowBit([weight], rule=adamw(lr=0.1, weight_decay=0.0), states="8bit")
    >>> weight.sum().backward()
    >>> optimizer.step()
    >>> round(weight[0, 0].item(), 6)
    0.9
    >>> print(optimizer.summary())
    LowBit: 4096 elements, 8.1 KiB of state, 2.03 bytes for each
      adamw, states 8bit, weights fp32: 1 parameters, 4096 elements, 8.1 KiB of state
    """

    _number_of: dict[torch.Tensor, int]

    def __init__(
        self,
        params: Any,
        rule: Rule,
        states: States = "8bit",
        weights: str = "fp32",
        *,
        seed: int = 0,
        maximize: bool = False,
    ) -> None:
        if not isinstance(rule, Rule):
            raise OptionError(
                f"rule={rule!r} is no Rule\nhint: make one: rule=packlight.optim.adamw(lr=1e-3)"
            )
        defaults = {
            **rule.hyperparameters,
            "rule": rule.name,
            "states": states,
            "weights": weights,
            "seed": seed,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters.

        Args:
            param_group: its "params" and what differs from the optimizer's own settings. A "rule"
                that is a `Rule` brings its hyperparameters.

        Raises:
            OptionError, UnsupportedParameterError: as for the class; nothing was added.
        """
        rule = param_group.get("rule")
        if isinstance(rule, Rule):
            of_rule = {"layer_rate": None, **rule.hyperparameters}  # not what others have
            param_group = {**of_rule, **param_group, "rule": rule.name}
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except Exception:
            del self.param_groups[-1]
            raise
        self._number_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number_parameters()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss anew.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(group, parameter)
        return loss

    @torch.no_grad()
    def rearrange_state(self, parameter: torch.Tensor, source: torch.Tensor) -> None:
        """Let a parameter's state follow elements that change places, before they do.

        Blocks of quantized moments are encoded anew. Costs some 20 bytes per element for a moment.

        Args:
            parameter: one of this optimizer's, a vector.
            source: for each new element which old one it is; -1 for one whose state starts at zero.
                There may be more or fewer than before.
        """
        group = next(g for g in self.param_groups if any(p is parameter for p in g["params"]))
        state = self.state.get(parameter)
        if not state:
            return
        for name, new in rearranged_state(group, state, parameter.numel(), source).items():
            old = state.get(name)
            if isinstance(old, torch.Tensor) and old.shape == new.shape and old.dtype == new.dtype:
                old.copy_(new)  # keeps its place in memory
            else:
                state[name] = new
        for name in set(state) - {"step", *state_layout(group, len(source))}:
            del state[name]  # the scales of a parameter that is now too small to be quantized

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over hyperparameters and state, bit for bit.

        Args:
            state_dict: of an optimizer with the same rules and formats, which `torch.optim`'s own
                are not.

        Raises:
            OptimizerStateError: it has other rules or formats; nothing was loaded.
        """
        saved_states = state_dict["state"]
        pairs: list[tuple[Any, torch.Tensor]] = []
        for number, (saved, group) in enumerate(
            zip(state_dict["param_groups"], self.param_groups, strict=False)
        ):
            for name in _FORM:
                if saved.get(name) != group[name]:
                    raise OptimizerStateError(
                        f"{name!r} of group {number}", saved.get(name), group[name],
                        "make the optimizer as the one that was saved",
                    )
            pairs += zip(saved["params"], group["params"], strict=False)
            for key, parameter in zip(saved["params"], group["params"], strict=False):
                misfit = _misfit(saved_states.get(key), saved, parameter)
                if misfit is not None:
                    name, found, expected = misfit
                    what = f"{name!r} of parameter {key}, of shape {tuple(parameter.shape)},"
                    raise OptimizerStateError(what, found, expected)
        # torch would convert states to the parameter's dtype; it checks the groups' lengths.
        super().load_state_dict({**state_dict, "state": {}})
        for key, parameter in pairs:
            if key in saved_states:
                self.state[parameter] = {
                    name: value.to(parameter.device, copy=True)
                    if isinstance(value, torch.Tensor)
                    else value
                    for name, value in saved_states[key].items()
                }

    def summary(self) -> str:
        """Return what is stored how and in how many bytes, made or to be made, one group a line."""
        lines = []
        total_elements = total_bytes = 0
        for group in self.param_groups:
            sizes = [p.numel() for p in group["params"]]
            held = sum(state_bytes(group, size) for size in sizes)
            total_elements, total_bytes = total_elements + sum(sizes), total_bytes + held
            lines.append(
                f"  {group['rule']}, states {_in_words(group['states'])}, weights "
                f"{group['weights']}: {len(sizes)} parameters, {sum(sizes)} elements, "
                f"{format_bytes(held)} of state"
            )
            small = [size for size in sizes if is_small(group, size)]
            if small:
                lines.append(
                    f"    of these, {len(small)} with fewer than {MIN_QUANTIZED_ELEMENTS} elements "
                    f"({sum(small)} in all) keep their moments in fp32"
                )
        per_element = total_bytes / total_elements if total_elements else 0.0
        head = (
            f"{type(self).__name__}: {total_elements} elements, {format_bytes(total_bytes)} of "
            f"state, {per_element:.2f} bytes for each"
        )
        return "\n".join([head, *lines])

    def _step_one(self, group: dict[str, Any], parameter: torch.Tensor) -> None:
        check_parameter(parameter, group["weights"])
        state = self.state[parameter]
        if not state:
            state.update(new_state(group, parameter))
        misfit = _misfit(state, group, parameter)
        if misfit is not None:
            name, found, expected = misfit
            raise UnsupportedParameterError(
                parameter,
                f"has a state {name!r} of (dtype, elements) {found}; now it should be {expected}",
                "a parameter keeps its shape and formats, or del optimizer.state[parameter]",
            )
        state["step"] += 1
        # Copies that somebody else steps, to see what happens, all have number 0.
        update_parameter(group, parameter, state, self._number_of.get(parameter, 0))

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group)
        check_formats(group)
        check_layer_rate(group)
        seed = group["seed"]
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise OptionError(f"seed={seed!r}; it must be an integer from 0 to 2^32 - 1")
        for parameter in group["params"]:
            check_parameter(parameter, group["weights"])

    def _number_parameters(self) -> None:
        parameters: Iterable[torch.Tensor] = (p for g in self.param_groups for p in g["params"])
        self._number_of = {parameter: number for number, parameter in enumerate(parameters)}


def _misfit(
    state: Mapping[str, Any] | None, group: Mapping[str, Any], parameter: torch.Tensor
) -> tuple[str, Any, Any] | None:
    """Return (name, what it is, what it should be) of a tensor that kernels would misread."""
    for name, expected in state_layout(group, parameter.numel()).items() if state else ():
        value = state.get(name) if state else None
        found = (value.dtype, value.numel()) if isinstance(value, torch.Tensor) else None
        if found != expected:
            return name, found, expected
    return None


def _in_words(states: States) -> str:
    if isinstance(states, str):
        return states
    return " and ".join(f"{form} ({name})" for name, form in states.items())
