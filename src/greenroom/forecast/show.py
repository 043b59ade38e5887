"""A forecast as people read it: a table of components, one of budgets, and sentences."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.text import Text

from ..columns import Columns
from ..core.units import format_bytes
from .forecast import exactly, seconds, settings_said

if TYPE_CHECKING:
    from rich.console import RenderableType

    from .forecast import Forecast
    from .within import Within

#: Columns that the tables need.
WIDTH = 100


def render(forecast: Forecast) -> RenderableType:
    """The forecast, for rich to print."""
    said = [Text(line) for line in (_title(forecast), *_answers(forecast))]
    tables = [_components(forecast)] if forecast.fits else []
    return Group(*said, *tables, _budgets(forecast), Text(_footnote(forecast)))


def as_text(forecast: Forecast) -> str:
    """The forecast as plain text."""
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False, color_system=None)
    console.print(render(forecast))
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def _title(forecast: Forecast) -> str:
    recording, card = forecast.recording, forecast.recording.card
    weights = format_bytes(sum(share.nbytes for share in forecast.asked.shares))
    where = f"a simulated {card.name}" if card.is_simulated else card.name
    call = settings_said(recording.settings)
    return (
        f"{recording.pipeline}, {weights} in {recording.dtype}, on {where} within "
        f"{format_bytes(forecast.asked.budget)}{f'; {call}' if call else ''}"
    )


def _answers(forecast: Forecast) -> list[str]:
    asked, recording = forecast.asked, forecast.recording
    if not asked.fits:
        return [forecast.why()]
    lines = [
        f"It runs: the first call takes {seconds(asked.first_s)}, each later one "
        f"{seconds(asked.later_s)}, with a peak of {format_bytes(asked.needs_nbytes)}.",
        forecast.why(),
        f"No plan could take less than {seconds(asked.bound_s)}: that is an efficiency of "
        f"{asked.efficiency:.1%}.",
    ]
    if recording.prepare_s is not None:
        lines[0] += f" Before it, page-locking takes {seconds(recording.prepare_s)} once."
    return lines


def _components(forecast: Forecast) -> Columns:
    shares = ("weights", "stay", "stream", "to device", "forwards", "computes", "besides")
    table = Columns(["component", *shares])
    for share in forecast.asked.shares:
        table.add(
            share.name,
            format_bytes(share.nbytes),
            format_bytes(share.stays_nbytes),
            format_bytes(share.nbytes - share.stays_nbytes),
            format_bytes(share.h2d_nbytes),
            str(share.forwards),
            seconds(share.compute_s),
            format_bytes(share.beside_nbytes),
        )
    return table


def _budgets(forecast: Forecast) -> Columns:
    numbers = ("budget", "first call", "later call", "waits", "to device", "efficiency")
    table = Columns([*numbers, "bound by", ""], right=numbers)
    for point in forecast.curve:
        table.add(
            format_bytes(point.budget),
            seconds(point.first_s),
            seconds(point.later_s),
            seconds(point.stalled_s),
            format_bytes(point.h2d_nbytes),
            f"{point.efficiency:.1%}",
            point.bound_by,
            _meaning(forecast, point),
            style="bold" if point.budget == forecast.asked.budget else None,
        )
    return table


def _meaning(forecast: Forecast, point: Within) -> str:
    budget, memory = point.budget, forecast.recording.card.memory_nbytes
    meanings = [
        said
        for said, which in (
            ("asked for", forecast.asked),
            ("the smallest", forecast.smallest),
            ("costs nothing", forecast.free),
            ("all stays", forecast.resident),
        )
        if which.budget == budget
    ]
    if memory is not None and budget > memory:
        meanings.append("more than it has")
    return ", ".join(meanings)


def _footnote(forecast: Forecast) -> str:
    return (
        f"smallest budget that runs: {exactly(forecast.smallest.budget)}\n"
        f"smallest that costs nothing: {exactly(forecast.free.budget)}\n"
        "first call: from an empty device, while the plan is learned, for budgets with a meaning; "
        "later call: each after it, and all columns to its right are of one"
    )
