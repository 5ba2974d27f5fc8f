"""Kinds of operations: what the emitter has handlers for."""

from __future__ import annotations

from packlight.capture.joint import RNG_STATE, SNAPSHOT, TANGENT
from packlight.capture.whole_step import KEEP, UPDATE
from packlight.step import Operation

__all__ = ["COMPUTE", "KEEP", "RNG_STATE", "SNAPSHOT", "TANGENT", "UPDATE", "kind_of"]

COMPUTE = "compute"
PSEUDO = frozenset((KEEP, UPDATE, TANGENT, RNG_STATE, SNAPSHOT))


def kind_of(operation: Operation) -> str:
    """Return the name of a pseudo operation, `COMPUTE` for calls."""
    return operation.name if operation.name in PSEUDO else COMPUTE
