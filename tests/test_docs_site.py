"""The documentation site: every name has its place, its code runs, and it needs no network."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType

import pytest
import torch

import packlight
from packlight import errors
from packlight.backend import packlight_backend
from packlight.cli import build_parser
from packlight.planner import plain_schedule, plan_schedule
from packlight.step import Action, Schedule, StepGraph, simulate
from tests.browser import Browser, find_chromium

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PLANNER_PAGE = DOCS / "how-a-budget-becomes-a-schedule.md"
PAGES = sorted(DOCS.rglob("*.md"))
MIB = 2**20
REFERENCE = "\n".join(path.read_text(encoding="utf-8") for path in DOCS.glob("api/*.md"))


def headings(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"^#+ (.+)$", text, re.M)


def slug(heading: str) -> str:
    """Return the anchor that both GitHub and MkDocs make of a heading."""
    return re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def described(module: str) -> set[str]:
    """Return the names of a module that the reference describes."""
    return set(re.findall(rf"^::: {re.escape(module)}\.(\w+)$", REFERENCE, re.M))


# -- every name has its place


@pytest.mark.parametrize(
    "module",
    [
        "packlight", "packlight.optim", "packlight.sparse", "packlight.comm", "packlight.step",
        "packlight.trials", "packlight.ensemble",
    ],
)
def test_every_public_name_is_in_the_reference(module: str) -> None:
    public = set(importlib.import_module(module).__all__) - {"__version__"}
    assert described(module) == public


def test_every_name_in_the_reference_exists() -> None:
    names = re.findall(r"^::: ([\w.]+)$", REFERENCE, re.MULTILINE)
    assert len(names) > 50 and len(names) == len(set(names))
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


def test_every_error_is_in_the_reference_and_in_the_troubleshooting() -> None:
    raised = {
        name for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.PacklightError)
    }
    assert described("packlight.errors") == raised
    explained = set(headings(DOCS / "troubleshooting.md"))
    assert raised - {"PacklightError"} <= explained


def test_every_move_has_a_section_that_says_whether_it_is_exact() -> None:
    text = (DOCS / "moves.md").read_text(encoding="utf-8")
    for move in packlight.MOVES:
        assert f"## `{move}`" in text
        section = text.split(f"## `{move}`\n")[1].split("\n## ")[0]
        (exact,) = re.findall(r"^- Exact: (every bit|up to the order of sums|no)\b", section, re.M)
        row = next(line for line in text.splitlines() if line.startswith(f"| `{move}` |"))
        is_exact = move in packlight.EXACT_MOVES
        assert (exact == "every bit") is is_exact
        assert row.endswith("| every bit |") is is_exact
        assert "\n- Cost: " in section


def test_figures_of_the_moves_are_those_of_the_benchmark() -> None:
    text = (DOCS / "moves.md").read_text(encoding="utf-8")
    table = (ROOT / "benchmarks" / "whole_step" / "README.md").read_text(encoding="utf-8")
    cells = [[c.strip() for c in line.split("|")] for line in table.splitlines() if "|" in line]
    measured = {
        (row[i], f"{float(time.split()[0]):.2f}")
        for row in cells for time in row if re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+\)", time)
        for i in range(len(row))
    }
    shown = re.findall(r"(\d+) MiB at ([\d.]+)x", text)
    assert len(shown) >= 8
    assert [figures for figures in shown if figures not in measured] == []


def test_every_technique_is_explained() -> None:
    from packlight.moves.registry import technique_names

    text = (DOCS / "moves.md").read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in text for name in technique_names())


def test_every_option_of_every_command_is_in_the_reference() -> None:
    text = (DOCS / "api" / "command-line.md").read_text(encoding="utf-8")
    shown = {
        option: set(commands.split(", "))
        for option, commands in re.findall(r"^\| `(--[\w-]+)[^`]*` \| ([\w, ]+) \|", text, re.M)
    }
    (commands,) = (a for a in build_parser()._actions if isinstance(a.choices, dict))
    assert commands.choices is not None
    there: dict[str, set[str]] = {}
    for name, parser in dict(commands.choices).items():
        assert f"| `packlight {name} FILE` |" in text
        for action in parser._actions:
            for option in set(action.option_strings) - {"-h", "--help"}:
                there.setdefault(option, set()).add(name)
    assert shown == there


# -- links and navigation


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_sections_lead_to_headings(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text("utf-8")):
        if not re.match(r"[a-z]+:", target):
            path = (page.parent / target).resolve() if target else page
            assert anchor in [slug(heading) for heading in headings(path)], (target, anchor)


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    listed = re.findall(r"(\S+\.md)$", nav, re.M)
    assert len(listed) == len(set(listed))
    pages = {path.relative_to(DOCS).as_posix() for path in PAGES}
    outside = runpy.run_path(str(DOCS / "site_hook.py"))["OUTSIDE"]
    assert set(listed) == pages | set(outside.values())


@pytest.mark.parametrize("picture", sorted(DOCS.glob("*.png")), ids=lambda p: p.name)
def test_pictures_are_small_and_shown(picture: Path) -> None:
    assert picture.stat().st_size < 150 * 1024
    texts = [*PAGES, ROOT / "README.md", *ROOT.glob("benchmarks/*/README.md")]
    assert any(picture.name in path.read_text(encoding="utf-8") for path in texts)


def test_the_picture_of_the_worked_example_can_be_drawn_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'report'")
    command = [sys.executable, str(DOCS / "make_pictures.py"), "retention", "--out", str(tmp_path)]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "retention.png").read_bytes().startswith(b"\x89PNG")


def test_links_to_documents_outside_of_the_site_lead_to_their_pages() -> None:
    rewrite = runpy.run_path(str(DOCS / "site_hook.py"))["with_site_links"]
    linked = "[a](../README.md#limits) ![b](memory.png) [c](../examples/char_gpt.py) [d](x://y)"
    assert rewrite(linked, "index.md") == (
        "[a](front-page.md#limits) ![b](memory.png) c [d](x://y)"
    )
    assert rewrite("[a](../../docs/moves.md)", "benchmarks/optim.md") == "[a](../moves.md)"
    assert rewrite("[a](docs/moves.md)", "front-page.md") == "[a](moves.md)"
    assert rewrite("[a](../moves.md)", "api/step.md") == "[a](../moves.md)"


# -- the code on the pages


def examples(page: Path) -> Iterator[tuple[str, str | None]]:
    """Yield (code, what it prints) of a page's Python blocks; None where nothing is shown."""
    pattern = r"^```python\n(.*?)^```\n(?:\n((?:    [^\n]*\n)+))?"
    for match in re.finditer(pattern, page.read_text(encoding="utf-8"), re.M | re.S):
        shown = match.group(2)
        yield match.group(1), None if shown is None else re.sub(r"^    ", "", shown, flags=re.M)


