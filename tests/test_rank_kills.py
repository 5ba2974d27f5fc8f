"""A rank is killed at a random moment: the others end with an error, the checkpoint is whole."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

import packlight
from packlight.errors import RankError
from packlight.run.distributed import load_distributed
from tests.rank_pool import RankPool, mesh, part
from tests.test_ranks import loss_of, whole_batches
from tests.test_shards import made

NUM_KILLS, MOST_SECONDS = 4, 3.0


def trained_until_it_ends(pieces: str, directory: str) -> tuple[str, int]:
    """Train and save step after step, until another rank is gone."""
    model, optimizer = made("mlp", "adamw")
    batch = part(whole_batches("mlp", 8, 1)[0])
    step = packlight.fit(
        model, loss_of, optimizer, batch, mesh=mesh(),
        parallel=packlight.Parallel(shard="data", pieces=pieces),
    )
    done = 0
    step.save(Path(directory) / "checkpoint", done)
    (Path(directory) / "started").touch()
    while True:
        try:
            step(batch)
            done += 1
            step.save(Path(directory) / "checkpoint", done)
        except RankError as error:
            return str(error), done
        except Exception as error:  # torch's own, of its checkpoints
            return f"{type(error).__name__}: {error}", done


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(NUM_KILLS))
def test_a_killed_rank_ends_the_others_and_leaves_a_whole_checkpoint(
    seed: int, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    generator = random.Random(seed)
    size = generator.choice((2, 3))
    victim, pieces = generator.randrange(size), generator.choice(("state", "parameter"))
    pool = RankPool(size, tmp_path_factory.mktemp("kills"))
    try:
        for pipe in pool.pipes:
            pipe.send((trained_until_it_ends, (pieces, str(tmp_path))))
        while not (tmp_path / "started").exists():
            time.sleep(0.05)
        time.sleep(generator.uniform(0.0, MOST_SECONDS))
        pool.processes[victim].kill()
        for rank, pipe in enumerate(pool.pipes):
            if rank != victim:
                assert pipe.poll(60.0), f"rank {rank} hangs"
                text, _ = pipe.recv()
                assert isinstance(text, str) and text
        model, optimizer = made("mlp", "adamw")
        whole = tmp_path / "checkpoint"
        if not whole.exists():  # killed between two renames: the one before is there, whole
            whole = tmp_path / ".checkpoint.old"
        assert load_distributed(whole, model, optimizer) >= 0
    finally:
        pool.close()
