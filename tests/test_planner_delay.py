"""Gradients that wait long for their reader are made late, where that is what the budget needs."""

from __future__ import annotations

import pytest

from packlight.planner import Planner
from packlight.planner.delay import delayed
from packlight.step import Action, BufferKind, GraphBuilder, Phase, StepGraph, simulate
from tests.oracles.liveness import recount_peak_bytes

NUM_BLOCKS, NUM_CHUNKS = 12, 8
WEIGHT, LOGITS, HIDDEN = 160, 10, 8


def tied_step(updates_early: bool = False) -> StepGraph:
    """Return a chain of blocks whose head, in chunks, shares its weight with the embedding.

    The weight's gradient is complete when the embedding's backward, the last one, has added to it.

    Args:
        updates_early: change the weight before the first block's backward, so that from there on
            logits can no longer be made.
    """
    build = GraphBuilder()
    weight = build.buffer(WEIGHT, BufferKind.STATE, "weight")
    x = build.operation("embed", [], [HIDDEN], seconds=1.0)[0]
    inputs = [x]
    for block in range(NUM_BLOCKS):
        wide = build.operation(f"wide{block}", [inputs[-1]], [4 * HIDDEN], seconds=2.0)[0]
        inputs += build.operation(f"narrow{block}", [wide], [HIDDEN], seconds=2.0)
    loss = build.operation("loss", [inputs[-1]], [1], seconds=0.1)[0]
    num_forward = 2 * NUM_BLOCKS + 2
    backward = {"phase": Phase.BACKWARD}
    total, parts = -1, []
    for chunk in range(NUM_CHUNKS):
        logits = build.operation(f"logits{chunk}", [weight, inputs[-1]], [LOGITS], seconds=1.0,
                                 **backward)[0]
        parts += build.operation(f"rows{chunk}", [weight, logits], [HIDDEN // NUM_CHUNKS],
                                 seconds=1.0, **backward)
        reads = [logits, inputs[-1]] + ([total] if chunk else [])
        total = build.operation(f"weight'{chunk}", reads, [WEIGHT], seconds=1.0,
                                overwrites_read=total if chunk else None, **backward)[0]
    gradient = build.operation("join", parts, [HIDDEN], **backward)[0]
    for block in reversed(range(NUM_BLOCKS)):
        if updates_early and block == 0:
            build.operation("early", [weight], [], can_recompute=False, mutates=[weight],
                            phase=Phase.UPDATE)
        wide = build.operation(f"again{block}", [inputs[block]], [4 * HIDDEN], seconds=2.0,
                               **backward)[0]
        gradient = build.operation(f"block'{block}", [gradient, wide], [HIDDEN], seconds=6.0,
                                   **backward)[0]
    total = build.operation("embed'", [gradient, total], [WEIGHT], seconds=1.0,
                            overwrites_read=total, **backward)[0]
    changed = [] if updates_early else [weight]
    build.operation("update", [total], [], can_recompute=False, mutates=changed,
                    phase=Phase.UPDATE)
    return build.finish(num_forward, [loss], [loss])


def test_a_tied_weights_gradient_is_made_when_the_rest_of_the_backward_is_over() -> None:
    graph = tied_step()
    # At the end: the gradient, a chunk of logits, what the head and what the embedding read.
    floor = WEIGHT + LOGITS + 2 * HIDDEN + 1
    plan = Planner(graph).plan(floor)
    # All there is to pay is a second run of the logits and what the end of the
    # forward needs: keeping the last block's output costs 8 bytes, and all else fits.
    assert plan.seconds <= graph.seconds + NUM_CHUNKS * 1.0 + 1e-9
    order = [
        graph.operations[i.target].name
        for i in plan.schedule.instructions if i.action is Action.RUN
    ]
    assert order.index("weight'0") > order.index("block'0")
    assert simulate(graph, plan.schedule).peak_bytes <= floor
    assert recount_peak_bytes(graph, plan.schedule.instructions) <= floor


def test_nothing_is_delayed_beyond_a_change_of_what_it_reads() -> None:
    graph = tied_step(updates_early=True)
    late = delayed(graph)
    names = [o.name for o in (late.graph if late else graph).operations]
    for chunk in range(NUM_CHUNKS):
        assert names.index(f"logits{chunk}") < names.index("early")
        assert names.index(f"rows{chunk}") < names.index("early")


def test_a_delayed_order_runs_every_operation_once_and_after_what_it_reads() -> None:
    late = delayed(tied_step())
    assert late is not None and sorted(late.old_ids) == list(range(len(late.graph.operations)))
    made: set[int] = set()
    makers = {b for o in late.graph.operations for b in o.creates}
    for operation in late.graph.operations:
        assert made.issuperset(set(operation.reads) & makers), operation.name
        made.update(operation.creates)


@pytest.mark.parametrize("num_blocks", [1, 6])
def test_a_chain_has_nothing_to_delay(num_blocks: int) -> None:
    build = GraphBuilder()
    values = [build.buffer(8, BufferKind.INPUT)]
    for _ in range(num_blocks):
        values += build.operation("f", [values[-1]], [8], seconds=1.0)
    gradient = values[-1]
    for value in reversed(values[:-1]):
        gradient = build.operation("f'", [gradient, value], [8], phase=Phase.BACKWARD)[0]
    assert delayed(build.finish(num_blocks, [values[-1]], [values[-1], gradient])) is None
