"""Byte and time quantities as people write them, and as integers and floats.

`parse_bytes("300MiB") == 314572800`; `format_bytes(314572800) == "300.0 MiB"`.
"""

from __future__ import annotations

import re

from packlight.errors import BudgetFormatError

_UNIT_BYTES = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_QUANTITY = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """Return a positive number of bytes.

    Args:
        text: an int (bytes), or a string such as ``"300MiB"``, ``"1.5 GB"``, ``"1048576"``.
            Decimal (kB, MB, GB, TB) and binary units (KiB, MiB, GiB, TiB) are told apart;
            case does not matter.

    Raises:
        BudgetFormatError: for anything else. Fractions of a model's memory are refused on purpose:
            a budget is a number of bytes.

    >>> parse_bytes("300MiB"), parse_bytes("1.5 GB"), parse_bytes(4096)
    (314572800, 1500000000, 4096)
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        hint = "write a number and a unit, for example '300MiB'"
        if isinstance(text, float):
            hint = "a budget is a number of bytes, not a fraction; write for example '300MiB'"
        raise BudgetFormatError(text, hint)
    if isinstance(text, int):
        if text <= 0:
            raise BudgetFormatError(text, "a budget must be positive")
        return text
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise BudgetFormatError(text, "write a number and a unit, for example '300MiB'")
    number, unit = match.groups()
    scale = _UNIT_BYTES.get(unit.upper())
    if scale is None:
        known = "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB"
        raise BudgetFormatError(text, f"unknown unit {unit!r}; known units: {known}")
    if "." in number and scale == 1:
        raise BudgetFormatError(text, "a budget is a whole number of bytes, not a fraction")
    value = round(float(number.replace("_", "")) * scale) if "." in number else int(number) * scale
    if value <= 0:
        raise BudgetFormatError(text, "a budget must be positive")
    return value


def format_bytes(num_bytes: float) -> str:
    """Return bytes in the binary unit that reads best.

    >>> format_bytes(314572800), format_bytes(12), format_bytes(-2048)
    ('300.0 MiB', '12 B', '-2.0 KiB')
    """
    size = abs(num_bytes)
    if size < 1024:
        return f"{num_bytes:.0f} B"
    for unit, scale in (("KiB", 2**10), ("MiB", 2**20)):
        if size < 1024 * scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 2**30:.2f} GiB"


def format_seconds(seconds: float) -> str:
    """Return seconds in the unit that reads best.

    >>> format_seconds(0.0123), format_seconds(75.0), format_seconds(2e-5)
    ('12.3 ms', '75.0 s', '20.0 us')
    """
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    if seconds < 1.0:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"
