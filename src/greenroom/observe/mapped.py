"""Which host memory is mapped from files, as the kernel's list of mappings tells it.

Weights that a library loads by mapping a file (safetensors does) are the file's pages until they
are taken in: they count for the page cache, and come from the disk when they are first read.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from pathlib import Path

#: Ranges of addresses, none of which touch, in order.
Ranges = list[tuple[int, int]]


def mapped_ranges(text: str) -> Ranges:
    """Of ``/proc/self/maps``, the addresses that lie in files.

    >>> mapped_ranges("1000-3000 r--p 00000000 08:01 42   /models/unet.safetensors")
    [(4096, 12288)]
    """
    found = []
    for line in text.splitlines():
        addresses, _, _, _, inode, *path = line.split(maxsplit=5)
        if path and path[0].startswith("/") and inode != "0":
            begin, end = (int(address, 16) for address in addresses.split("-"))
            found.append((begin, end))
    return found


def ranges_now(path: Path = Path("/proc/self/maps")) -> Ranges:
    """This process's; none where there is no such list."""
    try:
        return mapped_ranges(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return []


def nbytes_in(ranges: Ranges, memory: Iterable[tuple[int, int]]) -> int:
    """How many bytes of this memory, as (address, bytes), begin in one of the ranges."""
    begins = [begin for begin, _ in ranges]
    total = 0
    for address, nbytes in memory:
        which = bisect.bisect_right(begins, address) - 1
        if which >= 0 and address < ranges[which][1]:
            total += nbytes
    return total
