"""The command lines and tables of the matrix of strategies, and of ranks that are killed."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.common import (
    MEBIBYTE,
    append_line,
    provenance,
    read_lines,
    replace_between_markers,
    table,
)
from benchmarks.ranks import kills, large, parity
from benchmarks.ranks.cases import CONFIGS, MODELS, STRATEGIES

MODULE = "benchmarks.ranks"
FOLDER = Path(__file__).resolve().parent


def parity_table(words: Sequence[str]) -> int:
    """Train each cell of the matrix that the file does not have, and write the table.

    Args:
        words: of the command line, behind `parity`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE} parity")
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--strategies", nargs="+", choices=[*STRATEGIES], default=[*STRATEGIES])
    parser.add_argument("--configs", nargs="+", choices=[*CONFIGS], default=[*CONFIGS])
    parser.add_argument("--again", action="store_true", help="train cells that the file has, too")
    parser.add_argument("--out", type=Path, default=FOLDER / "parity.jsonl")
    arguments = parser.parse_args(words)
    done = {
        (cell.model, cell.strategy, cell.config)
        for cell in read_lines(arguments.out, parity.Cell) if not arguments.again
    }
    cells = (
        (model, strategy, config) for config, strategy, model in
        product(arguments.configs, arguments.strategies, arguments.models)
    )
    told, say = _prepared("parity", words)
    parity.run([cell for cell in cells if cell not in done], arguments.out, told, say)
    cells = read_lines(arguments.out, parity.Cell)
    _write(arguments.out == FOLDER / "parity.jsonl", "parity", parity_lines(cells))
    return 0


def parity_lines(cells: Sequence[parity.Cell]) -> list[str]:
    """Return the table: a row for each model and strategy, the latest line of each cell."""
    latest = {(cell.model, cell.strategy, cell.config): cell for cell in cells}
    rows, notes = [], []
    for model, strategy in product(MODELS, STRATEGIES):
        row = [model, strategy]
        for config in CONFIGS:
            cell = latest.get((model, strategy, config))
            if cell is None:
                row.append("")
            elif cell.errors:
                row.append(("" if cell.status == "equal" else f"**{cell.status}**: ")
                           + f"{max(cell.errors.values()):.0e}")
            else:
                if cell.status not in notes:
                    notes.append(cell.status)
                row.append(f"({notes.index(cell.status) + 1})")
        if any(row[2:]):
            rows.append(row)
    num_left = len(MODELS) * len(STRATEGIES) * len(CONFIGS) - len(latest)
    trained = [cell for cell in latest.values() if cell.errors]
    equal = sum(cell.status == "equal" for cell in trained)
    limited = [cell for cell in trained if cell.budget_bytes is not None]
    overrun = sum(
        cell.peak_bytes is None or cell.peak_bytes > cell.budget_bytes  # type: ignore[operator]
        for cell in limited
    )
    lines = table(["model", "strategy", *CONFIGS], rows)
    lines += ["", *(f"({number}) {note}" for number, note in enumerate(notes, 1))]
    return [
        *lines, "",
        f"{equal} of {len(trained)} cells that train have one process's numbers; the largest error "
        f"of losses, gradients, parameters and state is in the table. Of {len(limited)} cells with "
        f"a budget, {overrun} are above it. {num_left} cells of the matrix were not run.",
    ]


def kills_table(words: Sequence[str]) -> int:
    """Kill ranks, one of each group, and write what became of the others.

    Args:
        words: of the command line, behind `kills`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE} kills")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, default=FOLDER / "kills.jsonl")
    arguments = parser.parse_args(words)
    told, say = _prepared("kills", words)
    first = 1 + max((kill.seed for kill in read_lines(arguments.out, kills.Kill)), default=-1)
    kills.run(range(first, first + arguments.count), arguments.out, told, say)
    lines = kills_lines(read_lines(arguments.out, kills.Kill))
    _write(arguments.out == FOLDER / "kills.jsonl", "kills", lines)
    return 0


def kills_lines(found: Sequence[kills.Kill]) -> list[str]:
    """Return the table: how ranks ended, by what they were killed in."""
    rows = []
    for how in dict.fromkeys(kill.how for kill in found):
        mine = [kill for kill in found if kill.how == how]
        rows.append([
            how, str(len(mine)), str(sum(kill.num_hung for kill in mine)),
            str(sum(kill.num_unnamed for kill in mine)),
            str(sum(not kill.is_whole for kill in mine)),
            f"{max(kill.seconds for kill in mine):.1f}",
        ])
    heads = [
        "ranks and pieces", "kills", "ranks that hung", "ended by another error than `RankError`",
        "checkpoints that do not load", "longest until all had ended, s",
    ]
    return table(heads, rows)


def plans_table(words: Sequence[str]) -> int:
    """Plan a step of 512 ranks for each mesh, and write how long that took.

    Args:
        words: of the command line, behind `plans`.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE} plans")
    parser.add_argument("--meshes", nargs="+", type=int, choices=range(len(large.MESHES)))
    parser.add_argument("--out", type=Path, default=FOLDER / "plans.jsonl")
    arguments = parser.parse_args(words)
    for number in range(len(large.MESHES)) if arguments.meshes is None else arguments.meshes:
        told, say = _prepared("plans", words)
        found = large.planned(large.MESHES[number], told)
        append_line(arguments.out, found)
        say(f"{found.command}: {found.seconds:.0f} s, {found.resident_bytes / MEBIBYTE:.0f} MiB")
    lines = large.lines(read_lines(arguments.out, large.Planned))
    _write(arguments.out == FOLDER / "plans.jsonl", "plans", lines)
    return 0


def _prepared(command: str, words: Sequence[str]) -> tuple[dict[str, Any], Any]:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("PACKLIGHT_CACHE", tempfile.mkdtemp())
    told = provenance(0, "cpu", " ".join([f"python -m {MODULE} {command}", *words]))
    return told, Console(stderr=True).print


def _write(is_kept: bool, name: str, lines: Sequence[str]) -> None:
    if is_kept:
        replace_between_markers(FOLDER / "README.md", name, [*lines])
    else:
        print("\n".join(lines))
