"""Backwards that keep less, for plain PyTorch: few-bit activations, randomized linear layers.

    from packlight import lossy

    lossy.few_bit_activations(model, bits=3)
    lossy.randomized_linears(model, fraction=0.2)

`packlight.fit` makes the same approximations, and packs what else is saved, in the steps that it
plans: `allow={"few-bit", "packed", "randomized-matmul"}, max_gradient_error=0.02`.
"""

from packlight.lossy import functional as functional
from packlight.lossy.few_bit import Table as Table
from packlight.lossy.few_bit import optimal_table as optimal_table
from packlight.lossy.modules import FewBitActivation as FewBitActivation
from packlight.lossy.modules import RandomizedLinear as RandomizedLinear
from packlight.lossy.modules import few_bit_activations as few_bit_activations
from packlight.lossy.modules import randomized_linears as randomized_linears
from packlight.lossy.packing import pack_values as pack_values
from packlight.lossy.packing import packed_bytes as packed_bytes
from packlight.lossy.packing import unpack_values as unpack_values

__all__ = [
    "FewBitActivation",
    "RandomizedLinear",
    "Table",
    "few_bit_activations",
    "functional",
    "optimal_table",
    "pack_values",
    "packed_bytes",
    "randomized_linears",
    "unpack_values",
]
