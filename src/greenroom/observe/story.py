"""What a call's events add up to over time: memory by component, and what each lane was busy with.

The picture and the timeline are drawn from this, and the report's peak is found in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from .events import Call, Offloaded, Onloaded, Ran

#: Weights of other pipelines on the same device.
OTHERS = "other pipelines"


@dataclass(frozen=True)
class Level:
    """Bytes of device memory from a moment on, by component."""

    at_s: float
    nbytes: dict[str, int]


@dataclass(frozen=True)
class Stack:
    """Device memory over time, of everything at the same moments.

    Attributes:
        at_s: the moments; each holds until the next.
        nbytes: of weights, for each component.
        beside: besides weights; 0 where it was not measured.
    """

    at_s: tuple[float, ...]
    nbytes: tuple[tuple[int, ...], ...]
    beside: tuple[int, ...]


@dataclass(frozen=True)
class Bar:
    """A lane was busy: with what, and for how long. Times are seconds after the call began."""

    component: str
    label: str
    begin_s: float
    end_s: float
    details: dict[str, int | str | float]


@dataclass(frozen=True)
class Story:
    """A call over time.

    Attributes:
        components: those that were on the device, in the order in which they came.
        levels: the weights' memory, each until the next.
        beside: (begin, end, bytes) of memory besides weights, where it was measured.
        compute: what was computed.
        waits: when the device waited for weights.
        h2d: copies to the device.
        d2h: copies home.
        end_s: when the last of all was over.
    """

    components: tuple[str, ...]
    levels: tuple[Level, ...]
    beside: tuple[tuple[float, float, int], ...]
    compute: tuple[Bar, ...]
    waits: tuple[Bar, ...]
    h2d: tuple[Bar, ...]
    d2h: tuple[Bar, ...]
    end_s: float

    @cached_property
    def stack(self) -> Stack:
        """All memory, one on the other."""
        levels, besides = self.levels, sorted(self.beside)
        moments = sorted(
            {level.at_s for level in levels}
            | {at for begin, end, _ in besides for at in (begin, end)}
            | {self.end_s}
        )
        weights, beside = [], []
        now = until = 0
        for at in moments:
            while now + 1 < len(levels) and levels[now + 1].at_s <= at:
                now += 1
            while until < len(besides) and besides[until][1] <= at:
                until += 1
            weights.append([levels[now].nbytes.get(name, 0) for name in self.components])
            is_measured = until < len(besides) and besides[until][0] <= at
            beside.append(besides[until][2] if is_measured else 0)
        return Stack(tuple(moments), tuple(zip(*weights, strict=True)), tuple(beside))


def story_of(call: Call, component_of: Callable[[str], str]) -> Story:
    """The call over time; `component_of` says whose a part is."""
    changes: list[tuple[float, str, int]] = []
    order: dict[str, None] = {}
    there = dict(call.resident)
    for part, nbytes in call.resident.items():
        order.setdefault(component_of(part))
        changes.append((0.0, component_of(part), nbytes))
    for event in call.events:
        if isinstance(event, Onloaded) and event.began_s is not None:
            order.setdefault(component_of(event.part))
            changes.append((event.began_s, component_of(event.part), event.nbytes))
            there[event.part] = event.nbytes
        elif isinstance(event, Offloaded) and event.ended_s is not None:
            changes.append((event.ended_s, component_of(event.part), -event.nbytes))
            there.pop(event.part, None)
    ends = [call.seconds or 0.0]
    for event in call.events:
        ends += [event.ended_s] if event.ended_s is not None else []
    return Story(
        tuple(order),
        _levels(changes, tuple(order)),
        tuple(
            (run.began_s, run.ended_s, run.beside_nbytes)
            for run in call.runs
            if run.beside_nbytes is not None and run.began_s is not None and run.ended_s is not None
        ),
        tuple(bar for run in call.runs for bar in _bars(run, component_of, "began_s", "ended_s")),
        tuple(bar for run in call.runs for bar in _bars(run, component_of, "asked_s", "began_s")),
        tuple(bar for move in call.onloads for bar in _copies(move, component_of)),
        tuple(
            bar
            for move in call.offloads
            if move.copied_nbytes
            for bar in _copies(move, component_of)
        ),
        max(ends),
    )


def _levels(changes: list[tuple[float, str, int]], names: tuple[str, ...]) -> tuple[Level, ...]:
    """What is there from each moment on. What goes at a moment makes room for what comes."""
    now = dict.fromkeys(names, 0)
    found: list[Level] = [Level(0.0, dict(now))]
    for at, name, nbytes in sorted(changes, key=lambda change: change[0]):
        now[name] += nbytes
        if found[-1].at_s == at:
            found.pop()
        found.append(Level(at, dict(now)))
    return tuple(found)


def _bars(run: Ran, component_of: Callable[[str], str], begin: str, end: str) -> list[Bar]:
    first, last = getattr(run, begin), getattr(run, end)
    if first is None or last is None or last <= first:
        return []
    details: dict[str, int | str | float] = {}
    if run.forwards:
        details["forwards"] = run.forwards
    if run.beside_nbytes is not None:
        details["bytes beside weights"] = run.beside_nbytes
    if run.demanded:
        details["sent only now"] = ", ".join(run.demanded)
    if run.found_ahead:
        details["sent ahead"] = ", ".join(run.found_ahead)
    return [Bar(component_of(run.part), run.part, first, last, details)]


def _copies(move: Onloaded | Offloaded, component_of: Callable[[str], str]) -> list[Bar]:
    if move.began_s is None or move.ended_s is None or move.ended_s <= move.began_s:
        return []
    details: dict[str, int | str | float] = {"why": move.cause}
    if isinstance(move, Onloaded):
        details |= {"bytes": move.nbytes, "of them page-locked": move.pinned_nbytes}
    else:
        details["bytes"] = move.copied_nbytes
    return [Bar(component_of(move.part), move.part, move.began_s, move.ended_s, details)]