@pytest.mark.parametrize(
    "name", ["quickstart", "faq", "how-a-budget-becomes-a-schedule", "ensembles"]
)
def test_code_on_the_page_runs_and_prints_what_it_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All blocks of a page run one after the other in one module."""
    monkeypatch.chdir(tmp_path)
    if "packlight" not in torch._dynamo.list_backends(()):  # a checkout that is not installed
        torch._dynamo.register_backend(packlight_backend, "packlight")
    page = ModuleType(f"page_{name.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, page.__name__, page)  # dynamo imports what it traces, once
    num_shown = 0
    for code, shown in examples(DOCS / f"{name}.md"):
        stream = StringIO()
        with redirect_stdout(stream):
            exec(compile(code, f"{name}.md", "exec"), page.__dict__)
        printed = "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
        assert printed == (shown or "").rstrip(), code
        num_shown += shown is not None
    assert num_shown >= 2


# -- the example that a reader counts


@pytest.fixture(scope="module")
def graph() -> StepGraph:
    names: dict[str, object] = {}
    with redirect_stdout(StringIO()):
        exec(next(code for code, _ in examples(PLANNER_PAGE)), names)
    graph = names["graph"]
    assert isinstance(graph, StepGraph)
    return graph


def counted(name: str) -> list[tuple[str, int, int]]:
    """Return (operation, sum of the parts, total) of each row of a table on the page."""
    text = PLANNER_PAGE.read_text(encoding="utf-8").split(f"<!-- {name} -->\n")[1].split("\n\n")[0]
    rows = []
    for line in text.splitlines()[2:]:
        what, parts, total = (cell.strip() for cell in line.strip("|").split("|"))
        sizes = [int(part.rsplit(maxsplit=1)[1]) for part in parts.split(" + ")]
        rows.append((re.findall(r"`(\w+)`", what)[0], sum(sizes), int(total.strip("*"))))
    return rows


def held_while_running(graph: StepGraph, schedule: Schedule) -> list[tuple[str, int]]:
    """Return (operation, MiB in memory while it runs), from the simulated bytes after it."""
    live_bytes = simulate(graph, schedule).live_bytes
    return [
        (graph.operations[i.target].name,
         (live_bytes[at] + graph.operations[i.target].workspace_bytes) // MIB)
        for at, i in enumerate(schedule.instructions)
        if i.action is Action.RUN
    ]


def test_the_six_operations_are_those_of_the_table(graph: StepGraph) -> None:
    text = PLANNER_PAGE.read_text(encoding="utf-8")
    assert len(graph.operations) == 6
    for operation in graph.operations:
        (row,) = [line for line in text.splitlines()
                  if line.startswith(f"| `{operation.name}` |")]
        _, reads, makes, workspace, takes = (cell.strip() for cell in row.strip("|").split("|"))
        assert takes == f"{1000 * operation.seconds:.0f} ms"
        assert int((workspace or "0 MiB").split()[0]) == operation.workspace_bytes // MIB
        assert len(reads.split(",")) == len(operation.reads)
        made = re.search(r"(\d+) MiB", makes)
        made_mib = int(made[1]) if made else 0
        assert made_mib == sum(graph.buffers[b].bytes for b in operation.creates) // MIB


def test_the_hand_count_of_both_schedules_is_the_simulated_one(graph: StepGraph) -> None:
    planned = plan_schedule(graph, 14 * MIB)
    for name, schedule in (("plain", plain_schedule(graph)), ("planned", planned.schedule)):
        rows = counted(name)
        assert all(parts == total for _, parts, total in rows)
        assert [(op, total) for op, _, total in rows] == held_while_running(graph, schedule)
    assert max(total for *_, total in counted("plain")) == 18
    assert max(total for *_, total in counted("planned")) == 14
    assert planned.seconds == pytest.approx(graph.seconds + 0.002)


@pytest.mark.parametrize("budget_mib", range(12, 20))
def test_the_planner_answers_as_the_page_says(graph: StepGraph, budget_mib: int) -> None:
    if budget_mib < 14:
        with pytest.raises(errors.InfeasibleBudgetError) as caught:
            plan_schedule(graph, budget_mib * MIB)
        assert caught.value.smallest_bytes == 14 * MIB
        return
    plan = plan_schedule(graph, budget_mib * MIB)
    assert plan.seconds == pytest.approx(0.024 if budget_mib >= 18 else 0.026)


# -- the built site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason="the site needs the extra 'docs': make docs")
    built = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    done = subprocess.run(
        [*command, str(built)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return built


def test_the_built_site_refers_to_nothing_outside_of_it(site: Path) -> None:
    """Nothing that a page loads: a link that a reader may follow is another matter."""
    for path in (*site.rglob("*.html"), *site.rglob("*.css")):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*?\ssrc=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"<link(?![^>]*canonical)[^>]*?\shref=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"url\([\"']?([^\"')]+)", text) + re.findall(r"@import\s+(\S+)", text)
        outside = [target for target in loaded if re.match(r"(?:https?:)?//", target)]
        assert outside == [], path


def test_the_built_site_describes_every_name(site: Path) -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in site.glob("api/*.html"))
    anchors = set(re.findall(r'id="([\w.]+)"', text))
    for module in ("packlight", "packlight.optim", "packlight.step", "packlight.errors"):
        assert {f"{module}.{name}" for name in described(module)} <= anchors


@pytest.mark.skipif(find_chromium() is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_of_the_built_site_load_nothing_from_elsewhere(site: Path, width: int) -> None:
    executable = find_chromium()
    assert executable is not None
    with Browser(executable) as browser:
        browser.look(width)
        for name in ("index", "how-a-budget-becomes-a-schedule", "moves", "api/packlight"):
            browser.open(site / f"{name}.html")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width, name
            broken = browser.evaluate(
                "[...document.images].filter(i => !i.naturalWidth).map(i => i.src)"
            )
            assert broken == []
        assert [url for url in browser.requests if not url.startswith(("file:", "data:"))] == []
