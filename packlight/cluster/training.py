"""One training step of a transformer on a cluster: its seconds, and each rank's peak.

The layout is given; `planner.py` searches for it. Ranks are numbered as Megatron does: tensor
parallel ranks are neighbours, then come data parallel ones, then pipeline stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from packlight.cluster.collectives import (
    all_gather_seconds,
    all_reduce_seconds,
    reduce_scatter_seconds,
    send_seconds,
)
from packlight.cluster.costs import Choice, Layer, StageCosts
from packlight.cluster.devices import Cluster
from packlight.cluster.modelled import Ways, layers_of, receive_seconds, update_seconds
from packlight.cluster.schedules import schedule_of
from packlight.cluster.timeline import PipelineTimeline, simulate_pipeline
from packlight.cluster.transformer import Recompute, Transformer
from packlight.errors import OptionError

# Half-precision weight and gradient; gradient, master, and two moments in fp32 (Megatron's fp16
# optimizer: 20 bytes a parameter, of which a distributed optimizer shards 16).
WEIGHT_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES = 2, 2, 16


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is laid out on a cluster.

    Attributes:
        tensor, pipeline, data: degrees; their product is the number of GPUs.
        microbatch: samples at a time.
        chunks: stages on each rank (interleaved).
        schedule: by name, see `schedules.schedule_of`.
        recompute: what is computed again in all layers, where nothing is chosen for each: plans
            (`planner.py`) choose.
        sequence_parallel: norms and dropouts shared along the sequence, too.
        zero: what data parallel ranks share: 0 nothing, 1 optimizer state, 2 gradients, too, 3
            weights, too.
        overlap_tensor: exchanges of tensor parallelism beside gradients of weights.
        overlap_data: sums over data parallel ranks beside the last backward.
        offload: activations may lie in the host's memory.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    microbatch: int = 1
    chunks: int = 1
    schedule: str = "1f1b"
    recompute: Recompute = Recompute.FULL
    sequence_parallel: bool = False
    zero: int = 0
    overlap_tensor: bool = True
    overlap_data: bool = True
    offload: bool = False

    @property
    def num_gpus(self) -> int:
        """How many GPUs it takes."""
        return self.tensor * self.pipeline * self.data

    def num_microbatches(self, batch: int) -> int:
        """Return how many microbatches each pipeline runs.

        Raises:
            OptionError: the batch does not divide.
        """
        per_round = self.data * self.microbatch
        if batch % per_round:
            down = batch - batch % per_round
            raise OptionError(
                f"a batch of {batch} does not divide into microbatches of {self.microbatch} on "
                f"{self.data} data parallel ranks\n"
                f"hint: a batch of {down or per_round} or {down + per_round}"
            )
        return batch // per_round

    @property
    def ways(self) -> Ways:
        """How its layers run on the ranks that share them."""
        return Ways(
            self.tensor, self.microbatch, self.sequence_parallel, self.overlap_tensor,
            self.offload,
        )


@dataclass(frozen=True)
class Prediction:
    """What a step is expected to take.

    Attributes:
        seconds: of the whole step.
        pipeline_seconds: of all microbatches.
        data_seconds: of sums over data parallel ranks and of tied embeddings, not hidden.
        update_seconds: of the optimizer.
        timeline: of one pipeline.
        stages: what each stage costs.
        num_gpus: how many take part.
    """

    seconds: float
    pipeline_seconds: float
    data_seconds: float
    update_seconds: float
    timeline: PipelineTimeline = field(repr=False)
    stages: tuple[StageCosts, ...] = field(repr=False)
    num_gpus: int

    @property
    def peak_bytes(self) -> int:
        """Of the rank that holds most."""
        return max(self.timeline.peak_bytes)

    def flops_per_second(self, flops: float) -> float:
        """Return what each GPU does of so many floating point operations in a second."""
        return flops / self.seconds / self.num_gpus


def predict(model: Transformer, cluster: Cluster, layout: Layout, batch: int) -> Prediction:
    """Return the seconds and peaks of one training step.

    Raises:
        OptionError: the layout is none for this model, cluster and batch.
    """
    check_layout(model, cluster, layout, batch)
    layers = sharded_layers(model, cluster, layout)
    per_stage = model.layers // (layout.pipeline * layout.chunks)
    counts = [per_stage] * (layout.pipeline * layout.chunks)
    counts[0] += 1
    counts[-1] += 1
    pieces, at = [], 0
    for count in counts:
        pieces.append(layers[at : at + count])
        at += count
    stages = [
        stage_costs(cluster, layout, piece, [_chosen(layer, layout.recompute) for layer in piece])
        for piece in pieces
    ]
    return predict_stages(model, cluster, layout, batch, stages, [
        sum(layer.parameters for layer in piece) for piece in pieces
    ])


def predict_stages(
    model: Transformer,
    cluster: Cluster,
    layout: Layout,
    batch: int,
    stages: Sequence[StageCosts],
    parameters: Sequence[int],
) -> Prediction:
    """Return the prediction for stages whose costs are known.

    Args:
        model: for the size of its tied embedding.
        cluster: where it runs.
        layout: how.
        batch: samples of the whole step.
        stages: what each stage costs.
        parameters: of each stage, on one rank.
    """
    schedule = schedule_of(
        layout.schedule, layout.pipeline, layout.num_microbatches(batch), layout.chunks
    )
    timeline = simulate_pipeline(schedule, stages)
    own = [sum(parameters[r :: layout.pipeline]) for r in range(layout.pipeline)]
    ends = [runs[-1].end_seconds for runs in timeline.runs]
    backward = [
        sum(s.input_seconds + s.weight_seconds for s in stages[r :: layout.pipeline])
        for r in range(layout.pipeline)
    ]
    done = max(
        end + exposed_sum_seconds(cluster, layout, count, beside)
        for end, count, beside in zip(ends, own, backward, strict=True)
    )
    tied = tied_seconds(model, cluster, layout)
    update = update_seconds(cluster.gpu, max(own) / (layout.data if layout.zero else 1))
    pipeline = max(ends)
    return Prediction(
        done + tied + update, pipeline, done - pipeline + tied, update, timeline, tuple(stages),
        layout.num_gpus,
    )


def sharded_layers(model: Transformer, cluster: Cluster, layout: Layout) -> list[Layer]:
    """Return a model's layers as a layout runs them."""
    layers = layers_of(model, cluster, layout.ways)
    if layout.zero < 2 or layout.data == 1:
        return layers
    own = {layer: _with_sharding(cluster, layout, layer) for layer in set(layers)}
    return [own[layer] for layer in layers]


