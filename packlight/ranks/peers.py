"""What ranks of a group of torch's tell one another outside of any planned step.

`Ranks` does the same in a step: it fails together, and lets go of memory where a schedule says.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist


class Peers:
    """Ranks that speak through a group of torch's.

    Args:
        group: it.

    Attributes:
        group: it.
        size: how many ranks there are.
        rank: which of them this process is, from 0.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> Peers:
        return self  # a copy of a model talks to the same ranks

    def start(
        self, tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> dist.Work:
        """Start reducing, in place, what all ranks have in a contiguous tensor."""
        return cast(dist.Work, dist.all_reduce(tensor, operation, self.group, async_op=True))

    def start_sharing(self, tensor: torch.Tensor, owner: int) -> dist.Work:
        """Start giving all ranks what one of them has in a contiguous tensor."""
        work = dist.broadcast(tensor, group=self.group, group_src=owner, async_op=True)
        return cast(dist.Work, work)

    def start_exchange(
        self, received: torch.Tensor, sent: torch.Tensor, come: list[int], gone: list[int]
    ) -> dist.Work:
        """Start sending rows of a tensor to each rank, and getting theirs; as `Ranks` does."""
        work = dist.all_to_all_single(received, sent, come, gone, self.group, async_op=True)
        return cast(dist.Work, work)

    def wait(self, sent: Any) -> None:
        """Wait until that is done."""
        sent.wait()

    def wait_let_go(self, tensor: torch.Tensor, references: int) -> None:
        """Nobody counts on when memory is let go of."""
