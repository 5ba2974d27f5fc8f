"""Which settings make a model as small as asked for, at the smallest error? Tried one by one."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from packlight.compress.accounts import FileReport
from packlight.compress.errors import TargetError
from packlight.compress.files import inspect, load, save
from packlight.compress.layers import places_of
from packlight.compress.prune import Pruner, gradual
from packlight.compress.share import share

_NUM_BIAS_VALUES = 16
_STEPS_BETWEEN_MASKS = 20
_FRAME_BYTES = 200

Train = Callable[[nn.Module, str, Callable[[float], None]], None]


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
        density: share of weights that were kept.
        num_values: of each weight's codebook.
        file_bytes: of the file.
        error: of the model that the file holds.
        seconds: it took.
    """

    density: float
    num_values: int
    file_bytes: int
    error: float
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        target_bytes: asked for.
        dense_bytes, dense_error: of the model before.
        trials: all of them, those of an earlier, interrupted search included.
        best: whose file was kept: of those within the target the one with the smallest error; if
            there is none, the smallest.
        report: of that file.
    """

    target_bytes: int
    dense_bytes: int
    dense_error: float
    trials: tuple[Trial, ...]
    best: Trial
    report: FileReport

    @property
    def meets_target(self) -> bool:
        """Whether the file that was kept is small enough."""
        return self.best.file_bytes <= self.target_bytes


def search(
    model: nn.Module,
    target_bytes: int,
    output: str | Path,
    train: Train,
    error_of: Callable[[nn.Module], float],
    *,
    num_values: Sequence[int] = (8, 16, 4),
    key: str = "",
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Outcome:
    """Prune, share and save a model with several settings, and keep the best file.

    For each number of values the density is chosen so that the file should just fit: fewer values
    let more weights stay. After each trial the estimate is corrected by what its file took. The
    best file so far is at `output` at any time, and what was tried beside it, in
    `output.trials.jsonl`: the same search started again goes on behind the last finished trial.

    Args:
        model: trained; at the end it has the weights of the file.
        target_bytes: of the file.
        output: its path.
        train: trains the model with a new optimizer: `train(model, stage, on_step)`; it calls
            `on_step` before each step with the share of steps done. Stages: "prune", "share".
        error_of: what is to stay small.
        num_values: of codebooks, to be tried in this order.
        key: what else decides the outcome (data, steps, seed); a search with another begins anew.
        on_trial: called after each trial.

    Raises:
        TargetError: not even one weight in a thousand would fit.
        CompressionError: there are no weights, or some that are not finite.
    """
    output = Path(output)
    names = [place.name for place in places_of(model)]
    dense = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    dense_error = error_of(model)
    log = output.with_name(output.name + ".trials.jsonl")
    trials = _read(log, f"{key} {target_bytes}")
    correction = 1.0
    for num in num_values:
        if num in [trial.num_values for trial in trials]:
            continue
        begin = time.monotonic()
        model.load_state_dict(dense)
        density = density_that_fits(model, target_bytes / correction, num, names)
        _prune_and_share(model, density, num, train, names)
        part = output.with_name(output.name + ".part")
        error = error_of(model)
        report = save(part, model, meta={"error": error, "dense_error": dense_error})
        seconds = round(time.monotonic() - begin, 1)
        trial = Trial(density, num, report.file_bytes, error, seconds)
        correction *= report.file_bytes / _estimate(model, names, density, num)
        # The better file is in place before the trial is known, so no trial is without its file.
        if best_of([*trials, trial], target_bytes) is trial:
            os.replace(part, output)
        else:
            part.unlink()
        trials.append(trial)
        with log.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": f"{key} {target_bytes}", **asdict(trial)}) + "\n")
        on_trial(trial)
    load(output, into=model)
    dense_bytes = sum(tensor.nbytes for tensor in dense.values())
    best = best_of(trials, target_bytes)
    return Outcome(target_bytes, dense_bytes, dense_error, tuple(trials), best, inspect(output))


def best_of(trials: Sequence[Trial], target_bytes: int) -> Trial:
    """Return the trial within the target that errs least, or else the smallest."""
    within = [trial for trial in trials if trial.file_bytes <= target_bytes]
    if within:
        return min(within, key=lambda trial: trial.error)
    return min(trials, key=lambda trial: trial.file_bytes)


def density_that_fits(
    model: nn.Module, target_bytes: float, num_values: int, names: Sequence[str]
) -> float:
    """Return the largest density at which a file is estimated to fit.

    Raises:
        TargetError: none does.
    """
    low, high = 1e-3, 1.0
    least = _estimate(model, names, low, num_values)
    if least > target_bytes:
        raise TargetError(
            "the model's tensors", int(target_bytes), math.ceil(least), "0.1% of the weights"
        )
    if _estimate(model, names, high, num_values) <= target_bytes:
        return high
    for _ in range(40):
        middle = (low + high) / 2
        fits = _estimate(model, names, middle, num_values) <= target_bytes
        low, high = (middle, high) if fits else (low, middle)
    return low


def _estimate(model: nn.Module, names: Sequence[str], density: float, num_values: int) -> float:
    """Return about how many bytes a file takes: the entropy of places and codes, and tables."""
    total = float(_FRAME_BYTES)
    entropy = 0.0
    if density < 1:
        entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
    for name, tensor in model.state_dict().items():
        if name in names:
            bits = entropy + density * math.log2(num_values)
            total += tensor.numel() * bits / 8 + 2 * num_values
        elif tensor.is_floating_point():
            total += min(tensor.nbytes, tensor.numel() / 2 + 2 * _NUM_BIAS_VALUES)
        else:
            total += tensor.nbytes
    return total


def _prune_and_share(
    model: nn.Module, density: float, num: int, train: Train, names: Sequence[str]
) -> None:
    pruner = Pruner(model, score="lamp", names=names)
    num_steps = 0

    def on_step(share_done: float) -> None:
        nonlocal num_steps
        if num_steps % _STEPS_BETWEEN_MASKS == 0:
            pruner.prune_to(gradual(share_done, density, end=0.5))
        num_steps += 1

    try:
        train(model, "prune", on_step)
        pruner.prune_to(density)
    finally:
        pruner.finish()
    counts = {
        name: num if name in names else _NUM_BIAS_VALUES for name, _ in model.named_parameters()
    }
    sharing = share(model, counts, start="optimal", learn="both", bit_weight=0.01)
    try:
        train(model, "share", lambda share_done: None)
    finally:
        sharing.finish(half=True)


def _read(log: Path, key: str) -> list[Trial]:
    if not log.exists():
        return []
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in log.read_text(encoding="utf-8").splitlines() if line.strip()
    ]
    if any(line.pop("key") != key for line in lines):
        log.unlink()  # of another search
        return []
    return [Trial(**line) for line in lines]
