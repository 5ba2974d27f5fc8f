"""Train any PyTorch model inside a memory budget.

    step = packlight.fit(model, loss_fn, optimizer, batch, budget="1GiB")
    for batch in loader:
        loss = step(batch)

or, for activations and gradients only, with a training loop of your own:

    model = torch.compile(model, backend="packlight", options={"budget": "300MiB"})
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from packlight.costs.peak import MemoryPeak, measure_peak

    MOVES: tuple[str, ...]
    EXACT_MOVES: tuple[str, ...]
    from packlight.fitting import Options, fit, plan, profile
    from packlight.ranks.modelled import ModelledMesh
    from packlight.ranks.parallel import Parallel
    from packlight.run.train_step import TrainStep
    from packlight.sparse.sparsify import sparsify

# Where each public name lives; torch is imported when one of them is first used.
_HOMES = {
    "ModelledMesh": "packlight.ranks.modelled",
    "Options": "packlight.fitting",
    "Parallel": "packlight.ranks.parallel",
    "MemoryPeak": "packlight.costs.peak",
    "TrainStep": "packlight.run.train_step",
    "fit": "packlight.fitting",
    "measure_peak": "packlight.costs.peak",
    "plan": "packlight.fitting",
    "profile": "packlight.fitting",
    "sparsify": "packlight.sparse.sparsify",
}

# Folders that users import from, reached as attributes, too: `packlight.optim.AdamW8bit`.
_FOLDERS = ("cluster", "comm", "compress", "optim", "sparse")

__all__ = [
    "EXACT_MOVES",
    "MOVES",
    "MemoryPeak",
    "ModelledMesh",
    "Options",
    "Parallel",
    "TrainStep",
    "__version__",
    "fit",
    "measure_peak",
    "plan",
    "profile",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"packlight.{name}")
    if name in ("MOVES", "EXACT_MOVES"):  # those of installed packages included
        from packlight.moves.registry import exact_move_names, move_names

        return move_names() if name == "MOVES" else exact_move_names()
    if name not in _HOMES:
        raise AttributeError(f"module 'packlight' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
