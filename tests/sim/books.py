"""The allocators' books: bytes of the device and page-locked bytes of the host."""

from __future__ import annotations

from typing import Any

import torch

import greenroom.sim  # noqa: F401  (the device whose books these are)

__all__ = ["KIB", "MIB", "block", "books", "pinned", "pinned_books"]

KIB, MIB = 2**10, 2**20


def block(nbytes: int, device: str = "sim") -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def books(device: Any = None) -> tuple[int, int, int]:
    """Bytes of live tensors; those and freed ones held for a stream; those and the cache."""
    stats = torch.accelerator.memory_stats(device)
    kinds = ("allocated", "active", "reserved")
    allocated, active, reserved = (stats[f"{kind}_bytes.all.current"] for kind in kinds)
    assert (allocated, reserved) == (
        torch.sim.memory_allocated(device),
        torch.sim.memory_reserved(device),
    )
    assert torch.sim.mem_get_info(device)[0] == torch.sim.mem_get_info(device)[1] - reserved
    return allocated, active, reserved


def pinned_books() -> tuple[int, int]:
    """Bytes locked, and how many of them wait in the cache."""
    stats = torch.sim.host_memory_stats()
    return stats["allocated_bytes.current"], stats["cached_bytes.current"]


def pinned(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
