"""A step's digest: equal where a schedule of the one is a schedule of the other."""

from __future__ import annotations

import hashlib
import json

from packlight.step.types import StepGraph


def structure_digest(graph: StepGraph) -> str:
    """Return a digest of all that decides whether a schedule runs and what it holds.

    Times are left out (the same step takes other times tomorrow), and so are names of buffers and
    layers, which are for reports.
    """
    content = [
        [
            [o.name, o.reads, o.creates, o.workspace_bytes, o.phase, o.is_random,
             o.can_recompute, o.overwrites, o.mutates]
            for o in graph.operations
        ],
        [[b.bytes, b.kind] for b in graph.buffers],
        graph.num_forward, graph.forward_outputs, graph.outputs, graph.stored,
    ]
    text = json.dumps(content, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
