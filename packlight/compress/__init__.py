"""A trained model made small: pruned, its weights shared, and written into a file that loads.

    from packlight import compress

    pruner = compress.Pruner(model)                  # train while pruner.prune_to(...) is called
    pruner.finish()
    sharing = compress.share(model, 16)              # train the values
    sharing.finish(half=True)
    print(compress.save("model.plc", model).describe())
    compress.load("model.plc", into=model)

Training is yours: any loop, or `packlight.fit`. Every stage leaves a plain model behind.
"""

from packlight.compress.accounts import FileReport, TensorReport
from packlight.compress.channels import remove_channels, remove_dead_channels
from packlight.compress.errors import (
    AlteredFileError,
    CalibrationError,
    CompressedFileError,
    CompressionError,
    ModelMismatchError,
    NewerFileError,
    TargetError,
    TruncatedFileError,
)
from packlight.compress.files import inspect, load, save, stream
from packlight.compress.low_rank import low_rank, spatial
from packlight.compress.prune import Pruner, gradual, iterative
from packlight.compress.rate import choose_num_values, squared_gradients
from packlight.compress.reconstruct import remove_inputs
from packlight.compress.scales import ScaleSelection
from packlight.compress.share import Sharing, share
from packlight.compress.variational import VariationalPruner

__all__ = [
    "AlteredFileError",
    "CalibrationError",
    "CompressedFileError",
    "CompressionError",
    "FileReport",
    "ModelMismatchError",
    "NewerFileError",
    "Pruner",
    "ScaleSelection",
    "Sharing",
    "TargetError",
    "TensorReport",
    "TruncatedFileError",
    "VariationalPruner",
    "choose_num_values",
    "gradual",
    "inspect",
    "iterative",
    "load",
    "low_rank",
    "remove_channels",
    "remove_dead_channels",
    "remove_inputs",
    "save",
    "share",
    "spatial",
    "squared_gradients",
    "stream",
]
