"""A tensor as codes and the few distinct values that they stand for; nothing is rounded here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Codes = npt.NDArray[np.int32]

# Beyond so many values a table of them, and of how often each occurs, no longer pays.
MAX_VALUES = 4096

# What torch does not sort, exactly as something that it does.
_SORTED_AS = {
    torch.bool: torch.uint8,
    torch.float8_e4m3fn: torch.float32,
    torch.float8_e5m2: torch.float32,
}


@dataclass(frozen=True)
class Alphabet:
    """The values of a tensor other than zero, ascending: code 0 is zero, code i is `values[i-1]`.

    Attributes:
        values: one-dimensional, of the tensor's dtype.
    """

    values: torch.Tensor

    @property
    def num_codes(self) -> int:
        """Zero included, whether or not it occurs."""
        return len(self.values) + 1

    @property
    def num_negative(self) -> int:
        """How many of the codes from 1 on stand for negative values."""
        return int((_sortable(self.values) < 0).sum())

    def codes_of(self, tensor: torch.Tensor) -> Codes:
        """Return the code of each element, flat, in the order of rows."""
        flat = _sortable(tensor).reshape(-1)
        places = torch.searchsorted(_sortable(self.values), flat)
        codes = torch.where(flat == 0, 0, places + 1)
        return codes.to(torch.int32).numpy()

    def tensor_of(self, codes: Codes) -> torch.Tensor:
        """Return the elements that codes stand for, flat."""
        table = torch.cat([torch.zeros(1, dtype=self.values.dtype), self.values])
        return table[torch.from_numpy(codes.astype(np.int64))]


def alphabet_of(tensor: torch.Tensor) -> Alphabet | None:
    """Return a tensor's alphabet; None if it has too many values, or not ordered ones, for one."""
    if tensor.is_complex() or not tensor.numel():
        return None
    # Most tensors that have no alphabet show it in a few elements.
    sortable = _sortable(tensor)
    if len(torch.unique(sortable.reshape(-1)[: 4 * MAX_VALUES])) > MAX_VALUES:
        return None
    values = torch.unique(sortable)
    if len(values) > min(MAX_VALUES, max(2, tensor.numel() // 2)):
        return None
    if values.is_floating_point() and not torch.isfinite(values).all():
        return None
    return Alphabet(values[values != 0].to(tensor.dtype))


def _sortable(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(_SORTED_AS.get(tensor.dtype, tensor.dtype))


# -- how the values are written


def write_values(values: torch.Tensor) -> tuple[str, bytes]:
    """Return the name of the shortest exact form of an alphabet's values, and their bytes.

    - "grid": multiples of one number: that number, then the integers' differences.
    - "half": all of them are float16.
    - "plain": bytes as they are.
    """
    forms = [("plain", tensor_bytes(values))]
    if values.dtype in (torch.float32, torch.float64, torch.bfloat16):
        half = values.half()
        if torch.equal(half.to(values.dtype), values):
            forms.append(("half", tensor_bytes(half)))
    grid = _grid_of(values)
    if grid is not None:
        step, multiples = grid
        written = b"".join(
            write_varint(m) for m in (_zigzag(multiples[0]), *np.diff(multiples).tolist())
        )
        forms.append(("grid", tensor_bytes(step) + written))
    return min(forms, key=lambda form: len(form[1]))


def read_values(
    form: str, content: bytes, offset: int, num: int, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """Return the values that `write_values` wrote at an offset, and the offset behind them.

    Raises:
        ValueError: these are no such bytes.
    """
    stored = torch.float16 if form == "half" else dtype
    num_stored = 1 if form == "grid" else num
    end = offset + num_stored * stored.itemsize
    if form not in ("plain", "half", "grid") or end > len(content):
        raise ValueError(f"no {num} values of form {form!r}")
    found = bytes_tensor(content[offset:end], stored)
    if form != "grid":
        return found.to(dtype), end
    multiples, last = [], 0
    for index in range(num):
        number, end = read_varint(content, end)
        last = _unzigzag(number) if index == 0 else last + number
        multiples.append(last)
    return found * torch.tensor(multiples, dtype=torch.float64).to(dtype), end


def _grid_of(values: torch.Tensor) -> tuple[torch.Tensor, list[int]] | None:
    """Return (step, multiples) such that step * multiple is each value, bit for bit."""
    if not values.is_floating_point() or len(values) < 2:
        return None
    exact = values.double()
    smallest = exact.abs().min()
    for divisor in range(1, 9):
        step = (smallest / divisor).to(values.dtype)
        if step == 0:
            continue
        multiples = (exact / step.double()).round()
        if multiples.abs().max() >= 2**15 or len(torch.unique(multiples)) < len(multiples):
            continue
        if torch.equal(step * multiples.to(values.dtype), values):
            return step.reshape(1), [int(m) for m in multiples.tolist()]
    return None


def _zigzag(number: int) -> int:
    return 2 * number if number >= 0 else -2 * number - 1


def _unzigzag(number: int) -> int:
    return number // 2 if number % 2 == 0 else -(number + 1) // 2


def write_varint(number: int) -> bytes:
    """Return an integer from 0 on in as few bytes of 7 bits as it needs, lowest first."""
    written = bytearray()
    while True:
        number, low = number >> 7, number & 127
        written.append(low | (128 if number else 0))
        if not number:
            return bytes(written)


def read_varint(content: bytes, offset: int) -> tuple[int, int]:
    """Return the integer at an offset, and the offset behind it.

    Raises:
        ValueError: it does not end, or is no integer of 63 bits.
    """
    number = shift = 0
    while offset < len(content) and shift < 63:
        byte = content[offset]
        offset += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, offset
    raise ValueError("an integer does not end")


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """Return the elements' bytes in the order of rows, little-endian."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def bytes_tensor(content: bytes, dtype: torch.dtype) -> torch.Tensor:
    """Return the elements that bytes are, flat."""
    if not content:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype)
