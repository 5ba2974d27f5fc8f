"""A step's digest: equal where a schedule of the one is a schedule of the other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable

from packlight.step.types import StepGraph


def order_digest(graph: StepGraph) -> str:
    """Return a digest of what decides whether a schedule runs: equal for a step at other sizes.

    What it holds, and what may be overwritten with the same bits, `simulate` has to say.
    """
    content = [
        [
            [o.name, o.reads, o.creates, o.phase, o.is_random, o.can_recompute, o.mutates, o.kind]
            for o in graph.operations
        ],
        [b.kind for b in graph.buffers], graph.num_forward, graph.forward_outputs, graph.outputs,
    ]
    text = json.dumps(content, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def structure_digest(graph: StepGraph) -> str:
    """Return a digest of all that decides whether a schedule runs and what it holds.

    Times are left out (the same step takes other times tomorrow), and so are names: those of
    buffers and layers are for reports, those of memories and lanes are another machine's elsewhere.
    """
    lanes = _numbered(o.lane for o in graph.operations)
    memories = _numbered(b.memory for b in graph.buffers)
    content = [
        [
            [o.name, o.reads, o.creates, o.workspace_bytes, o.phase, o.is_random,
             o.can_recompute, o.overwrites, o.mutates, o.kind, lanes[o.lane]]
            for o in graph.operations
        ],
        [[b.bytes, b.kind, memories[b.memory]] for b in graph.buffers],
        graph.num_forward, graph.forward_outputs, graph.outputs,
    ]
    text = json.dumps(content, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}
