"""Measures plans of a study with and without what they share, and members at once and alone.

    python -m benchmarks.trials plans --count 6
    python -m benchmarks.trials members --rounds 3

CPU seconds of the process that works, on one thread: other processes on the machine change them
less than the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from benchmarks.common import ROOT, append_line, provenance, read_lines, replace_between_markers
from benchmarks.trials.records import FOLDER, MEMBERS, PLANS, MemberLine, PlanLine

WIDTHS = (16, 64, 256, 512)
NUM_MEMBERS, NUM_ROWS, NUM_STEPS = 8, 64, 30
FROM_NOTHING, FORKED, IN_A_STUDY = "from nothing", "forked", "in a study"


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trials")
    parser.add_argument("what", choices=["plans", "members", "report", "plan-one"])
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--point", help="of plan-one, as JSON")
    arguments = parser.parse_args()
    if arguments.what == "plan-one":
        started = time.perf_counter(), 0.0
        print(json.dumps(plan_once(json.loads(arguments.point), started)))
        return
    told = provenance(0, "cpu", " ".join(["python -m benchmarks.trials", *sys.argv[1:]]))
    if arguments.what == "plans":
        PLANS.unlink(missing_ok=True)
        for line in plan_lines(arguments.count):
            line.provenance = told
            append_line(PLANS, line)
            print(line.how, line.index, f"{line.cpu_seconds:.2f}", flush=True)
    elif arguments.what == "members":
        MEMBERS.unlink(missing_ok=True)
        for member in member_lines(arguments.rounds):
            member.provenance = told
            append_line(MEMBERS, member)
            print(member.how, member.width, f"{1e3 * member.cpu_seconds:.2f} ms", flush=True)
    report()


# -- plans


def points(count: int) -> Iterator[dict[str, Any]]:
    """Yield a study's points, all of other shapes."""
    draw = random.Random(0)
    choices = [(w, n, b) for w in range(32, 129, 16) for n in (1, 2) for b in (4, 8, 12, 16)]
    for width, num_layers, batch in draw.sample(choices, count):
        yield {"width": width, "num_layers": num_layers, "batch": batch}


def plan_once(point: dict[str, Any], started: tuple[float, float]) -> dict[str, float]:
    """Capture and plan a trial's step; return what it took since it was started."""
    import torch

    import packlight
    from packlight.costs.cache import CallCache
    from packlight.example import BatchStream, build, load_example
    from packlight.trials.point import with_point

    torch.set_num_threads(1)
    num_known = CallCache(torch.device("cpu")).num_known
    example = with_point(load_example(str(ROOT / "examples" / "char_gpt_search.py")), point)
    model, optimizer = build(example, "cpu", 0)
    batch = next(BatchStream(example, "train", "cpu", 0))
    packlight.plan(
        model, example.loss, optimizer, batch, "256MiB", moves=packlight.EXACT_MOVES, progress=False
    )
    return {
        "cpu_seconds": time.process_time() - started[1],
        "seconds": time.perf_counter() - started[0],
        "num_known": num_known,
    }


def plan_lines(count: int) -> Iterator[PlanLine]:
    """Yield each point planned in three ways, in turn."""
    from packlight.costs.cache import read_ahead
    from packlight.trials.nursery import warm_up

    with tempfile.TemporaryDirectory() as shared, tempfile.TemporaryDirectory() as empty:
        os.environ["PACKLIGHT_CACHE"] = shared
        warm_up(16)
        for index, point in enumerate(points(count)):
            for how in (FROM_NOTHING, FORKED, IN_A_STUDY):
                own = tempfile.mkdtemp(dir=empty)
                os.environ["PACKLIGHT_CACHE"] = shared if how == IN_A_STUDY else own
                if how == FROM_NOTHING:
                    told = _in_new_process(point)
                else:
                    read_ahead()
                    told = _forked(point)
                yield PlanLine(how, index, point, **told)


