"""Timelines of a call: for Perfetto, and as a page that needs nothing but a browser."""

from __future__ import annotations

import importlib.resources
import json
import os
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .account import Report
from .story import Bar, Story
from .style import (
    BESIDE,
    BESIDE_COLOUR,
    BUDGET_COLOUR,
    WAIT_COLOUR,
    WAITING,
    colours_of,
)

_LANES = ("compute", "copies to the device", "copies home")


def write(reports: Mapping[str, Report], path: str | os.PathLike[str]) -> None:
    """Write reports' timelines: ``.json`` for Perfetto, ``.html`` as a page.

    Raises:
        UsageError: the file's ending is another one; nothing was written.
    """
    target = Path(path)
    if target.suffix not in (".json", ".html"):
        raise UsageError(f"a timeline is written as .json or .html, not as {target.name!r}")
    text = json.dumps(trace_of(reports)) if target.suffix == ".json" else page_of(reports)
    target.write_text(text, encoding="utf-8")


# ---- Perfetto


def trace_of(reports: Mapping[str, Report]) -> dict[str, Any]:
    """The reports in Chrome's trace format, which ui.perfetto.dev opens; times in microseconds.

    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU

    A process for each report, with a lane for what was computed and for copies either way, and a
    counter of bytes for each component.
    """
    events: list[dict[str, Any]] = []
    for pid, (title, report) in enumerate(reports.items(), 1):
        name = f"{title or report.call.pipeline} on {report.call.device}"
        events.append(_name("process_name", pid, 0, name))
        events += [_name("thread_name", pid, tid, lane) for tid, lane in enumerate(_LANES, 1)]
        story = report.story
        for tid, bars in enumerate(_bars(story), 1):
            for bar in bars:
                events.append(
                    {
                        "ph": "X",
                        "pid": pid,
                        "tid": tid,
                        "name": bar.label,
                        "cat": bar.component,
                        "ts": _us(bar.begin_s),
                        "dur": round(_us(bar.end_s) - _us(bar.begin_s), 3),
                        "args": {"component": bar.component, **bar.details},
                    }
                )
        names = [*story.components, BESIDE]
        for of, heights in zip(names, (*story.stack.nbytes, story.stack.beside), strict=True):
            before = None
            for at, nbytes in zip(story.stack.at_s, heights, strict=True):
                if nbytes != before:
                    events.append(_counter(pid, f"memory: {of}", at, nbytes))
                before = nbytes
        if report.call.budget is not None:
            for at in (0.0, story.end_s):
                events.append(_counter(pid, "memory: budget", at, report.call.budget))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _counter(pid: int, name: str, at: float, nbytes: int) -> dict[str, Any]:
    return {"ph": "C", "pid": pid, "name": name, "ts": _us(at), "args": {"bytes": nbytes}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _bars(story: Story) -> tuple[list[Bar], list[Bar], list[Bar]]:
    """What each lane was busy with, in order; waiting is in the lane of what waits."""
    waits = [Bar(WAITING, f"{bar.label} waits", *_rest(bar)) for bar in story.waits]
    compute = sorted([*story.compute, *waits], key=lambda bar: bar.begin_s)
    return compute, list(story.h2d), list(story.d2h)


def _rest(bar: Bar) -> tuple[float, float, dict[str, int | str | float]]:
    return bar.begin_s, bar.end_s, bar.details


# ---- the page


def page_of(reports: Mapping[str, Report]) -> str:
    """A page of its own, with zoom, pan and hover; it asks no server for anything."""
    template = importlib.resources.files(__package__).joinpath("timeline.html")
    colours = colours_of([report.story for report in reports.values()])
    colours |= {BESIDE: BESIDE_COLOUR, WAITING: WAIT_COLOUR, "budget": BUDGET_COLOUR}
    data = {
        "colours": colours,
        "panels": [_panel(title, report) for title, report in reports.items()],
    }
    # A "</script>" in a name would end the script.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    heading = " and ".join(dict.fromkeys(r.call.pipeline or "components" for r in reports.values()))
    page = template.read_text(encoding="utf-8")
    return page.replace("GREENROOM_TITLE", escape(heading)).replace("GREENROOM_DATA", text)


def _panel(title: str, report: Report) -> dict[str, Any]:
    story, call = report.story, report.call
    return {
        "title": title or call.pipeline or "outside of calls",
        "device": call.device,
        "budget": call.budget,
        "peak": call.peak_nbytes,
        "end": _us(story.end_s),
        "names": [*story.components, BESIDE],
        "at": [_us(at) for at in story.stack.at_s],
        "nbytes": [*story.stack.nbytes, story.stack.beside],
        "lanes": [
            {
                "name": lane,
                "bars": [
                    [bar.component, bar.label, _us(bar.begin_s), _us(bar.end_s), bar.details]
                    for bar in bars
                ],
            }
            for lane, bars in zip(_LANES, _bars(story), strict=True)
        ],
        "report": str(report),
    }
