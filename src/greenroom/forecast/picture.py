"""The curve of a forecast: seconds of a call over the budget, and what they are made of."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING, Any

from ..core.units import format_bytes
from ..observe.style import BUDGET_COLOUR, COLOURS, WAIT_COLOUR
from .forecast import seconds, settings_said

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .forecast import Forecast

_FIRST, _LATER, _COMPUTE = COLOURS[0], COLOURS[2], "#9CCFE8"
_BOUND = "#444444"


def draw(forecast: Forecast, path: str | os.PathLike[str]) -> None:
    """Draw it as a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    unit, name = (2**30, "GiB") if forecast.resident.budget >= 2 * 2**30 else (2**20, "MiB")
    time, time_name = (1.0, "seconds") if forecast.smallest.later_s >= 2 else (1e-3, "milliseconds")
    _draw_curves(axes, forecast, unit, time)
    _mark_budgets(axes, forecast, unit, time)
    axes.set_xlabel(f"budget of device memory, {name}", fontsize=9)
    axes.set_ylabel(f"a call, {time_name}", fontsize=9)
    axes.set_title(_title(forecast), loc="left", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=8
    )
    figure.savefig(
        os.fspath(path), format="png", metadata={"Software": None}, pil_kwargs={"optimize": True}
    )


def _draw_curves(axes: Axes, forecast: Forecast, unit: int, time: float) -> None:
    points = forecast.curve
    budgets = [point.budget / unit for point in points]
    compute = [point.compute_s / time for point in points]
    later = [point.later_s / time for point in points]
    axes.fill_between(
        budgets, 0, compute, color=_COMPUTE, alpha=0.45, linewidth=0, label="the device computes"
    )
    axes.fill_between(
        budgets, compute, later, color=WAIT_COLOUR, alpha=0.8, linewidth=0, label="and waits"
    )
    dots: dict[str, Any] = {"marker": "o", "markersize": 3.5}
    firsts = [(p.budget / unit, p.first_s / time) for p in points if p.first_s is not None]
    axes.plot(
        [at for at, _ in firsts],
        [spent for _, spent in firsts],
        color=_FIRST,
        linestyle="none",
        marker="D",
        markersize=5,
        label="the first call",
        zorder=4,
    )
    axes.plot(budgets, later, color=_LATER, linewidth=1.8, label="a later call", **dots)
    axes.plot(
        budgets,
        [point.bound_s / time for point in points],
        color=_BOUND,
        linewidth=1,
        linestyle=(0, (2, 2)),
        label="the least possible",
    )
    axes.set_ylim(0, 1.15 * max([*later, *(spent for _, spent in firsts)]))
    axes.set_xlim(0, 1.04 * budgets[-1])


def _mark_budgets(axes: Axes, forecast: Forecast, unit: int, time: float) -> None:
    asked, smallest, memory = forecast.asked, forecast.smallest, forecast.recording.card
    axes.axvspan(0, smallest.budget / unit, color="#E4E6E9", linewidth=0, zorder=0)
    if asked.fits:
        said = f"asked for: {format_bytes(asked.budget)}, {seconds(asked.later_s)}"
        _mark_line(axes, asked.budget / unit, said, row=0, color=BUDGET_COLOUR, dashes=(5, 2))
    _write(
        axes,
        f"does not run\nbelow {format_bytes(smallest.budget)}",
        (smallest.budget / unit / 2, 0),
        xytext=(0, 60),
        ha="center",
        rotation=90 if smallest.budget < 0.12 * forecast.resident.budget else 0,
    )
    free = forecast.free
    if smallest.budget < free.budget:
        axes.plot(
            [free.budget / unit],
            [free.later_s / time],
            marker="o",
            markersize=8,
            color=_LATER,
            markerfacecolor="white",
            markeredgewidth=1.8,
            linestyle="none",
            zorder=5,
        )
        _write(
            axes,
            f"costs nothing from\n{format_bytes(free.budget)} on",
            (free.budget / unit, free.later_s / time),
            xytext=(0, -10),
            ha="center",
        )
    if memory.memory_nbytes is not None and memory.memory_nbytes < forecast.curve[-1].budget:
        said = f"{memory.name} has {format_bytes(memory.memory_nbytes)}"
        _mark_line(axes, memory.memory_nbytes / unit, said, row=1, color="#555555")


def _mark_line(
    axes: Axes, at: float, said: str, *, row: int, color: str, dashes: tuple[int, ...] = ()
) -> None:
    """A line at a budget, and beside its top what it means, in the first or second row there."""
    axes.axvline(at, color=color, linewidth=1.2, linestyle=(0, dashes or None))
    near_the_end = at > 0.75 * axes.get_xlim()[1]
    _write(
        axes,
        said,
        (at, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if near_the_end else 5, -4 - 14 * row),
        ha="right" if near_the_end else "left",
        color=color,
    )


def _write(axes: Axes, said: str, at: tuple[float, float], **where: Any) -> None:
    axes.annotate(said, at, textcoords="offset points", fontsize=8, va="top", **where)


def _title(forecast: Forecast) -> str:
    recording, card = forecast.recording, forecast.recording.card
    where = f"simulated {card.name}" if card.is_simulated else card.name
    call = settings_said(recording.settings)
    title = f"{recording.pipeline} in {recording.dtype}   ·   {where}"
    return f"{title}\n{textwrap.shorten(call, 120)}" if call else title
