"""Copies to one device, on a stream of their own, and what reads the copies.

Note [Order on the streams]: a copy is allocated and written on `h2d_stream`, in whose pool its
memory stays. `watch_stream` reads it as it arrives, `check_stream` when it has been used, to tell
whether it has changed; in between, the current stream of the thread that runs the pipeline computes
with it. `mark()` is a point behind the copies so far and their first digests, and `wait()` makes
the current stream wait for it, so that nothing runs before its weights, or changes them unseen.
Memory is given back when the host knows that nobody reads it any more (it has read the last digest,
which comes after the last kernel), or behind `settle()`, which makes `h2d_stream` wait for
everybody. The host itself never waits for a copy. Arrivals and departures have streams of their
own, since what has arrived last may be waited for long after something else may leave.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

_ENOUGH_TO_TIME = 16 * 2**20  # bytes


class Transfer:
    """The way to one device. Where a device has no streams, all is in order by itself."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._device = device
        self.h2d_stream: Any = None  # None before the first copy, and where a device has none
        self._watch_stream: Any = None
        self._check_stream: Any = None
        self._timed: tuple[Any, Any, int] | None = None
        self._starts = 0  # of the device, when that was timed
        #: The point, on the copies' stream, at which the latest copies begin.
        self.began: Any = None
        #: Events that nobody needs any more. To make and to destroy one takes far longer than to
        #: record it, so `new_time` gives these out again.
        self.spare_times: list[Any] = []

    def begin(self) -> None:
        """Have streams, where the device has any."""
        if self.h2d_stream is None and hasattr(self._module, "Stream"):
            self.h2d_stream = self._module.Stream(device=self._device)
            self._watch_stream = self._module.Stream(device=self._device)
            self._check_stream = self._module.Stream(device=self._device)
        if self.h2d_stream is not None:
            self.began = self.now()

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory to copy to: uint8, of `nbytes` bytes."""
        with self._on(self.h2d_stream):
            return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy host memory to the device; the host goes on at once if `source` is page-locked."""
        with self._on(self.h2d_stream):
            is_to_be_timed = (
                self._timed_copy() is None
                and self.h2d_stream is not None
                and source.is_pinned()
                and source.nbytes >= _ENOUGH_TO_TIME
            )
            began = self.now() if is_to_be_timed else None
            target.copy_(source, non_blocking=True)
            if is_to_be_timed:
                self._timed = (began, self.now(), source.nbytes)

    def bytes_per_s(self) -> float | None:
        """What the link does from page-locked memory; None before a large copy was over."""
        timed = self._timed_copy()
        if timed is None or not timed[1].query():
            return None
        began, ended, nbytes = timed
        return nbytes / (float(began.elapsed_time(ended)) / 1e3)

    def _timed_copy(self) -> tuple[Any, Any, int] | None:
        """When the copy that was timed began and ended, and its bytes.

        The simulated device can begin anew as another card: what its link did before is forgotten.
        """
        starts = getattr(self._module, "starts", 0)
        if starts != self._starts:
            self._timed, self._starts = None, starts
        return self._timed

    def now(self) -> Any:
        """The point, with its time, that the copies so far lead up to; None without streams."""
        if self.h2d_stream is None:
            return None
        event = self.new_time()
        event.record(self.h2d_stream)
        return event

    def new_time(self) -> Any:
        """An event that tells its time once it was recorded."""
        spare = self.spare_times
        return spare.pop() if spare else self._module.Event(enable_timing=True)

    def on_arrival(self) -> Any:
        """A context: what is done inside comes after the copies so far, beside everything else."""
        if self._watch_stream is not None:
            self._watch_stream.wait_stream(self.h2d_stream)
        return self._on(self._watch_stream)

    def after_use(self) -> Any:
        """A context: what is done inside comes after the current stream's work, beside the rest."""
        if self._check_stream is not None:
            self._check_stream.wait_stream(self._module.current_stream(self._device))
        return self._on(self._check_stream)

    def checked(self) -> Any:
        """A context: what is done inside comes after all that was done `after_use`."""
        return self._on(self._check_stream)

    def mark(self) -> Any:
        """The point that copies and digests so far lead up to, for `wait`."""
        return None if self._watch_stream is None else self._watch_stream.record_event()

    def wait(self, mark: Any) -> None:
        """What the current stream does from now on comes after the mark."""
        if mark is not None:
            self._module.current_stream(self._device).wait_event(mark)

    def settle(self) -> None:
        """Copies from now on come after all that is queued, and may reuse its memory."""
        if self.h2d_stream is not None:
            self.h2d_stream.wait_stream(self._watch_stream)
            self.h2d_stream.wait_stream(self._check_stream)
            self.h2d_stream.wait_stream(self._module.current_stream(self._device))

    def _on(self, stream: Any) -> Any:
        return contextlib.nullcontext() if stream is None else self._module.stream(stream)