def _in_new_process(point: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.trials", "plan-one", "--point", json.dumps(point)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def _forked(point: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    if not os.fork():
        told = plan_once(point, (time.perf_counter(), time.process_time()))
        os.write(writer, json.dumps(told).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer: dict[str, Any] = json.loads(pipe.read())
    os.wait()
    return answer


# -- members


def member_lines(rounds: int) -> Iterator[MemberLine]:
    """Yield steps of members at once, one at a time, and in eager PyTorch, in turn."""
    import torch

    torch.set_num_threads(1)
    steps = {width: _steps(width) for width in WIDTHS}
    for index in range(rounds):
        for width, ways in steps.items():
            for how, step in ways.items():
                step()
                seconds = []
                for _ in range(NUM_STEPS):
                    before = time.process_time()
                    step()
                    seconds.append(time.process_time() - before)
                yield MemberLine(how, width, NUM_MEMBERS, index, median(seconds))


def _steps(width: int) -> dict[str, Callable[[], Any]]:
    """Return a step of all members in each way."""
    import torch
    from torch import nn

    import packlight
    from packlight import ensemble

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(32, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, 10),
        )  # fmt: skip

    def loss_fn(member: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(member(batch[0]), batch[1])

    torch.manual_seed(0)
    batch = torch.randn(NUM_ROWS, 32), torch.randint(0, 10, (NUM_ROWS,))
    alone = ensemble.Ensemble(make, range(NUM_MEMBERS)).members()
    optimizers = [torch.optim.AdamW(member.parameters(), lr=1e-3) for member in alone]

    def train_alone() -> None:
        for member, optimizer in zip(alone, optimizers, strict=True):
            optimizer.zero_grad()
            loss_fn(member, batch).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def planned(size: int) -> Callable[[], Any]:
        members = ensemble.Ensemble(make, range(NUM_MEMBERS))
        members.rechunk(size)
        steps = []
        for chunk in members.stacks:
            optimizer = torch.optim.AdamW(chunk.parameters(), lr=1e-3)
            steps.append(packlight.fit(
                chunk, chunk.loss_function(loss_fn, own_batches=False), optimizer, batch,
                moves=(), progress=False,
            ))  # fmt: skip
        return lambda: [step(batch) for step in steps]

    return {"alone": train_alone, "at once": planned(NUM_MEMBERS), "chunked": planned(1)}


# -- report


def report() -> None:
    """Write the tables into README.md."""
    plans, members = read_lines(PLANS, PlanLine), read_lines(MEMBERS, MemberLine)
    readme = FOLDER / "README.md"
    if plans:
        replace_between_markers(readme, "plans", list(_plan_table(plans)))
    if members:
        replace_between_markers(readme, "members", list(_member_table(members)))


def _plan_table(lines: list[PlanLine]) -> Iterator[str]:
    yield "| how | plans | median CPU seconds | least | most | of from nothing |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    base = median(line.cpu_seconds for line in lines if line.how == FROM_NOTHING)
    for how in (FROM_NOTHING, FORKED, IN_A_STUDY):
        seconds = [line.cpu_seconds for line in lines if line.how == how]
        yield (
            f"| {how} | {len(seconds)} | {median(seconds):.2f} | {min(seconds):.2f} | "
            f"{max(seconds):.2f} | {median(seconds) / base:.2f} |"
        )


def _member_table(lines: list[MemberLine]) -> Iterator[str]:
    yield "| width | alone, ms | at once, ms | ratio (rounds) | planned one by one, ms | ratio |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: |"
    for width in sorted({line.width for line in lines}):
        of = {
            how: [x.cpu_seconds for x in lines if x.width == width and x.how == how]
            for how in ("alone", "at once", "chunked")
        }
        ratios = [a / b for a, b in zip(of["at once"], of["alone"], strict=True)]
        chunked = [a / b for a, b in zip(of["chunked"], of["alone"], strict=True)]
        yield (
            f"| {width} | {1e3 * median(of['alone']):.2f} | {1e3 * median(of['at once']):.2f} | "
            f"{median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f}) | "
            f"{1e3 * median(of['chunked']):.2f} | {median(chunked):.2f}x |"
        )


if __name__ == "__main__":
    main()
