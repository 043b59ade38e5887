"""What is known of the calls that run within one budget: their plans, and what was too much."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .core.outlook import Planned
from .core.plan import Plan, make_plan
from .core.simulate import Costs
from .grant import SPARE_PARTS, refuse_if_exceeded
from .traces import Trace

if TYPE_CHECKING:
    from .recording import Timing
    from .traces import KeptTrace

logger = logging.getLogger("greenroom")

_USUAL_COSTS = Costs(20e9)  # PCIe 4.0 x16, until the link was measured
_MUCH_FASTER = 0.9  # of the seconds of a call; less is not worth another plan
_SAME = 0.95  # a plan for at least so much of what may be used is good enough


@dataclass(frozen=True)
class _Known:
    """A plan, and the sizes of all parts when calls that it is for begin.

    A component that is cast for its work has another size in the plan.
    """

    plan: Plan
    before: Mapping[str, int]


class KnownCalls:
    """Plans of calls by their key, which tells which calls are alike."""

    def __init__(
        self,
        h2d_bytes_per_s: Callable[[], float | None],
        unusable_nbytes: Callable[[int], int] = lambda budget: 0,
    ) -> None:
        """Of a link whose speed is measured as it is used; see `Backend.unusable_nbytes`."""
        self._measured = h2d_bytes_per_s
        self._unusable = unusable_nbytes
        self._kept_h2d_bytes_per_s: float | None = None
        self._plans: dict[Hashable, _Known] = {}
        self._to_be_timed: set[Hashable] = set()
        self._stale: set[Hashable] = set()  # what is kept of them has proved wrong
        # What was allocated when the device refused a call that was planned.
        self._limits: dict[Hashable, int] = {}

    def costs(self) -> Costs:
        """What moving takes, as far as is known."""
        measured = self._measured() or self._kept_h2d_bytes_per_s
        return _USUAL_COSTS if measured is None else Costs(measured)

    def usable(self, key: Hashable, budget: int) -> int:
        """How much of a budget such a call may use.

        Digests, and what differs from call to call, take a little that is in no plan.
        """
        usable = budget - budget // SPARE_PARTS - min(self._unusable(budget), budget // 8)
        return min(usable, self._limits.get(key, usable))

    def plan(
        self, key: Hashable, before: Mapping[str, int], budget: int, kept: KeptTrace | None
    ) -> Plan | None:
        """The plan for such a call, if its like was seen with the same weights.

        Raises:
            BudgetTooSmall: it is known to exceed the budget.
        """
        known, usable = self._plans.get(key), self.usable(key, budget)
        if known is None or known.before != before:
            # Else weights were cast, or came and went, since the plan was made.
            trace = None if kept is None or key in self._stale else kept.load()
            if trace is None or not trace.steps:
                return None
            self._kept_h2d_bytes_per_s = trace.h2d_bytes_per_s
            steps, sizes, planned_for = trace.steps, {**before, **trace.sizes}, -1
        else:
            plan = known.plan
            steps, sizes, planned_for = plan.steps, dict(plan.sizes), plan.budget
        # As measured: what a cast adds to a part's size is in what its step took besides.
        refuse_if_exceeded(steps, before, budget)
        if known is None or not _SAME * usable <= planned_for <= usable:
            known = _Known(make_plan(steps, sizes, usable, self.costs()), before)
            self._plans[key] = known
        return known.plan

    def planned(self, key: Hashable, budget: int, seen_h2d_bytes_per_s: float) -> Planned | None:
        """What is known of such calls.

        Args:
            key: of what kind.
            budget: what they are granted.
            seen_h2d_bytes_per_s: what the link was seen to do, in case it was never measured.
        """
        known = self._plans.get(key)
        if known is None:
            return None
        costs = self.costs()
        if self._measured() is None and seen_h2d_bytes_per_s > costs.h2d_bytes_per_s:
            costs = Costs(seen_h2d_bytes_per_s)
        return Planned(known.plan.steps, known.plan.sizes, self.usable(key, budget), costs)

    def learn(
        self, key: Hashable, plan: Plan, before: Mapping[str, int], kept: KeptTrace | None
    ) -> None:
        """Such a call was measured, and the next one is planned."""
        self._plans[key] = _Known(plan, before)
        self._to_be_timed.add(key)
        self._stale.discard(key)
        if kept is not None:
            kept.save(Trace(plan.steps, plan.sizes, self._measured()))

    def is_to_be_timed(self, key: Hashable) -> bool:
        """Whether such a call was measured once only, in its first call of all."""
        return key in self._to_be_timed

    def learn_times(self, timing: Timing, kept: KeptTrace | None) -> None:
        """A call was timed that went as planned: if it is faster than that, it is planned anew."""
        known, steps = self._plans.get(timing.key), timing.steps()
        if known is None or known.plan is not timing.plan or steps is None:
            return
        self._to_be_timed.discard(timing.key)
        before, now = (sum(step.seconds or 0.0 for step in s) for s in (known.plan.steps, steps))
        if now > before * _MUCH_FASTER:
            return
        logger.info("the steps take %.3f s, not %.3f: planned anew", now, before)
        plan = make_plan(steps, known.plan.sizes, known.plan.budget, self.costs())
        self._plans[timing.key] = _Known(plan, known.before)
        if kept is not None:
            kept.save(Trace(plan.steps, plan.sizes, self._measured()))

    def limit(self, key: Hashable, nbytes: int) -> None:
        """The device has refused such a call at so many bytes: it is planned anew, below them.

        If that happens again, what was measured of it is doubtful as well: it is learned anew.
        """
        logger.info("no room at %d bytes: calls like this one keep below it", nbytes)
        if key in self._limits:
            self.forget(key)
        self._limits[key] = max(0, nbytes)

    def forget(self, key: Hashable) -> None:
        """Such calls are learned anew, whatever is kept of them."""
        self._plans.pop(key, None)
        self._stale.add(key)

    def forget_calls_of(self, token: object) -> None:
        """A pipeline is no more: `token` is what the keys of its calls begin with."""
        for known in (self._plans, self._limits):
            for key in list(known):
                if isinstance(key, tuple) and key[0] is token:
                    known.pop(key, None)
        self._to_be_timed.intersection_update(self._plans)
        self._stale = {k for k in self._stale if not (isinstance(k, tuple) and k[0] is token)}
