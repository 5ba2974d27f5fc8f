"""The report: one page that stands alone, whose numbers are those of the plan."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from packlight.errors import MissingExtraError
from packlight.planner import plain_schedule
from packlight.planner.accounts import (
    curve,
    layer_accounts,
    layer_groups,
    peak_by_kind,
    peak_by_layer,
    whole_step_bytes,
)
from packlight.report import write_report
from packlight.report.figures import memory_over_time, peak_breakdown, three_kinds
from packlight.report.transfers import buffer_transfers, busy, lanes_over_time
from packlight.step import (
    Action,
    GraphBuilder,
    Instruction,
    Lane,
    Limit,
    Machine,
    Phase,
    Plan,
    Schedule,
    Speed,
    StepGraph,
    Termination,
    live_after_forward,
    simulate,
    with_transfers,
)
from packlight.step.profile import StepProfile
from packlight.units import format_bytes, format_seconds
from tests.oracles.gpt import gpt_profile, gpt_step
from tests.oracles.liveness import recount_peak_bytes, schedule_from_order
from tests.oracles.machines import lane, one_lane, read, several_lanes, write


def plan_of(graph: StepGraph, schedule: Schedule, budget_bytes: int | None) -> Plan:
    timeline = simulate(graph, schedule)
    plain = simulate(graph, plain_schedule(graph))
    return Plan(
        schedule, budget_bytes, timeline.peak_bytes, timeline.seconds, plain.seconds,
        plain.peak_bytes, Termination.at(timeline.seconds, plain.seconds, Limit.MOVES),
    )


def blockwise_plan(graph: StepGraph, every: int) -> Plan:
    """Return the plan of a user who drops what is inside of every `every`-th block."""
    dropped = {f"h.{block}." for block in range(12) if block % every == 0}
    order = list(range(graph.num_forward))
    again = {op.id for op in graph.operations[: graph.num_forward]
             if any(op.layer.startswith(prefix) for prefix in dropped)}
    done: set[str] = set()
    for operation in graph.operations[graph.num_forward :]:
        block = ".".join(operation.layer.split(".")[:2])
        if f"{block}." in dropped and block not in done:
            done.add(block)
            inside = (op for op in again if graph.operations[op].layer.startswith(f"{block}."))
            order += sorted(inside)
        order.append(operation.id)
    schedule = schedule_from_order(graph, order, graph.num_forward)
    return plan_of(graph, schedule, round(1.01 * simulate(graph, schedule).peak_bytes))


@pytest.fixture(scope="module")
def profile() -> StepProfile:
    return gpt_profile()


@pytest.fixture(scope="module")
def plans(profile: StepProfile) -> list[Plan]:
    plain = plan_of(profile.graph, plain_schedule(profile.graph), None)
    return [plain, *(blockwise_plan(profile.graph, every) for every in (4, 3, 2, 1))]


@pytest.fixture(scope="module")
def page(profile: StepProfile, plans: list[Plan], tmp_path_factory: Any) -> Iterator[str]:
    path = write_report(tmp_path_factory.mktemp("r") / "new", profile, plans, plans[2], "a <GPT>")
    assert path.name == "index.html"
    yield path.read_text(encoding="utf-8")


class Outline(HTMLParser):
    """Collects what a page refers to, its ids, and whether its tags are balanced."""

    VOID = frozenset({"meta", "br", "wbr", "img", "link", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.references.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_stands_alone(page: str) -> None:
    outline = Outline(page)
    assert outline.open == []
    assert all(reference.startswith("#") for reference in outline.references)
    assert "link" not in outline.tags and "img" not in outline.tags
    assert not re.search(r"url\((?!#)|@import|fetch\(", page)
    assert len(outline.ids) == len(set(outline.ids)), "ids of different figures must not collide"
    missing = {r[1:] for r in outline.references} - set(outline.ids)
    assert not missing, "a figure refers to a shape that is not there"


def test_page_escapes_names(page: str) -> None:
    assert "a &lt;GPT&gt;" in page
    assert "<GPT>" not in page


def test_page_says_what_the_plan_says(page: str, profile: StepProfile, plans: list[Plan]) -> None:
    memory, plan = profile.memory, plans[2]
    for allocated_bytes in (plan.peak_bytes, plan.plain_peak_bytes):
        assert format_bytes(whole_step_bytes(memory, allocated_bytes)) in page
    assert plan.budget_bytes is not None
    assert format_bytes(memory.resident_bytes + plan.budget_bytes) in page
    assert f"{plan.slowdown:.2f}x" in page
    assert len(re.findall("<svg", page)) == 4


def test_colours_of_figures_follow_the_theme(page: str) -> None:
    figures = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", figures)) <= {"#ffffff", "#000000"}
    assert "var(--planned)" in figures
    assert "prefers-color-scheme:dark" in page


def test_page_is_the_same_every_time(
    profile: StepProfile, plans: list[Plan], tmp_path: Path
) -> None:
    pages = [write_report(tmp_path / name, profile, plans, plans[1], "t").read_text()
             for name in "ab"]
    assert pages[0] == pages[1]


def test_plain_page_needs_no_plan(profile: StepProfile, tmp_path: Path) -> None:
    text = write_report(tmp_path, profile, [], None, "plain").read_text()
    assert Outline(text).open == []
    assert "planned" not in re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)


def test_an_old_page_survives_a_failed_write(
    profile: StepProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_report(tmp_path, profile, [], None, "old")
    old = path.read_text()

    def fail(*_: Any, **__: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path, profile, [], None, "new")
    assert path.read_text() == old


def test_missing_matplotlib_names_the_extra(
    profile: StepProfile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without_matplotlib(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(MissingExtraError, match=r"packlight\[report\]") as raised:
        write_report(tmp_path, profile, [], None, "t")
    assert raised.value.extra == "report"
    assert not list(tmp_path.iterdir())


def test_importing_the_report_does_not_import_matplotlib() -> None:
    code = "import sys, packlight.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_curve_has_the_peak_and_the_duration_of_the_timeline(plans: list[Plan]) -> None:
    graph = gpt_step()
    for plan in plans:
        drawn = curve(graph, plan.schedule)
        assert max(drawn.bytes) == plan.peak_bytes
        assert drawn.total_seconds == pytest.approx(plan.seconds)
        edges = zip(drawn.seconds, drawn.seconds[1:], drawn.bytes, strict=False)
        assert any(
            left <= drawn.peak_seconds <= right and held == plan.peak_bytes
            for left, right, held in edges
        )


def test_thinned_curve_keeps_its_peak() -> None:
    graph = gpt_step(num_blocks=160)
    schedule = plain_schedule(graph)
    drawn = curve(graph, schedule)
    assert len(drawn.seconds) <= 4004 < 2 * len(graph.operations)
    assert max(drawn.bytes) == simulate(graph, schedule).peak_bytes
    assert list(drawn.seconds) == sorted(drawn.seconds)


def test_groups_at_the_peak_add_up_to_it(plans: list[Plan]) -> None:
    graph = gpt_step()
    for plan in plans:
        timeline = simulate(graph, plan.schedule)
        by_kind = peak_by_kind(graph, timeline)
        by_layer = peak_by_layer(graph, timeline, layer_groups(graph, 30))
        assert sum(by_kind.values()) == plan.peak_bytes
        assert sum(by_layer.values()) + timeline.peak_workspace_bytes == plan.peak_bytes


def test_layer_accounts_add_up(plans: list[Plan]) -> None:
    graph = gpt_step()
    plan = plans[-1]
    accounts = layer_accounts(graph, plain_schedule(graph), plan)
    kept = live_after_forward(graph, plan.schedule)
    assert sum(a.kept_bytes for a in accounts) == sum(graph.buffers[b].bytes for b in kept)
    assert sum(a.rerun_seconds for a in accounts) == pytest.approx(plan.seconds - graph.seconds)
    reruns = sum(runs - 1 for runs in plan.schedule.run_counts().values())
    assert sum(a.num_reruns for a in accounts) == reruns
    # What the forward hands over is what is live when nothing of the backward has run.
    at_boundary = simulate(graph, plan.schedule).live_bytes[plan.schedule.num_forward - 1]
    assert sum(a.kept_bytes for a in accounts) == at_boundary


def test_layers_are_grouped_as_deep_as_the_limit_allows() -> None:
    graph = gpt_step()
    deepest = layer_groups(graph, 1000)
    assert deepest["h.3.attn"] == "h.3.attn"
    blocks = layer_groups(graph, 20)
    assert blocks["h.3.attn"] == blocks["h.3.mlp"] == "h.3"
    assert layer_groups(graph, 1)["h.3.attn"] == "h"


def test_blockwise_plan_is_what_it_says(plans: list[Plan]) -> None:
    graph = gpt_step()
    peaks = [plan.peak_bytes for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks == [recount_peak_bytes(graph, plan.schedule.instructions) for plan in plans]


def test_figures_stand_alone(profile: StepProfile, plans: list[Plan], tmp_path: Path) -> None:
    figure = memory_over_time(profile.graph, plans[1], memory=profile.memory)
    figure.savefig(tmp_path / "memory.png", dpi=60)
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert any(text.startswith("planned") and "peak" in text for text in texts)
    assert any(text.startswith("budget") for text in texts)
    three_kinds(profile.memory, plans[0].peak_bytes, None).savefig(tmp_path / "kinds.svg")


# Plans with transfers.


def run(operation: int, overwrite: tuple[int, int] | None = None) -> Instruction:
    return Instruction(Action.RUN, operation, overwrite)


def free(buffer: int) -> Instruction:
    return Instruction(Action.FREE, buffer)


def there_and_back() -> tuple[StepGraph, Schedule, Machine]:
    """Return a step that writes its first buffer (4 MiB, 4 s each way) to a disk and reads it.

    f ends at 1; the write takes until 5, while g runs until 2: the FREE waits for 3 s. The read is
    over at 9, in the middle of h, which runs from 5 to 25.
    """
    mib = 2**20
    build = GraphBuilder()
    a = build.operation("f", [], [4 * mib], seconds=1.0, layer="first")[0]
    b = build.operation("g", [a], [2 * mib], seconds=1.0, layer="second")[0]
    c = build.operation("h", [b], [2 * mib], seconds=20.0, layer="third")[0]
    d = build.operation("f'", [c, a], [mib], seconds=1.0, phase=Phase.BACKWARD, layer="first")[0]
    machine = one_lane(mib)
    graph = with_transfers(build.finish(3, [c], [c, d]), machine)
    steps = (
        run(0), write(graph, a), run(1), free(a), read(graph, a), run(2), free(b), run(3), free(a),
    )
    return graph, Schedule(steps, 7), machine


def test_curve_and_lanes_of_a_schedule_with_transfers_by_hand() -> None:
    graph, schedule, machine = there_and_back()
    mib = 2**20
    drawn = curve(graph, schedule, machine)
    corners = [(s, b // mib) for s, b in zip(drawn.seconds, drawn.bytes, strict=True)]
    assert corners == [
        (0, 4), (1, 4), (1, 6), (2, 6), (2, 6), (5, 6), (5, 6), (5, 6), (5, 8), (25, 8),
        (25, 7), (26, 7), (26, 3), (26, 3),
    ]
    assert (drawn.peak_seconds, drawn.peak_name) == (15.0, "third (h)")
    assert drawn.forward_seconds == 25.0
    timeline = simulate(graph, schedule, machine)
    assert busy(graph, schedule, timeline) == {
        "compute": [(0, 1), (1, 2), (5, 25), (25, 26)], "write": [(1, 5)], "read": [(5, 9)],
    }
    (entry,) = buffer_transfers(graph, schedule, timeline)
    assert (entry.buffer, entry.num_writes, entry.num_reads) == (0, 1, 1)
    assert (entry.lane_seconds, entry.gone_seconds) == (8.0, 0.0)  # freed and read at once


def test_a_buffer_is_gone_when_another_takes_its_storage() -> None:
    """From 2 to 3 s g writes b over a, which is read at 13 s, when h is done."""
    build = GraphBuilder()
    a = build.operation("f", [], [1], seconds=1.0)[0]
    b = build.operation("g", [a], [1], seconds=1.0, overwrites_read=a)[0]
    c = build.operation("h", [b], [1], seconds=10.0)[0]
    build.operation("f'", [a, c], [], phase=Phase.BACKWARD, seconds=1.0)
    machine = one_lane(1.0)
    graph = with_transfers(build.finish(3, [c], [c]), machine)
    steps = (
        run(0), write(graph, a), run(1, (b, a)), run(2), free(b), read(graph, a), run(3), free(a),
    )
    schedule = Schedule(steps, 5)
    timeline = simulate(graph, schedule, machine)
    (entry,) = buffer_transfers(graph, schedule, timeline)
    assert (entry.num_writes, entry.num_reads, entry.gone_seconds) == (1, 1, 10.0)


@pytest.fixture(scope="module")
def offloading(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StepProfile, Plan]]:
    """A real step in its smallest budget: activations and optimizer state leave memory."""
    import torch

    import packlight
    from packlight.errors import InfeasibleBudgetError
    from packlight.memory import scratch
    from packlight.search import prepare

    lane = Lane("a disk", "a disk", Speed(2e8, 1e-4), Speed(2e8, 1e-4))
    directory = tmp_path_factory.mktemp("tier")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PACKLIGHT_CACHE", str(directory / "cache"))
        patch.setattr(scratch, "file_system", lambda _: "a disk's")
        patch.setattr(prepare, "measure_lane", lambda *_: lane)
        layers = [torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)]
        model, batch = torch.nn.Sequential(*layers), torch.randn(64, 64)
        optimizer = torch.optim.AdamW(model.parameters())

        def loss_fn(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
            return model(batch).square().mean()

        options: dict[str, Any] = dict(
            moves=packlight.EXACT_MOVES, offload_directory=directory, progress=False
        )
        with pytest.raises(InfeasibleBudgetError) as caught:
            packlight.fit(model, loss_fn, optimizer, batch, 1, **options)
        smallest = caught.value.smallest_bytes
        step = packlight.fit(model, loss_fn, optimizer, batch, smallest, **options)
        yield step.profile, step.plan


def test_the_curve_of_a_real_plan_with_transfers_is_the_simulated_one(
    offloading: tuple[StepProfile, Plan],
) -> None:
    profile, plan = offloading
    graph = profile.graph
    assert graph.resting and plan.lane_seconds > 0
    drawn = curve(graph, plan.schedule, profile.machine)
    assert max(drawn.bytes) == drawn.peak_bytes == plan.peak_bytes
    assert drawn.total_seconds == pytest.approx(plan.seconds)
    assert list(drawn.seconds) == sorted(drawn.seconds)
    timeline = simulate(graph, plan.schedule, profile.machine)
    by_kind = peak_by_kind(graph, timeline)
    by_layer = peak_by_layer(graph, timeline, layer_groups(graph, 30))
    assert sum(by_kind.values()) == plan.peak_bytes
    assert sum(by_layer.values()) + timeline.peak_workspace_bytes == plan.peak_bytes
    # On a lane one thing happens at a time, and nothing is invisible.
    lanes = busy(graph, plan.schedule, timeline)
    transfers = sorted(lanes["write"] + lanes["read"])
    assert all(end <= start for (_, end), (start, _) in zip(transfers, transfers[1:], strict=False))
    assert sum(end - start for start, end in transfers) == pytest.approx(plan.lane_seconds)
    computing = sum(end - start for start, end in lanes["compute"])
    tail = timeline.seconds - timeline.done_seconds[-1]
    waits_inside = plan.wait_seconds - tail
    assert computing + waits_inside == pytest.approx(timeline.done_seconds[-1])


def test_a_page_with_transfers_draws_the_lane_and_lists_what_it_carries(
    offloading: tuple[StepProfile, Plan], tmp_path: Path
) -> None:
    profile, plan = offloading
    graph = profile.graph
    text = write_report(tmp_path, profile, [plan], plan, "with transfers").read_text()
    outline = Outline(text)
    assert outline.open == [] and len(outline.ids) == len(set(outline.ids))
    assert len(re.findall("<svg", text)) == 5
    timeline = simulate(graph, plan.schedule, profile.machine)
    read_bytes = sum(graph.buffers[o.creates[0]].bytes for i in plan.schedule.runs()
                     if (o := graph.operations[i]).kind == "read")
    caption = f"{format_bytes(plan.offloaded_bytes)} out and {format_bytes(read_bytes)} in"
    assert caption in text and format_seconds(timeline.wait_seconds) in text
    for entry in buffer_transfers(graph, plan.schedule, timeline)[:200]:
        assert escape(graph.buffers[entry.buffer].name) in text.replace("<wbr>", "")
    # The plain step has all of the optimizer's state in memory.
    resting_bytes = sum(graph.buffers[b].bytes for b in graph.resting)
    bare = graph.without_transfers()
    plain = simulate(bare, plain_schedule(bare))
    plain_bytes = profile.memory.peak_bytes(plain.peak_bytes) + resting_bytes
    assert f"<b>{format_bytes(plain_bytes)}</b>" in text
    accounts = layer_accounts(graph, plain_schedule(bare), plan)
    assert sum(a.written_bytes for a in accounts) == plan.offloaded_bytes


def test_a_peak_at_a_read_is_named_by_the_operation_that_follows() -> None:
    """The buffer that is read (4) and what is there (3) are more than any operation holds."""
    build = GraphBuilder()
    a = build.operation("f", [], [4], layer="first", seconds=1.0)[0]
    b = build.operation("g", [a], [1], layer="second", seconds=1.0)[0]
    c = build.operation("h", [b], [2], layer="third", seconds=1.0)[0]
    build.operation("f'", [a, c], [], phase=Phase.BACKWARD, layer="first", seconds=1.0)
    machine = one_lane(1.0)
    graph = with_transfers(build.finish(3, [c], [c]), machine)
    steps = (
        run(0), write(graph, a), run(1), free(a), run(2), read(graph, a), free(b), run(3), free(a),
    )
    schedule = Schedule(steps, 5)
    drawn = curve(graph, schedule, machine)
    assert drawn.peak_bytes == 7 == max(drawn.bytes)
    assert drawn.peak_name == "a read before first backward (f')"
    plan = replace(plan_of(graph, plain_schedule(graph), None), schedule=schedule)
    memory_over_time(graph, plan, machine=machine)
    peak_breakdown(graph, plan, machine=machine)


def test_lanes_are_drawn_one_below_the_other() -> None:
    """Two buffers of 4 s each, written and read on two disks at the same time."""
    build = GraphBuilder()
    a, b = build.operation("f", [], [4, 4], seconds=1.0)
    c = build.operation("g", [a, b], [1], seconds=2.0)[0]
    d = build.operation("h", [a, b], [1], seconds=1.0, phase=Phase.BACKWARD)[0]
    machine = several_lanes(lane("one", 1.0), lane("two", 2.0))
    graph = with_transfers(build.finish(2, [c], [c, d]), machine)
    steps = (
        run(0), write(graph, a, "one"), write(graph, b, "two"), run(1), free(a), free(b),
        read(graph, a, "one"), read(graph, b, "two"), run(2), free(a), free(b),
    )
    schedule = Schedule(steps, 6)
    timeline = simulate(graph, schedule, machine)
    assert busy(graph, schedule, timeline) == {
        "compute": [(0, 1), (1, 3), (9, 10)], "write 1": [(1, 5)], "read 1": [(5, 9)],
        "write 2": [(1, 3)], "read 2": [(5, 7)],
    }
    entries = buffer_transfers(graph, schedule, timeline)
    assert [(e.buffer, e.lane_seconds) for e in entries] == [(a, 8.0), (b, 4.0)]
    (axes,) = lanes_over_time(graph, schedule, machine).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["compute", "write 1", "read 1", "write 2", "read 2"]
