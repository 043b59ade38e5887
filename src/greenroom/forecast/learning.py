"""How a first call is expected to go: its plan is made of guesses, and made anew as it is measured.

What `WithinBudget` does in a call that it has not seen the like of, against a clock: the sequence
is all that is known, until the first stay in each component was measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..core.director import Director, Orders
from ..core.expect import rest_of_call
from ..core.plan import Plan, make_plan
from ..core.trace import Step, visits
from ..grant import ACTIVATION_PARTS
from .recording import Card, Cut


@dataclass(frozen=True)
class FirstForecast:
    """Seconds, bytes that go to the device, and the most that is in use at once."""

    seconds: float
    h2d_nbytes: int
    peak_nbytes: int


def first_call(cut: Cut, budget: int, card: Card) -> FirstForecast:
    """The first call within so many usable bytes."""
    costs, clock = card.costs, _Clock(card, cut.sizes)
    some = budget // ACTIVATION_PARTS

    def guess(steps: Sequence[Step]) -> Plan:
        return make_plan(steps, cut.sizes, budget, costs, unmeasured_nbytes=some)

    plan = guess(cut.expected or cut.steps)
    director = Director(plan)
    director.begin_call()
    position = most_beside = 0
    for stay, is_first in _stays(cut.steps):
        for step in stay:
            clock.step(director, step)
            beside = step.beside_nbytes or 0
            if is_first and director.room + beside > budget:
                clock.offload(director.press(max(0, budget - beside - some), set(step.needs)))
        position += len(stay)
        if is_first and position < len(cut.steps):
            begin = position - len(stay)
            rest = rest_of_call(cut.steps[:position], begin, cut.expected, frozenset())
            plan = guess([*cut.steps[:position], *rest])
            director.follow(plan, at=position - 1)
            clock.wait_for_device()  # to read its times
        most_beside = max(step.beside_nbytes or 0 for step in stay)
    director.follow(plan, at=director.position)
    clock.send_while_busy(director.look_ahead(budget - most_beside))
    return FirstForecast(clock.done, clock.moved, clock.peak)


def _stays(steps: Sequence[Step]) -> Iterator[tuple[Sequence[Step], bool]]:
    """Each stay in a component, and whether it is the first one there, and ends with a forward."""
    seen: set[str] = set()
    for span in visits(steps):
        part = steps[span.start].part
        yield steps[span.start : span.stop], part not in seen and steps[span.start].opens
        seen.add(part)


class _Clock:
    """Device, link and host in a call; see `core.simulate`, which knows the whole plan."""

    def __init__(self, card: Card, sizes: Mapping[str, int]) -> None:
        self._card, self._costs, self._sizes = card, card.costs, sizes
        self.done = self._host = self._link = 0.0
        self.moved = self.peak = 0
        self._ready: dict[str, float] = {}
        self._used: dict[str, float] = {}

    def wait_for_device(self) -> None:
        """The host goes on when the device has done all that it was given."""
        self._host = self.done + self._costs.pause_s

    def offload(self, orders: Orders) -> None:
        """Something leaves while a step runs: the host waits until it has been used."""
        self._host = max([self._host, *(self._used.get(name, 0.0) for name in orders.offload)])

    def send_while_busy(self, names: Sequence[str]) -> None:
        """The call is over for the host: so much of this goes as the device has work for."""
        for name in names:
            if max(self._link, self._host) >= self.done:
                return
            self._send(name)

    def _send(self, name: str) -> None:
        self._link = max(self._link, self._host) + self._costs.copy_s
        self._link += self._sizes[name] / self._costs.h2d_bytes_per_s
        self._ready[name] = self._link
        self.moved += self._sizes[name]

    def step(self, director: Director, step: Step) -> None:
        """A step begins, and is over."""
        orders = director.begin(replace(step, seconds=None, beside_nbytes=None))
        over = [self._used.get(name, 0.0) for name in orders.offload]
        if orders.settles:
            over.append(self.done)
        self._host = max([self._host, *over])
        looked_at = [self._sizes[name] for name in orders.release]
        for name in orders.onload:
            if name not in self._ready:
                looked_at.append(self._sizes[name])
            self._send(name)
        self.peak = max(self.peak, director.resident_nbytes + (step.beside_nbytes or 0))
        pause = self._costs.pause_s if over else 0.0
        arrived = max((self._ready.get(name, 0.0) for name in step.needs), default=0.0)
        begin = max(self.done, max(over, default=0.0) + pause, self._host, arrived)
        checks = sum(map(self._card.check_s, looked_at))
        self.done = begin + (step.seconds or 0.0) + checks
        self._used.update(dict.fromkeys(step.needs, self.done))
