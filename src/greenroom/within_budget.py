"""Runs pipelines within a budget: records steps, has them planned, and carries out the orders.

The first call with new arguments is recorded: what runs after what, how long the device computes
for it, and how much memory it takes besides weights. Times are read from events of the device.
After the first stay in each component the rest of the call is planned on the expectation that the
stay is repeated, as a denoising loop does; after the call, the next one like it is planned whole.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .core.director import Director, Orders
from .core.plan import Plan, make_plan
from .core.simulate import Costs
from .core.trace import Step

if TYPE_CHECKING:
    from .engine import Engine
    from .hooks import Part

logger = logging.getLogger("greenroom")

_EXPECTED_ROUNDS = 30
_USUAL_COSTS = Costs(20e9)  # PCIe 4.0 x16, until the link was measured


@dataclass
class _Record:
    step: Step
    began: Any
    ended: Any = None
    beside_nbytes: int = 0

    def measured(self) -> Step:
        seconds = self.began.elapsed_time(self.ended) / 1e3
        return replace(self.step, seconds=seconds, beside_nbytes=self.beside_nbytes)


class WithinBudget:
    """What a device's engine does when it was granted a budget."""

    def __init__(self, engine: Engine, budget: int) -> None:
        self.engine = engine
        self.budget = budget
        # Digests, and what differs from call to call, take a little that is in no plan.
        self._usable = budget - budget // 128
        self.director: Director | None = None
        self._plans: dict[Hashable, Plan] = {}
        self._key: Hashable = None
        self._prior: list[Step] = []
        self._inside: list[str] = []  # components whose forwards run: what lies beside their blocks
        self._now: Step | None = None
        self._is_watched = False
        self._stream: Any = None  # that calls run on, and on which memory is given back
        self._records: list[_Record] | None = None  # while a call is learned
        self._parts: weakref.WeakSet[Part] = weakref.WeakSet()

    def add(self, part: Part) -> None:
        """Know a part from now on."""
        self._parts.add(part)

    # ---- a call

    def begin_call(self, key: Hashable, prior: Sequence[Step], *, is_watched: bool = False) -> None:
        """A pipeline's call begins.

        Args:
            key: tells which calls are alike.
            prior: the order to expect if no call like it was ever seen.
            is_watched: whether somebody else's code runs between the components, which may look at
                weights, and change them.
        """
        self._is_watched = is_watched
        self._inside, self._now, self._key = [], None, key
        self._prior = list(prior)
        self._take_in_what_others_did()
        plan = self._plans.get(key)
        if plan is not None and any(
            self._sizes().get(name) != nbytes for name, nbytes in plan.sizes.items()
        ):
            plan = None  # weights were cast, or came and went, since it was made
        self._records = [] if plan is None else None
        if plan is None:
            plan = make_plan(self._prior, self._sizes(), self._usable, self._costs())
        if self.director is None:
            self.director = Director(plan, self._sizes)
        elif self.director.plan is not plan:
            self.director.follow(plan)
        self.director.begin_call()

    def _take_in_what_others_did(self) -> None:
        """Parts whose tensors were replaced since the last call, by a cast say, go home."""
        stream = self.engine.backend.current_stream()
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
            self.send_all_home()
            self._stream.wait_stream(stream)  # where the memory is given back to
        self._stream = stream
        for part in list(self._parts):
            if not part.store.is_as_it_came:
                self.send_home(part)

    def end_call(self) -> None:
        """The call is over; what the next one needs first may come."""
        director = self.director
        if director is None:
            return
        self._inside, self._now = [], None
        if self._records is not None:
            self._finish_record()
            steps = self._measured()
            self._records = None
            self.engine.backend.restore_peak()
            self._plans[self._key] = plan = make_plan(
                steps, self._sizes(), self._usable, self._costs()
            )
            logger.info("plan for the next call within %d bytes:\n%s", self.budget, plan)
            director.follow(plan, at=len(steps) - 1)
        elif director.deviations:
            del self._plans[self._key]  # to be learned anew
            return
        orders = director.end_call()
        self._carry_out(orders, ())
        self._show(orders.onload)

    def send_all_home(self) -> None:
        """Everything goes home, whoever may need it."""
        self._inside, self._now, self._records = [], None, None
        if self.director is not None:
            names = sorted(self.director.resident)
            self.director.gone(names)
            known = {part.key: part for part in self._parts}
            for name in names:
                if name in known:
                    known[name].go_home()

    def forget(self, key: str) -> None:
        """A part is no more."""
        if self.director is not None:
            self.director.gone([key])

    def send_home(self, part: Part) -> None:
        """A part goes home, whoever may need it."""
        self._now = None
        if part.key in self._inside:
            self._inside.remove(part.key)
        if self.director is not None and part.key in self.director.resident:
            self.director.gone([part.key])
            part.go_home()

    # ---- a step

    def need(self, part: Part, *, enters: bool) -> None:
        """A part is about to run."""
        beside = part.beside.key if part.beside is not None else None
        now = self._now
        if not enters and (
            part.key in self._inside
            or (now is not None and now.part == part.key and now.held == self._held(beside))
        ):
            return
        if enters:
            if part.key in self._inside:  # its last forward raised, and has not said that it left
                del self._inside[self._inside.index(part.key) :]
            self._inside.append(part.key)
        if part.has_entrances and now is not None and now.part == part.key:
            return  # through another of its doors, one after the other
        step = Step(part.key, self._held(beside), opens=enters)
        if self._records is not None:
            self._finish_record()
        if self.director is None:  # no pipeline's call, which would have an end: nothing is learned
            self.begin_call(None, [])
            self._records = None
            if enters:
                self._inside.append(part.key)
        assert self.director is not None
        orders = self.director.begin(step)
        self.engine.log.needs(
            part.key,
            step.needs,
            opens=enters,
            moves=bool(orders.offload or orders.onload),
            every=self._records is not None,
            beside_nbytes=self._expected_beside(),
        )
        self._carry_out(orders, step.needs)
        self.engine.log.runs()
        self._now = step
        if self._records is not None:
            self.engine.backend.restart_peak()
            self._records.append(_Record(step, self.engine.backend.record_time()))

    def left(self, part: Part) -> None:
        """A component's forward has returned: its weights are for others to see."""
        if part.key in self._inside:
            self._inside.remove(part.key)
        if part.has_entrances:
            return
        self._now = None
        for name in self._residents_of(part):
            self.engine.part(name).store.watch()
        if self._is_watched and self.director is not None:
            self._show(self.director.resident)
        if self._records is not None and not self._inside:
            self._expect_a_loop(part)

    def _show(self, names: Iterable[str]) -> None:
        """Let modules use what is on its way, and see what others change.

        Until it arrives a module uses its masters, and nothing tells of a change to those that no
        version counts.
        """
        for name in list(names):
            part = self.engine.part(name)
            part.arrive()
            part.store.watch()

    def _held(self, beside: str | None) -> tuple[str, ...]:
        if beside is None or beside in self._inside:
            return tuple(self._inside)
        return (*self._inside, beside)

    def _residents_of(self, part: Part) -> list[str]:
        resident = self.director.resident if self.director is not None else set()
        return [
            name for name in resident if name == part.key or self.engine.part(name).beside is part
        ]

    def _carry_out(self, orders: Orders, needs: tuple[str, ...]) -> None:
        for name in orders.offload:
            self.engine.part(name).go_home()
        unsent = list(orders.onload)
        try:
            while unsent:
                part = self.engine.part(unsent[0])
                part.store.settle_all()
                part.send()
                unsent.pop(0)
        finally:
            if unsent and self.director is not None:  # the device refused
                self.director.gone(unsent)
        for name in needs:
            self.engine.part(name).arrive()

    # ---- learning

    def _finish_record(self) -> None:
        if self._records and self._records[-1].ended is None:
            assert self.director is not None
            record = self._records[-1]
            record.ended = self.engine.backend.record_time()
            peak = self.engine.backend.restart_peak()
            record.beside_nbytes = max(0, peak - self.director.resident_nbytes)
            self.engine.log.took(record.beside_nbytes)

    def _expected_beside(self) -> int | None:
        """What the step that runs took besides weights when it was measured."""
        if self.director is None or not 0 <= self.director.position < len(self.director.plan.steps):
            return None
        return self.director.plan.steps[self.director.position].beside_nbytes

    def _measured(self) -> list[Step]:
        self.engine.backend.synchronize()
        return [record.measured() for record in self._records or ()]

    def _expect_a_loop(self, part: Part) -> None:
        """After the first stay in a component: expect many more, then what the prior says."""
        assert self._records is not None and self.director is not None
        opened = [
            i for i, r in enumerate(self._records) if r.step.part == part.key and r.step.opens
        ]
        if len(opened) != 1:
            return
        self._finish_record()
        done = self._measured()
        stay = done[opened[0] :]
        after = [i for i, step in enumerate(self._prior) if part.key in (step.part, *step.held)]
        rest = self._prior[after[-1] + 1 :] if after else []
        steps = [*done, *stay * _EXPECTED_ROUNDS, *rest]
        plan = make_plan(steps, self._sizes(), self._usable, self._costs())
        self.director.follow(plan, at=len(done) - 1)

    def _sizes(self) -> dict[str, int]:
        return {part.key: part.store.nbytes for part in self._parts}

    def _costs(self) -> Costs:
        measured = self.engine.backend.transfer.bytes_per_s()
        return _USUAL_COSTS if measured is None else Costs(measured)
