"""How long a kernel takes: a roofline whose roofs depend on the shape.

A matrix product is cut into tiles, and each multiprocessor works on one tile at a time. With
`waves = ceil(tiles / multiprocessors)` its time is that of `waves` tiles one after the other, so a
few tiles more than multiprocessors take twice as long (wave quantization), and so does a matrix
that is a little larger than a tile (tile quantization). A tile that is small reads its operands
more often; one with a short inner dimension does not fill its pipeline:

    seconds(tile) = 2 * tile_m * tile_n * (k + depth) / (rate / multiprocessors * efficiency(tile))

The library picks the fastest tile, and so does this. Everything else streams: bytes over the
memory's rate.
"""

from __future__ import annotations

from functools import lru_cache

from packlight.cluster.devices import Gpu

# (rows, columns) of a tile, and what it sustains beside the largest: the share of operands that it
# reads from the cache again grows as tiles shrink.
_TILES = (
    ((256, 128), 1.0),
    ((128, 256), 1.0),
    ((128, 128), 0.92),
    ((256, 64), 0.85),
    ((64, 256), 0.85),
    ((128, 64), 0.75),
    ((64, 128), 0.75),
    ((64, 64), 0.60),
)


@lru_cache(maxsize=65536)
def matmul_seconds(
    gpu: Gpu, m: int, n: int, k: int, *, batch: int = 1, element_bytes: int = 2
) -> float:
    """Return the seconds of `batch` products of [m, k] and [k, n] matrices.

    >>> from packlight.cluster.devices import A100_80GB
    >>> seconds = matmul_seconds(A100_80GB, 4096, 4096, 4096)
    >>> 200e12 < 2 * 4096**3 / seconds < 312e12
    True
    """
    per_multiprocessor = (
        gpu.matmul_flops_per_second * gpu.matmul_efficiency / gpu.num_multiprocessors
    )
    compute = min(
        -(-batch * -(-m // rows) * -(-n // columns) // gpu.num_multiprocessors)
        * 2 * rows * columns * (k + gpu.pipeline_depth) / (per_multiprocessor * efficiency)
        for (rows, columns), efficiency in _TILES
    )
    return max(compute, stream_seconds(gpu, batch * element_bytes * (m * k + k * n + m * n)))


def stream_seconds(gpu: Gpu, num_bytes: float) -> float:
    """Return the seconds of one kernel that reads and writes so many bytes in all."""
    return gpu.kernel_seconds + num_bytes / (gpu.memory_bytes_per_second * gpu.memory_efficiency)
