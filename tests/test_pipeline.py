"""Stages in one process: any graph cut anywhere keeps its bits; what a rank holds is bounded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import pytest
import torch

from packlight.capture.read_joint import read_joint_graph
from packlight.capture.step_capture import StepCapture
from packlight.cluster.instructions import Instruction, PipelineSchedule, Work
from packlight.cluster.schedules import (
    gpipe,
    interleaved,
    one_f_one_b,
    varuna,
    zero_bubble_h1,
    zero_bubble_h2,
)
from packlight.costs.profiler import CallProfiler
from packlight.errors import InfeasibleBudgetError
from packlight.lower.frame import Frame
from packlight.pipeline.cuts import balanced, choose_cuts
from packlight.pipeline.memory import StageBytes, messages, most_bytes, received_before
from packlight.pipeline.plans import plan_stages
from packlight.pipeline.split import split_step
from packlight.pipeline.stage import PlannedStage, read_stage
from packlight.planner import Planner, plan_schedule
from packlight.planner.search import LocalSearch
from tests.test_pipeline_ranks import MODELS, batch_of, loss_fn
from tests.zoo.families import make


def case(name: str) -> Any:
    if name in MODELS:
        torch.manual_seed(0)
        return MODELS[name](), batch_of(0), loss_fn
    return make(name, 0.0, 0)


def run_in_stages(planned: list[PlannedStage], primals: list[Any]) -> tuple[Any, dict[int, Any]]:
    """Return the loss and the gradients of one microbatch through all stages."""
    frames: list[Frame] = []
    given: list[Any] = []
    gradients: dict[int, Any] = {}

    def add(primals: Sequence[int], results: Sequence[Any]) -> None:
        for primal, gradient in zip(primals, results, strict=True):
            before = gradients.get(primal)
            gradients[primal] = gradient if before is None else gradient + before

    for stage in planned:
        frame = Frame(stage.program(), {})
        if Work.RECOMPUTE in stage.works:
            assert stage.num_reruns, "there is something to bring back"
        results = list(frame.run([*(primals[p] for p in stage.graph.primals), *given]))
        given = results[: len(stage.graph.leaving)]
        frames.append(frame)
    loss, given = results[-1], [torch.ones(())]
    for stage, frame in reversed(list(zip(planned, frames, strict=True))):
        if Work.RECOMPUTE in stage.works:
            frame.run([])
        results = list(frame.run(given))
        given, rest = results[: len(stage.graph.handing)], results[len(stage.graph.handing) :]
        is_halved = Work.WEIGHT in stage.works
        add(stage.graph.gradients[: stage.graph.num_early if is_halved else None], rest)
    for stage, frame in zip(planned, frames, strict=True):
        if Work.WEIGHT in stage.works:  # nobody waits for the second halves
            add(stage.graph.gradients[stage.graph.num_early :], frame.run([]))
    return loss, gradients


@pytest.mark.parametrize("is_halved", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("name", ["gpt", "tied", "skips", "shared", "t5", "unet"])
def test_a_step_cut_anywhere_has_eager_bits(name: str, is_halved: bool) -> None:
    """Where the planner would cut, and at random places."""
    model, batch, loss_of = case(name)
    expected = loss_of(model, batch)
    expected.backward()
    with CallProfiler(False) as profiler:
        loss = StepCapture(loss_of, model).capture(batch)
        whole = read_joint_graph(loss.joint, loss.num_forward_outputs, profiler.measure)
        names = {id(p): n for n, p in model.named_parameters()}
        wanted = dict(model.named_parameters())
        num = whole.graph.num_forward
        random = Random(name)
        for cuts in (choose_cuts(whole.graph, 3), sorted(random.sample(range(1, num), 4))):
            graphs = split_step(loss, whole, cuts)
            read = [read_stage(graph, profiler.measure, is_halved) for graph in graphs]
            planned = [PlannedStage(g, s, plan_schedule(s.graph, None).schedule) for g, s in read]
            with torch.no_grad():
                value, gradients = run_in_stages(planned, loss.arguments)
            assert torch.equal(value, expected)
            assert len(gradients) == sum(p.grad is not None for p in wanted.values())
            for primal, gradient in gradients.items():
                parameter = wanted[names[id(loss.arguments[primal])]]
                several = sum(primal in graph.gradients for graph in graphs) > 1
                assert parameter.grad is not None
                if several:  # the terms of a tied weight's gradient come in another order
                    assert torch.allclose(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
                else:
                    assert torch.equal(gradient, parameter.grad), names[id(parameter)]


@pytest.mark.parametrize("how", ["whole", "halves", "ahead"])
def test_what_every_microbatch_keeps_is_planned_apart_from_what_one_needs(how: str) -> None:
    """Eight under way: far less is enough than at equal shares of peaks, with eager's bits."""
    model, batch, loss_of = case("gpt")
    expected = loss_of(model, batch)
    expected.backward()
    make = {"whole": gpipe, "halves": zero_bubble_h2, "ahead": gpipe}[how]
    schedule = make(1, 8)
    with CallProfiler(False) as profiler, torch.no_grad():
        loss = StepCapture(loss_of, model).capture(batch)
        whole = read_joint_graph(loss.joint, loss.num_forward_outputs, profiler.measure)
        graphs = split_step(loss, whole, choose_cuts(whole.graph, 2))
        own, last = (read_stage(g, profiler.measure, how == "halves") for g in graphs)

        def most(stages: Mapping[int, StageBytes]) -> int:
            return most_bytes(schedule, 0, stages, 0)[0]

        def plan(budget: int) -> PlannedStage:
            return plan_stages({0: own}, budget, most, [], (0,) if how == "ahead" else ())[0]

        with pytest.raises(InfeasibleBudgetError) as refused:
            plan(1)
        least = refused.value.smallest_bytes
        if how == "whole":  # a peak alone says little of what is kept eight times
            half = Planner(own[1].graph).plain_peak_bytes // 2
            found = LocalSearch(own[1].graph).fastest(half)
            assert least < 0.5 * most({0: PlannedStage(*own, found[-1].schedule).bytes})
        small = plan(int(1.1 * least))
        assert most({0: small.bytes}) <= 1.1 * least
        planned = [small, PlannedStage(*last, plan_schedule(last[1].graph, None).schedule)]
        value, gradients = run_in_stages(planned, loss.arguments)
    assert torch.equal(value, expected)
    known = {id(p): p for p in model.parameters()}
    for primal, gradient in gradients.items():
        parameter = known[id(loss.arguments[primal])]
        assert parameter.grad is not None and torch.equal(gradient, parameter.grad)


