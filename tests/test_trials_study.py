"""Studies: what is admitted beside what, what is told to the sampler, what survives a kill."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

optuna = pytest.importorskip("optuna", reason="needs the extra 'search'")

from packlight.errors import NoFeasibleTrialError, OptionError  # noqa: E402
from packlight.trials.coordinator import Coordinator  # noqa: E402
from packlight.trials.packing import Option, Waiting, choose  # noqa: E402
from packlight.trials.records import (  # noqa: E402
    Outcome,
    Record,
    Study,
    read_record,
    record_path,
    write_record,
)
from packlight.trials.settings import Settings  # noqa: E402
from packlight.trials.storage import CONSTRAINT, locked  # noqa: E402
from tests.oracles.fake_trials import (  # noqa: E402
    MIB,
    FakeWorkers,
    smooth,
    smooth_space,
    study,
)

ROOT = Path(__file__).resolve().parent.parent


def frozen(directory: Path) -> list[Any]:
    """Return Optuna's trials, read from the journal by Optuna alone."""
    backend = optuna.storages.journal.JournalFileBackend(str(directory / "journal.log"))
    storage = optuna.storages.JournalStorage(backend)
    return list(optuna.load_study(study_name=None, storage=storage).get_trials())


# -- admission


def test_steps_never_hold_more_than_there_is_and_each_trial_ends_once(tmp_path: Path) -> None:
    seen: list[int] = []

    def watch(coordinator: Coordinator) -> None:
        assert coordinator.held_bytes <= coordinator.step_bytes
        seen.append(len(coordinator.active))

    workers = FakeWorkers(smooth, smooth_space)
    result = study(tmp_path, workers, 25, num_workers=3, watch=watch).run()
    assert sorted(result.records) == list(range(25)) and max(seen) == 3
    assert len(workers.trained) == len(set(workers.trained))
    for number, record in result.records.items():
        least = smooth(record.point)["floor"]
        assert (record.outcome is Outcome.INFEASIBLE) == (least > result.step_bytes), number
        if record.outcome is Outcome.INFEASIBLE:
            assert record.smallest_bytes == least and number not in workers.trained
    told = {trial.number: trial for trial in frozen(tmp_path)}
    for number, record in result.records.items():
        needed = record.smallest_bytes or (record.planned and record.planned.peak_bytes)
        assert needed is not None
        assert told[number].constraints[CONSTRAINT] == needed - result.step_bytes


def test_a_trial_that_fits_only_recomputed_runs_recomputed_and_one_that_needs_all_runs_alone(
    tmp_path: Path,
) -> None:
    sizes = {0: (900, 100), 1: (900, 550), 2: (10, 10)}  # plain and smallest MiB

    def behave(point: dict[str, Any]) -> dict[str, Any]:
        plain, floor = sizes[point["kind"]]
        return {"plain": plain * MIB, "floor": floor * MIB, "error": 1.0}

    alone: list[bool] = []

    def watch(coordinator: Coordinator) -> None:
        for active in coordinator.active.values():
            if active.held_bytes > coordinator.share_bytes and active.is_admitted:
                alone.append(coordinator.held_bytes <= coordinator.step_bytes)

    workers = FakeWorkers(behave, kinds(3))
    result = study(tmp_path, workers, 3, watch=watch).run()
    planned = [result.records[number].planned for number in range(3)]
    assert all(p is not None for p in planned)
    assert [p.slowdown for p in planned if p] == [1.5, 1.5, 1.0]
    assert planned[1] and planned[1].peak_bytes == result.step_bytes
    assert alone and all(alone)


def kinds(count: int) -> Callable[..., dict[str, Any]]:
    """A space whose trials are of one kind after the other."""

    def space(ask: Callable[..., Any], number: int) -> dict[str, Any]:
        return {"kind": number % count, "x": ask("suggest_float", "x", 0.0, 1.0)}

    return space


