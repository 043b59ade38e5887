"""What a recorded call is expected to take within one budget. Pure: no device, no clock.

Note [Looking for changes]: a part's bytes are read once when it first arrives in a call, and once
each time it is given up, to tell whether anybody has changed them. That work is the device's, so it
is added to the steps that it is done beside. The host learns what came of it before it sends
another part into that place, and so may be late with what comes next, if the steps since the part's
last use were short.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..core.bound import Start, lower_bound
from ..core.director import Director
from ..core.plan import Plan, make_plan
from ..core.simulate import Timeline, run
from ..core.trace import Step
from .learning import first_call
from .recording import Card, Cut, Recording, usable

_CALLS = 3  # in a row: the third begins as all later ones do
_NEGLIGIBLE = 0.01  # of a call


@dataclass(frozen=True)
class Share:
    """One component's part in a later call.

    Attributes:
        name: as the pipeline calls it.
        nbytes: of its weights.
        stays_nbytes: of them, never leave the device.
        h2d_nbytes: go to the device in each call, those that go several times counted as often.
        forwards: in a call.
        compute_s: seconds at work.
        beside_nbytes: device memory besides weights while it works, at most.
    """

    name: str
    nbytes: int
    stays_nbytes: int
    h2d_nbytes: int
    forwards: int
    compute_s: float
    beside_nbytes: int


@dataclass(frozen=True)
class Within:
    """A call within one budget.

    Attributes:
        budget: bytes of device memory, activations included.
        fits: whether it runs within it.
        needs_nbytes: the peak, which exceeds what is planned with if it does not fit.
        later_s: seconds of each call after it.
        compute_s: of a later call, seconds that the device works.
        stalled_s: of a later call, seconds that it waits for weights.
        h2d_nbytes: of a later call, bytes that go to the device.
        copying_s: of a later call, seconds that the link is busy.
        bound_s: the least that any plan could take for a later call.
        shares: by component.
        first_s, first_h2d_nbytes: of a first call, from an empty device, in which the plan is still
            learned; None where that was not computed.
    """

    budget: int
    fits: bool
    needs_nbytes: int
    later_s: float
    compute_s: float
    stalled_s: float
    h2d_nbytes: int
    copying_s: float
    bound_s: float
    shares: tuple[Share, ...]
    first_s: float | None = None
    first_h2d_nbytes: int | None = None

    @property
    def efficiency(self) -> float:
        """The bound over the prediction: 1 is the best there is."""
        return min(1.0, self.bound_s / self.later_s) if self.later_s > 0 else 1.0

    @property
    def bound_by(self) -> str:
        """What a later call's time goes by: "compute", or "link"."""
        if self.stalled_s <= _NEGLIGIBLE * self.later_s:
            return "compute"
        return "link"


def within(recording: Recording, budget: int) -> Within:
    """What the recorded call takes within this budget."""
    cut, card = recording.cut_for(budget), recording.card
    plan = make_plan(cut.steps, cut.sizes, usable(budget), card.costs)
    walked = _walk(plan, card)
    later = _timeline(plan, walked, card)
    bound = lower_bound(
        cut.steps,
        cut.sizes,
        usable(budget),
        dataclasses.replace(card.costs, copy_s=0.0),
        Start.IN_A_ROW,
    )
    return Within(
        budget,
        later.peak_nbytes <= usable(budget),
        later.peak_nbytes,
        later.seconds + cut.outside_s,
        later.compute_s + cut.outside_s,
        later.stalled_s,
        later.h2d_nbytes,
        later.h2d_nbytes / card.link_bytes_per_s,
        min(bound.seconds, later.seconds) + cut.outside_s,
        _shares(cut, walked.sent),
    )


def with_first_call(recording: Recording, found: Within) -> Within:
    """The same, and what a first call takes, which is several plans' work to tell."""
    cut = recording.cut_for(found.budget)
    first = first_call(cut, usable(found.budget), recording.card)
    return dataclasses.replace(
        found, first_s=first.seconds + cut.outside_s, first_h2d_nbytes=first.h2d_nbytes
    )


def _timeline(plan: Plan, beside: _Beside, card: Card) -> Timeline:
    """The last of some calls, with all that is beside its steps."""
    steps = tuple(
        dataclasses.replace(
            step,
            seconds=(step.seconds or 0.0) + beside.checks.get(i, 0.0) + beside.pauses.get(i, 0.0),
        )
        for i, step in enumerate(plan.steps)
    )
    found = run(dataclasses.replace(plan, steps=steps), card.costs, calls=_CALLS)[-1]
    paused = sum(beside.pauses.values())
    return dataclasses.replace(
        found, compute_s=found.compute_s - paused, stalled_s=found.stalled_s + paused
    )


@dataclass(frozen=True)
class _Beside:
    """Of a call, by position: seconds of looking for changes, and of waiting for the host."""

    checks: Mapping[int, float]
    pauses: Mapping[int, float]
    sent: Counter[str]  # bytes that go to the device for each part


def _walk(plan: Plan, card: Card) -> _Beside:
    """Follow the plan for some calls, and tell of the last."""
    director = Director(plan)
    return [_call(director, card) for _ in range(_CALLS)][-1]


def _call(director: Director, card: Card) -> _Beside:
    plan = director.plan
    checks: dict[int, float] = {}
    pauses: dict[int, float] = {}
    sent: Counter[str] = Counter()
    over: dict[str, float] = {}  # when each part's last step was
    now = 0.0
    director.begin_call()
    for i, step in enumerate(plan.steps):
        orders = director.begin(step)
        nbytes = [plan.sizes[name] for name in orders.release]
        nbytes += [plan.sizes[name] for name in orders.onload if name not in sent]
        if nbytes:
            checks[i] = sum(map(card.check_s, nbytes))
        sent.update({name: plan.sizes[name] for name in orders.onload})
        since = now - max((over.get(name, 0.0) for name in orders.offload), default=0.0)
        if orders.offload and 0 < since < card.costs.pause_s:  # 0: in the timeline already
            pauses[i] = card.costs.pause_s - since
        now += (step.seconds or 0.0) + pauses.get(i, 0.0)
        over.update(dict.fromkeys(step.needs, now))
    sent.update({name: plan.sizes[name] for name in director.end_call().onload})
    return _Beside(checks, pauses, sent)


def _shares(cut: Cut, sent: Mapping[str, int]) -> tuple[Share, ...]:
    names = dict.fromkeys(component_of(name) for step in cut.steps for name in step.needs)
    used = {name for step in cut.steps for name in step.needs}
    found = []
    for component in names:
        parts = [name for name in used if component_of(name) == component]
        mine = [step for step in cut.steps if component_of(step.part) == component]
        found.append(
            Share(
                component,
                sum(cut.sizes[name] - cut.cast.get(name, 0) for name in parts),
                sum(cut.sizes[name] for name in parts if name not in sent),
                sum(sent.get(name, 0) for name in parts),
                _forwards(mine),
                sum(step.seconds or 0.0 for step in mine),
                max((step.beside_nbytes or 0 for step in mine), default=0),
            )
        )
    return tuple(found)


def _forwards(steps: list[Step]) -> int:
    return sum(step.opens for step in steps)


def component_of(part: str) -> str:
    """The component that a part is of: "unet" of "unet.down_blocks.0"."""
    return part.partition(".")[0]
