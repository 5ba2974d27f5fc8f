"""Who may import whom: read from the sources, and seen in fresh interpreters."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "packlight"
LINT_IMPORTS = "from importlinter.cli import lint_imports_command as c; c()"
STEP_MAY_IMPORT = ("numpy", "packlight.step", "packlight.errors", "packlight.units")


def sources(folder: str) -> list[Path]:
    return sorted((PACKAGE / folder).rglob("*.py"))


def imported_names(path: Path) -> list[str]:
    return names_in(path.read_text(encoding="utf-8"), path.relative_to(ROOT).parent.as_posix())


def names_in(source: str, folder: str) -> list[str]:
    """Return the full dotted names that a source imports anywhere, functions included."""
    package = folder.split("/")
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("path", sources("step"), ids=lambda p: p.name)
def test_step_imports_only_the_standard_library_and_numpy(path: Path) -> None:
    strange = [
        name
        for name in imported_names(path)
        if name.partition(".")[0] not in sys.stdlib_module_names
        and name != "packlight"
        and not any(is_under(name, allowed) for allowed in STEP_MAY_IMPORT)
    ]
    assert strange == []


@pytest.mark.parametrize(
    "path", [*sources("planner"), *sources("cluster")], ids=lambda p: f"{p.parent.name}-{p.name}"
)
def test_planner_and_cluster_never_imports_torch_or_what_needs_it(path: Path) -> None:
    forbidden = ("torch", "packlight.capture", "packlight.costs", "packlight.search")
    assert [n for n in imported_names(path) if any(is_under(n, f) for f in forbidden)] == []


def test_the_reader_of_imports_sees_every_form() -> None:
    source = (
        "import torch.nn as nn\n"
        "def f():\n"
        "    from packlight import lower\n"
        "    from ..capture import joint\n"
        "    from . import types\n"
    )
    assert {
        "torch.nn",
        "packlight.lower",
        "packlight.capture.joint",
        "packlight.step.types",
    } <= set(names_in(source, "packlight/step"))


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after a statement."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import packlight",
        "import packlight.step, packlight.step.serialize, packlight.planner",
        "import packlight.cluster",
        "import packlight.cli",
    ],
)
def test_torch_is_not_loaded_by(statement: str) -> None:
    loaded = modules_after(statement)
    assert not loaded & {"torch", "transformers", "matplotlib", "safetensors"}


def test_import_packlight_loads_no_numeric_library() -> None:
    assert not modules_after("import packlight") & {"numpy", "scipy", "rich"}


def test_import_packlight_loads_one_module_of_its_own_and_next_to_nothing_else() -> None:
    bare = modules_after("import typing, importlib")
    loaded = modules_after("import packlight") - bare
    assert {name for name in loaded if name.startswith("packlight")} == {"packlight"}
    assert len(loaded) <= 5, f"a few milliseconds, not {sorted(loaded)}"


def test_every_public_name_is_found_lazily() -> None:
    import packlight

    for name in packlight.__all__:
        assert getattr(packlight, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = packlight.no_such_name


def test_help_needs_no_torch() -> None:
    loaded = modules_after(
        "import packlight.cli\ntry: packlight.cli.main(['--help'])\nexcept SystemExit: pass"
    )
    assert "torch" not in loaded


def test_import_linter_agrees() -> None:
    pytest.importorskip("importlinter", reason="import-linter is part of the dev extra")
    done = subprocess.run(
        [sys.executable, "-c", LINT_IMPORTS, "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
