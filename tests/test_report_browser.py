"""The report page in a real browser: quiet, without network, legible, and its tables sort.

Skipped where no Chromium is installed (Debian and Ubuntu: `apt-get install chromium`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from packlight.planner import plain_schedule
from packlight.planner.accounts import plain_step
from packlight.report import write_report
from packlight.step import (
    Action,
    BufferKind,
    GraphBuilder,
    Instruction,
    Limit,
    Phase,
    Plan,
    Schedule,
    Termination,
    simulate,
    with_transfers,
)
from packlight.step.profile import StepProfile
from tests.browser import Browser, find_chromium
from tests.oracles.gpt import gpt_profile
from tests.oracles.machines import lane, read, several_lanes, write
from tests.test_report import blockwise_plan, plan_of

pytest.importorskip("matplotlib", reason="reports need the extra 'report'")

CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here: apt-get install chromium brings one"
)
WIDTHS = (1280, 390)
HOW = [("moves", "4 microbatches (4 x 2 rows)"), ("without chunk", "not among the moves")]
UNITS = {
    "": 1.0, "B": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30,
    "us": 1e-6, "ms": 1e-3, "s": 1.0, "x": 1.0, "%": 1.0,
}

# (text, left, top, right, bottom, font size in CSS pixels, contrast) of a figure's words.
WORDS = """
(() => {
  const parts = colour => colour.match(/[0-9.]+/g).map(Number);
  const light = colour => parts(colour).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  return [...document.querySelectorAll("figure svg")].map(svg => {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    const behind = light(getComputedStyle(svg.closest("section")).backgroundColor);
    const words = [...svg.querySelectorAll("text")].map(text => {
      const at = text.getBoundingClientRect(), style = getComputedStyle(text);
      const ink = light(style.fill);
      return [text.textContent, at.left - box.left, at.top - box.top, at.right - box.left,
              at.bottom - box.top, parseFloat(style.fontSize) * box.width / view.width,
              (Math.max(ink, behind) + 0.05) / (Math.min(ink, behind) + 0.05)];
    });
    return {width: box.width, height: box.height, words};
  });
})()
"""

# For each table its headings and its rows of texts, as a reader sees them.
TABLES = """
[...document.querySelectorAll("table")].map(table => ({
  heads: [...table.tHead.rows[0].cells].map(cell => cell.textContent),
  sorted: [...table.tHead.rows[0].cells].map(cell => cell.getAttribute("aria-sort")),
  rows: [...table.tBodies[0].rows].map(row => [...row.cells].map(cell => cell.textContent)),
}))
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return three pages: a plan in microbatches, one with transfers, a plain step."""
    folder = tmp_path_factory.mktemp("pages")
    profile = gpt_profile()
    memory = replace(profile.memory, accumulated_bytes=profile.memory.gradient_bytes)
    plans = [plan_of(profile.graph, plain_schedule(profile.graph), None),
             *(blockwise_plan(profile.graph, every) for every in (4, 3, 2, 1))]
    moved, schedule = streamed_state()
    sent = plan_of_transfers(moved, schedule)
    split = replace(plans[2], num_microbatches=4)
    return {
        "microbatches": write_report(
            folder / "a", replace(profile, memory=memory), plans, split, "a <GPT>", how=HOW
        ),
        "transfers": write_report(folder / "b", moved, [sent], sent, "transfers"),
        "plain": write_report(folder / "c", profile, [], None, "plain"),
    }


def streamed_state() -> tuple[StepProfile, Schedule]:
    """Return a step with the longest names that a figure has, and transfers in KiB and MiB."""
    layer = "model.encoder.layers.11.self_attention.output"
    build = GraphBuilder()
    weight = build.buffer(2**20, BufferKind.PARAMETER, f"{layer}.weight")
    state = build.buffer(2 * 2**20, BufferKind.STATE, f"optimizer state of {layer}.weight")
    a = build.operation("f", [weight], [900 * 2**10], seconds=9e-4, layer=layer)[0]
    b = build.operation("g", [a], [2**20], seconds=1e-3, layer="head")[0]
    g = build.operation("f'", [a, b], [2**20], seconds=2e-3, phase=Phase.BACKWARD, layer=layer)[0]
    build.operation("update", [g, state], [], phase=Phase.UPDATE, seconds=1e-3, layer=layer,
                    mutates=[state, weight], can_recompute=False)
    machine = several_lanes(*(lane(name, 2.0**30, 1e-4) for name in ("a disk", "the host")))
    graph = with_transfers(build.finish(2, [b], [b]), machine, [state])
    runs = [Instruction(Action.RUN, operation) for operation in range(4)]
    frees = {buffer: Instruction(Action.FREE, buffer) for buffer in (a, g, state)}
    steps = (
        runs[0], write(graph, a, "the host"), runs[1], frees[a], read(graph, a, "the host"),
        runs[2], frees[a], read(graph, state), runs[3], frees[g], write(graph, state),
        frees[state],
    )
    profile = StepProfile(graph, gpt_profile().memory, "a slow CPU", "2.13.0", machine)
    return profile, Schedule(steps, 4)


def plan_of_transfers(profile: StepProfile, schedule: Schedule) -> Plan:
    timeline = simulate(profile.graph, schedule, profile.machine)
    plain = plain_step(profile.graph).timeline
    return Plan(
        schedule, timeline.peak_bytes, timeline.peak_bytes, timeline.seconds, plain.seconds,
        plain.peak_bytes, Termination.at(timeline.seconds, plain.seconds, Limit.MOVES),
        lane_seconds=timeline.lane_seconds, wait_seconds=timeline.wait_seconds,
        offloaded_bytes=2 * 2**20 + 900 * 2**10,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM) as browser:
        yield browser


def shown_value(text: str) -> float:
    """Return the number that a cell shows: "1.5 MiB", "7.4 ms", "1.14x", "85%", "–" for none."""
    if text == "–":
        return 0.0
    match = re.fullmatch(r"(-?[0-9.]+) ?([A-Za-z%]*)", text)
    assert match, f"not a quantity: {text!r}"
    return float(match[1]) * UNITS[match[2]]


def is_quantity(text: str) -> bool:
    return text == "–" or bool(re.fullmatch(r"-?[0-9.]+ ?(|[KMG]iB|B|us|ms|s|x|%)", text))


@pytest.mark.parametrize("name", ["microbatches", "transfers", "plain"])
def test_page_asks_for_nothing_and_complains_of_nothing(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    browser.complaints.clear()
    browser.requests.clear()
    browser.look(1280)
    browser.open(pages[name])
    for button in range(browser.evaluate("document.querySelectorAll('th button').length")):
        browser.click("th button", button)
    assert browser.complaints == []
    assert browser.requests == [pages[name].resolve().as_uri()]
    named = browser.evaluate(
        "[...document.querySelectorAll('*')].flatMap(element => [...element.attributes])"
        ".filter(a => ['src', 'href', 'xlink:href'].includes(a.name)).map(a => a.value)"
    )
    assert all(target.startswith(("#", "data:")) for target in named)


def test_the_browser_sees_requests_and_complaints(browser: Browser, tmp_path: Path) -> None:
    """What the test above relies on."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='https://example.org/a.png'><script>nothing()</script>")
    browser.complaints.clear()
    browser.requests.clear()
    browser.open(bad)
    assert "https://example.org/a.png" in browser.requests
    assert any("NAME_NOT_RESOLVED" in text for text in browser.complaints)
    assert any("ReferenceError" in text for text in browser.complaints)
    browser.complaints.clear()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["microbatches", "transfers", "plain"])
