"""What was found, as people read it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from ..columns import Columns
from ..core.units import format_bytes
from .judge import Facts, Finding, Level

_UNKNOWN = "-"


def show(facts: Facts, findings: Sequence[Finding]) -> None:
    """Print it on standard output."""
    # What is no terminal has no width of its own.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    if facts.devices:
        console.print(_devices(facts))
    if facts.link is not None:
        console.print(_link(facts))
    console.print(_rest(facts))
    for finding in findings:
        is_trouble = finding.level is Level.TROUBLE
        mark = Text(finding.level.value, style="bold red" if is_trouble else "bold yellow")
        console.print(mark + Text(f": {finding.what}", style="default"))
        console.print(Text(f"  {finding.do}"))
    if not any(finding.level is Level.TROUBLE for finding in findings):
        console.print(Text("nothing is wrong", style="bold green"))


def _devices(facts: Facts) -> Columns:
    table = Columns(["device", "name", "free", "total"], right=["free", "total"])
    for device in facts.devices:
        table.add(device.device, device.name, _bytes(device.free_bytes), _bytes(device.total_bytes))
    return table


def _link(facts: Facts) -> Columns:
    assert facts.link is not None
    link, locking = facts.link, facts.page_locking
    by = "virtual" if facts.simulated is not None else "measured"
    what = f"{facts.device}, {by}, copies of {format_bytes(link.copied_bytes)}"
    table = Columns([what, "page-locked", "pageable"])
    table.add(
        "to the device", _speed(link.h2d_pinned_bytes_per_s), _speed(link.h2d_pageable_bytes_per_s)
    )
    table.add(
        "to the host", _speed(link.d2h_pinned_bytes_per_s), _speed(link.d2h_pageable_bytes_per_s)
    )
    if locking is not None:
        speed = "refused" if locking.bytes_per_s is None else _speed(locking.bytes_per_s)
        table.add("page-locking where it lies", speed, "")
    return table


def _rest(facts: Facts) -> Columns:
    host = facts.host
    table = Columns(["host and software", ""], right=[])
    limit = host.cgroup_limit_bytes
    table.add(
        "host memory",
        f"{format_bytes(host.available_bytes)} available of {format_bytes(host.total_bytes)}",
    )
    table.add("control group's limit", "none" if limit is None else format_bytes(limit))
    locked = host.memlock_limit_bytes
    table.add("ulimit -l", "unlimited" if locked is None else format_bytes(locked))
    if host.is_wsl:
        table.add("WSL", "yes")
    table.add("driver", facts.driver or "none found")
    for name, version in facts.versions.items():
        built = f", built for {facts.built_for or 'the CPU'}" if name == "torch" else ""
        table.add(name, f"{version}{built}" if version is not None else "not installed")
    return table


def _bytes(nbytes: int | None) -> str:
    return _UNKNOWN if nbytes is None else format_bytes(nbytes)


def _speed(bytes_per_s: float | None) -> str:
    return _UNKNOWN if bytes_per_s is None else f"{bytes_per_s / 1e9:.1f} GB/s"