def test_what_fails_diverges_dies_or_grows_is_recorded_and_the_study_goes_on(
    tmp_path: Path,
) -> None:
    ends = ["fails", "diverges", "dies", "grows", None]
    workers = FakeWorkers(lambda p: {"ends": ends[p["kind"]], "error": p["x"]}, kinds(5))
    result = study(tmp_path, workers, 10).run()
    outcomes = [result.records[number].outcome for number in range(5)]
    assert outcomes == [
        Outcome.FAILED, Outcome.DIVERGED, Outcome.FAILED, Outcome.COMPLETE, Outcome.COMPLETE
    ]  # fmt: skip
    assert "without a word" in result.records[2].why
    assert result.num_retried == 2
    assert [limit for number, limit in workers.limits if number == 3] == [
        result.step_bytes // 2, result.step_bytes
    ]  # fmt: skip
    states = [trial.state.name for trial in frozen(tmp_path)]
    assert states[:5] == ["FAIL", "PRUNED", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_point_that_was_run_before_is_not_run_again(tmp_path: Path) -> None:
    def space(ask: Callable[..., Any], number: int) -> dict[str, Any]:
        return {"x": ask("suggest_categorical", "x", [1, 2, 3])}

    workers = FakeWorkers(lambda point: {"error": float(point["x"])}, space)
    result = study(tmp_path, workers, 12, num_workers=3).run()
    assert sorted(result.records) == list(range(12))
    points = [record.point["x"] for record in result.records.values()]
    assert len(workers.trained) == len(set(points)) < 12
    for record in result.records.values():
        assert record.outcome is Outcome.COMPLETE
        assert record.error == record.point["x"] + 0.1
        if record.same_as is not None:
            assert result.records[record.same_as].point == record.point


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_bad_trials_are_pruned_and_the_best_is_not(tmp_path: Path, pruner: str) -> None:
    settings = Settings(steps=16, report_every=1, pruner=pruner)
    workers = FakeWorkers(lambda p: {"error": 0.0 if p["kind"] == 0 else 5.0 + p["kind"]}, kinds(8))
    result = study(tmp_path, workers, 24, settings=settings).run()
    ended = {n: r.outcome for n, r in result.records.items()}
    assert result.count(Outcome.PRUNED) >= 5
    assert ended[8] is ended[16] is Outcome.COMPLETE
    best = result.best
    assert best is not None and best.point["kind"] == 0
    for record in result.records.values():
        if record.outcome is Outcome.PRUNED:
            assert max(record.reports) < 16


def test_the_sampler_learns_what_fits(tmp_path: Path) -> None:
    """Of random points three in ten fit; of those that TPE asks for later, most do."""
    workers = FakeWorkers(
        lambda p: {"plain": p["width"] * MIB, "floor": p["width"] * MIB, "error": p["x"]},
        lambda ask, number: {
            "width": ask("suggest_int", "width", 1, 2200), "x": ask("suggest_float", "x", 0.0, 1.0)
        },
    )
    result = study(tmp_path, workers, 60, num_workers=1).run()
    late = [r.outcome is not Outcome.INFEASIBLE for n, r in result.records.items() if n >= 30]
    assert sum(late) >= 0.6 * len(late)


# -- what survives


def run_killed(directory: Path, num_trials: int, seconds: float | None) -> int:
    """Run a study, and kill it after some seconds; return its exit code."""
    command = [sys.executable, "-m", "tests.oracles.fake_trials", str(directory), str(num_trials)]
    process = subprocess.Popen([*command, "2"], cwd=ROOT, stderr=subprocess.PIPE)
    try:
        _, told = process.communicate(timeout=seconds)
        assert process.returncode == 0, told.decode()
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
    return process.returncode


def finished(directory: Path) -> dict[int, Record]:
    """Return the trials of which a file says that they have ended."""
    numbers = (int(path.stem) for path in (directory / "trials").glob("*.json"))
    records = ((number, read_record(record_path(directory, number))) for number in numbers)
    return {number: record for number, record in records if record is not None}


def kill_again_and_again(directory: Path, num_kills: int, num_trials: int) -> None:
    """Kill a study at random moments; what was finished stays as it was and is not run again."""
    draw = random.Random(0)
    started_path = directory / "started"
    (directory / "trials").mkdir(parents=True)
    started = time.monotonic()
    assert run_killed(directory, 1, None) == 0
    loading = time.monotonic() - started
    done = finished(directory)
    num_killed = 0
    while num_killed < num_kills:
        before = len(started_path.read_text().splitlines())
        code = run_killed(directory, num_trials, draw.uniform(0.6 * loading, 1.6 * loading))
        num_killed += code != 0
        later = [int(line) for line in started_path.read_text().splitlines()[before:]]
        assert not set(later) & set(done)
        now = finished(directory)
        assert {number: now[number] for number in done} == done
        if code == 0:
            num_trials += 40  # it was quicker than the kill: there is more to do
        done = now
    assert run_killed(directory, num_trials, None) == 0
    done = finished(directory)
    assert sorted(done) == list(range(num_trials))
    for trial in frozen(directory):
        assert trial.state.is_finished()
        assert trial.params == done[trial.number].point
        if done[trial.number].outcome is Outcome.COMPLETE:
            assert trial.value == done[trial.number].error


def test_no_finished_trial_is_lost_or_run_twice_when_the_study_is_killed(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path / "study", 3, 40)


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path) -> None:
    kill_again_and_again(tmp_path / "study", 50, 400)


