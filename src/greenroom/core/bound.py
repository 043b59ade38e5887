"""The least time and the fewest bytes that any plan could take within a budget.

    bound = lower_bound(steps, sizes, budget, costs, Start.EMPTY)
    bound.seconds / measured_seconds  # the efficiency of a first call

How it works
------------
Weights are taken as bytes that move one by one. Then the best replacement is known: when room is
wanted, give up the bytes whose next use is furthest away (Belady, IBM Systems Journal 5(2), 1966).
It moves the fewest bytes not only for the call as a whole but up to every single step of it, and
so says when a step can begin at the earliest. With D(a, j) the fewest bytes that move between the
end of step a and the beginning of step j, whatever is on the device at a; C(j, p) the seconds of
the steps j to p - 1; and B the bytes per second of the link:

    begin(p) >= end(a) + max over j in a+1..p of (D(a, j) / B + C(j, p))

Proof: when a is over, what is there fits in beside what a works on, and D(a, j) counts from the
best that this can be. So those bytes pass the link after the end of a and before j begins, and the
steps from j to p - 1 run after that, one by one. Stretches that follow on each other add up, as one
ends where the next begins: any steps a may be chosen, and each choice gives a bound.

The bound is the longest chain of such stretches through the call, by way of the steps where its
phases begin and end, and of one long step of every round of a loop. One stretch over the whole
call is the familiar max(sum of C, bytes / B) + first fill; the chain also sees that what is copied
in one phase does not hide under the compute of another one, beyond what fits on the device in
between; and that in a loop what is copied while a long step is at work has to fit in beside it, so
that the link waits once that is there, and the device for what comes after it.

A step holds what it needs, and the most that it works on, until it is over. What a copy takes
besides its bytes is left out, and so is that weights move in parts: the best run may be slower.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from heapq import heapify, heappop, heappush

from .simulate import Costs
from .trace import Phase, Step, phases

_MOST_ANCHORS = 20
_MOST_LONG = 4  # steps of a round
_MOST_STEPS = 60_000  # that are walked through until calls in a row repeat themselves


class Start(Enum):
    """What may be on the device when a call begins."""

    EMPTY = "empty"  # nothing: a first call
    IN_A_ROW = "in a row"  # what the call before left, the same one, which has ended just now
    RESTED = "rested"  # whatever serves best: there was time between the calls


@dataclass(frozen=True)
class Bound:
    """What no plan does better.

    seconds: of the call; the mean if calls in a row differ.
    compute_s: the sum over its steps.
    h2d_nbytes: bytes that have to go to the device; the mean if calls in a row differ.
    first_fill_s: what the first step waits for, which nothing can hide.
    """

    seconds: float
    compute_s: float
    h2d_nbytes: int
    first_fill_s: float


def lower_bound(
    steps: Sequence[Step],
    sizes: Mapping[str, int],
    budget: int,
    costs: Costs,
    start: Start = Start.IN_A_ROW,
) -> Bound:
    """The bound for a call of these steps within `budget` bytes, activations included.

    A step that was never measured counts as taking no time, and no memory besides its weights.
    """
    if not steps:
        return Bound(0.0, 0.0, 0, 0.0)
    trace, rate = _Trace(steps, sizes, budget), costs.h2d_bytes_per_s
    compute_s = sum(trace.seconds)
    reach = {a: trace.reach(a, rate, many) for a, many in _anchors(steps, trace, rate).items()}
    if start is Start.IN_A_ROW:
        nbytes = trace.moved_in_a_row()
        # From a step to the same one of the next call it is a whole call.
        whole = [a for a, earliest in reach.items() if len(earliest) > len(steps)]
        seconds = max(_to_the_next_call(reach, a, len(steps)) for a in whole)
        return Bound(max(seconds, compute_s, nbytes / rate), compute_s, int(nbytes), 0.0)
    moved = trace.moved(0, len(steps), is_full=start is Start.RESTED)
    if start is Start.EMPTY:
        reach[0] = trace.reach_from_empty(moved, reach[0], rate)
    seconds = _to_the_end(reach, trace)
    return Bound(max(seconds, compute_s), compute_s, moved[-1], moved[0] / rate)


def _anchors(steps: Sequence[Step], trace: _Trace, rate: float) -> dict[int, int]:
    """Where stretches begin, and the most steps that are followed from there.

    At the ends of a phase and of its first and last round (some of them, of many) all of a call; at
    a long step of a round two rounds, which is beyond the same step of the next one.
    """
    ends = {0}
    inside: dict[int, int] = {}
    for phase in phases(steps):
        second = phase.begin + phase.length
        ends |= {phase.begin, second - 1, phase.end - phase.length, phase.end - 1}
        if phase.times > 1:
            ends.add(second)
            first = _longest_way_round(trace, phase, rate)
            inside |= dict.fromkeys(range(first, phase.end, phase.length), 2 * phase.length)
    every = -(-len(ends) // _MOST_ANCHORS)
    return inside | dict.fromkeys(sorted(ends)[::every], len(steps))


def _longest_way_round(trace: _Trace, phase: Phase, rate: float) -> int:
    """The long step of a loop's first round from which a round takes longest."""
    middle = phase.length * (phase.times // 2)
    long = sorted(phase.cycle, key=lambda i: -trace.seconds[middle + i])[:_MOST_LONG]
    return max(long, key=lambda i: trace.reach(middle + i, rate, phase.length)[-1])


def _to_the_next_call(reach: Mapping[int, Sequence[float]], begin: int, count: int) -> float:
    """The longest chain from a step to the same one of the next call."""
    stops = [(a if a >= begin else a + count) for a in reach]
    return _chain(reach, sorted([*stops, begin + count]), count)[-1]


def _to_the_end(reach: Mapping[int, Sequence[float]], trace: _Trace) -> float:
    """The longest chain from the first step to the end of the last."""
    count = len(trace.seconds)
    # The last step is over after it began; what a next call needs is none of this one's.
    return _chain(reach, sorted({*reach, count - 1}), count)[-1] + trace.seconds[-1]


def _chain(reach: Mapping[int, Sequence[float]], stops: Sequence[int], count: int) -> list[float]:
    """When each of these steps begins at the earliest, counted from the first."""
    begins = [reach[stops[0]][0]]
    from_here = [(stops[0], 0.0, reach[stops[0]])]  # that reach the next stop
    for stop in stops[1:]:
        from_here = [stretch for stretch in from_here if stop - stretch[0] < len(stretch[2])]
        begins.append(max(at + earliest[stop - a] for a, at, earliest in from_here))
        if stop % count in reach:
            from_here.append((stop, begins[-1], reach[stop % count]))
    return begins


class _Trace:
    """A call that is repeated: what each step needs, and how far off the next use of it is."""

    def __init__(self, steps: Sequence[Step], sizes: Mapping[str, int], budget: int) -> None:
        numbers: dict[str, int] = {}
        parts = [[numbers.setdefault(n, len(numbers)) for n in step.needs] for step in steps]
        self.sizes = [sizes[name] for name in numbers]
        self.seconds = [step.seconds or 0.0 for step in steps]
        self.rooms = [budget - (step.beside_nbytes or 0) for step in steps]
        self.uses: list[list[tuple[int, int]]] = []  # (part, steps until its next use)
        self._where: list[list[int]] = [[] for _ in numbers]  # each part is used
        for i, used in enumerate(parts):
            for part in used:
                self._where[part].append(i)
        upcoming = self._upcoming(0)
        for i in reversed(range(len(steps))):
            self.uses.append([])
            for part in parts[i]:
                after = upcoming[part] if upcoming[part] > i else upcoming[part] + len(steps)
                self.uses[-1].append((part, after - i))
            for part in parts[i]:
                upcoming[part] = i
        self.uses.reverse()

    def _upcoming(self, begin: int) -> list[int]:
        """The position of each part's first use from `begin` on."""
        found = []
        for where in self._where:
            i = bisect_left(where, begin)
            found.append(where[i] if i < len(where) else where[0] + len(self.seconds))
        return found

    def moved(self, begin: int, many: int, *, is_full: bool) -> list[int]:
        """The fewest bytes that have moved when each of so many steps from `begin` on begins.

        is_full: whether everything is there before the first, as far as there is room.
        """
        there = list(self.sizes) if is_full else [0] * len(self.sizes)
        totals, nbytes = [], 0
        for missed in self._walk(there, begin, many):
            nbytes += missed
            totals.append(nbytes)
        return totals

    def moved_in_a_row(self) -> float:
        """The fewest bytes that a call moves, of many in a row; the mean if they differ.

        Nobody moves fewer in the first calls than who begins with all that there is room for, so
        their mean is a bound. Once the device is left as it was before, it is the least there is.
        """
        there = list(self.sizes)
        totals = [0]
        seen: dict[tuple[int, ...], int] = {}
        for call in range(max(4, _MOST_STEPS // len(self.uses))):
            totals.append(totals[-1] + sum(self._walk(there, 0, len(self.uses))))
            before = seen.setdefault(tuple(there), call)
            if before < call:
                return (totals[-1] - totals[before + 1]) / (call - before)
        return totals[-1] / (len(totals) - 1)

    def _walk(self, there: list[int], begin: int, many: int) -> Iterator[int]:
        """Bytes that so many steps miss. `there`: bytes of each part on the device, changed."""
        sizes, uses, rooms, count = self.sizes, self.uses, self.rooms, len(self.uses)
        due = self._upcoming(begin)
        furthest = [(-due[part], part) for part, nbytes in enumerate(there) if nbytes]
        heapify(furthest)
        total = sum(there)
        for i in range(begin, begin + many):
            missed = 0
            for part, until_next in uses[i % count]:
                missed += sizes[part] - there[part]
                there[part] = sizes[part]
                due[part] = i + until_next
            total += missed
            excess = total - rooms[i % count]
            while excess > 0 and furthest:
                when, part = furthest[0]
                if -when != due[part] or not there[part]:
                    heappop(furthest)  # it was used since, or has gone
                    continue
                gone = min(excess, there[part])
                there[part] -= gone
                total -= gone
                excess -= gone
            for part, _ in uses[i % count]:
                heappush(furthest, (-due[part], part))
            yield missed

    def reach(self, begin: int, rate: float, many: int) -> list[float]:
        """When each of so many steps begins at the earliest, counted from when `begin` does.

        Those of the next call follow on the last; the first value is for the one at `begin`.
        """
        earliest, over = [0.0], self.seconds[begin]
        for i, nbytes in enumerate(self.moved(begin, many + 1, is_full=True)[1:], start=begin):
            computed = earliest[-1] + self.seconds[i % len(self.seconds)]
            earliest.append(max(computed, over + nbytes / rate))
        return earliest

    def reach_from_empty(
        self, moved: Sequence[int], reach: Sequence[float], rate: float
    ) -> list[float]:
        """When each step of a call begins at the earliest if nothing was there before it began."""
        earliest = [moved[0] / rate]
        for i, nbytes in enumerate(moved[1:]):
            earliest.append(max(earliest[-1] + self.seconds[i], nbytes / rate))
        return [max(own, earliest[0] + at) for own, at in zip(earliest, reach, strict=False)]
