"""What a plan takes: seconds, bytes, the peak, and the least that any plan could take.

The model: one stream of compute and one of copies to the device, and a host that is ahead of both.
A copy starts when the link is free and the host has asked for it; the host asks before a step, and
waits before it asks until the last step of what has to go is over. A step starts when the one
before it is over and what it needs has arrived.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .director import Director
    from .plan import Plan


@dataclass(frozen=True)
class Costs:
    """What moving takes: bytes per second to the device, and seconds for each copy.

    pause_s: from the end of a step to the begin of one that the host could not order before.
    check_bytes_per_s: how fast what leaves is looked at for changes, after its last step.
    """

    h2d_bytes_per_s: float
    copy_s: float = 10e-6
    pause_s: float = 150e-6
    check_bytes_per_s: float = math.inf


@dataclass(frozen=True)
class Timeline:
    """A call as it is expected to go.

    ends: when each step is over, in seconds.
    pressed: parts that had to go though the plan did not give them up, and the steps in which they
        were needed last; negative positions are of the call before.
    """

    ends: tuple[float, ...]
    compute_s: float
    stalled_s: float
    h2d_nbytes: int
    peak_nbytes: int
    pressed: tuple[tuple[int, str], ...] = ()

    @property
    def seconds(self) -> float:
        """The whole call."""
        return self.ends[-1] if self.ends else 0.0


def simulate(plan: Plan, costs: Costs, *, calls: int = 1) -> Timeline:
    """Run a plan against the clock, the last of some calls in a row, from an empty device."""
    return run(plan, costs, calls=calls)[-1]


def run(plan: Plan, costs: Costs, *, calls: int) -> list[Timeline]:
    """Run a plan against the clock, some calls in a row, from an empty device."""
    from .director import Director  # the very rules that the engine follows

    clock = _Clock(Director(plan), costs)
    return [clock.call() for _ in range(calls)]


class _Clock:
    """Device, link and host, from one call to the next."""

    def __init__(self, director: Director, costs: Costs) -> None:
        self._director = director
        self._costs = costs
        self._done = 0.0  # when the last step is over
        self._link = 0.0  # when the last copy is
        self._ready: dict[str, float] = {}
        self._moved = 0

    def _send(self, names: Iterable[str], host: float) -> None:
        sizes = self._director.plan.sizes
        for name in names:
            nbytes = sizes[name]
            self._link = max(self._link, host) + self._costs.copy_s
            self._link += nbytes / self._costs.h2d_bytes_per_s
            self._ready[name] = self._link
            self._moved += nbytes

    def call(self) -> Timeline:
        director, plan = self._director, self._director.plan
        director.begin_call()
        began = host = self._done
        compute = stalled = 0.0
        peak = self._moved = 0
        ends = []
        used: dict[str, float] = {}  # when the last step of each part is over
        for step in plan.steps:
            orders = director.begin(step)
            before = self._done
            over = [
                used.get(name, began) + plan.sizes[name] / self._costs.check_bytes_per_s
                for name in orders.offload
            ]
            host = max([host, *over])
            if orders.has_more_room:
                host = max(host, self._done)
            self._send(orders.onload, host)
            peak = max(peak, director.resident_nbytes + (step.beside_nbytes or 0))
            ordered = max(over) + self._costs.pause_s if over else 0.0
            start = max(before, ordered, *(self._ready.get(name, 0.0) for name in step.needs))
            stalled += start - before
            compute += step.seconds or 0.0
            self._done = start + (step.seconds or 0.0)
            for name in step.needs:
                used[name] = self._done
            ends.append(self._done - began)
        self._send(director.end_call().onload, self._done)
        pressed = tuple(director.pressed)
        return Timeline(tuple(ends), compute, stalled, self._moved, peak, pressed)