def test_a_line_that_was_not_written_to_its_end_does_not_end_the_study(tmp_path: Path) -> None:
    workers = FakeWorkers(smooth, smooth_space)
    study(tmp_path, workers, 3).run()
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"worker_')
    result = study(tmp_path, workers, 5).run()
    assert sorted(result.records) == list(range(5))
    assert journal.read_bytes().startswith(whole)


def test_a_trial_that_ended_while_nobody_listened_is_told_of_later(tmp_path: Path) -> None:
    workers = FakeWorkers(smooth, smooth_space)
    coordinator = study(tmp_path, workers, 4)
    trial = coordinator.storage.ask()
    point = {"width": trial.suggest_int("width", 1, 400), "x": trial.suggest_float("x", -1.0, 1.0)}
    write_record(
        record_path(tmp_path, 0), Record(0, Outcome.COMPLETE, point, 0.25, reports={10: 0.25})
    )
    result = study(tmp_path, workers, 4).run()
    assert 0 not in workers.trained and result.records[0].error == 0.25
    assert frozen(tmp_path)[0].value == 0.25


# -- what is refused


def test_memory_that_leaves_nothing_for_steps_is_refused_with_how_much_would(
    tmp_path: Path,
) -> None:
    workers = FakeWorkers(smooth, smooth_space)
    with pytest.raises(OptionError, match=r"--workers [1-9]\d* would have some"):
        study(tmp_path, workers, 4, num_workers=64, memory=2**31)
    with pytest.raises(OptionError, match="hint: more than"):
        study(tmp_path, workers, 4, memory=64 * MIB)


def test_a_study_none_of_whose_trials_fits_names_the_smallest_memory(tmp_path: Path) -> None:
    workers = FakeWorkers(
        lambda p: {"plain": 9000 * MIB, "floor": (1000 + 100 * p["kind"]) * MIB}, kinds(3)
    )
    coordinator = study(tmp_path, workers, 3)
    memory_bytes = coordinator.memory_bytes
    with pytest.raises(NoFeasibleTrialError) as caught:
        coordinator.run()
    assert caught.value.trial == 0
    needed = caught.value.smallest_bytes
    assert needed == memory_bytes - coordinator.step_bytes + 1000 * MIB
    needed += 8 * MIB  # this process may have grown meanwhile
    again = study(tmp_path, FakeWorkers(lambda p: {"floor": 1000 * MIB, "error": 1.0}, kinds(3)), 4,
                  memory=needed)  # fmt: skip
    assert again.run().records[3].outcome is Outcome.COMPLETE


def test_another_study_or_another_search_in_the_directory_is_refused(tmp_path: Path) -> None:
    workers = FakeWorkers(smooth, smooth_space)
    study(tmp_path, workers, 2).run()
    with pytest.raises(OptionError, match="of a study with steps 10, not 20"):
        study(tmp_path, workers, 2, settings=Settings(steps=20))
    with locked(tmp_path), pytest.raises(OptionError, match="another search runs"):
        with locked(tmp_path, seconds_to_wait=0.0):
            pass


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(OptionError, match="report_every=10"):
        Settings(steps=100, pruner="median")
    with pytest.raises(OptionError, match="known are none, median, halving"):
        Settings(pruner="medain")
    assert Settings(steps=10, report_every=4).reported_steps == (4, 8, 10)


