"""Schedules of pipelines as data: they can run, and take the time that their papers say."""

from __future__ import annotations

import random
import re
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from packlight.cluster.costs import StageCosts
from packlight.cluster.instructions import (
    Instruction,
    PipelineSchedule,
    Work,
    check,
    weight_versions,
)
from packlight.cluster.schedules import (
    bidirectional,
    gpipe,
    interleaved,
    one_f_one_b,
    pipedream,
    pipedream_2bw,
    schedule_of,
    varuna,
    zero_bubble_h1,
    zero_bubble_h2,
)
from packlight.cluster.timeline import simulate_pipeline
from packlight.errors import OptionError, PipelineError

SIZES = [(1, 1), (1, 4), (2, 5), (3, 3), (4, 8), (4, 2), (8, 32)]
UNIT = StageCosts(1.0, 1.0, 1.0, kept_bytes=10, held_bytes=6, static_bytes=100, workspace_bytes=3)


def all_schedules(p: int, m: int) -> list[PipelineSchedule]:
    found = [f(p, m) for f in (gpipe, one_f_one_b, varuna, zero_bubble_h1, pipedream)]
    found += [pipedream_2bw(p, m, m), bidirectional(p, m)]
    if m % p == 0:
        found += [interleaved(p, m, 2), interleaved(p, m, 3)]
    return found


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_every_schedule_can_run_and_does_everything_once(p: int, m: int) -> None:
    for schedule in all_schedules(p, m):
        check(schedule)


@pytest.mark.parametrize(("p", "m"), [s for s in SIZES if s[1] >= s[0]])
def test_bubbles_are_those_of_the_papers(p: int, m: int) -> None:
    work = 3 * m

    def bubble(schedule: PipelineSchedule, unit: StageCosts = UNIT) -> float:
        stages = [unit] * schedule.num_stages
        return simulate_pipeline(schedule, stages).total_seconds - work

    assert bubble(gpipe(p, m)) == pytest.approx(3 * (p - 1))
    assert bubble(one_f_one_b(p, m)) == pytest.approx(3 * (p - 1))
    assert bubble(zero_bubble_h1(p, m)) == pytest.approx(p - 1)  # F + I - W for each rank
    if m >= 2 * p - 1:  # F + I - 2W, but F at least: the last rank starts so much later
        assert bubble(zero_bubble_h2(p, m)) == pytest.approx(p - 1)
        again = StageCosts(1, 2, 1)  # the first half recomputes
        assert bubble(zero_bubble_h1(p, m), again) - m == pytest.approx(2 * (p - 1))
        assert bubble(zero_bubble_h2(p, m), again) - m == pytest.approx(p - 1)
    if m % p == 0:
        for v in (2, 3):
            chunk = StageCosts(1 / v, 1 / v, 1 / v)
            assert bubble(interleaved(p, m, v), chunk) == pytest.approx(3 * (p - 1) / v)


@pytest.mark.parametrize(("p", "m"), [(4, 8), (8, 32)])
def test_frames_in_flight_are_those_of_the_papers(p: int, m: int) -> None:
    def frames(schedule: PipelineSchedule) -> list[int]:
        return list(simulate_pipeline(schedule, [UNIT] * schedule.num_stages).frames)

    assert frames(gpipe(p, m)) == [m] * p
    assert frames(one_f_one_b(p, m)) == [p - r for r in range(p)]
    assert frames(zero_bubble_h1(p, m)) == [p] * p
    assert frames(zero_bubble_h2(p, m)) == [2 * p - 1] * p
    assert frames(interleaved(p, m, 2)) == [min(2 * m, 2 * (p - r - 1) + p + 1) for r in range(p)]


@pytest.mark.parametrize(("p", "m"), [(2, 3), (4, 8), (8, 16)])
def test_two_ways_have_a_smaller_bubble_than_one_for_one_more_microbatch(p: int, m: int) -> None:
    both = simulate_pipeline(bidirectional(p, m), [UNIT] * 2 * p)
    one = simulate_pipeline(zero_bubble_h1(p, 2 * m), [UNIT] * p)
    assert max(both.frames) <= p + 1
    assert sum(both.busy_seconds) == sum(one.busy_seconds) == pytest.approx(2 * m * 3 * p)
    assert one.total_seconds - 6 * m == pytest.approx(p - 1)
    assert both.total_seconds - 6 * m == pytest.approx(p / 2 - 1)


