"""Copies to one device, on a stream of their own.

Note [Order on the streams]: slabs are allocated, read and freed on the current stream of the thread
that runs the pipeline, and written on `h2d_stream`. `begin()` makes the copies wait for what is
queued on the current stream, whose kernels may still read memory that was freed and is now
allocated again. `wait()` makes the current stream wait for a copy. So every copy is between its
allocation and its first reader, memory is freed behind its last reader, and the host waits for
nothing. If copies are given up half-way, `abandon()` puts them before the freeing.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch


class Transfer:
    """The way to one device. Where a device has no streams, all is in order by itself."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._device = device
        self._h2d_stream: Any = None

    def begin(self) -> None:
        """Copies from now on come after what the current stream has queued."""
        if self._h2d_stream is None and hasattr(self._module, "Stream"):
            self._h2d_stream = self._module.Stream(device=self._device)
        if self._h2d_stream is not None:
            self._h2d_stream.wait_stream(self._module.current_stream(self._device))

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy host memory to the device; the host goes on at once if `source` is page-locked."""
        with self._on_h2d_stream():
            target.copy_(source, non_blocking=True)

    def wait(self) -> None:
        """What the current stream does from now on comes after the copies so far."""
        if self._h2d_stream is not None:
            self._module.current_stream(self._device).wait_stream(self._h2d_stream)

    abandon = wait

    def _on_h2d_stream(self) -> Any:
        if self._h2d_stream is None:
            return contextlib.nullcontext()
        return self._module.stream(self._h2d_stream)
