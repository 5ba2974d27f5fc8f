"""Linear layers beside sparselab's, the one package with real sparse storage, in the same rounds.

`pip install --no-deps sparselab==0.2.2`. Its vector kernels are written for ARM.
"""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import torch
from torch import nn

from benchmarks.common import quartiles, timed
from benchmarks.sparse.speed import BATCH, CPU
from packlight.sparse import SparseLinear

CASES = {"linear 1024 x 1024": (1024, 1024), "linear 4096 x 1024": (4096, 1024)}


def measured(case: str, density: float, num_rounds: int) -> dict[str, Any]:
    """Return bytes of a layer with its gradient, and a step's time, ours over theirs."""
    try:
        import sparselab
    except ImportError:
        raise SystemExit(__doc__) from None
    from sparselab.ops import _transpose_cache  # type: ignore[import-not-found]

    warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
    inner, outer = CASES[case]
    torch.manual_seed(0)
    theirs: Any = sparselab.SparseLinear(inner, outer, bias=False, sparsity=1 - density)
    ours = SparseLinear(inner, outer, bias=False, density=density)
    dense = nn.Linear(inner, outer, bias=False)
    x = torch.randn(BATCH, inner, requires_grad=True)
    dy = torch.randn(BATCH, outer)

    def step(layer: nn.Module) -> None:
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)

    layers = (dense, theirs, ours)
    for layer in layers:
        step(layer)
    rounds = [[timed(lambda: step(layer), CPU) for layer in layers] for _ in range(num_rounds)]  # noqa: B023
    over_theirs = [mine / rival for _, rival, mine in rounds]
    (transposed,) = [entry for entry in _transpose_cache.values() if entry[1] == (outer, inner)]
    their_bytes = _bytes_of(theirs._csr) + _bytes_of(transposed[2]) + transposed[3].nbytes
    _transpose_cache.clear()
    weight = ours.weight
    return {
        "our_bytes": 2 * weight.values.nbytes + weight.index.nbytes,
        "their_bytes": their_bytes + theirs._values.grad.nbytes,
        "their_bytes_without_transposed": _bytes_of(theirs._csr) + theirs._values.grad.nbytes,
        "dense_bytes": 2 * dense.weight.nbytes,
        "ratio_median": statistics.median(over_theirs), "ratio_quartiles": quartiles(over_theirs),
        "our_ratio_to_dense_median": statistics.median([c / a for a, _, c in rounds]),
        "their_ratio_to_dense_median": statistics.median([b / a for a, b, _ in rounds]),
        "num_rounds": num_rounds, "num_threads": torch.get_num_threads(),
    }


def _bytes_of(matrix: Any) -> int:
    names = ("values", "col_indices", "row_start", "row_nnz", "row_capacity")
    return sum(getattr(matrix, name).nbytes for name in names)