def test_peaks_count_what_each_instruction_holds() -> None:
    peaks = simulate_pipeline(one_f_one_b(3, 6), [UNIT] * 3).peak_bytes
    assert peaks == (100 + 3 * 10 + 3, 100 + 2 * 10 + 3, 100 + 10 + 3)
    # The last rank has three in flight: two of them half done, one of them in its backward.
    assert simulate_pipeline(zero_bubble_h1(3, 6), [UNIT] * 3).peak_bytes[2] == 100 + 2 * 6 + 10 + 3


def test_recomputation_just_in_time_leaves_no_recomputation_in_the_bubble() -> None:
    p, m = 4, 12
    stages = [replace(UNIT, recompute_seconds=1.0)] * (p - 1) + [UNIT]
    waiting = simulate_pipeline(one_f_one_b(p, m), stages)
    in_time = simulate_pipeline(varuna(p, m), stages)
    assert in_time.total_seconds < waiting.total_seconds
    # What remains is the bubble without recomputation: the first rank works all the time, but for
    # forwards and backwards of one microbatch in the other stages.
    assert in_time.total_seconds <= 4 * m + 3 * (p - 1)


def test_weight_stashing_keeps_a_version_for_each_microbatch_in_flight() -> None:
    assert weight_versions(pipedream(4, 32)) == (4, 3, 2, 1)
    assert weight_versions(pipedream_2bw(4, 32, 4)) == (2, 2, 2, 1)
    assert weight_versions(one_f_one_b(4, 32)) == (1, 1, 1, 1)
    stages = [replace(UNIT, version_bytes=50)] * 4
    stashed = simulate_pipeline(pipedream(4, 32), stages).peak_bytes[0]
    assert stashed - simulate_pipeline(one_f_one_b(4, 32), stages).peak_bytes[0] == 3 * 50


def test_a_pipeline_that_never_flushes_has_one_bubble_for_all_batches() -> None:
    p, m, batches = 4, 8, 5
    endless = simulate_pipeline(pipedream_2bw(p, m * batches, m), [UNIT] * p).total_seconds
    flushed = simulate_pipeline(one_f_one_b(p, m), [UNIT] * p).total_seconds
    assert endless == pytest.approx(batches * flushed - (batches - 1) * 3 * (p - 1))


def test_the_page_shows_what_its_code_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text(encoding="utf-8")
    code, shown = re.findall(r"^```python\n(.*?)^```\n\n((?:    [^\n]*\n)+)", page, re.M | re.S)[0]
    exec(code, {})
    assert capsys.readouterr().out == textwrap.dedent(shown)


def swapped(schedule: PipelineSchedule, rank: int, a: int, b: int) -> PipelineSchedule:
    changed = list(schedule.ranks[rank])
    changed[a], changed[b] = changed[b], changed[a]
    ranks = list(schedule.ranks)
    ranks[rank] = tuple(changed)
    return replace(schedule, ranks=tuple(ranks))


def test_a_deadlock_is_found_and_its_circle_named() -> None:
    # The first rank wants the gradient of microbatch 1 before it has sent microbatch 2, which the
    # second wants before it makes that gradient.
    first = [(Work.FORWARD, 0), (Work.FORWARD, 1), (Work.BACKWARD, 1), (Work.FORWARD, 2),
             (Work.BACKWARD, 0), (Work.BACKWARD, 2)]
    second = [(Work.FORWARD, 0), (Work.FORWARD, 1), (Work.FORWARD, 2), (Work.BACKWARD, 1),
              (Work.BACKWARD, 0), (Work.BACKWARD, 2)]
    ranks = tuple(
        tuple(Instruction(work, stage, m) for work, m in order)
        for stage, order in enumerate((first, second))
    )
    with pytest.raises(PipelineError, match="rank 0 cannot start B1 of stage 0 before B1") as found:
        check(PipelineSchedule("own", (0, 1), 3, ranks))
    assert "rank 1 cannot start F2 of stage 1 before F2 of stage 0" in str(found.value)


