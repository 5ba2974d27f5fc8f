"""A trained model made small: a file that loads, runs and states its error."""

from packlight.compress.accounts import FileReport, TensorReport
from packlight.compress.files import inspect, load, save, stream

__all__ = ["FileReport", "TensorReport", "inspect", "load", "save", "stream"]
