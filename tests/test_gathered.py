"""Parameters in pieces with all ranks: gathered as operations, updated where they rest."""

from __future__ import annotations

import pytest

from packlight.errors import ScheduleError
from packlight.planner import plan_schedule
from packlight.planner.plan import Planner
from packlight.ranks.pieces import Pieces, segments
from packlight.step import (
    RANKS,
    Action,
    BufferKind,
    GraphBuilder,
    Instruction,
    Lane,
    Machine,
    OperationKind,
    Phase,
    Schedule,
    Speed,
    StepGraph,
    simulate,
    with_transfers,
)

SIZE, NUM_LAYERS = 100, 6
# Gathering takes a tenth of a layer.
MACHINE = Machine().with_lane(Lane("network", RANKS, Speed(100.0, 2.0), None))


def chain(num_layers: int = NUM_LAYERS) -> StepGraph:
    """Layers whose parameters forward and backward read, each updated behind that."""
    build = GraphBuilder()
    weights = [build.buffer(SIZE, BufferKind.PARAMETER) for _ in range(num_layers)]
    x = build.buffer(1, BufferKind.INPUT)
    inputs = []
    for weight in weights:
        inputs.append(x)
        (x,) = build.operation("layer", (x, weight), (10,), seconds=30.0)
    gradient = x
    for weight, x in reversed([*zip(weights, inputs, strict=True)]):
        gradient, own = build.operation(
            "back", (gradient, x, weight), (10, 20), seconds=60.0, phase=Phase.BACKWARD
        )
        build.operation(
            "update", (own,), (), seconds=1.0, phase=Phase.UPDATE, mutates=(weight,),
            can_recompute=False,
        )
    return build.finish(num_layers, (), ())


def gathered(num_layers: int = NUM_LAYERS) -> StepGraph:
    return with_transfers(chain(num_layers), MACHINE, in_pieces=range(num_layers))


def num_gathers(graph: StepGraph, schedule: Schedule) -> int:
    kinds = [graph.operations[run].kind for run in schedule.runs()]
    return kinds.count(OperationKind.READ)


def test_updates_are_updates_of_what_rests_with_the_ranks() -> None:
    graph = gathered()
    assert not any(o.kind is OperationKind.WRITE for o in graph.transfers)
    for update in (o for o in graph.computations if o.mutates):
        (there,) = update.mutates
        assert graph.buffers[there].memory == RANKS
        assert graph.gathered_from[there] not in update.reads
    assert graph.without_transfers() == chain()


def test_what_a_computation_reads_cannot_run_again_behind_the_update() -> None:
    assert gathered().last_chances() == chain().last_chances()


def test_a_parameter_is_not_gathered_after_its_update() -> None:
    graph = gathered(1)
    (gather,) = graph.transfers
    order = [gather.id, 0, 1, 2]
    good = [Instruction(Action.RUN, run) for run in order]
    dies = [Instruction(Action.FREE, b) for o in graph.computations for b in o.creates]
    frees = [Instruction(Action.FREE, 0), *dies]
    peak = simulate(graph, Schedule((*good, *frees), 2), MACHINE).peak_bytes
    assert peak == SIZE + 10 + 10 + 20
    again = [*good, Instruction(Action.FREE, 0), Instruction(Action.RUN, gather.id)]
    with pytest.raises(ScheduleError, match="gathered after its update"):
        simulate(graph, Schedule(tuple(again), 2), MACHINE)


def test_without_a_budget_parameters_are_gathered_anew_rather_than_kept() -> None:
    planner = Planner(graph := gathered(), MACHINE)
    plan = planner.plan(None)
    assert plan.peak_bytes < planner.plain_peak_bytes - 2 * SIZE
    assert num_gathers(graph, plan.schedule) > NUM_LAYERS
    # The network works beside the layers: what is gathered anew costs next to nothing.
    assert plan.seconds < 1.1 * planner.plain_seconds


def test_a_budget_decides_how_many_are_kept_from_forward_to_backward() -> None:
    graph = gathered()
    plain = Planner(graph, MACHINE).plain_peak_bytes
    counts = []
    for budget in (plain, plain - 2 * SIZE, plain - 4 * SIZE):
        plan = plan_schedule(graph, budget, MACHINE)
        assert simulate(graph, plan.schedule, MACHINE).peak_bytes <= budget
        counts.append(num_gathers(graph, plan.schedule))
    assert counts == sorted(counts)
    assert NUM_LAYERS == counts[0] < counts[-1] <= 2 * NUM_LAYERS


