"""Packages that an extra brings, asked for when something is first used."""

from __future__ import annotations

from types import ModuleType

from packlight.errors import MissingExtraError


def require_numba(extra: str, what: str) -> None:
    """Check that kernels can be compiled.

    Args:
        extra: that brings numba, for the error.
        what: needs it.

    Raises:
        MissingExtraError: numba is not installed.
    """
    try:
        import numba  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("numba", extra, what) from error


def require_optuna(what: str) -> ModuleType:
    """Return Optuna.

    Args:
        what: needs it.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna", "search", what) from error
    return optuna