def stage_costs(
    cluster: Cluster, layout: Layout, layers: Sequence[Layer], choices: Sequence[Choice]
) -> StageCosts:
    """Return what layers cost as one stage, with a choice for each."""
    parameters = sum(layer.parameters for layer in layers)
    sent = layers[-1].output_bytes
    return StageCosts(
        sum(layer.forward_seconds for layer in layers),
        sum(layer.input_seconds for layer in layers),
        sum(layer.weight_seconds for layer in layers),
        recompute_seconds=sum(choice.extra_seconds for choice in choices),
        kept_bytes=sum(choice.kept_bytes for choice in choices),
        static_bytes=static_bytes(layout, parameters),
        workspace_bytes=max(
            max(layer.workspace_bytes - choice.kept_bytes, 0)
            for layer, choice in zip(layers, choices, strict=True)
        ),
        held_bytes=sum(layer.held_bytes for layer in layers),
        version_bytes=WEIGHT_BYTES * parameters,
        send_seconds=send_seconds(cluster, sent / layout.tensor, layout.tensor * layout.data)
        if layout.pipeline > 1 else 0.0,
        receive_seconds=receive_seconds(cluster, sent, layout.ways)
        if layout.pipeline > 1 else 0.0,
        choices=tuple(choice.name for choice in choices),
    )


def static_bytes(layout: Layout, parameters: int) -> int:
    """Return what parameters of one rank hold throughout: themselves, gradients, state."""
    kinds = (OPTIMIZER_BYTES, GRADIENT_BYTES, WEIGHT_BYTES)
    return sum(
        -(-each * parameters // (layout.data if layout.zero > level else 1))
        for level, each in enumerate(kinds)
    )


def exposed_sum_seconds(
    cluster: Cluster, layout: Layout, parameters: int, backward_seconds: float
) -> float:
    """Return how much longer a step takes for gradients to be added up over data parallel ranks.

    Args:
        cluster: where the ranks are.
        layout: how many there are, and how far apart.
        parameters: of one rank.
        backward_seconds: of one microbatch on it, which hides as much.
    """
    if layout.data == 1 or layout.zero >= 2:
        return 0.0
    seconds = all_reduce_seconds(
        cluster, GRADIENT_BYTES * parameters, layout.data, layout.tensor
    )
    hidden = min(seconds, backward_seconds) if layout.overlap_data else 0.0
    return seconds - hidden


def tied_seconds(model: Transformer, cluster: Cluster, layout: Layout) -> float:
    """Return how long the first and last stage take to add up their embedding's gradients."""
    if layout.pipeline == 1:
        return 0.0
    num_bytes = GRADIENT_BYTES * model.vocabulary * model.hidden / layout.tensor
    return all_reduce_seconds(cluster, num_bytes, 2, layout.tensor * layout.data)


def check_layout(model: Transformer, cluster: Cluster, layout: Layout, batch: int) -> None:
    """Raise an OptionError where a layout is none for this model, cluster and batch."""
    layout.num_microbatches(batch)
    if layout.num_gpus != cluster.num_gpus:
        raise OptionError(
            f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data} is "
            f"{layout.num_gpus} GPUs, not {cluster.num_gpus}\n"
            f"hint: data={cluster.num_gpus // (layout.tensor * layout.pipeline)} comes closest"
        )
    if model.heads % layout.tensor:
        raise OptionError(
            f"{model.heads} heads do not divide among {layout.tensor} tensor parallel ranks"
        )
    stages = layout.pipeline * layout.chunks
    if stages > model.layers:
        raise OptionError(
            f"{stages} stages need as many layers, and there are {model.layers}\n"
            f"hint: pipeline={model.layers // layout.chunks}"
        )
    if model.layers % stages:
        raise OptionError(f"{model.layers} layers do not divide into {stages} equal stages")


def _chosen(layer: Layer, recompute: Recompute) -> Choice:
    named = [choice for choice in layer.choices if choice.name == recompute.value]
    return named[0] if named else layer.choices[0]


def _with_sharding(cluster: Cluster, layout: Layout, layer: Layer) -> Layer:
    """Return a layer whose gradients (and weights) are exchanged in each microbatch."""
    ranks, distance = layout.data, layout.tensor
    sums = reduce_scatter_seconds(cluster, GRADIENT_BYTES * layer.parameters, ranks, distance)
    gathers = all_gather_seconds(cluster, WEIGHT_BYTES * layer.parameters, ranks, distance)
    gathers *= layout.zero >= 3
    share = cluster.network.compute_share

    def beside(compute: float, exchange: float) -> float:
        hidden = min(compute, exchange)
        return compute + exchange - hidden + share * hidden

    return replace(
        layer,
        forward_seconds=beside(layer.forward_seconds, gathers),
        input_seconds=beside(layer.input_seconds, gathers),
        weight_seconds=beside(layer.weight_seconds, sums),
    )
