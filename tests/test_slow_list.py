"""What `make test` leaves out exists, and something of each file stays in."""

from __future__ import annotations

import re

import pytest

from tests.conftest import SLOW

LISTED = SLOW.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("path", sorted({node.partition("::")[0] for node in LISTED}))
def test_listed_tests_exist_and_are_not_all_of_their_file(path: str) -> None:
    text = (SLOW.parent.parent / path).read_text(encoding="utf-8")
    tests = set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE))
    whole = {node.partition("::")[2] for node in LISTED if node.startswith(path + "::")}
    assert {name.partition("[")[0] for name in whole} <= tests
    assert tests - whole, "nothing of this file would run"
