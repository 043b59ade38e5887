"""A report as people read it."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from ..columns import Columns
from ..core.units import format_bytes
from .account import ComponentReport, Report, seconds


def table_of(report: Report) -> Group:
    """Title, table, and a line each for memory and advice."""
    call, total = report.call, report.total
    title = f"{call.pipeline or 'outside of calls'} on {call.device}, {call.outcome}"
    title += f" after {seconds(call.seconds)}" if call.seconds is not None else ""
    within = f"within {format_bytes(call.budget)}" if call.budget else "without a budget"
    table = Columns(
        [
            *("component", "weights", "forwards", "compute", "waited", "to device", "to host"),
            *("ahead", "on demand", "offloads", "pinned"),
        ]
    )
    for row in report.components:
        table.add(row.name, *_cells(row))
    table.add_section()
    table.add("total", *_cells(total))
    lines = [
        "ahead: parts that were there or on their way when needed; pinned: of host memory",
        _host(total),
        _peak(report),
    ]
    if report.efficiency is not None:
        lines.append(
            f"efficiency {report.efficiency:.1%}: at least {seconds(report.lower_bound_s)} are "
            "needed, however weights move"
        )
    lines += [f"* {sentence}" for sentence in report.advice]
    return Group(Text(f"{title}, {within}"), table, *map(Text, lines))


def _host(total: ComponentReport) -> str:
    kinds = {
        "page-locked": total.host_pinned_nbytes,
        "pageable": total.host_pageable_nbytes,
        "mapped from files": total.host_mapped_nbytes,
    }
    said = [f"{format_bytes(nbytes)} {kind}" for kind, nbytes in kinds.items() if nbytes]
    return f"host memory of the weights: {', '.join(said) or 'none'}"


def _peak(report: Report) -> str:
    call = report.call
    if call.peak_nbytes is None:
        return "peak of device memory: not measured"
    line = f"peak of device memory: {format_bytes(call.peak_nbytes)}"
    if call.peak_part is not None:
        line += f", while {call.peak_part} ran"
    if call.peak_s is not None:
        line += f" from {seconds(call.peak_s)} on"
    return line


def _cells(row: ComponentReport) -> list[str]:
    host = row.host_pinned_nbytes + row.host_pageable_nbytes + row.host_mapped_nbytes
    return [
        format_bytes(row.nbytes),
        str(row.forwards),
        seconds(row.compute_s),
        seconds(row.stalled_s),
        format_bytes(row.h2d_nbytes),
        format_bytes(row.d2h_nbytes),
        str(row.found_ahead),
        str(row.demanded),
        str(row.offloads),
        f"{row.host_pinned_nbytes / host:.0%}" if host else "-",
    ]