@pytest.mark.parametrize("bytes_per_second", [3.0, 20.0])
def test_gathering_some_again_is_no_slower_than_gathering_none_or_all(
    bytes_per_second: float,
) -> None:
    """... in simulated seconds, at five budgets, on a network that may be what all wait for."""
    machine = Machine().with_lane(Lane("network", RANKS, Speed(bytes_per_second, 2.0), None))
    graph = with_transfers(uneven_chain(), machine, in_pieces=range(NUM_LAYERS))
    kept, again = schedule_by_hand(graph, False), schedule_by_hand(graph, True)
    most = simulate(graph, kept, machine).peak_bytes
    least = simulate(graph, again, machine).peak_bytes
    assert least < most
    mixed = 0
    for part in range(5):
        budget = least + part * (most - least) // 4
        plan = plan_schedule(graph, budget, machine)
        assert plan.peak_bytes <= budget
        for schedule in (kept, again):
            timeline = simulate(graph, schedule, machine)
            assert timeline.peak_bytes > budget or plan.seconds <= timeline.seconds * (1 + 1e-9)
        mixed += NUM_LAYERS < num_gathers(graph, plan.schedule) < 2 * NUM_LAYERS
    assert mixed  # the choice is each parameter's


def uneven_chain() -> StepGraph:
    """Layers whose parameters have other sizes, and which take longer or shorter."""
    build = GraphBuilder()
    sizes = [40 * (1 + layer % 3) for layer in range(NUM_LAYERS)]
    weights = [build.buffer(size, BufferKind.PARAMETER) for size in sizes]
    x = build.buffer(1, BufferKind.INPUT)
    inputs = []
    for layer, weight in enumerate(weights):
        inputs.append(x)
        (x,) = build.operation("layer", (x, weight), (10,), seconds=10.0 * (1 + layer % 2))
    gradient = x
    for weight, x in reversed([*zip(weights, inputs, strict=True)]):
        gradient, own = build.operation(
            "back", (gradient, x, weight), (10, 20), seconds=30.0, phase=Phase.BACKWARD
        )
        build.operation(
            "update", (own,), (), seconds=1.0, phase=Phase.UPDATE, mutates=(weight,),
            can_recompute=False,
        )
    return build.finish(NUM_LAYERS, (), ())


def schedule_by_hand(graph: StepGraph, again: bool) -> Schedule:
    """Gather each parameter one layer ahead, once or also for the backward; free all when done."""
    gather_of = {o.creates[0]: o.id for o in graph.transfers}
    uses = [
        (i, [b for b in graph.operations[i].reads if b in gather_of])
        for i in range(graph.num_computations)
    ]
    order: list[int] = []
    there: set[int] = set()
    for place, (index, _) in enumerate(uses):
        is_forward = index < graph.num_forward
        for _, needed in uses[place : place + 3]:
            for buffer in needed:
                if buffer not in there:
                    there.add(buffer)
                    order.append(gather_of[buffer])
        order.append(index)
        if again and is_forward and index + 1 < graph.num_forward:
            there -= {*uses[place][1]}  # the last layer's stays: the backward begins with it
    last_use: dict[int, int] = {}
    for place, index in enumerate(order):
        for buffer in (*graph.operations[index].reads, *graph.operations[index].creates):
            last_use[buffer] = place
        if index in gather_of.values():
            last_use[graph.operations[index].creates[0]] = place
    instructions: list[Instruction] = []
    for place, index in enumerate(order):
        operation = graph.operations[index]
        instructions.append(Instruction(Action.RUN, index))
        for buffer in dict.fromkeys((*operation.reads, *operation.creates)):
            next_gather = next(
                (p for p in range(place + 1, len(order)) if order[p] == gather_of.get(buffer)), None
            )
            next_use = next(
                (p for p in range(place + 1, len(order))
                 if buffer in graph.operations[order[p]].reads), None,
            )
            is_over = next_use is None or (next_gather is not None and next_gather < next_use)
            if is_over and graph.buffers[buffer].kind is not BufferKind.INPUT and (
                not graph.buffers[buffer].memory
            ):
                instructions.append(Instruction(Action.FREE, buffer))
    end_of_forward = next(
        n for n, one in enumerate(instructions)
        if one == Instruction(Action.RUN, graph.num_forward - 1)
    )
    return Schedule(tuple(instructions), end_of_forward + 1)


@pytest.mark.parametrize("shape", [(5, 3), (4,), (1, 7), (8, 2, 2)])
@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_pieces_are_all_rows_once(shape: tuple[int, ...], num_ranks: int) -> None:
    for pieces in (
        Pieces.even(shape, num_ranks),
        Pieces.even(shape, num_ranks, 4),
        Pieces.of_owner(shape, num_ranks, num_ranks - 1),
    ):
        rows = [row for first, end in pieces.rows for row in range(first, end)]
        assert rows == [*range(shape[0])]
        assert len(pieces.rows) == num_ranks
        assert segments([pieces])[-1] == sum(map(pieces.num_elements, range(num_ranks)))


def test_pieces_begin_where_blocks_of_states_do() -> None:
    pieces = Pieces.even((10, 96), 2, 256)
    assert all(first * 96 % 256 == 0 for first, end in pieces.rows if first < end)
