"""A trained model made small: a file that loads, runs and states its error."""

from packlight.compress.accounts import FileReport, TensorReport
from packlight.compress.files import inspect, load, save, stream
from packlight.compress.prune import Pruner, gradual, iterative
from packlight.compress.share import Sharing, share

__all__ = [
    "FileReport",
    "Pruner",
    "Sharing",
    "TensorReport",
    "gradual",
    "inspect",
    "iterative",
    "load",
    "save",
    "share",
    "stream",
]
