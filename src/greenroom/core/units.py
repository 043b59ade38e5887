"""Bytes, as people write them."""

from __future__ import annotations

import re

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 10 ** (3 * i) for i, prefix in enumerate("KMGT", 1)},
    **{f"{prefix}IB": 2 ** (10 * i) for i, prefix in enumerate("KMGT", 1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: int | str) -> int:
    """Read a number of bytes: ``parse_bytes("8GiB") == 8 * 2**30``.

    ``GB`` is decimal and ``GiB`` binary, as the standards have it; case does not matter.

    Raises:
        ValueError: the text is no size, or the number is negative.
    """
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ValueError(f"a size is an int or a text such as '8GiB', not {size!r}")
    if isinstance(size, int):
        if size < 0:
            raise ValueError(f"a size cannot be negative: {size}")
        return size
    match = _SIZE.fullmatch(size)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(
            f"{size!r} is no size; write bytes, or a number with KB, MB, GB, KiB, MiB, GiB or TiB"
        )
    return int(float(match[1]) * _UNITS[match[2].upper()])


def format_bytes(nbytes: float) -> str:
    """Write a number of bytes for people: ``format_bytes(3 * 2**30) == "3.0 GiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"
