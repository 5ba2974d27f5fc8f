"""Small training steps, the same on every machine, on which planners are held against the optimum.

`graphs()` maps names to steps of 14 to 40 operations: few enough for the MILP, varied enough that
no single rule of thumb is right on all of them.
"""

from __future__ import annotations

import random
from functools import cache

from packlight.step import StepGraph
from tests.oracles.tape import Tape


def heterogeneous_chain(seed: int, length: int = 8) -> StepGraph:
    """A chain without any skip: sizes and seconds are drawn per operation."""
    draw = random.Random(seed)
    tape = Tape()
    x = tape.input(8)
    for position in range(length):
        kind = draw.choice(("linear", "linear", "gelu", "relu", "norm")) if position else "linear"
        if kind == "linear":
            size = draw.choice((8, 16, 24, 32, 48))
            workspace = draw.choice((0, 0, 4, 12))
            x = tape.linear(x, size, draw.uniform(1, 8), weight=draw.choice((2, 6)),
                            workspace=workspace)
        elif kind == "norm":
            x = tape.norm(x, 0.05 * tape.size(x))
        else:
            x = tape.pointwise(x, 0.04 * tape.size(x), reads_output=kind == "relu")
    return tape.finish(x, 0.5)


def uniform_chain(length: int) -> StepGraph:
    """Equal stages: the shape for which the best nesting is known in closed form."""
    tape = Tape()
    x = tape.input(16)
    for _ in range(length):
        x = tape.linear(x, 16, 2.0, weight=1)
    return tape.finish(x, 0.5)


def residual_mlp(seed: int, num_blocks: int = 2) -> StepGraph:
    """Blocks of linear, GELU, linear (or norm first), each with a residual around it."""
    draw = random.Random(seed)
    tape = Tape()
    x = tape.linear(tape.input(8), 16, 1.0, weight=2)
    for block in range(num_blocks):
        y = tape.norm(x, 0.6) if (seed + block) % 2 else x
        wide = draw.choice((32, 48, 64))
        y = tape.linear(y, wide, draw.uniform(2, 5), weight=4, split=draw.random() < 0.5)
        y = tape.pointwise(y, 0.03 * wide, reads_output=draw.random() < 0.3)
        y = tape.linear(y, 16, draw.uniform(2, 5), weight=4)
        x = tape.add(x, y, 0.3)
    return tape.finish(x, 0.5)


def transformer(seed: int, num_blocks: int = 1) -> StepGraph:
    """Attention with a residual, a feed-forward part, and a loss head that may be the peak."""
    draw = random.Random(seed)
    tape = Tape()
    x = tape.linear(tape.input(8), 12, 0.5, weight=2)
    for _ in range(num_blocks):
        y = tape.norm(x, 0.4)
        y = tape.linear(y, 36, 3.0, weight=3)
        y = tape.attention(y, draw.uniform(3, 6), workspace=draw.choice((0, 8)))
        y = tape.linear(y, 12, 1.0, weight=2)
        if draw.random() < 0.5:
            y = tape.dropout(y, 0.3)
        x = tape.add(x, y, 0.2)
        y = tape.linear(x, 40, 3.0, weight=4)
        y = tape.pointwise(y, 1.2)
        x = tape.linear(y, 12, 3.0, weight=4)
    x = tape.linear(x, draw.choice((16, 60)), 3.0, weight=6)
    return tape.finish(x, 0.8)


