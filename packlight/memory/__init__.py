"""Where buffers wait while they are not needed: disk, or the memory of the host.

The schedule says what leaves when; a tier moves it beside the computation, one transfer after the
other.
"""

from packlight.memory.disk import DiskTier
from packlight.memory.host import HostTier
from packlight.memory.tier import SlotSpec, Tier

__all__ = ["DiskTier", "HostTier", "SlotSpec", "Tier"]
