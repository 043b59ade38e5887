"""The memory picture: what was on the device when, and what was copied and computed meanwhile."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..core.units import format_bytes
from .account import Report, seconds
from .story import Bar, Story
from .style import BESIDE, BESIDE_COLOUR, BUDGET_COLOUR, WAIT_COLOUR, WAITING, colours_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LANES = ("compute", "to device", "to host")


def draw(reports: Mapping[str, Report], path: str | os.PathLike[str]) -> None:
    """Draw reports one above the other, on one scale of time and one of memory, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.patches import Patch

    stories = {title: report.story for title, report in reports.items()}
    colours = colours_of(list(stories.values()))
    time, time_unit = _unit_of_time(max(story.end_s for story in stories.values()))
    memory, memory_unit = _unit_of_memory(max(_ceiling(report) for report in reports.values()))
    figure = Figure(
        figsize=(9, 0.8 + 2.5 * len(reports)),
        dpi=100,
        layout=ConstrainedLayoutEngine(hspace=0, h_pad=0.03),
    )
    FigureCanvasAgg(figure)
    # A panel of memory and one of lanes for each report, and some air between two.
    heights = [3.4, 1, 0.3] * len(reports)
    grid = figure.add_gridspec(3 * len(reports) - 1, 1, height_ratios=heights[:-1])
    first: Any = None
    for row, (title, report) in enumerate(reports.items()):
        above = figure.add_subplot(grid[3 * row], sharex=first)
        first = first if first is not None else above
        below = figure.add_subplot(grid[3 * row + 1], sharex=first)
        _draw_memory(above, report, colours, time, memory)
        _draw_lanes(below, stories[title], colours, time)
        above.set_title(_title(title, report), loc="left", fontsize=10)
        above.set_ylabel(f"device memory, {memory_unit}", fontsize=8)
        above.set_ylim(0, 1.12 * max(map(_ceiling, reports.values())) / memory)
        above.tick_params(labelbottom=False)
        below.tick_params(labelbottom=row + 1 == len(reports))
    below.set_xlabel(f"{time_unit} after the call began", fontsize=8)
    first.set_xlim(0, 1.005 * max(story.end_s for story in stories.values()) / time)
    names = dict.fromkeys(name for story in stories.values() for name in story.components)
    handles = [Patch(color=colours[name], label=name) for name in names]
    if any(story.beside for story in stories.values()):
        handles.append(Patch(color=BESIDE_COLOUR, label=BESIDE))
    if any(story.waits for story in stories.values()):
        handles.append(Patch(color=WAIT_COLOUR, label=WAITING))
    figure.legend(
        handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8
    )
    figure.savefig(
        os.fspath(path), format="png", metadata={"Software": None}, pil_kwargs={"optimize": True}
    )


def _title(title: str, report: Report) -> str:
    call, parts = report.call, [title] if title else [report.call.pipeline]
    if call.seconds is not None:
        parts.append(seconds(call.seconds))
    if call.peak_nbytes is not None:
        parts.append(f"peak {format_bytes(call.peak_nbytes)}")
    parts.append(f"{format_bytes(report.total.h2d_nbytes)} to the device")
    return "   ·   ".join(parts)


def _ceiling(report: Report) -> float:
    """The most memory that the picture has to have room for."""
    sums = [sum(level.nbytes.values()) for level in report.story.levels]
    return max(report.call.budget or 0, report.call.peak_nbytes or 0, *sums, 1)


def _draw_memory(
    axes: Axes, report: Report, colours: Mapping[str, str], time: float, memory: float
) -> None:
    story = report.story
    stack = story.stack
    axes.stackplot(
        [at / time for at in stack.at_s],
        *[[nbytes / memory for nbytes in heights] for heights in (*stack.nbytes, stack.beside)],
        colors=[*(colours[name] for name in story.components), BESIDE_COLOUR],
        step="post",
        linewidth=0,
    )
    if report.call.budget is not None:
        budget = report.call.budget / memory
        axes.axhline(budget, color=BUDGET_COLOUR, linewidth=1.2, linestyle=(0, (5, 2)))
        axes.annotate(
            f"budget {format_bytes(report.call.budget)}",
            (1, budget),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            color=BUDGET_COLOUR,
            fontsize=8,
        )
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    axes.set_axisbelow(False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_lanes(axes: Axes, story: Story, colours: Mapping[str, str], time: float) -> None:
    solid: dict[str, Any] = {"linewidth": 0, "antialiased": False}  # no seams between two
    for lane, bars in enumerate((story.compute, story.h2d, story.d2h)):
        for name in dict.fromkeys(bar.component for bar in bars):
            mine = [bar for bar in bars if bar.component == name]
            axes.broken_barh(_spans(mine, time), (lane - 0.4, 0.8), color=colours[name], **solid)
    waits = _spans(list(story.waits), time)
    axes.broken_barh(waits, (-0.4, 0.8), color=WAIT_COLOUR, **solid)
    axes.set_yticks(range(len(_LANES)), _LANES, fontsize=8)
    axes.set_ylim(len(_LANES) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _spans(bars: Sequence[Bar], time: float) -> list[tuple[float, float]]:
    return [(bar.begin_s / time, (bar.end_s - bar.begin_s) / time) for bar in bars]


def _unit_of_time(longest_s: float) -> tuple[float, str]:
    return (1.0, "seconds") if longest_s >= 2 else (1e-3, "milliseconds")


def _unit_of_memory(most_nbytes: float) -> tuple[float, str]:
    return (2**30, "GiB") if most_nbytes >= 2 * 2**30 else (2**20, "MiB")
