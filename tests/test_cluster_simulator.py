"""Predicted training steps: published formulas by hand, published tables by measurement."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cluster.tables import MEGATRON, SELECTIVE, Row
from packlight.cluster import Cluster, Layout, Recompute, Transformer, cluster_of, predict
from packlight.cluster.collectives import all_gather_seconds, all_reduce_seconds, send_seconds
from packlight.cluster.costs import Choice, cheapest_within, convex, pareto
from packlight.cluster.devices import A100_80GB, HDR_INFINIBAND, NVLINK3, Link
from packlight.cluster.kernels import matmul_seconds, stream_seconds
from packlight.cluster.training import check_layout, static_bytes
from packlight.errors import OptionError

GPT3 = Transformer(96, 12288, 96)


def error(row: Row) -> float:
    predicted = predict(row.model, cluster_of("a100-80gb", row.layout.num_gpus), row.layout,
                        row.batch)
    if row.seconds is not None:
        return predicted.seconds / row.seconds - 1
    return row.measured_seconds / predicted.seconds - 1


def test_steps_on_few_gpus_are_within_a_tenth_of_what_was_published() -> None:
    rows = [row for row in MEGATRON + SELECTIVE if row.layout.pipeline <= 8]
    errors = [abs(error(row)) for row in rows]
    assert max(errors) < 0.10
    assert sum(errors) / len(errors) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "mean", "worst"), [(MEGATRON, 0.05, 0.10), (SELECTIVE, 0.07, 0.07)]
)
def test_published_tables_are_met(rows: list[Row], mean: float, worst: float) -> None:
    errors = [abs(error(row)) for row in rows]
    assert sum(errors) / len(errors) < mean
    assert max(errors) < worst


def test_parameters_are_those_that_the_models_are_named_after() -> None:
    for row in MEGATRON:
        billions = float(row.name.removesuffix("B"))
        assert row.model.parameters / 1e9 == pytest.approx(billions, rel=0.03)


def test_operations_are_those_of_all_matrix_products() -> None:
    s, h, v, n, b = 2048, 12288, 51200, 96, 64
    linears = 2 * b * s * (h * 3 * h + h * h + 2 * h * 4 * h)
    attention = 2 * 2 * b * s * s * h
    layers, logits = n * (linears + attention), 2 * b * s * h * v
    assert GPT3.flops(b) == pytest.approx(3 * layers + 3 * logits)
    published = 96 * b * s * n * h**2 * (1 + s / (6 * h) + v / (16 * n * h))
    assert GPT3.flops(b, Recompute.FULL) == pytest.approx(published)
    assert published == pytest.approx(4 * layers + 3 * logits)


def test_activations_are_those_of_the_published_formulas() -> None:
    def kept(recompute: Recompute, t: int, *, sequence_parallel: bool) -> float:
        found = GPT3.kept_bytes(1, t, recompute, sequence_parallel=sequence_parallel)
        return found / (2048 * 12288)

    scores = 5 * 96 * 2048 / 12288
    assert kept(Recompute.NONE, 1, sequence_parallel=False) == pytest.approx(34 + scores)
    assert kept(Recompute.NONE, 8, sequence_parallel=False) == pytest.approx(10 + (24 + scores) / 8)
    assert kept(Recompute.SELECTIVE, 8, sequence_parallel=True) == pytest.approx(34 / 8)
    assert kept(Recompute.FULL, 8, sequence_parallel=False) == pytest.approx(2)
    # The paper: selective recomputation saves 70% of GPT-3's activations.
    whole = kept(Recompute.NONE, 1, sequence_parallel=False)
    selective = kept(Recompute.SELECTIVE, 1, sequence_parallel=False)
    assert 1 - selective / whole == pytest.approx(0.70, abs=0.01)


def test_state_takes_the_bytes_that_megatron_documents() -> None:
    millions = 10**6
    assert static_bytes(Layout(data=4), millions) == 20 * millions
    assert static_bytes(Layout(data=4, zero=1), millions) == (4 + 16 // 4) * millions
    assert static_bytes(Layout(data=4, zero=3), millions) == 20 // 4 * millions


def test_what_ran_on_80_gigabytes_is_predicted_to_fit() -> None:
    for row in MEGATRON[:7] + SELECTIVE[:4]:
        cluster = cluster_of("a100-80gb", row.layout.num_gpus)
        predicted = predict(row.model, cluster, row.layout, row.batch)
        assert predicted.peak_bytes + A100_80GB.reserved_bytes < A100_80GB.memory_bytes, row.name
    # ... and keeping everything, which the paper says does not, does not.
    everything = replace(SELECTIVE[3].layout, recompute=Recompute.NONE)
    assert predict(SELECTIVE[3].model, cluster_of("a100-80gb", 64), everything, 64).peak_bytes > (
        A100_80GB.memory_bytes
    )


@pytest.mark.parametrize(
    ("m", "n", "k", "tflops"), [(4096, 4096, 4096, 238.8), (5376, 5376, 2048, 212.3)]
)
def test_products_take_about_what_benchmarks_of_them_publish(
    m: int, n: int, k: int, tflops: float
) -> None:
    found = 2 * m * n * k / matmul_seconds(A100_80GB, m, n, k) / 1e12
    assert found == pytest.approx(tflops, rel=0.05)


def test_a_product_one_wave_larger_takes_one_wave_longer() -> None:
    m, n, k = 256 * 12, 128 * 9, 4096  # 108 tiles
    full = matmul_seconds(A100_80GB, m, n, k)
    assert matmul_seconds(A100_80GB, m - 255, n - 127, k) == full
    # Smaller tiles, which the library would take, do not make up for a second wave.
    assert 1.3 * full < matmul_seconds(A100_80GB, m + 1, n, k) < 2 * full
    # A product with few columns reads more than it computes.
    m, n = 256 * 108, 128
    thin = stream_seconds(A100_80GB, 2 * (m * k + k * n + m * n))
    assert matmul_seconds(A100_80GB, m, n, k) == thin


def test_exchanges_take_what_rings_take() -> None:
    node = cluster_of("a100-80gb", 8)
    rate, latency = NVLINK3.rate, NVLINK3.latency_seconds
    assert all_reduce_seconds(node, 1e9, 8) == pytest.approx(14 * latency + 2 * 7 / 8 * 1e9 / rate)
    assert all_gather_seconds(node, 1e9, 1) == 0.0
    many = cluster_of("a100-80gb", 64)
    adapter = HDR_INFINIBAND.rate
    one_each = all_gather_seconds(many, 1e9, 8, distance=8)
    assert one_each == pytest.approx(7 * HDR_INFINIBAND.latency_seconds + 7 / 8 * 1e9 / adapter)
    # All eight members in a node: the ring has eight adapters.
    all_eight = all_gather_seconds(many, 1e9, 64)
    assert all_eight == pytest.approx(
        63 * HDR_INFINIBAND.latency_seconds + 63 / 64 * 1e9 / (8 * adapter)
    )
    assert send_seconds(many, 1e9, 8) > send_seconds(many, 1e9, 1)


def test_racks_are_further_than_nodes() -> None:
    slow = Link(5e9, 0.9, 2e-5)
    racks = Cluster(A100_80GB, 64, 8, NVLINK3, HDR_INFINIBAND, nodes_per_rack=4, rack_link=slow)
    assert racks.link(1, 8) is NVLINK3
    assert racks.link(8, 4) is HDR_INFINIBAND
    assert racks.link(8, 8) is slow


def test_layouts_that_are_none_are_refused_with_one_that_is() -> None:
    cluster = cluster_of("a100-80gb", 64)
    cases = [
        (Layout(8, 8, 1), 63, None),
        (Layout(8, 8, 1, microbatch=5), 64, "a batch of 60 or 65"),
        (Layout(8, 4, 1), 64, "data=2 comes closest"),
        (Layout(1, 64, 1, chunks=2), 64, "pipeline=48"),
        (Layout(1, 64, 1), 64, "do not divide into 64 equal stages"),
    ]
    for layout, batch, message in cases:
        if message is None:
            check_layout(GPT3, cluster, layout, batch)
            continue
        with pytest.raises(OptionError, match=message):
            check_layout(GPT3, cluster, layout, batch)
    with pytest.raises(OptionError, match="'a100-80gb'. known are"):
        cluster_of("a100-80g", 8)
    with pytest.raises(OptionError, match="known are a100-80gb, .* --peak-tflops"):
        cluster_of("zx81", 8)
    with pytest.raises(OptionError, match="hint: 8 or 16 GPUs do"):
        cluster_of("a100-80gb", 12)
    with pytest.raises(OptionError, match="--heads"):
        Transformer(2, 100, 7)


def test_the_cheapest_choices_of_equal_layers_are_those_of_all_combinations() -> None:
    from itertools import product

    choices = pareto([Choice(100, 0.0, "a"), Choice(40, 1.0, "b"), Choice(10, 3.0, "c"),
                      Choice(60, 2.0, "dominated")])
    assert [c.name for c in choices] == ["a", "b", "c"]
    for count in (1, 2, 3, 4):
        for limit in range(0, 100 * count + 1, 5):
            combined = [
                sum(c.extra_seconds for c in each)
                for each in product(choices, repeat=count)
                if sum(c.kept_bytes for c in each) <= limit
            ]
            found = cheapest_within([(convex(choices), count)], limit)
            if not combined:
                assert found is None
            else:
                assert found is not None
                assert found.kept_bytes <= limit
                assert found.extra_seconds == pytest.approx(min(combined)), (count, limit)
                assert found.bound_seconds <= min(combined)
