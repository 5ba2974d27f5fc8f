"""What all errors of Packlight have in common."""

from __future__ import annotations


class PacklightError(Exception):
    """Base class of all errors that Packlight raises for something its user can change."""


def hinted(hint: str) -> str:
    """Return a hint as the end of a message."""
    return f"\nhint: {hint}" if hint else ""
