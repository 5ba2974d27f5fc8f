"""Convolutional models over several ranks: samples cut into rows, exactly."""

from packlight.convolution.parallelize import (
    LayerPlace,
    Spatial,
    SplitModel,
    parallelize_convolutions,
)

__all__ = ["LayerPlace", "Spatial", "SplitModel", "parallelize_convolutions"]
