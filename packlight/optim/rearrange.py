"""A state whose elements change places: decoded, put in another order, encoded again.

Blocks of quantized states get new scales. A value is given the nearest level, and the largest of a
block is a level exactly, so that a block which stays what it is keeps its codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from packlight.optim.codebooks import LINEAR_4BIT, SIGNED_4BIT, SIGNED_8BIT, UNSIGNED_8BIT
from packlight.optim.formats import (
    MIN_QUANTIZED_ELEMENTS,
    STATE_FORMATS,
    StateFormat,
    state_format,
    state_layout,
)
from packlight.optim.rules import moments_of


def rearranged_state(
    group: Mapping[str, Any], state: Mapping[str, Any], num_elements: int, source: torch.Tensor
) -> dict[str, Any]:
    """Return the state of a parameter of `len(source)` elements.

    Args:
        group: the parameter's, see `state_format`.
        state: as it is.
        num_elements: that the parameter has had.
        source: for each new element which old one it is, -1 for one that starts at zero.
    """
    new: dict[str, Any] = {"step": state["step"]}
    is_new, place = source < 0, source.clamp(min=0)
    signed = {moment.name: moment.is_signed for moment in moments_of(group)}
    for name in state_layout(group, len(source)):
        if name in signed:
            old_form = state_format(group, name, num_elements)
            form = state_format(group, name, len(source))
            values = _decoded(state, name, old_form, signed[name], num_elements)[place]
            values[is_new] = 0
            new.update(_encoded(values, name, form, signed[name]))
        elif not name.endswith("_scale"):
            new[name] = state[name].view(-1)[place].masked_fill_(is_new, 0)
    return new


def decoded_moments(group: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the moments of a parameter, or of rows of one, as vectors of numbers.

    Args:
        group: the parameter's, see `state_format`.
        state: of all of its elements, or of some blocks of them.
    """
    found = {}
    for moment in moments_of(group):
        # (Of rows of a large parameter there may be few.)
        is_quantized = f"{moment.name}_scale" in state
        count = MIN_QUANTIZED_ELEMENTS if is_quantized else 0
        form = state_format(group, moment.name, count)
        num_elements = state[moment.name].numel() * form.elements_per_item
        found[moment.name] = _decoded(state, moment.name, form, moment.is_signed, num_elements)
    return found


def _levels(form: StateFormat, is_signed: bool) -> torch.Tensor:
    """Return the level of each code, ascending."""
    if form is STATE_FORMATS["8bit"]:
        levels = SIGNED_8BIT.signed if is_signed else UNSIGNED_8BIT.magnitudes
    else:
        levels = SIGNED_4BIT.signed if is_signed else LINEAR_4BIT
    return torch.tensor(levels, dtype=torch.float32)


def _decoded(
    state: Mapping[str, Any], name: str, form: StateFormat, is_signed: bool, count: int
) -> torch.Tensor:
    stored: torch.Tensor = state[name].view(-1)
    if not form.is_quantized:
        return stored
    if form.elements_per_item > 1:  # a block's first half in the low bits
        halves = stored.view(-1, form.block_elements // 2)
        stored = torch.stack([halves & 15, halves >> 4], 1).view(-1)
    scales: torch.Tensor = state[f"{name}_scale"].repeat_interleave(form.block_elements)
    levels = _levels(form, is_signed).to(stored.device)
    return (levels[stored.long()] * scales[: len(stored)])[:count]


def _encoded(
    values: torch.Tensor, name: str, form: StateFormat, is_signed: bool
) -> dict[str, torch.Tensor]:
    if not form.is_quantized:
        return {name: values.to(form.dtype)}
    count = len(values)
    blocks = torch.nn.functional.pad(values.float(), (0, -count % form.block_elements))
    blocks = blocks.view(-1, form.block_elements)
    levels = _levels(form, is_signed).to(values.device)
    scales = blocks.amax(1)
    if is_signed:  # there is no level -1: of the largest magnitude, scales would shrink each time
        scales = torch.maximum(scales, blocks.amin(1) / levels[0])
    shares = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)
    if not is_signed:  # a second moment that becomes zero makes the next update explode
        codes[(codes == 0) & (shares > 0) & (levels[0] == 0)] = 1
    if form.elements_per_item > 1:
        low, high = codes.view(-1, 2, form.block_elements // 2).unbind(1)
        return {name: (low | high << 4).view(-1).byte(), f"{name}_scale": scales}
    return {name: codes.view(-1)[:count].byte(), f"{name}_scale": scales}
