"""The record of a call that is learned: what ran after what, how long, and the memory it took."""

from __future__ import annotations

import itertools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .core.trace import Step

if TYPE_CHECKING:
    from .core.director import Director
    from .core.plan import Plan
    from .device.backend import Backend


@dataclass
class _Entry:
    step: Step
    began: Any
    ended: Any = None
    beside_nbytes: int = 0

    def measured(self) -> Step:
        seconds = self.began.elapsed_time(self.ended) / 1e3
        return replace(self.step, seconds=seconds, beside_nbytes=self.beside_nbytes)


class Recording:
    """Steps as they run. Times are read from events of the device, memory from its allocator."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._entries: list[_Entry] = []
        self._is_interrupted = False

    def begin(self, step: Step) -> None:
        """A step begins; the one before it has been ended."""
        self._is_interrupted = False
        self._backend.restart_peak()
        self._entries.append(_Entry(step, self._backend.record_time()))

    def end(self, there_nbytes: int) -> int | None:
        """The last step ends; so many bytes were on the device that it did not work on.

        Returns:
            The most bytes it took besides, also since it ended if it has, as long as nothing
            interrupted; None if nobody can tell.
        """
        if not self._entries or (self._is_interrupted and self._entries[-1].ended is not None):
            return None
        self.look(there_nbytes)
        entry = self._entries[-1]
        if entry.ended is None:
            entry.ended = self._backend.record_time()
        return entry.beside_nbytes

    def interrupt(self) -> None:
        """Weights go home, or somebody else runs: what is in use then is no step's."""
        self._is_interrupted = True

    def look(self, there_nbytes: int) -> None:
        """Until now so many bytes were there that the last step does not work on; as `end`."""
        entry = self._entries[-1]
        beside = self._backend.restart_peak() - there_nbytes
        entry.beside_nbytes = max(entry.beside_nbytes, beside)

    @property
    def is_empty(self) -> bool:
        """Whether nothing ran, or what did has not been."""
        return not self._entries

    def opened(self, part: str) -> list[int]:
        """Where stays in a component begin, by its part that opens them."""
        return [i for i, e in enumerate(self._entries) if e.step.part == part and e.step.opens]

    def forget_stay(self, part: str) -> None:
        """The last stay in a component has not been."""
        del self._entries[(self.opened(part) or [len(self._entries)])[-1] :]

    def beside_of_stay(self, part: str) -> int:
        """The most that the last stay in a component took besides weights."""
        stay = self._entries[(self.opened(part) or [len(self._entries)])[-1] :]
        return max((entry.beside_nbytes for entry in stay), default=0)

    def beside_of_last(self) -> int:
        """The most that the last component took besides weights, since another one ran."""
        last = self._entries[-1].step.needs[0]
        stays = itertools.takewhile(lambda e: e.step.needs[0] == last, reversed(self._entries))
        return max(entry.beside_nbytes for entry in stays)

    def steps(self) -> list[Step]:
        """What was measured. Waits until the device has done it all, but for no copies."""
        if self._entries:
            self._entries[-1].ended.synchronize()
        return [entry.measured() for entry in self._entries]


class Timing:
    """How long each stay in a component takes in a call that goes by its plan.

    The first call of its kind also loads kernels and sets libraries up, which is in its steps'
    times. Here what they wait for is in them; so the less of both is nearer to what they compute.
    Only stays are timed: to read a time is not free, and there may be ten thousand steps.
    """

    def __init__(self, backend: Backend, key: Hashable, plan: Plan) -> None:
        """Of a call of this kind, which goes by this plan."""
        self.key = key
        self.plan = plan
        self._backend = backend
        self._points: list[tuple[int, Any]] = []  # position, and when it began
        self._is_over = False

    def begin(self, director: Director) -> None:
        """A stay begins; if another plan is followed by now, nothing is told."""
        if director.plan is self.plan:
            self._points.append((director.position, self._backend.record_time()))

    def end(self, director: Director) -> None:
        """The call is over, and went as planned."""
        if director.plan is self.plan and self._backend.keeps_time:
            self._points.append((len(self.plan.steps), self._backend.record_time()))
            self._is_over = True

    def steps(self) -> list[Step] | None:
        """The plan's steps with what is nearer to their times; None if they are not known yet."""
        if not self._is_over or not self._points[-1][1].query():
            return None
        steps = list(self.plan.steps)
        for (begin, began), (end, ended) in pairwise(self._points):
            expected = sum(step.seconds or 0.0 for step in steps[begin:end])
            taken = float(began.elapsed_time(ended)) / 1e3
            if begin < end and taken < expected:
                for i in range(begin, end):
                    seconds = (steps[i].seconds or 0.0) * taken / expected
                    steps[i] = replace(steps[i], seconds=seconds)
        return steps