def u_shape(seed: int, depth: int) -> StepGraph:
    """Down and up again, with long skips that stay in memory across everything below them."""
    draw = random.Random(seed)
    tape = Tape()
    sizes = [draw.choice((32, 48))]
    x = tape.linear(tape.input(16), sizes[0], 2.0, weight=1)
    skips = []
    for _ in range(depth):
        if draw.random() < 0.6:
            x = tape.pointwise(x, 0.03 * sizes[-1], reads_output=draw.random() < 0.5)
        skips.append(x)
        sizes.append(max(4, sizes[-1] // draw.choice((2, 3))))
        x = tape.linear(x, sizes[-1], draw.uniform(2, 4), weight=2, workspace=draw.choice((0, 8)))
    for skip, size in zip(reversed(skips), reversed(sizes[:-1]), strict=True):
        x = tape.linear(x, size, draw.uniform(1, 3), weight=2)
        join = draw.choice(("cat", "add"))
        x = tape.concatenate([x, skip], 0.5) if join == "cat" else tape.add(x, skip, 0.3)
        x = tape.linear(x, size, draw.uniform(1, 5), weight=2)
    return tape.finish(x, 0.5)


def random_dag(seed: int, length: int = 7) -> StepGraph:
    """Each operation reads one or two of the recent values; nothing has to be a narrow cut."""
    draw = random.Random(seed)
    tape = Tape()
    size = 16
    values = [tape.linear(tape.input(8), size, 1.0, weight=2)]
    unread = set(values)
    for _ in range(length):
        x = draw.choice(values[-3:])
        kind = draw.choice(("linear", "gelu", "relu", "mul", "add", "attention"))
        others = [v for v in values[-4:] if v != x]
        if kind in ("mul", "add") and not others:
            kind = "gelu"
        if kind == "linear":
            y = tape.linear(x, size, draw.uniform(1, 6), weight=draw.choice((1, 4)),
                            workspace=draw.choice((0, 6)))
        elif kind in ("mul", "add"):
            other = draw.choice(others)
            unread.discard(other)
            combine = tape.multiply if kind == "mul" else tape.add
            y = combine(x, other, draw.uniform(0.2, 0.6))
        elif kind == "attention":
            y = tape.attention(x, draw.uniform(2, 5), workspace=draw.choice((0, 8)))
        else:
            y = tape.pointwise(x, draw.uniform(0.3, 1.0))
        unread.discard(x)
        values.append(y)
        unread.add(y)
    ends = sorted(unread)
    x = ends[0] if len(ends) == 1 else tape.concatenate(ends, 0.5)
    return tape.finish(x, 0.5)


def towers(seed: int, num_towers: int = 3) -> StepGraph:
    """Branches of unequal cost from one stem, joined at the end."""
    draw = random.Random(seed)
    tape = Tape()
    stem = tape.linear(tape.input(8), 24, 2.0, weight=2)
    ends = []
    for tower in range(num_towers):
        size = draw.choice((8, 16, 32))
        y = tape.linear(stem, size, draw.uniform(1, 6), weight=2, workspace=4 * tower)
        if tower < 2:
            y = tape.pointwise(y, 0.04 * size)
        ends.append(y)
    x = tape.concatenate(ends, 0.6)
    x = tape.linear(x, 16, 2.0, weight=2)
    return tape.finish(x, 0.5)


@cache
def graphs() -> dict[str, StepGraph]:
    """Return all graphs by name."""
    made: dict[str, StepGraph] = {}
    for seed in range(6):
        made[f"chain-{seed}"] = heterogeneous_chain(seed)
    for seed in range(6, 8):
        made[f"long-chain-{seed}"] = heterogeneous_chain(seed, length=15)
    for length in (6, 12, 16):
        made[f"uniform-{length}"] = uniform_chain(length)
    for seed in range(4):
        made[f"residual-{seed}"] = residual_mlp(seed)
    made["deep-residual-4"] = residual_mlp(4, num_blocks=3)
    for seed in range(3):
        made[f"transformer-{seed}"] = transformer(seed)
    for seed in range(4):
        made[f"u-shape-{seed}"] = u_shape(seed, depth=2)
    for seed in range(4, 6):
        made[f"deep-u-shape-{seed}"] = u_shape(seed, depth=3)
    for seed in range(8):
        made[f"dag-{seed}"] = random_dag(seed)
    for seed in range(8, 10):
        made[f"large-dag-{seed}"] = random_dag(seed, length=11)
    for seed in range(4):
        made[f"towers-{seed}"] = towers(seed)
    return made
