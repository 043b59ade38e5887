"""What calls like one could take at best, and what a larger budget would gain. Pure simulation.

    known = Planned(steps, sizes, usable_nbytes, costs)
    known.bound_s(Start.EMPTY)
    known.outlook.bound_by, known.outlook.enough_nbytes

Parts are as they are divided now; a larger budget may divide components more coarsely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .bound import Start, lower_bound
from .plan import make_plan
from .simulate import Costs, Timeline, run
from .trace import Step, sizes_of

_CALLS = 3  # in a row: the third begins as all later ones do
_NEAR = 0.01  # of a call
_WORTH = 2 * _NEAR  # below that there is no point in a search
_TRIES = 5  # plans that are made to find a budget: to a thirty-second of what is missing


@dataclass(frozen=True)
class Outlook:
    """What the plan of later calls takes, and what more memory would do.

    Attributes:
        later_s: seconds of a later call, as it is planned.
        stalled_s: of them, the device waits for weights.
        enough_nbytes: the smallest budget found whose planned call takes at most a hundredth longer
            than it computes; this one if there is less than two hundredths to gain.
        gain: the share of `later_s` that such a budget would save.
    """

    later_s: float
    stalled_s: float
    enough_nbytes: int
    gain: float

    @property
    def bound_by(self) -> str:
        """What a later call's time goes by: "compute", or "link"."""
        return "compute" if self.stalled_s <= _NEAR * self.later_s else "link"


@dataclass(frozen=True)
class Planned:
    """What calls of one kind take, as one was measured.

    sizes: the parts' bytes. usable_nbytes: what such a call may use.
    """

    steps: tuple[Step, ...]
    sizes: Mapping[str, int]
    usable_nbytes: int
    costs: Costs

    def within(self, compute_s: float) -> Planned:
        """The same with steps that take no longer than a call of them was seen to compute.

        They were measured while weights came and host memory was locked, which may hold a step up.
        """
        measured = sum(step.seconds or 0.0 for step in self.steps)
        if measured <= compute_s:
            return self
        steps = (replace(s, seconds=(s.seconds or 0.0) * compute_s / measured) for s in self.steps)
        return replace(self, steps=tuple(steps))

    def bound_s(self, start: Start) -> float:
        """The least seconds that any order of copies could take, see `lower_bound`."""
        return lower_bound(self.steps, self.sizes, self.usable_nbytes, self.costs, start).seconds

    @cached_property
    def outlook(self) -> Outlook:
        """What more memory would gain: some plans' work to tell."""
        now = self._later(self.usable_nbytes)
        best, enough = now, self.usable_nbytes
        if now.stalled_s > _WORTH * now.seconds:
            beside = max((step.beside_nbytes or 0 for step in self.steps), default=0)
            enough = max(enough, sizes_of(self.steps, self.sizes) + beside)
            best, enough = self._smallest(self.usable_nbytes, enough)
        return Outlook(now.seconds, now.stalled_s, enough, max(0.0, 1 - best.seconds / now.seconds))

    def _smallest(self, too_few: int, enough: int) -> tuple[Timeline, int]:
        """Of the budgets in between, one in which a call is nearly as fast as it computes."""
        best = self._later(enough)
        for _ in range(_TRIES):
            half = (too_few + enough) // 2
            found = self._later(half)
            if _is_near(found):
                best, enough = found, half
            else:
                too_few = half
        return best, enough

    def _later(self, usable_nbytes: int) -> Timeline:
        plan = make_plan(self.steps, self.sizes, usable_nbytes, self.costs)
        return run(plan, self.costs, calls=_CALLS)[-1]


def start_of(resident: Mapping[str, int], needed: Sequence[str], *, is_first: bool) -> Start:
    """What a call began with, as a bound takes it.

    Args:
        resident: bytes on the device when it began, by part.
        needed: the call's parts.
        is_first: whether no call like it went before, so that what is there is there by chance.
    """
    if not any(resident.get(name) for name in needed):
        return Start.EMPTY
    return Start.RESTED if is_first else Start.IN_A_ROW


def _is_near(call: Timeline) -> bool:
    return call.seconds <= (1 + _NEAR) * call.compute_s
