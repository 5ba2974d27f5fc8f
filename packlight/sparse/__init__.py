"""Sparse training with storage that is sparse: values and an index of about a byte for each.

    sparsity = packlight.sparsify(model, density=0.1, method="dsr")
    optimizer = torch.optim.AdamW(model.parameters())
    sparsity.attach(optimizer)

Weights, their gradients and the optimizer's state exist at nonzeros only; methods say where these
are and how they move. All of it knows nothing of planning: to a captured step a sparse weight is
two ordinary tensors and a few operators.
"""

from packlight.sparse.export import load_compact, save_compact
from packlight.sparse.growth import GuidedExploration, RigL
from packlight.sparse.layers import SparseConv1d, SparseConv2d, SparseEmbedding, SparseLinear
from packlight.sparse.method import Change, Method, Place, Run
from packlight.sparse.methods import DSR, SET, DeepR, GradualPruning, Static, Thin
from packlight.sparse.sparsify import METHODS, sparsify, to_dense
from packlight.sparse.sparsity import Sparsity
from packlight.sparse.weight import SparseWeight

__all__ = [
    "DSR",
    "METHODS",
    "SET",
    "Change",
    "DeepR",
    "GradualPruning",
    "GuidedExploration",
    "Method",
    "Place",
    "RigL",
    "Run",
    "SparseConv1d",
    "SparseConv2d",
    "SparseEmbedding",
    "SparseLinear",
    "SparseWeight",
    "Sparsity",
    "Static",
    "Thin",
    "load_compact",
    "save_compact",
    "sparsify",
    "to_dense",
]