def test_page_is_not_wider_than_its_window(
    browser: Browser, pages: dict[str, Path], name: str, width: int
) -> None:
    browser.look(width)
    browser.open(pages[name])
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    # What is wider than its section scrolls inside of it.
    outside = browser.evaluate(
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('figure, .scroll'))"
        f".filter(e => e.getBoundingClientRect().right > {width}).map(e => e.outerHTML)"
    )
    assert outside == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["microbatches", "transfers", "plain"])
def test_words_of_figures_are_legible(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    """Large enough, in contrast with the page, whole, and not one over another."""
    browser.look(width, dark=dark)
    browser.open(pages[name])
    figures = browser.evaluate(WORDS)
    assert len(figures) == {"microbatches": 4, "transfers": 5, "plain": 3}[name]
    for figure in figures:
        assert figure["width"] > 200 and figure["height"] > 50 and figure["words"]
        for text, left, top, right, bottom, font_pixels, contrast in figure["words"]:
            assert left >= -0.5 and right <= figure["width"] + 0.5, f"{text!r} is cut off"
            assert top >= -0.5 and bottom <= figure["height"] + 0.5, f"{text!r} is cut off"
            assert font_pixels >= 9, f"{text!r} is {font_pixels:.1f} pixels high"
            assert contrast >= 4.5, f"{text!r} has a contrast of {contrast:.1f}"
        for i, (text, left, top, right, bottom, *_) in enumerate(figure["words"]):
            for other, *place in ((w[0], *w[1:5]) for w in figure["words"][i + 1 :]):
                across = min(right, place[2]) - max(left, place[0])
                # A line's box is higher than its letters.
                down = min(bottom, place[3]) - max(top, place[1]) - 0.3 * (bottom - top)
                assert across <= 1 or down <= 0, f"{text!r} lies over {other!r}"


@pytest.mark.parametrize("name", ["microbatches", "transfers"])
def test_clicking_a_heading_sorts_by_value(
    browser: Browser, pages: dict[str, Path], name: str
) -> None:
    """Bytes and seconds sort by how much they are, not by their letters."""
    browser.look(1280)
    browser.open(pages[name])
    by_letters = 0
    for t, table in enumerate(browser.evaluate(TABLES)):
        for column, head in enumerate(table["heads"]):
            shown = [row[column] for row in table["rows"]]
            in_page_order = {text: i for i, text in reversed(list(enumerate(shown)))}
            place = sum(len(other["heads"]) for other in browser.evaluate(TABLES)[:t]) + column
            for click, direction in enumerate(("ascending", "descending")):
                browser.click("th button", place)
                now = browser.evaluate(TABLES)[t]
                assert now["sorted"][column] == direction
                assert sum(state is not None for state in now["sorted"]) == 1
                assert sorted(now["rows"]) == sorted(table["rows"]), "rows stay whole"
                found = [row[column] for row in now["rows"]]
                if all(map(is_quantity, shown)):
                    values = [shown_value(text) for text in found]
                    by_letters += values != [shown_value(text) for text in sorted(shown)]
                    assert values == sorted(values, reverse=bool(click)), head
                elif head == "layer" and "run again" in table["heads"]:
                    order = [in_page_order[text] for text in found]
                    assert order == sorted(order, reverse=bool(click)), "in the model's order"
    assert by_letters, "no column tells the two orders apart"


def test_a_heading_is_a_button_for_keyboards(browser: Browser, pages: dict[str, Path]) -> None:
    browser.look(1280)
    browser.open(pages["microbatches"])
    browser.evaluate("document.querySelector('th button').focus()")
    state = "document.querySelector('th').getAttribute('aria-sort')"
    assert browser.evaluate(state) is None
    browser.press("Enter", 13, "\r")
    assert browser.evaluate(state) == "ascending"
    browser.press("Tab", 9)
    assert browser.evaluate("document.activeElement.closest('th').cellIndex") == 1


def test_the_page_follows_the_theme(browser: Browser, pages: dict[str, Path]) -> None:
    seen = []
    for dark in (False, True):
        browser.look(1280, dark=dark)
        browser.open(pages["microbatches"])
        colour = browser.evaluate("getComputedStyle(document.body).backgroundColor")
        seen.append(sum(map(int, re.findall(r"\d+", colour)[:3])) / 3)
    assert seen[0] > 200 and seen[1] < 50


def test_a_page_of_microbatches_says_so(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["microbatches"])
    text = browser.evaluate("document.body.innerText")
    for name, what in HOW:
        assert name in text and what in text
    assert "one of 4 microbatches" in text and "plain microbatch" in text
    assert "plain step" not in text
    # Everything in memory at the planned peak is in the table of kinds.
    kinds = next(t for t in browser.evaluate(TABLES) if t["heads"][0] == "kind")
    assert [row[0] for row in kinds["rows"]][-1] == "accumulated gradients"
    total = sum(shown_value(row[2]) for row in kinds["rows"])
    peak = shown_value(re.search(r"planned peak\s+([0-9.]+ [KMG]iB)", text)[1])  # type: ignore[index]
    assert total == pytest.approx(peak, rel=2e-3)
