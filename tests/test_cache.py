"""What is remembered of calls: shared between processes, never in the way of what is computed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch

from packlight.costs import cache as caches
from packlight.costs.cache import Cache, read_ahead

CPU = torch.device("cpu")


def in_a_fork(work: Callable[[], object]) -> object:
    """Return what a function returns in a forked process."""
    reader, writer = os.pipe()
    if not os.fork():
        os.write(writer, json.dumps(work()).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        told = json.loads(pipe.read())
    os.wait()
    return told


def test_what_one_process_saves_others_know(tmp_path: Path) -> None:
    mine = Cache("t", CPU, tmp_path)
    mine["a"] = [1, None]
    assert "a" in mine and "a" not in Cache("t", CPU, tmp_path)  # it is not saved yet
    mine.save()
    assert Cache("t", CPU, tmp_path)["a"] == [1, None]

    def other() -> bool:
        theirs = Cache("t", CPU, tmp_path)
        theirs["b"] = theirs["a"]
        theirs["a"] = 2
        theirs.save()
        return True

    assert in_a_fork(other)
    again = Cache("t", CPU, tmp_path)
    assert again["a"] == 2 and again["b"] == [1, None]
    assert len(again.path.read_text().splitlines()) == 3


def test_saving_adds_what_is_new_and_reads_nothing_twice(tmp_path: Path) -> None:
    first = Cache("t", CPU, tmp_path)
    for number in range(100):
        first[str(number)] = number
    first.save()
    size = first.path.stat().st_size
    second = Cache("t", CPU, tmp_path)
    second["100"] = 100
    second.save()
    second.save()
    assert second.path.stat().st_size - size == len('["100", 100]\n')
    num_read = caches._lines_of[first.path].num_read
    assert num_read == size
    read_ahead()

    def parsed_in_a_fork() -> int:
        before = caches._lines_of[first.path].num_read
        assert Cache("t", CPU, tmp_path)["100"] == 100
        return caches._lines_of[first.path].num_read - before

    assert in_a_fork(parsed_in_a_fork) == 0


def test_a_line_that_was_cut_off_is_none_and_harms_no_other(tmp_path: Path) -> None:
    mine = Cache("t", CPU, tmp_path)
    mine["a"] = 1
    mine.save()
    with mine.path.open("a") as file:
        file.write('["b", {"half')
    assert "b" not in Cache("t", CPU, tmp_path)
    later = Cache("t", CPU, tmp_path)
    later["c"] = 3
    later.save()
    caches._lines_of.clear()
    fresh = Cache("t", CPU, tmp_path)
    assert fresh["a"] == 1 and fresh["c"] == 3 and "b" not in fresh


def test_a_file_that_was_deleted_is_an_empty_cache(tmp_path: Path) -> None:
    mine = Cache("t", CPU, tmp_path)
    mine["a"] = 1
    mine.save()
    mine.path.unlink()
    assert "a" not in Cache("t", CPU, tmp_path)
    mine["b"] = 2
    mine.save()
    assert Cache("t", CPU, tmp_path)["b"] == 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    nowhere = Cache("t", CPU, blocked / "below")
    nowhere["a"] = 1
    nowhere.save()  # costs only time
    assert nowhere["a"] == 1


def test_a_file_of_lines_that_were_replaced_becomes_small_again(tmp_path: Path) -> None:
    for number in range(caches.MOST_OLD_LINES + 100):
        again = Cache("t", CPU, tmp_path)
        again["a"] = number
        again.save()
    assert len(again.path.read_text().splitlines()) < 200
    assert Cache("t", CPU, tmp_path)["a"] == number
