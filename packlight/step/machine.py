"""What a step runs on beside the device that computes: other memories, and lanes that reach them.

The device's own memory is not among them: how much of it a step may use is its budget, which no
machine knows.
"""

from __future__ import annotations

from dataclasses import dataclass

# The memory of what lies in pieces with all ranks.
RANKS = "ranks"


@dataclass(frozen=True, slots=True)
class Memory:
    """Where buffers can be besides the device's own memory: a disk, the host.

    Attributes:
        name: what buffers say they are in.
        bytes: what fits; None for all there ever is.
    """

    name: str
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Speed:
    """How long one kind of transfer takes.

    Attributes:
        bytes_per_second: once it is under way.
        latency_seconds: before the first byte.
    """

    bytes_per_second: float
    latency_seconds: float = 0.0

    def seconds(self, num_bytes: int) -> float:
        """Return how long a transfer takes."""
        return self.latency_seconds + num_bytes / self.bytes_per_second


@dataclass(frozen=True, slots=True)
class Lane:
    """What works beside computation, on one operation after the other.

    Attributes:
        name: what operations say they run on.
        memory: which one it reaches; "" for a network that only adds up, `RANKS` for one from which
            parameters are gathered.
        read, write: from there and to there; None where it does not do that.
        compute_share: seconds of computation lost in each second of its work, 0 to 1: on a CPU, the
            cores that compute copy, too.
        reduce: adding up what all ranks have in a buffer; None where it does not do that.
        reduce_pieces: ... where each rank gets the sums of a part of it.
        share: giving all ranks the parts of a buffer that each has.
    """

    name: str
    memory: str
    read: Speed | None
    write: Speed | None
    compute_share: float = 0.0
    reduce: Speed | None = None
    reduce_pieces: Speed | None = None
    share: Speed | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """The memories and lanes beside the device that computes.

    >>> disk = Lane("nvme", "disk", read=Speed(2e9, 1e-4), write=Speed(1e9, 1e-4))
    >>> Machine((Memory("disk"),), (disk,)).lane("nvme").memory
    'disk'
    """

    memories: tuple[Memory, ...] = ()
    lanes: tuple[Lane, ...] = ()

    def __post_init__(self) -> None:
        memories = [memory.name for memory in self.memories]
        names = [lane.name for lane in self.lanes]
        if len({*memories}) < len(memories) or len({*names}) < len(names) or "" in memories + names:
            raise ValueError(f"memories {memories} and lanes {names} need a name each")
        for lane in self.lanes:
            if lane.memory and lane.memory not in memories:
                raise ValueError(f"lane {lane.name!r} reaches {lane.memory!r}, none of {memories}")

    def with_lane(self, lane: Lane) -> Machine:
        """Return the machine with a further lane, and the memory that it reaches."""
        is_new = lane.memory and all(memory.name != lane.memory for memory in self.memories)
        memories = (*self.memories, Memory(lane.memory)) if is_new else self.memories
        return Machine(memories, (*self.lanes, lane))

    @classmethod
    def with_one_lane(cls, lane: Lane) -> Machine:
        """Return a machine with one lane, to a memory in which everything fits."""
        return cls((Memory(lane.memory),), (lane,))

    def lane(self, name: str) -> Lane:
        """Return the lane of a name; KeyError if there is none."""
        for lane in self.lanes:
            if lane.name == name:
                return lane
        raise KeyError(name)
