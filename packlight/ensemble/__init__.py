"""Ensembles: members of one shape trained as one planned step.

    members = Ensemble(make_model, seeds=range(8))
    step = fit(members, loss_fn, torch.optim.AdamW, batch, "64MiB", settings={"lr": 1e-3})

See docs/ensembles.md.
"""

from __future__ import annotations

from packlight.ensemble.optimizer import Each, MemberOptimizer
from packlight.ensemble.predictions import (
    calibration_error,
    disagreement,
    mean_probabilities,
    mutual_information,
    vote,
)
from packlight.ensemble.stacked import Stacked
from packlight.ensemble.train import Ensemble, EnsembleStep, fit

__all__ = [
    "Each",
    "Ensemble",
    "EnsembleStep",
    "MemberOptimizer",
    "Stacked",
    "calibration_error",
    "disagreement",
    "fit",
    "mean_probabilities",
    "mutual_information",
    "vote",
]
