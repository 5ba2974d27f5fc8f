"""A rank is killed at a random moment: the others end with an error, the checkpoint is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.ranks.kills import killed

NUM_KILLS = 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_a_killed_rank_ends_the_others_and_leaves_a_whole_checkpoint(
    seed: int, tmp_path: Path
) -> None:
    kill = killed(seed, tmp_path)
    assert kill.num_ended > 0 == kill.num_hung
    assert kill.num_unnamed == 0, kill.texts
    assert kill.is_whole
