"""Decides how much host memory may be page-locked when, so that no call takes longer for it.

Page-locked weights travel two to twenty times as fast, but locking is slow: on a usual host 0.3 s
a GB, and 0.1 s to gather the GB in one piece. So it is done while the device works anyway, and, at
the end of a call, as far as the call has saved the time elsewhere: the usual model offloading
copies every component home, which this one does not.
"""

from __future__ import annotations

from dataclasses import dataclass

# Gathering (10 GB/s) and locking (3.2 GB/s, cudaHostRegister on one thread) a byte take 4.6 times
# as long as copying it home to pageable memory (11 GB/s on PCIe 4.0; elsewhere it is slower).
_BYTES_SAVED_FOR_ONE_LOCKED = 5
#: What locking a byte where it lies takes of that: nothing is gathered.
LOCKED_IN_PLACE = 0.75


@dataclass
class PinningAllowance:
    """How many bytes a call may lock when it ends."""

    _nbytes: float = 0.0

    def dropped(self, nbytes: int) -> None:
        """So many bytes went from the device without being copied home."""
        self._nbytes += nbytes / _BYTES_SAVED_FOR_ONE_LOCKED

    def take(self) -> int:
        """What may be locked now; the count begins anew."""
        taken, self._nbytes = int(self._nbytes), 0.0
        return taken
