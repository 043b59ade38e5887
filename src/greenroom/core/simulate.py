"""What a plan takes: seconds, bytes, the peak, and the least that any plan could take.

The model: one stream of compute and one of copies to the device. A copy starts when the link is
free and all steps before the one that asked for it are over, whose memory it may reuse. A step
starts when the one before it is over and what it needs has arrived.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .director import Director
    from .plan import Plan


@dataclass(frozen=True)
class Costs:
    """What moving takes: bytes per second to the device, and seconds for each copy."""

    h2d_bytes_per_s: float
    copy_s: float = 10e-6


@dataclass(frozen=True)
class Timeline:
    """A call as it is expected to go. `ends`: when each step is over, in seconds."""

    ends: tuple[float, ...]
    compute_s: float
    stalled_s: float
    h2d_nbytes: int
    peak_nbytes: int

    @property
    def seconds(self) -> float:
        """The whole call."""
        return self.ends[-1] if self.ends else 0.0


def simulate(plan: Plan, costs: Costs, *, calls: int = 1) -> Timeline:
    """Run a plan against the clock, the last of some calls in a row, from an empty device."""
    from .director import Director  # the very rules that the engine follows

    director = Director(plan)
    for _ in range(calls):
        timeline = _call(director, costs)
    return timeline


def _call(director: Director, costs: Costs) -> Timeline:
    plan = director.plan
    director.begin_call()
    done = link = compute = stalled = 0.0
    ready: dict[str, float] = {}
    moved = peak = 0
    ends = []
    for step in plan.steps:
        orders = director.begin(step)
        for name in orders.onload:
            link = max(link, done) + costs.copy_s + plan.sizes[name] / costs.h2d_bytes_per_s
            ready[name] = link
            moved += plan.sizes[name]
        peak = max(peak, director.resident_nbytes + (step.beside_nbytes or 0))
        start = max([done, *(ready.get(name, 0.0) for name in step.needs)])
        stalled += start - done
        compute += step.seconds or 0.0
        done = start + (step.seconds or 0.0)
        ends.append(done)
    for name in director.end_call().onload:
        moved += plan.sizes[name]
    return Timeline(tuple(ends), compute, stalled, moved, peak)