# -- packing


def packed(trials: list[Waiting], total_bytes: int, num_workers: int) -> tuple[float, list[int]]:
    """Start trials as `choose` says; return when the last one ends, and in which order they start.

    Checked moment by moment: what is running fits.
    """
    now, running, waiting = 0.0, list[tuple[float, int]](), dict(enumerate(trials))
    order: list[int] = []
    while waiting or running:
        while waiting:
            names = list(waiting)
            at_work = [Option(size, end - now) for end, size in running]
            start = choose(at_work, [waiting[n] for n in names], total_bytes, num_workers, 99)
            if start is None:
                break
            name = names[start.index]
            assert start.option in waiting.pop(name).options
            running.append((now + start.option.seconds, start.option.bytes))
            order.append(name)
        assert running and sum(size for _, size in running) <= total_bytes
        assert len(running) <= num_workers
        now = min(end for end, _ in running)
        running = [(end, size) for end, size in running if end > now]
    return now, order


def best_makespan(trials: list[Waiting], total_bytes: int, num_workers: int) -> int:
    """Return the least integer time in which trials of integer seconds end (search over starts)."""
    options = [trial.options for trial in trials]
    for limit in itertools.count(1):
        def fits(index: int, taken: list[tuple[int, int]], limit: int = limit) -> bool:
            if index == len(trials):
                return True
            for option in options[index]:
                for start in range(limit - int(option.seconds) + 1):
                    span = range(start, start + int(option.seconds))
                    if all(taken[t][0] + option.bytes <= total_bytes and taken[t][1] < num_workers
                           for t in span):
                        more = [
                            (b + option.bytes, n + 1) if t in span else (b, n)
                            for t, (b, n) in enumerate(taken)
                        ]
                        if fits(index + 1, more):
                            return True
            return False

        if fits(0, [(0, 0)] * limit):
            return limit
    raise AssertionError


def test_trials_are_packed_nearly_as_well_as_can_be() -> None:
    draw = random.Random(1)
    num_optimal = 0
    for _ in range(15):
        trials = []
        for _ in range(4):
            size, seconds = draw.randint(1, 9), draw.randint(1, 4)
            options = [Option(size, seconds)]
            if draw.random() < 0.5:
                options.append(Option(max(1, size // 2), seconds + 1))
            trials.append(Waiting(tuple(options)))
        ended, order = packed(trials, 10, 3)
        least = best_makespan(trials, 10, 3)
        assert sorted(order) == [0, 1, 2, 3]
        assert least <= ended <= 1.5 * least
        num_optimal += ended == least
    assert num_optimal >= 13


def test_a_trial_recomputes_where_that_lets_two_run_side_by_side() -> None:
    trial = Waiting((Option(6, 10.0), Option(5, 11.0)))
    assert packed([trial, trial], 10, 2)[0] == 11.0  # not 20


def test_a_trial_that_was_passed_over_often_is_waited_for() -> None:
    small, wide = Waiting((Option(2, 1.0),)), Waiting((Option(10, 5.0),), num_passed=4)
    running = [Option(2, 3.0)]
    assert choose(running, [wide, small], 10, 2, most_passed=5) is not None
    start = choose(running, [wide, small], 10, 2, most_passed=4)
    assert start is not None and start.index == 1  # it ends before the wide one could start
    slow = Waiting((Option(2, 9.0),))
    assert choose(running, [wide, slow], 10, 2, most_passed=4) is None


def test_what_is_read_of_a_record_is_what_was_written(tmp_path: Path) -> None:
    record = Record(3, Outcome.PRUNED, {"a": 1, "b": "x"}, 0.1 + 0.2, [1 / 3], {5: 0.3}, why="so")
    write_record(tmp_path / "r.json", record)
    assert read_record(tmp_path / "r.json") == record
    assert Study(tmp_path, 1, 1, {3: record}, {}).best is None
