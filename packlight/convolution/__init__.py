"""Convolutional models over several ranks: rows of samples, or channels, with each of them."""

from packlight.convolution.channels import PartModel, PartPlace
from packlight.convolution.parallelize import Spatial, parallelize_convolutions
from packlight.convolution.parts import Channels, Filters
from packlight.convolution.places import LayerPlace, SplitModel

__all__ = [
    "Channels",
    "Filters",
    "LayerPlace",
    "PartModel",
    "PartPlace",
    "Spatial",
    "SplitModel",
    "parallelize_convolutions",
]
