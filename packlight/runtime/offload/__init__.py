"""Where buffers wait while they are not needed: disk, or the memory of the host.

The schedule says what leaves when; a tier moves it beside the computation, one transfer after the
other.
"""

from packlight.runtime.offload.disk import DiskTier
from packlight.runtime.offload.host import HostTier
from packlight.runtime.offload.link import measure_link
from packlight.runtime.offload.tier import SlotSpec, Tier

__all__ = ["DiskTier", "HostTier", "SlotSpec", "Tier", "measure_link"]
