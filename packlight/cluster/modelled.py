"""A transformer's layers as a GPU runs them, kernel by kernel: matrix products, streams, exchanges.

The kernels are Megatron's: products by cuBLAS, scale + mask + softmax, bias + GeLU and bias +
dropout + add fused, attention with its scores in memory, layer norm in one kernel. Each streaming
kernel is counted by the bytes that it reads and writes, two per element and one per element of a
mask; what a byte count leaves out (kernels' own overheads) is in the memory's efficiency.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from packlight.cluster.collectives import all_gather_seconds, all_reduce_seconds, send_over
from packlight.cluster.costs import Choice, Layer, pareto
from packlight.cluster.devices import Cluster, Gpu
from packlight.cluster.kernels import matmul_seconds, stream_seconds
from packlight.cluster.transformer import Recompute, Transformer

# A microbatch's gradient of a parameter is added to the sum: both are read, one is written.
_ACCUMULATE_BYTES = 6
# Unscaling, the norm, clipping, Adam in fp32 on fp32 masters, and the cast back: what they read
# and write of one parameter's gradient, master, moments and half-precision weight.
_UPDATE_BYTES = 62


@dataclass(frozen=True, slots=True)
class Ways:
    """How layers run on the ranks that share them.

    Attributes:
        tensor: how many ranks share each layer.
        microbatch: samples at a time.
        sequence_parallel: norms and dropouts are shared, too, along the sequence.
        overlap_tensor: exchanges of the backward run beside the gradients of weights.
        offload: whether layers may also lie in the host's memory between forward and backward.
    """

    tensor: int
    microbatch: int
    sequence_parallel: bool = False
    overlap_tensor: bool = False
    offload: bool = False


@lru_cache(maxsize=4096)
def transformer_layer(model: Transformer, cluster: Cluster, ways: Ways) -> Layer:
    """Return one layer of attention and MLP."""
    gpu, t, b = cluster.gpu, ways.tensor, ways.microbatch
    h, s = model.hidden, model.sequence
    tokens, heads, width = b * s, model.heads // t, model.hidden // model.heads
    rows = tokens * h
    whole = rows // t if ways.sequence_parallel else rows
    shared = rows / t
    scores = b * heads * s * s

    linears = ((tokens, 3 * h // t, h), (tokens, h, h // t), (tokens, 4 * h // t, h),
               (tokens, h, 4 * h // t))
    products = matmul_seconds(gpu, s, s, width, batch=b * heads) + matmul_seconds(
        gpu, s, width, s, batch=b * heads
    )
    attention = products + _streams(gpu, 4 * scores, 5 * scores)
    exchange = 2 * all_reduce_seconds(cluster, 2 * rows, t)
    norms_and_adds = 2 * _streams(gpu, 4 * whole, 7 * whole)
    biases = _streams(gpu, 12 * shared, 4 * shared, 16 * shared)
    forward = (
        sum(matmul_seconds(gpu, *shape) for shape in linears)
        + attention + norms_and_adds + biases + exchange
    )

    weight = sum(matmul_seconds(gpu, k, n, m) for m, n, k in linears) + stream_seconds(
        gpu, _ACCUMULATE_BYTES * model.layer_parameters / t
    )
    # An all-gather of what sequence parallelism keeps in parts comes on top.
    exchanges = exchange * (1.5 if ways.sequence_parallel else 1.0)
    input_ = (
        sum(matmul_seconds(gpu, m, k, n) for m, n, k in linears)
        + 2 * products + _streams(gpu, 5 * scores, 6 * scores)
        + 2 * _streams(gpu, 7 * whole, 6 * whole, 10 * whole)
        + _streams(gpu, 24 * shared, 8 * shared, 18 * shared, 4 * shared)
        + _exposed(cluster, exchanges, weight if ways.overlap_tensor else 0.0)
    )
    again = {Recompute.NONE: 0.0, Recompute.SELECTIVE: attention, Recompute.FULL: forward}
    kept = {
        kind: model.kept_bytes(b, t, kind, sequence_parallel=ways.sequence_parallel)
        for kind in Recompute
    }
    choices = [Choice(kept[kind], again[kind], kind.value) for kind in Recompute]
    if ways.offload and cluster.host_link is not None:
        backward = input_ + weight
        for kind in Recompute:
            away = send_over(cluster.host_link, kept[kind])
            waits = max(0.0, away - forward) + max(0.0, away - backward - again[kind])
            choices.append(Choice(0, again[kind] + waits, f"{kind.value}+offload"))
    return Layer(
        "layer", model.layer_parameters // t, forward, input_, weight, 2 * rows,
        pareto(choices),
        # What is computed again; with transfers the layer that comes or goes beside it, too.
        workspace_bytes=kept[Recompute.NONE] * (2 if ways.offload else 1),
        # Of the four linears: what they read, and the gradients of what they make.
        held_bytes=int(8 * whole + 24 * shared),
    )


@lru_cache(maxsize=4096)
def embedding(model: Transformer, cluster: Cluster, ways: Ways) -> Layer:
    """Return the embedding of tokens and positions, whose rows are shared by the ranks."""
    gpu, rows = cluster.gpu, ways.microbatch * model.sequence * model.hidden
    parameters = (model.vocabulary // ways.tensor + model.sequence) * model.hidden
    forward = _streams(gpu, 4 * rows, 4 * rows) + all_reduce_seconds(
        cluster, 2 * rows, ways.tensor
    )
    weight = _streams(gpu, 8 * rows, _ACCUMULATE_BYTES * parameters)
    # Token ids and the dropout's mask.
    kept = Choice(rows // (ways.tensor if ways.sequence_parallel else 1))
    return Layer("embedding", parameters, forward, 0.0, weight, 2 * rows, (kept,))


@lru_cache(maxsize=4096)
def head(model: Transformer, cluster: Cluster, ways: Ways) -> Layer:
    """Return the last norm, the logits with the embedding's weights, and the loss."""
    gpu, t, h = cluster.gpu, ways.tensor, model.hidden
    tokens = ways.microbatch * model.sequence
    rows, columns = tokens * h, model.vocabulary // t
    logits = tokens * columns
    # The loss in fp32: cast, maximum, difference, exponential, sum, quotient.
    forward = (
        matmul_seconds(gpu, tokens, columns, h)
        + _streams(gpu, 4 * rows, 6 * logits, 4 * logits, 8 * logits, 12 * logits, 4 * logits)
    )
    exchange = all_reduce_seconds(cluster, 2 * rows, t)
    weight = matmul_seconds(gpu, h, columns, tokens) + stream_seconds(
        gpu, _ACCUMULATE_BYTES * columns * h
    )
    input_ = (
        matmul_seconds(gpu, tokens, h, columns) + _streams(gpu, 8 * logits, 6 * logits, 10 * rows)
        + _exposed(cluster, exchange, weight if ways.overlap_tensor else 0.0)
    )
    kept = Choice(4 * rows // (t if ways.sequence_parallel else 1) + 4 * logits)
    return Layer(
        "head", columns * h, forward, input_, weight, 0, (kept,), workspace_bytes=4 * logits,
        held_bytes=2 * rows + 2 * logits,
    )


def layers_of(model: Transformer, cluster: Cluster, ways: Ways) -> list[Layer]:
    """Return the whole model: embedding, layers, head."""
    middle = [transformer_layer(model, cluster, ways)] * model.layers
    return [embedding(model, cluster, ways), *middle, head(model, cluster, ways)]


def update_seconds(gpu: Gpu, parameters: float) -> float:
    """Return the seconds of the optimizer's step on so many parameters of one rank."""
    return stream_seconds(gpu, _UPDATE_BYTES * parameters)


def receive_seconds(cluster: Cluster, num_bytes: float, ways: Ways) -> float:
    """Return how long ranks put together what each has received a part of."""
    if ways.sequence_parallel:
        return 0.0
    return all_gather_seconds(cluster, num_bytes, ways.tensor)


def _streams(gpu: Gpu, *num_bytes: float) -> float:
    return sum(stream_seconds(gpu, each) for each in num_bytes)


def _exposed(cluster: Cluster, exchange: float, beside: float) -> float:
    """Return what exchanges add to computation that runs beside them for so many seconds."""
    hidden = min(exchange, beside)
    return exchange - hidden + hidden * cluster.node_link.compute_share
