"""What was published: training steps that others measured on A100 machines.

Megatron: Narayanan et al. 2021 (arXiv 2104.04473), table 1; all layers recomputed, exchanges not
overlapped. Korthikanti et al. 2022 (arXiv 2205.05198), table 5: seconds of an iteration with full
recomputation, and with selective recomputation and sequence parallelism; exchanges of tensor
parallelism overlap with gradients of weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from packlight.cluster.training import Layout
from packlight.cluster.transformer import Recompute, Transformer


@dataclass(frozen=True)
class Row:
    """One published configuration.

    Attributes:
        name: as published.
        model, layout, batch: what ran.
        seconds: of a step, where that was published.
        tflops: per second and GPU, recomputation counted, where that was.
    """

    name: str
    model: Transformer
    layout: Layout
    batch: int
    seconds: float | None = None
    tflops: float | None = None

    @property
    def measured_seconds(self) -> float:
        """What was published, as seconds."""
        if self.seconds is not None:
            return self.seconds
        assert self.tflops is not None
        flops = self.model.flops(self.batch, self.layout.recompute)
        return flops / self.layout.num_gpus / (self.tflops * 1e12)


def _megatron(
    name: str, sizes: tuple[int, int, int], parallel: tuple[int, int, int, int], gpus: int,
    batch: int, tflops: float,
) -> Row:
    tensor, pipeline, microbatch, chunks = parallel
    layout = Layout(
        tensor, pipeline, gpus // (tensor * pipeline), microbatch, chunks,
        recompute=Recompute.FULL, overlap_tensor=False, overlap_data=False,
    )
    return Row(name, Transformer(*sizes), layout, batch, tflops=tflops)


def _selective(
    name: str, sizes: tuple[int, int, int], parallel: tuple[int, int, int, int], batch: int,
    full: float, selective: float,
) -> list[Row]:
    tensor, pipeline, microbatch, chunks = parallel
    return [
        Row(
            f"{name} {recompute.value}",
            Transformer(*sizes),
            Layout(
                tensor, pipeline, 1, microbatch, chunks, recompute=recompute,
                sequence_parallel=recompute is Recompute.SELECTIVE, overlap_data=False,
            ),
            batch,
            seconds=seconds,
        )
        for recompute, seconds in ((Recompute.FULL, full), (Recompute.SELECTIVE, selective))
    ]


MEGATRON = [
    _megatron("1.7B", (24, 2304, 24), (1, 1, 16, 1), 32, 512, 137),
    _megatron("3.6B", (30, 3072, 32), (2, 1, 16, 1), 64, 512, 138),
    _megatron("7.5B", (36, 4096, 32), (4, 1, 16, 1), 128, 512, 142),
    _megatron("18.4B", (40, 6144, 48), (8, 1, 8, 1), 256, 1024, 135),
    _megatron("39.1B", (48, 8192, 64), (8, 2, 4, 1), 512, 1536, 138),
    _megatron("76.1B", (60, 10240, 80), (8, 4, 2, 3), 1024, 1792, 140),
    _megatron("145.6B", (80, 12288, 96), (8, 8, 2, 2), 1536, 2304, 148),
    _megatron("310.1B", (96, 16384, 128), (8, 16, 1, 2), 1920, 2160, 155),
    _megatron("529.6B", (105, 20480, 128), (8, 35, 1, 3), 2520, 2520, 163),
    _megatron("1008B", (128, 25600, 160), (8, 64, 1, 1), 3072, 3072, 163),
]

SELECTIVE = [
    *_selective("22B", (48, 6144, 64), (8, 1, 4, 1), 4, 1.42, 1.10),
    *_selective("175B", (96, 12288, 96), (8, 8, 1, 3), 64, 18.13, 13.75),
    *_selective("530B", (105, 20480, 128), (8, 35, 1, 3), 280, 49.05, 37.83),
    *_selective("1T", (128, 25600, 160), (8, 64, 1, 1), 512, 94.42, 71.49),
]
