"""The host memory that a segment's weights are copied from: page-locked, and whole pages."""

from __future__ import annotations

import mmap
import weakref

import torch

from .backend import Backend
from .layout import Segment

_LEAST_PAGED = 2**20  # bytes


def host_slab(nbytes: int) -> torch.Tensor:
    """Host memory of whole pages, unless it is small: pages are locked, and not twice.

    Its storage begins where it does: torch asks there whether memory is page-locked.
    """
    if nbytes < _LEAST_PAGED or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(nbytes, dtype=torch.uint8)
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8)


def lock(segment: Segment, slab: torch.Tensor, backend: Backend) -> bool:
    """Page-lock a segment's slab, until `unlock` or the segment is no more; False if refused."""
    if not backend.pin(slab):
        return False
    segment.slab = slab
    segment.unpin = weakref.finalize(segment, backend.unpin, slab)
    segment.unpin.atexit = False
    return True


def unlock(segment: Segment) -> None:
    """Let the segment's slab go."""
    if segment.unpin is not None:
        segment.unpin()
    segment.slab = segment.unpin = None
    segment.is_in_place = False