def test_no_other_contiguous_parts_have_a_smaller_largest_sum() -> None:
    random = Random(0)
    for _ in range(50):
        seconds = [random.random() for _ in range(random.randint(3, 9))]
        ends = balanced(seconds, 3)
        starts = [0, *ends[:-1]]
        most = max(sum(seconds[a:b]) for a, b in zip(starts, ends, strict=True))
        num = len(seconds)
        best = min(
            max(sum(seconds[:a]), sum(seconds[a:b]), sum(seconds[b:]))
            for a in range(1, num - 1) for b in range(a + 1, num)
        )
        assert most == pytest.approx(best)


SCHEDULES: list[Callable[[], PipelineSchedule]] = [
    lambda: gpipe(3, 4), lambda: one_f_one_b(4, 6), lambda: interleaved(2, 4, 2),
    lambda: zero_bubble_h1(3, 6), lambda: zero_bubble_h2(3, 6), lambda: varuna(3, 5),
]
NAMES = ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "varuna"]


@pytest.mark.parametrize("make_schedule", SCHEDULES, ids=NAMES)
def test_no_pace_of_the_ranks_holds_more_than_the_bound_and_one_holds_all_of_it(
    make_schedule: Callable[[], PipelineSchedule],
) -> None:
    """Ranks go on in a random order; what they sent stays until the other has received it."""
    schedule = make_schedule()
    random = Random(0)
    stages = {stage: some_bytes(schedule, stage, random) for stage in range(schedule.num_stages)}
    bounds = [most_bytes(schedule, r, stages, 7)[0] for r in range(schedule.num_ranks)]
    seen = [0] * schedule.num_ranks
    for _ in range(400):
        for rank, most in enumerate(at_a_random_pace(schedule, stages, random)):
            seen[rank] = max(seen[rank], 7 + most)
    assert all(s <= b for s, b in zip(seen, bounds, strict=True))
    assert sum(s == b for s, b in zip(seen, bounds, strict=True)) >= schedule.num_ranks - 1


def some_bytes(schedule: PipelineSchedule, stage: int, random: Random) -> StageBytes:
    is_halved, is_ahead = stage in schedule.split_stages, stage in schedule.ahead_stages
    backward = (Work.INPUT, Work.WEIGHT) if is_halved else (Work.BACKWARD,)
    works = (Work.FORWARD, *((Work.RECOMPUTE,) if is_ahead else ()), *backward)
    running = tuple(random.randint(1, 50) for _ in works)
    kept = tuple(random.randint(1, 50) for _ in works[1:])
    return StageBytes(works, running, kept, *(random.randint(1, 50) for _ in range(3)))


def at_a_random_pace(
    schedule: PipelineSchedule, stages: dict[int, StageBytes], random: Random
) -> list[int]:
    """Return the most that each rank held."""
    sent, let_go = messages(schedule), received_before(schedule)
    at = [0] * schedule.num_ranks
    done: set[Instruction] = set()
    held = [0] * schedule.num_ranks
    most = [0] * schedule.num_ranks
    under_way: dict[Instruction, int] = {}
    weights = [random.random() ** 4 for _ in at]  # some ranks are much slower than others
    while any(at[r] < len(own) for r, own in enumerate(schedule.ranks)):
        ready = [
            r for r, own in enumerate(schedule.ranks)
            if at[r] < len(own) and (schedule.needs(own[at[r]]) or own[0]) in {*done, own[0]}
        ]
        rank = random.choices(ready, [weights[r] for r in ready])[0]
        instruction = schedule.ranks[rank][at[rank]]
        costs = stages[instruction.stage]
        for source in let_go[rank][at[rank]]:  # what is known to be received is
            assert source not in under_way, "the bound lets go of what is still under way"
        if (source := schedule.needs(instruction)) in under_way:
            held[schedule.rank_of_stage[source.stage]] -= under_way.pop(source)
        place = costs.works.index(instruction.work)
        kept = (0, *costs.kept, 0)
        if instruction.work is Work.FORWARD:
            held[rank] += costs.arriving
        most[rank] = max(most[rank], held[rank] - kept[place] + costs.running[place])
        held[rank] += kept[place + 1] - kept[place]
        if instruction.work in (Work.BACKWARD, Work.WEIGHT):
            held[rank] -= costs.arriving
        if instruction in sent:
            size = costs.leaving if instruction.work is Work.FORWARD else costs.handing
            under_way[instruction] = size
            held[rank] += size
        done.add(instruction)
        at[rank] += 1
    return most
