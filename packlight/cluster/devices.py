"""Machines that are not here: GPUs, the nodes they sit in, and the network between nodes, as data.

Numbers of a `Gpu` or a `Link` are public: a datasheet's peak, or a rate that a benchmark of that
one thing reaches (a matrix product, a copy, an all-reduce). One of them is calibrated on training
steps, `matmul_efficiency` of the A100. docs/cluster.md says where each is from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

from packlight.errors import OptionError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of device and what it sustains.

    Attributes:
        name: how it is asked for.
        memory_bytes: of the device.
        reserved_bytes: what a framework holds beside tensors: contexts, kernels, communicators.
        matmul_flops_per_second: peak of half-precision matrix products.
        matmul_efficiency: share of that peak that long products sustain.
        num_multiprocessors: which work on tiles of a product at the same time.
        pipeline_depth: of a tile, in steps of the inner dimension: what filling and emptying
            its pipeline takes, so that a product with a short inner dimension is slower.
        memory_bytes_per_second: peak of its memory.
        memory_efficiency: share of that peak that kernels which only stream sustain.
        kernel_seconds: between the end of one kernel and the start of the next.
    """

    name: str
    memory_bytes: int
    matmul_flops_per_second: float
    memory_bytes_per_second: float
    num_multiprocessors: int
    matmul_efficiency: float
    pipeline_depth: int
    memory_efficiency: float
    kernel_seconds: float = 3e-6
    reserved_bytes: int = 3 * 2**30


@dataclass(frozen=True, slots=True)
class Link:
    """What joins one GPU to others, in each direction.

    Attributes:
        bytes_per_second: peak of one GPU's share.
        efficiency: share of that peak that large messages reach.
        latency_seconds: from one GPU to the next.
        compute_share: seconds of computation lost in each second of an exchange beside it: the
            multiprocessors that copy do not compute.
    """

    bytes_per_second: float
    efficiency: float
    latency_seconds: float
    compute_share: float = 0.15

    @property
    def rate(self) -> float:
        """Bytes per second that large messages reach."""
        return self.bytes_per_second * self.efficiency


@dataclass(frozen=True, slots=True)
class Cluster:
    """GPUs in nodes, nodes on a network.

    GPUs are numbered node by node. `node_link` joins those of one node, `network` those of
    different nodes (each GPU has a share of its node's adapters), and `rack_link`, if nodes
    stand in racks that are joined more thinly, those of different racks.

    Attributes:
        gpu: what each of them is.
        num_gpus: how many there are.
        per_node: how many of them share a node.
        node_link, network: within a node and between nodes.
        nodes_per_rack, rack_link: between racks; 0 and None where all nodes are equally near.
        host_link: a GPU's share of the way to its node's memory; None where nothing is offloaded.
    """

    gpu: Gpu
    num_gpus: int
    per_node: int
    node_link: Link
    network: Link
    nodes_per_rack: int = 0
    rack_link: Link | None = None
    host_link: Link | None = None

    def __post_init__(self) -> None:
        if self.num_gpus < 1 or self.per_node < 1:
            raise OptionError(
                f"{self.num_gpus} GPUs in nodes of {self.per_node} are no cluster\n"
                "hint: both numbers are positive"
            )
        if self.num_gpus > self.per_node and self.num_gpus % self.per_node:
            down = self.num_gpus - self.num_gpus % self.per_node
            raise OptionError(
                f"{self.num_gpus} GPUs do not fill nodes of {self.per_node}\n"
                f"hint: {down} or {down + self.per_node} GPUs do"
            )

    def link(self, distance: int, span: int = 2) -> Link:
        """Return the slowest link on the way around a group of GPUs.

        Args:
            distance: between neighbours of the group, in GPUs.
            span: how many members the group has.
        """
        reach = distance * (span - 1) + 1
        if reach <= self.per_node:
            return self.node_link
        if self.rack_link is not None and reach > self.per_node * self.nodes_per_rack:
            return self.rack_link
        return self.network

    def with_gpus(self, num_gpus: int) -> Cluster:
        """Return the same machines, more or fewer of them."""
        return replace(self, num_gpus=num_gpus)


_GB = 1e9
_GIB = 2**30
NVLINK3 = Link(300 * _GB, 0.77, 3.5e-6)
NVLINK4 = Link(450 * _GB, 0.82, 3.5e-6)
# Two GPUs share a switch's 16 lanes.
PCIE4_SHARED = Link(16 * _GB, 0.8, 1e-5, compute_share=0.0)
HDR_INFINIBAND = Link(25 * _GB, 0.88, 8e-6, compute_share=0.02)
NDR_INFINIBAND = Link(50 * _GB, 0.88, 8e-6, compute_share=0.02)

A100_80GB = Gpu(
    "a100-80gb", 80 * _GIB, 312e12, 2039 * _GB, 108,
    matmul_efficiency=0.82, pipeline_depth=256, memory_efficiency=0.85,
)
_MACHINES: dict[str, tuple[Gpu, Link, Link]] = {
    "a100-80gb": (A100_80GB, NVLINK3, HDR_INFINIBAND),
    "a100-40gb": (
        replace(
            A100_80GB, name="a100-40gb", memory_bytes=40 * _GIB,
            memory_bytes_per_second=1555 * _GB,
        ),
        NVLINK3,
        HDR_INFINIBAND,
    ),
    "h100-80gb": (
        Gpu(
            "h100-80gb", 80 * _GIB, 989e12, 3350 * _GB, 132,
            matmul_efficiency=0.75, pipeline_depth=512, memory_efficiency=0.85,
        ),
        NVLINK4,
        NDR_INFINIBAND,
    ),
    "v100-32gb": (
        Gpu(
            "v100-32gb", 32 * _GIB, 125e12, 900 * _GB, 80,
            matmul_efficiency=0.85, pipeline_depth=128, memory_efficiency=0.85,
        ),
        Link(150 * _GB, 0.80, 4e-6),
        Link(12.5 * _GB, 0.88, 1e-5),
    ),
}


def known_gpus() -> tuple[str, ...]:
    """Return the names of the machines that are known."""
    return tuple(_MACHINES)


def cluster_of(name: str, num_gpus: int, per_node: int = 8) -> Cluster:
    """Return a cluster of a known machine.

    Raises:
        OptionError: nobody knows it; the known ones are listed.
    """
    if name not in _MACHINES:
        near = get_close_matches(name, _MACHINES, 1)
        meant = f"{near[0]!r}? " if near else ""
        raise OptionError(
            f"no GPU called {name!r} is known\n"
            f"hint: {meant}known are {', '.join(_MACHINES)}; for another, give its own numbers: "
            "--peak-tflops, --memory, --memory-speed, --node-link, --network"
        )
    gpu, node_link, network = _MACHINES[name]
    return Cluster(gpu, num_gpus, per_node, node_link, network, host_link=PCIE4_SHARED)
