"""How processes found one another."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def default_store() -> Any:
    """Return the store through which the processes of the default group found one another."""
    return dist.distributed_c10d._get_default_store()
