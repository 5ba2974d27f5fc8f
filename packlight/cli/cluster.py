"""`packlight cluster`: a FILE, or a transformer by its sizes, laid out on a cluster."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from packlight.cli.options import positive_int, writable_directory
from packlight.errors import BudgetFormatError, MissingExtraError, OptionError
from packlight.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from packlight.cluster import Cluster
    from packlight.cluster.planner import ClusterPlan

HELP = "lay a model out on a cluster that need not be there"
_SCHEDULES = ("1f1b", "interleaved", "zb-h1")
_ZERO = (0, 1, 2, 3)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument(
        "file", metavar="FILE", nargs="?", default="",
        help="Python file with model(), loss(), ...: measured here, in microbatches of its batch; "
        "or a transformer by --layers, --hidden and --heads",
    )
    parser.add_argument("--device", default="cpu", help="of FILE (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of FILE (default: %(default)s)")
    model = parser.add_argument_group("the model")
    model.add_argument("--layers", type=positive_int)
    model.add_argument("--hidden", type=positive_int)
    model.add_argument("--heads", type=positive_int)
    model.add_argument(
        "--sequence", type=positive_int, default=2048, help="tokens (default: %(default)s)"
    )
    model.add_argument(
        "--vocabulary", type=positive_int, default=51200, help="default: %(default)s"
    )
    model.add_argument("--batch", type=positive_int, required=True, help="samples of a step")
    machines = parser.add_argument_group("the machines")
    machines.add_argument("--gpus", type=positive_int, required=True, help="how many there are")
    machines.add_argument("--gpu", default="a100-80gb", help="which (default: %(default)s)")
    machines.add_argument(
        "--per-node", type=positive_int, default=8, help="how many share a node (default: 8)"
    )
    machines.add_argument(
        "--peak-tflops", type=float, help="of half-precision matrix products, for another GPU"
    )
    machines.add_argument("--memory", metavar="BYTES", help="of each GPU, such as 80GiB")
    machines.add_argument("--memory-speed", metavar="SPEED", help="of that memory: 2TB/s")
    machines.add_argument("--node-link", metavar="SPEED", help="of a GPU in its node: 300GB/s")
    machines.add_argument("--network", metavar="SPEED", help="of a GPU's share: 25GB/s")
    machines.add_argument(
        "--nodes-per-rack", type=positive_int, help="where racks are further apart than nodes"
    )
    machines.add_argument("--rack-link", metavar="SPEED", help="of a GPU's share between racks")
    allowed = parser.add_argument_group("what may be used")
    allowed.add_argument("--max-tensor", type=positive_int, default=None, metavar="N",
                         help="ranks that share a layer (default: those of a node)")
    allowed.add_argument("--schedule", action="append", choices=_SCHEDULES, default=[],
                         help="may be given several times (default: all)")
    allowed.add_argument("--zero", action="append", type=int, choices=_ZERO, default=[],
                         help="levels of sharing state; may be given several times "
                         "(default: 0 and 1)")
    allowed.add_argument("--offload", action="store_true",
                         help="activations may lie in the host's memory")
    parser.add_argument("--picture", metavar="FILE", help="draw the pipeline into FILE.svg or .png")


def run(arguments: argparse.Namespace) -> int:
    """Plan and print."""
    sizes = (arguments.layers, arguments.hidden, arguments.heads)
    if bool(arguments.file) is any(sizes) or (not arguments.file and not all(sizes)):
        raise OptionError(
            "a model is a FILE, or --layers, --hidden and --heads together\n"
            "hint: --layers 96 --hidden 12288 --heads 96"
        )
    return _run_file(arguments) if arguments.file else _run_transformer(arguments)


def _run_file(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from rich.console import Console

    from packlight.cluster.chain import plan_chain
    from packlight.cluster.measured import chain_of
    from packlight.cluster.picture import drawn
    from packlight.example import BatchStream, build, load_example
    from packlight.fitting import planned_step
    from packlight.moves.microbatch.split import num_rows

    if arguments.memory is None:
        raise OptionError("a FILE needs the memory of its GPUs\nhint: --memory 16GiB")
    cluster = machines_of(arguments)
    cluster = replace(cluster, gpu=replace(cluster.gpu, reserved_bytes=0))
    example = load_example(arguments.file)
    model, optimizer = build(example, arguments.device, arguments.seed)
    batch = next(BatchStream(example, "train", arguments.device, arguments.seed))
    step = planned_step(model, example.loss, optimizer, batch, None, moves=())
    chain = chain_of(step.profile, num_rows(batch))
    plan = plan_chain(chain, cluster, arguments.batch)
    console = Console()
    lines = [
        f"{len(chain.layers)} parts of {arguments.file}, microbatches of {chain.rows}, times as on "
        f"{chain.where}",
        f"plan       pipeline {plan.pipeline} x data {plan.data}, {plan.num_microbatches} "
        "microbatches, 1f1b",
        f"step       {format_seconds(plan.seconds)} (none is faster than "
        f"{format_seconds(plan.bound_seconds)}), bubble {plan.timeline.bubble:.1%}",
        *(
            f"rank {rank}     parts {stage.start} to {stage.end - 1}, "
            f"{format_seconds(stage.seconds)} a microbatch, {frames} in flight, peak "
            f"{format_bytes(peak)}"
            for rank, (stage, frames, peak) in enumerate(
                zip(plan.stages, plan.timeline.frames, plan.timeline.peak_bytes, strict=True)
            )
        ),
        *drawn(plan.timeline),
        *(
            f"- pipeline {p} x data {d}: {format_seconds(seconds)} "
            f"({seconds / plan.seconds - 1:+.1%})"
            for p, d, seconds in plan.others[:3]
        ),
    ]
    for text in lines:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 0


def _run_transformer(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from packlight.cluster import Transformer
    from packlight.cluster.picture import drawn
    from packlight.cluster.planner import Allowed, plan_cluster
    from packlight.cluster.why import describe_layout, reasons

    picture = _picture_file(arguments.picture)
    model = Transformer(
        arguments.layers, arguments.hidden, arguments.heads, arguments.sequence,
        arguments.vocabulary,
    )
    cluster = machines_of(arguments)
    plan = plan_cluster(model, cluster, arguments.batch, Allowed(
        max_tensor=arguments.max_tensor or 0,
        schedules=tuple(arguments.schedule) or _SCHEDULES,
        offload=arguments.offload,
        zero=tuple(sorted({*arguments.zero})) or (0, 1),
    ))
    console = Console()
    prediction = plan.prediction

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    line(
        f"{model.parameters / 1e9:.1f}B parameters, batch {arguments.batch} x {model.sequence} "
        f"tokens, {cluster.num_gpus} {cluster.gpu.name} in nodes of {cluster.per_node}"
    )
    line(f"plan       {describe_layout(plan.layout)}")
    share = plan.tflops * 1e12 / cluster.gpu.matmul_flops_per_second
    line(
        f"step       {format_seconds(prediction.seconds)}: {plan.tflops:.0f} TFLOP/s on each GPU, "
        f"{share:.0%} of its peak, what is computed again not counted"
    )
    line(
        f"           pipeline {format_seconds(prediction.pipeline_seconds)} "
        f"(bubble {prediction.timeline.bubble:.1%}), sums over ranks "
        f"{format_seconds(prediction.data_seconds)}, update "
        f"{format_seconds(prediction.update_seconds)}"
    )
    line(
        f"memory     peak {format_bytes(prediction.peak_bytes)} of "
        f"{format_bytes(plan.problem.budget_bytes)} on each GPU"
    )
    console.print(_table(plan))
    for text in drawn(prediction.timeline):
        line(text)
    for text in reasons(plan):
        line(f"- {text}")
    if picture is not None:
        from packlight.report.cluster import pipeline_picture

        pipeline_picture({describe_layout(plan.layout): prediction.timeline}).savefig(picture)
        line(f"picture: {picture}")
    return 0


def machines_of(arguments: argparse.Namespace) -> Cluster:
    """Return the cluster that was asked for: a known GPU's, with numbers of the user's own.

    Raises:
        OptionError: nobody knows the GPU, and not all of its numbers are given.
    """
    from dataclasses import replace

    from packlight.cluster.devices import cluster_of, known_gpus

    own = {
        "matmul_flops_per_second": arguments.peak_tflops and arguments.peak_tflops * 1e12,
        "memory_bytes": arguments.memory and parse_bytes(arguments.memory),
        "memory_bytes_per_second": _speed(arguments.memory_speed, "--memory-speed"),
    }
    links = {
        "node_link": _speed(arguments.node_link, "--node-link"),
        "network": _speed(arguments.network, "--network"),
    }
    complete = all(own.values()) and all(links.values())
    name = arguments.gpu if arguments.gpu in known_gpus() or not complete else known_gpus()[0]
    cluster = cluster_of(name, arguments.gpus, arguments.per_node)
    gpu = replace(
        cluster.gpu, name=arguments.gpu, **{key: value for key, value in own.items() if value}
    )
    cluster = replace(cluster, gpu=gpu, **{
        key: replace(getattr(cluster, key), bytes_per_second=value)
        for key, value in links.items() if value
    })
    racks = _speed(arguments.rack_link, "--rack-link")
    if (racks is None) is not (arguments.nodes_per_rack is None):
        raise OptionError(
            "--nodes-per-rack and --rack-link belong together\n"
            "hint: --nodes-per-rack 4 --rack-link 10GB/s"
        )
    if racks is None:
        return cluster
    return replace(
        cluster, nodes_per_rack=arguments.nodes_per_rack,
        rack_link=replace(cluster.network, bytes_per_second=racks),
    )


def _speed(text: str | None, option: str) -> float | None:
    if text is None:
        return None
    try:
        return float(parse_bytes(text.removesuffix("/s")))
    except BudgetFormatError:
        raise OptionError(f"{option} {text} is no speed\nhint: such as 25GB/s") from None


def _picture_file(file: str | None) -> Path | None:
    if file is None:
        return None
    path = Path(file)
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise OptionError(f"--picture {file} is no picture\nhint: {path.stem}.svg")
    writable_directory(str(path.parent), "--picture")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "report", "--picture") from None
    return path


def _table(plan: ClusterPlan) -> object:
    from rich.table import Table

    from packlight.cluster.why import stage_rows

    table = Table(box=None, pad_edge=False)
    for heading in ("rank", "layers", "kept", "microbatch", "in flight", "peak"):
        table.add_column(heading, justify="left" if heading in ("layers", "kept") else "right")
    rows = stage_rows(plan)
    for index, row in enumerate(rows):
        same = index > 0 and index + 1 < len(rows) and row[1:3] == rows[index - 1][1:3]
        if not same:
            table.add_row(*row)
    return table
