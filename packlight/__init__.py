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
    from packlight.errors import BatchError as BatchError
    from packlight.errors import BudgetFormatError as BudgetFormatError
    from packlight.errors import FormatError as FormatError
    from packlight.errors import GraphBreakError as GraphBreakError
    from packlight.errors import InfeasibleBudgetError as InfeasibleBudgetError
    from packlight.errors import LossScaleError as LossScaleError
    from packlight.errors import MicrobatchError as MicrobatchError
    from packlight.errors import MissingExtraError as MissingExtraError
    from packlight.errors import MoveError as MoveError
    from packlight.errors import NonFiniteLossError as NonFiniteLossError
    from packlight.errors import OffloadError as OffloadError
    from packlight.errors import OptimizerStateError as OptimizerStateError
    from packlight.errors import OptionError as OptionError
    from packlight.errors import PacklightError as PacklightError
    from packlight.errors import PrecisionError as PrecisionError
    from packlight.errors import RankError as RankError
    from packlight.errors import RankMismatchError as RankMismatchError
    from packlight.errors import ScheduleError as ScheduleError
    from packlight.errors import UnsupportedModelError as UnsupportedModelError
    from packlight.errors import UnsupportedParameterError as UnsupportedParameterError
    from packlight.errors import WayError as WayError

    MOVES: tuple[str, ...]
    EXACT_MOVES: tuple[str, ...]
    from packlight.fitting import Options, fit, plan, profile
    from packlight.pipeline.fit import fit_pipeline
    from packlight.pipeline.step import PipelineStep
    from packlight.ranks.megatron import megatron
    from packlight.ranks.modelled import ModelledMesh
    from packlight.ranks.parallel import Parallel
    from packlight.ranks.tensor import localize
    from packlight.run.train_step import TrainStep
    from packlight.sparse.sparsify import sparsify

# Where each public name lives; torch is imported when one of them is first used.
_HOMES = {
    "ModelledMesh": "packlight.ranks.modelled",
    "Options": "packlight.fitting",
    "Parallel": "packlight.ranks.parallel",
    "MemoryPeak": "packlight.costs.peak",
    "TrainStep": "packlight.run.train_step",
    "PipelineStep": "packlight.pipeline.step",
    "fit": "packlight.fitting",
    "fit_pipeline": "packlight.pipeline.fit",
    "localize": "packlight.ranks.tensor",
    "measure_peak": "packlight.costs.peak",
    "megatron": "packlight.ranks.megatron",
    "plan": "packlight.fitting",
    "profile": "packlight.fitting",
    "sparsify": "packlight.sparse.sparsify",
}

# Folders that users import from, reached as attributes, too: `packlight.optim.AdamW8bit`.
_FOLDERS = (
    "cluster", "comm", "compress", "convolution", "ensemble", "lossy", "optim", "sparse", "trials",
)

__all__ = [
    "EXACT_MOVES",
    "MOVES",
    "MemoryPeak",
    "ModelledMesh",
    "Options",
    "Parallel",
    "PipelineStep",
    "TrainStep",
    "__version__",
    "fit",
    "fit_pipeline",
    "localize",
    "measure_peak",
    "megatron",
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
    if name.endswith("Error"):
        return getattr(import_module("packlight.errors"), name)
    if name not in _HOMES:
        raise AttributeError(f"module 'packlight' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
