"""Sums over device memory that tell whether its bytes have changed.

A digest reads its bytes once. The 64-bit words are summed, modulo 2**64, into as many sums as a
prime number: words meet in a sum only if they lie a multiple of that prime apart, which no
transposition or permutation of a weight's rows, columns or channels makes of all the words it
moves. The sums are then added up, each weighted by its place.
"""

from __future__ import annotations

import torch

from .layout import extent_of, is_same_kind

# Primes. With the first, a table of 64 MiB has about half as many rows as columns; with the second
# the sums of a small one take little memory beside it.
_SUMS, _SUMS_OF_FEW = 4099, 257


def digest_of(slab: torch.Tensor) -> torch.Tensor:
    """The digest of a uint8 tensor of whole 64-bit words: a scalar on the tensor's device."""
    words = slab.view(torch.int64)
    width = _SUMS if words.numel() >= 64 * _SUMS else _SUMS_OF_FEW
    rows = words.numel() // width
    rest = words[rows * width :]
    sums = torch.cat([rest, words[: rows * width].view(rows, width).sum(0)]) if rows else rest
    # Odd weights: a word that changes always changes the total.
    weights = torch.arange(1, 2 * sums.numel(), 2, dtype=torch.int64, device=slab.device)
    return (sums * (weights * 0x9E3779B97F4A7C1)).sum()


def differing(before: list[torch.Tensor], after: list[torch.Tensor]) -> list[bool]:
    """Which digests differ from the ones before; the host waits once for all of them."""
    if not before:
        return []
    return [bool(differs) for differs in (torch.stack(before) != torch.stack(after)).tolist()]


def has_same_values(tensor: torch.Tensor, master: torch.Tensor) -> bool:
    """Whether a tensor on the device equals one in host memory, told by their digests."""
    if not is_same_kind(tensor, master):
        return False
    here, there = (digest_of(_bytes_of(t.data)).item() for t in (tensor, master))
    return bool(here == there)


def is_cast_of(tensor: torch.Tensor, original: torch.Tensor) -> bool:
    """Whether a tensor is another one in its own dtype; piece by piece, as room may be short."""
    if not tensor.is_contiguous() or tensor.dtype == original.dtype:
        pairs = [(tensor, original)]
    else:
        pairs = list(
            zip(tensor.view(-1).split(_AT_ONCE), original.view(-1).split(_AT_ONCE), strict=True)
        )
    try:
        return all(torch.equal(mine, theirs.to(mine.dtype)) for mine, theirs in pairs)
    except torch.OutOfMemoryError:
        return False  # nobody can tell: it is copied


_AT_ONCE = 2**20  # elements


def _bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, filled up with zeros to whole words."""
    nbytes = extent_of(tensor)
    flat = tensor.as_strided((nbytes // tensor.element_size(),), (1,)).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -nbytes % 8)) if nbytes % 8 else flat
