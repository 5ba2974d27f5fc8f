"""Byte and time quantities are read and written as people write them."""

from __future__ import annotations

import pytest

from packlight.errors import BudgetFormatError, PacklightError
from packlight.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (1, 1),
        (314572800, 314572800),
        (2**70, 2**70),
        ("1048576", 1048576),
        ("1_000", 1000),
        ("512B", 512),
        ("300MiB", 300 * 2**20),
        ("300 MiB", 300 * 2**20),
        ("  300mib\n", 300 * 2**20),
        ("4GiB", 4 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("1.5 GB", 1_500_000_000),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 * 2**40),
        ("16kB", 16_000),
        ("16KB", 16_000),
        ("16KiB", 16_384),
        ("0.5KiB", 512),
        ("9007199254740993", 9007199254740993),
        ("8388608.5MiB", 8388608 * 2**20 + 2**19),
    ],
)
def test_budgets_are_read(text: str | int, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("0", "must be positive"),
        ("0MiB", "must be positive"),
        ("0.0001B", "whole number of bytes"),
        ("0.0001KiB", "must be positive"),
        (0, "must be positive"),
        (-5, "must be positive"),
        ("-5MiB", "a number and a unit"),
        ("abc", "a number and a unit"),
        ("", "a number and a unit"),
        ("MiB", "a number and a unit"),
        ("1e9", "unit"),
        ("1,5GiB", "a number and a unit"),
        ("nan", "a number and a unit"),
        ("inf GiB", "a number and a unit"),
        ("12 parsecs", "unknown unit 'parsecs'; known units: B, kB"),
        ("300M", "unknown unit 'M'"),
        ("300Mib it", "a number and a unit"),
        ("0.5", "not a fraction"),
        (0.5, "not a fraction; write for example '300MiB'"),
        (300.0, "not a fraction"),
        (float("nan"), "not a fraction"),
        (True, ""),
        (None, ""),
        (b"300MiB", ""),
        ([1], ""),
        ("\u0663\u0660MiB", "a number and a unit"),
    ],
)
def test_what_is_no_budget_is_refused_with_a_hint(text: object, hint: str) -> None:
    with pytest.raises(BudgetFormatError) as caught:
        parse_bytes(text)  # type: ignore[arg-type]
    assert repr(text) in str(caught.value)
    assert hint in str(caught.value)
    assert caught.value.budget is text
    assert isinstance(caught.value, PacklightError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (314572800, "300.0 MiB"),
        (2**30, "1.00 GiB"),
        (5 * 2**40, "5120.00 GiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_bytes_are_written(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize("num_bytes", [1, 1000, 1024, 123_456_789, 5 * 2**30, 7 * 2**41])
def test_what_is_written_reads_back_to_the_shown_precision(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 us"),
        (2e-5, "20.0 us"),
        (0.0123, "12.3 ms"),
        (1.0, "1.00 s"),
        (9.994, "9.99 s"),
        (75.0, "75.0 s"),
    ],
)
def test_seconds_are_written(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
