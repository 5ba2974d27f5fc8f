"""Packages of the extra `compress`, imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from packlight.errors import MissingExtraError


def constriction() -> Any:
    """Return the library of entropy coders."""
    return _import("constriction", "constriction", "coding weights into a file")


def kmeans1d() -> Any:
    """Return the library that clusters numbers optimally."""
    return _import("kmeans1d", "kmeans1d", "the optimal start of a codebook")


def torch_pruning() -> Any:
    """Return the library that knows which channels go together."""
    return _import("torch_pruning", "torch-pruning", "removing channels")


def _import(module: str, package: str, feature: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise MissingExtraError(package, "compress", feature) from error