def test_what_is_wrong_on_one_rank_is_named() -> None:
    schedule = one_f_one_b(2, 3)
    with pytest.raises(PipelineError, match="rank 0, instruction 0: B0 of stage 0 comes before F0"):
        check(swapped(schedule, 0, 0, 2))
    missing = replace(schedule, ranks=(schedule.ranks[0][:-1], schedule.ranks[1]))
    with pytest.raises(PipelineError, match="B2 of stage 0 never runs"):
        check(missing)
    first, second = schedule.ranks
    twice = replace(schedule, ranks=((*first, first[-1]), second))
    with pytest.raises(PipelineError, match="runs a second time"):
        check(twice)
    elsewhere = replace(schedule, rank_of_stage=(1, 0))
    with pytest.raises(PipelineError, match="F0 of stage 0 belongs to rank 1"):
        check(elsewhere)


def written_out(schedule: PipelineSchedule, stages: list[StageCosts]) -> float:
    """Return when the last instruction ends, as the longest path through all dependencies."""
    ends: dict[Instruction, float] = {}
    seconds = {
        Work.FORWARD: lambda c: c.forward_seconds,
        Work.BACKWARD: lambda c: c.input_seconds + c.weight_seconds + c.recompute_seconds,
        Work.INPUT: lambda c: c.input_seconds + c.recompute_seconds,
        Work.WEIGHT: lambda c: c.weight_seconds,
    }
    changed = True
    while changed:
        changed = False
        for instructions in schedule.ranks:
            before = 0.0
            for instruction in instructions:
                needed = schedule.needs(instruction)
                start = max(before, ends.get(needed, 0.0) if needed else 0.0)
                before = start + seconds[instruction.work](stages[instruction.stage])
                if ends.get(instruction) != before:
                    ends[instruction] = before
                    changed = True
    return max(ends.values())


@pytest.mark.parametrize("seed", range(8))
def test_times_are_the_longest_path_through_all_dependencies(seed: int) -> None:
    random.seed(seed)
    p = random.choice([2, 3, 4])
    m = p * random.choice([1, 2, 3])
    for schedule in (gpipe(p, m), one_f_one_b(p, m), zero_bubble_h1(p, m), interleaved(p, m, 2)):
        stages = [
            StageCosts(*(random.random() for _ in range(4))) for _ in range(schedule.num_stages)
        ]
        found = simulate_pipeline(schedule, stages).total_seconds
        assert found == pytest.approx(written_out(schedule, stages))


def test_messages_take_the_sender_or_the_link() -> None:
    stages = [replace(UNIT, send_seconds=0.5, receive_seconds=0.25)] * 2
    one = one_f_one_b(2, 1)
    # F, message, F B, message, B.
    assert simulate_pipeline(one, stages).total_seconds == pytest.approx(6 + 2 * 0.75)
    assert simulate_pipeline(one, stages, blocking=False).total_seconds == pytest.approx(7.5)
    many = one_f_one_b(2, 50)
    blocked = simulate_pipeline(many, stages)
    beside = simulate_pipeline(many, stages, blocking=False)
    assert blocked.sending_seconds[0] == pytest.approx(50 * 0.75)
    assert beside.sending_seconds == (0.0, 0.0)
    assert beside.total_seconds < blocked.total_seconds


def test_sizes_that_make_no_pipeline_are_refused_with_a_size_that_does() -> None:
    with pytest.raises(OptionError, match="such as 8"):
        interleaved(4, 6, 2)
    with pytest.raises(OptionError, match="one of gpipe, 1f1b, varuna, zb-h1"):
        schedule_of("2f2b", 2, 2, 1)
    with pytest.raises(OptionError, match="both numbers are positive"):
        gpipe(0, 1)
    with pytest.raises(OptionError, match="hint: 6 do"):
        pipedream_2bw(2, 8, 3)
