"""Keeps what torch's allocator holds on the device within a budget, not only what is in use.

Note [Two pools]: weights lie in the pool of the stream that copies them, all else in that of the
stream that computes (see `transfer.py`). The allocator gives memory of one pool to the other only
when the device itself has no more. Until then each keeps the most it ever needed, so a decoder
after a transformer would take its activations besides what the transformer's weights have left
behind, and the sum exceeds a budget that what is in use never does. So what is unused is given back
to the device before a phase in which one pool will need more than the other one leaves. For that
the device has to finish its work first, which costs a pause; once or twice in a call.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .backend import Backend

logger = logging.getLogger("greenroom")


class Reserve:
    """What the allocator holds for weights, and for everything else."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._most_nbytes = 0  # of weights since the cache was emptied

    def note(self, weights_nbytes: int) -> None:
        """So many bytes of weights are on the device now."""
        self._most_nbytes = max(self._most_nbytes, weights_nbytes)

    def room(self, budget: int) -> int:
        """Bytes that weights may take within a budget for both, if nothing is given back."""
        return budget - max(0, self._backend.reserved_bytes() - self._most_nbytes)

    def make_fit(self, weights_nbytes: int, most_nbytes: int, room: int, budget: int) -> None:
        """Before a phase begins: give back what is unused if the two pools would exceed the budget.

        Args:
            weights_nbytes: of weights on the device now.
            most_nbytes: that weights will take in the phase.
            room: what the phase leaves for weights; everything else may take the rest.
            budget: for both, and what others have on the device.
        """
        self.note(weights_nbytes)
        held = self._backend.reserved_bytes()
        rest = max(held - self._most_nbytes, budget - room)
        if max(self._most_nbytes, most_nbytes) + rest <= budget:
            return
        logger.debug("empty the allocator's cache: %d bytes are held, of %d", held, budget)
        self._backend.empty_cache()
        self._most_nbytes = weights_nbytes
