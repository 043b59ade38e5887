"""What greenroom did: reports, pictures of memory, timelines.

>>> print(greenroom.report(pipe))
>>> greenroom.observe.write_picture(pipe, "memory.png")
>>> greenroom.observe.write_timeline(pipe, "timeline.html")

All of it is read from the engine's log of the last few calls; nothing has to be turned on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .account import PartFacts, Report, make_report
from .events import Call
from .mapped import nbytes_in, ranges_now

__all__ = ["Report", "report", "write_picture", "write_timeline"]


def report(pipe: Any, call: int = -1) -> Report:
    """What the pipeline's last call cost: seconds, bytes and memory, by component.

    >>> print(greenroom.report(pipe))

    It waits until the device has done all its work.

    Args:
        pipe: one that is offloaded by greenroom.
        call: -1 for the last call, -2 for the one before; the last four of a device are kept.

    Raises:
        UsageError: the pipeline is not offloaded, or there was no such call.
    """
    from ..components import components_of, unique
    from ..errors import UsageError
    from ..pipeline import hook_of, state_of

    state = state_of(pipe)
    if state is None:
        raise UsageError(
            f"this {type(pipe).__name__} is not offloaded by greenroom, so there is nothing to "
            "report: greenroom.enable_model_cpu_offload(pipe) first"
        )
    with state.engine.lock:
        parts: dict[str, PartFacts] = {}
        ranges = ranges_now()
        for name, module in unique(components_of(pipe), state.order.names).items():
            hook = hook_of(module)
            for part in hook.parts if hook is not None else ():
                store = part.store
                loose = [s for s in store.segments if s.unpin is None and s.slab is None]
                mapped = nbytes_in(
                    ranges, ((p.host.data_ptr(), p.nbytes) for s in loose for p in s.pieces)
                )
                parts[part.key] = PartFacts(name, store.nbytes, store.pinned_nbytes, mapped)
        found = state.engine.log.read(state, parts, call)
        planned = None
        if state.within is not None and found is not None and found.budget is not None:
            kind = state.engine.log.kind_of(state, parts, call)
            planned = state.within.known.planned(kind, found.budget, _fastest_copy(found))
    if found is None:
        raise UsageError(
            f"the log has no call {call} of this {type(pipe).__name__}: it keeps the last four of "
            f"{state.engine.device}"
        )
    return make_report(found, parts, planned)


def _fastest_copy(call: Call) -> float:
    """The most bytes per second that a copy to the device was seen to go at."""
    return max(
        (
            up.nbytes / (up.ended_s - up.began_s)
            for up in call.onloads
            if up.began_s is not None and up.ended_s is not None and up.ended_s > up.began_s
        ),
        default=0.0,
    )


def write_picture(what: Any | Report | Mapping[str, Report], path: str | os.PathLike[str]) -> None:
    """Draw a call's device memory by component over time, with copies and compute under it.

    >>> greenroom.observe.write_picture(pipe, "memory.png")
    >>> greenroom.observe.write_picture({"before": one, "after": other}, "both.png")

    Args:
        what: a pipeline, whose last call is drawn; a report; or reports by title, which are drawn
            one above the other on the same scales.
        path: the PNG file.

    Raises:
        UsageError: as `report`.
        OSError: the file cannot be written.
    """
    from .picture import draw

    draw(_reports(what), path)


def write_timeline(what: Any | Report | Mapping[str, Report], path: str | os.PathLike[str]) -> None:
    """Write a call's timeline: what was computed and copied when, and the memory in use.

    >>> greenroom.observe.write_timeline(pipe, "timeline.html")  # a page; needs no network
    >>> greenroom.observe.write_timeline(pipe, "timeline.json")  # for ui.perfetto.dev

    Args:
        what: as for `write_picture`.
        path: a file that ends in ``.html`` or ``.json``.

    Raises:
        UsageError: as `report`; or the file has another ending.
        OSError: the file cannot be written.
    """
    from .timeline import write

    write(_reports(what), path)


def _reports(what: Any) -> Mapping[str, Report]:
    if isinstance(what, Report):
        return {"": what}
    if isinstance(what, Mapping) and what and all(isinstance(r, Report) for r in what.values()):
        return what
    return {"": report(what)}
