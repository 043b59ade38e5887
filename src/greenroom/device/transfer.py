"""Copies to one device, on a stream of their own.

Note [Order on the streams]: slabs are allocated, read and freed on the current stream of the thread
that runs the pipeline, and written on `h2d_stream`. `begin()` makes the copies wait for what is
queued on the current stream, whose kernels may still read memory that was freed and is now
allocated again. `wait()` makes the current stream wait for a copy. So every copy is between its
allocation and its first reader, memory is freed behind its last reader, and the host waits for
nothing. If copies are given up half-way, `wait()` puts them before the freeing.
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
        self._h2d_stream: Any = None
        self._timed: tuple[Any, Any, int] | None = None
        #: The point, on the copies' stream, at which the latest copies begin.
        self.began: Any = None

    def begin(self) -> None:
        """Copies from now on come after what the current stream has queued."""
        if self._h2d_stream is None and hasattr(self._module, "Stream"):
            self._h2d_stream = self._module.Stream(device=self._device)
        if self._h2d_stream is not None:
            self._h2d_stream.wait_stream(self._module.current_stream(self._device))
            self.began = self._now()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy host memory to the device; the host goes on at once if `source` is page-locked."""
        with self._on_h2d_stream():
            is_to_be_timed = (
                self._timed is None
                and self._h2d_stream is not None
                and source.is_pinned()
                and source.nbytes >= _ENOUGH_TO_TIME
            )
            began = self._now() if is_to_be_timed else None
            target.copy_(source, non_blocking=True)
            if is_to_be_timed:
                self._timed = (began, self._now(), source.nbytes)

    def bytes_per_s(self) -> float | None:
        """What the link does from page-locked memory; None before a large copy was over."""
        if self._timed is None or not self._timed[1].query():
            return None
        began, ended, nbytes = self._timed
        return nbytes / (float(began.elapsed_time(ended)) / 1e3)

    def _now(self) -> Any:
        event = self._module.Event(enable_timing=True)
        event.record(self._h2d_stream)
        return event

    def mark(self) -> Any:
        """The point that the copies so far lead up to, for `wait`."""
        return None if self._h2d_stream is None else self._now()

    def wait(self, mark: Any = None) -> None:
        """What the current stream does from now on comes after the copies so far, or to a mark."""
        if self._h2d_stream is None:
            return
        current = self._module.current_stream(self._device)
        if mark is None:
            current.wait_stream(self._h2d_stream)
        else:
            current.wait_event(mark)

    def _on_h2d_stream(self) -> Any:
        if self._h2d_stream is None:
            return contextlib.nullcontext()
        return self._module.stream(self._h2d_stream)
