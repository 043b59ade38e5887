"""What a plan takes: seconds, bytes, the peak, and the least that any plan could take.

The model: one stream of compute and one of copies to the device, and a host that is ahead of both.
A copy starts when the link is free and the host has asked for it; the host asks before a step, and
waits before it asks until the last step of what has to go is over. A step starts when the one
before it is over and what it needs has arrived.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
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


def run(
    plan: Plan,
    costs: Costs,
    *,
    calls: int,
    most_stalled_s: float = math.inf,
    worth: Sequence[int] | None = None,
) -> list[Timeline]:
    """Run a plan against the clock, some calls in a row, from an empty device.

    Where the device waits longer than `most_stalled_s` in all of them, nobody wants to know by how
    much: the call in which that shows is broken off, and the list ends before it.

    Where each step stands for more than one, `worth` says for how many: what the device waits for
    it, and what is sent before it, counts as often.
    """
    from .director import Director  # the very rules that the engine follows

    clock = _Clock(Director(plan), costs)
    found: list[Timeline] = []
    while len(found) < calls:
        timeline = clock.call(most_stalled_s, worth or itertools.repeat(1))
        if timeline is None:
            break
        most_stalled_s -= timeline.stalled_s
        found.append(timeline)
    return found


class _Clock:
    """Device, link and host, from one call to the next."""

    def __init__(self, director: Director, costs: Costs) -> None:
        self._director = director
        self._costs = costs
        self._done = 0.0  # when the last step is over
        self._link = 0.0  # when the last copy is
        self._ready: dict[str, float] = {}
        self._moved = 0

    def _send(self, names: Iterable[str], host: float) -> int:
        moved = 0
        sizes, costs, link = self._director.plan.sizes, self._costs, self._link
        for name in names:
            nbytes = sizes[name]
            link = (link if link > host else host) + costs.copy_s + nbytes / costs.h2d_bytes_per_s
            self._ready[name] = link
            moved += nbytes
        self._link = link
        return moved

    def call(self, most_stalled_s: float, worth: Iterable[int]) -> Timeline | None:
        from .director import NOTHING

        director, plan = self._director, self._director.plan
        director.begin_call()
        began = host = done = self._done
        compute = stalled = 0.0
        peak = self._moved = 0
        ends = []
        used: dict[str, float] = {}  # when the last step of each part is over
        ready, sizes, costs = self._ready, plan.sizes, self._costs
        # Thousands of times for each plan that is made.
        for step, many in zip(plan.steps, worth, strict=False):
            orders, needs, start = director.begin(step), step.needs, done
            if orders is not NOTHING:
                for name in orders.offload:
                    over = used.get(name, began) + sizes[name] / costs.check_bytes_per_s
                    if over > host:
                        host = over
                    if over + costs.pause_s > start:
                        start = over + costs.pause_s
                if orders.settles and done > host:
                    host = done
                if orders.onload:
                    self._moved += many * self._send(orders.onload, host)
            taken = director.resident_nbytes + (step.beside_nbytes or 0)
            if taken > peak:
                peak = taken
            for name in needs:
                arrives = ready.get(name, 0.0)
                if arrives > start:
                    start = arrives
            seconds = step.seconds or 0.0
            stalled += (start - done) * many
            if stalled > most_stalled_s:
                return None
            compute += seconds
            done = start + seconds
            for name in needs:
                used[name] = done
            ends.append(done - began)
        self._done = done
        self._moved += self._send(director.end_call().onload, self._done)
        pressed = tuple(director.pressed)
        return Timeline(tuple(ends), compute, stalled, self._moved, peak, pressed)
