"""The documents tell the truth: folders, commands, links, code and dependencies exist."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from packlight.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
ARCHITECTURE = ROOT / "ARCHITECTURE.md"
DOCUMENTS = [README, ARCHITECTURE, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL_LANGUAGES = ("", "sh", "bash", "shell", "console", "text")


def code_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield (language, content) of fenced and of indented blocks."""
    fence = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```\s*$", re.MULTILINE | re.DOTALL)
    for match in fence.finditer(text):
        yield match.group(1), match.group(2)
    rest = fence.sub("", text)
    for match in re.finditer(r"(?:^(?: {4}[^\n]*)?\n)+", rest, re.MULTILINE):
        if match.group().strip():
            yield "", match.group()


def listed_paths(text: str) -> list[str]:
    """Return the paths that the lines of a folder listing start with ("step/", "a.py b.py")."""
    paths = []
    for _, block in code_blocks(text):
        for line in block.splitlines():
            for word in re.sub(r"^[\s│├└─|+`-]*", "", line).split():
                if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*/|[\w.-]+(/[\w.-]+)*\.(py|md|toml)", word):
                    break
                paths.append(word)
    return paths


def commands(text: str) -> list[list[str]]:
    """Return the words of every shell command line of a document."""
    found = []
    for language, block in code_blocks(text):
        if language not in SHELL_LANGUAGES:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ").strip()
            if re.match(r"(make|packlight|python3?|pip)( |$)", line):
                found.append(shlex.split(line, comments=True))
    return found


def test_every_folder_of_the_package_is_in_the_architecture() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    listed = {Path(path).name for path in listed_paths(text) if path.endswith("/")}
    folders = {path.parent.name for path in (ROOT / "packlight").glob("*/__init__.py")}
    assert folders - listed == set(), "folders that ARCHITECTURE.md does not list"


def test_every_path_that_the_architecture_lists_exists() -> None:
    listed = listed_paths(ARCHITECTURE.read_text(encoding="utf-8"))
    places = [ROOT, ROOT / "packlight", *(ROOT / "packlight").glob("**/")]
    missing = [path for path in listed if not any((place / path).exists() for place in places)]
    assert missing == []
    assert len(listed) >= 5, "the listing was not found"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_paths_in_inline_code_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"`((?:packlight|tests|examples|benchmarks|docs)/[\w./-]*)`", text)
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_local_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    local = [target for target in targets if not re.match(r"[a-z]+:", target)]
    assert [target for target in local if not (document.parent / target).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_commands_can_be_typed_as_they_stand(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(document.read_text(encoding="utf-8")):
        if words[0] == "make":
            unknown = {word for word in words[1:] if "=" not in word} - targets
            assert not unknown, f"{shlex.join(words)}: no such target"
        elif words[0] == "packlight" and words[1:] != ["--help"]:
            arguments = build_parser().parse_args(words[1:])
            assert (ROOT / arguments.file).is_file() or "/" not in arguments.file, words
        elif words[0].startswith("python") and len(words) > 1 and words[1] == "-m":
            module = Path(*words[2].split("."))
            is_ours = words[2].split(".")[0] in ("packlight", "benchmarks", "tests")
            found = (ROOT / module).is_dir() or (ROOT / module).with_suffix(".py").is_file()
            assert found or not is_ours, words
        elif words[0].startswith("python") and len(words) > 1:
            assert (ROOT / words[1]).is_file(), words


def test_the_readme_shows_how_to_start() -> None:
    shown = [words[:2] for words in commands(README.read_text(encoding="utf-8"))]
    assert ["make", "demo"] in shown


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_python_blocks_parse(document: Path) -> None:
    for language, block in code_blocks(document.read_text(encoding="utf-8")):
        if language in ("python", "py"):
            ast.parse(block)


def project() -> dict[str, object]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        content: dict[str, object] = tomllib.load(file)["project"]
    return content


def required_names(requirements: list[str]) -> set[str]:
    return {Requirement(text).name for text in requirements} - {"packlight"}


def test_every_dependency_is_explained_once_and_pinned() -> None:
    described = project()
    needed = required_names(described["dependencies"])  # type: ignore[arg-type]
    extras = described["optional-dependencies"]
    assert isinstance(extras, dict)
    in_extras = {(extra, n) for extra, texts in extras.items() for n in required_names(texts)}

    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if row and row[0] not in ("package", "extra", "---")]
    assert {row[0] for row in rows if len(row) == 2} == needed
    assert {(row[0], row[1]) for row in rows if len(row) == 3} == in_extras

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {Requirement(line).name for line in lines if line and not line.startswith("#")}
    assert needed | {name for _, name in in_extras} <= pins


def test_torch_is_pinned_to_one_release_that_the_project_accepts() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pin,) = [line.removeprefix("torch==") for line in lines if line.startswith("torch==")]
    accepted = [Requirement(t) for t in project()["dependencies"]]  # type: ignore[attr-defined]
    (torch,) = [r for r in accepted if r.name == "torch"]
    assert torch.specifier.contains(pin)
    assert f"torch=={pin}" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_no_document_or_script_names_a_machine() -> None:
    """Absolute paths and package hosts belong to a machine, not to the project."""
    pattern = re.compile(r"(?<![\w./])/(?:work|tmp|home|root|opt)/|--index-url|--find-links")
    named = ("README.md", "ARCHITECTURE.md", "Makefile", "constraints.txt", "pyproject.toml")
    files = [ROOT / name for name in named if (ROOT / name).exists()]
    for folder, ending in (("docs", "md"), ("packlight", "py"), ("examples", "py")):
        files += (ROOT / folder).rglob(f"*.{ending}")
    found = [str(p) for p in files if pattern.search(p.read_text(encoding="utf-8"))]
    assert found == []
