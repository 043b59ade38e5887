"""Rows of a comparison as people read them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console

from .columns import Columns
from .compare import Row
from .core.units import format_bytes

_ABSENT = "-"
_SAME = {None: _ABSENT, True: "yes", False: "NO"}


def print_rows(rows: Sequence[Row], title: str, *, are_virtual: bool) -> None:
    """Print the table on standard output."""
    calls = max((len(row.call_seconds) for row in rows), default=1)
    time = "times are virtual" if are_virtual else "times are by the clock"
    of = "of a call" if calls <= 1 else "of the last call"
    headings = ["a call"] if calls <= 1 else [f"call {number}" for number in range(1, calls + 1)]
    table = Columns(
        ["way", "to enable", *headings, "peak", "to device", "to host", "races", "same"]
    )
    for row in rows:
        table.add(row.way, *cells(row, max(calls, 1)))
    # What is no terminal has no width of its own; the table needs about a hundred columns.
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(title)
    console.print(table)
    console.print(f"{time}; bytes are {of}; same: the first one's answer, bit by bit")


def cells(row: Row, calls: int = 1) -> list[str]:
    """The row's cells after its name, in a table with so many columns for calls."""
    if not row.fits:
        why = "fails" if row.fits is None else "does not fit"
        return [_ABSENT, *[_ABSENT] * calls, why, *[_ABSENT] * 4]
    seconds = [_seconds(spent) for spent in row.call_seconds]
    sizes = (row.peak_bytes, row.h2d_bytes, row.d2h_bytes)
    return [
        _seconds(row.enable_seconds),
        *seconds,
        *[_ABSENT] * (calls - len(seconds)),
        *(_ABSENT if nbytes is None else format_bytes(nbytes) for nbytes in sizes),
        _ABSENT if row.races is None else str(row.races),
        _SAME[row.same_output],
    ]


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return _ABSENT
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
