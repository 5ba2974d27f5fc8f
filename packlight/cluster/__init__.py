"""Many devices: what a step takes on them, and how it is best laid out. No torch.

`predict` says how long a transformer's step takes in a given layout, `simulate_pipeline` what any
schedule of any stages takes and holds.
"""

from packlight.cluster.costs import Choice, Layer, StageCosts
from packlight.cluster.devices import Cluster, Gpu, Link, cluster_of, known_gpus
from packlight.cluster.instructions import (
    Instruction,
    PipelineSchedule,
    Work,
    check,
    weight_versions,
)
from packlight.cluster.timeline import PipelineTimeline, simulate_pipeline
from packlight.cluster.training import Layout, Prediction, predict
from packlight.cluster.transformer import Recompute, Transformer

__all__ = [
    "Choice",
    "Cluster",
    "Gpu",
    "Instruction",
    "Layer",
    "Layout",
    "Link",
    "PipelineSchedule",
    "PipelineTimeline",
    "Prediction",
    "Recompute",
    "StageCosts",
    "Transformer",
    "Work",
    "check",
    "cluster_of",
    "known_gpus",
    "predict",
    "simulate_pipeline",
    "weight_versions",
]
