"""The least seconds that any schedule takes, by trying them all: for instances of a few parts.

    least_seconds(steps, sizes, budget, costs, calls=2)

The model is that of `core/simulate.py`. Before each step the host may give up any parts, then have
any others sent, and goes on:

- it waits before it gives up a part until the last step that needed it is over;
- copies go one after the other, in the order in which the parts are needed; what is there, or on
  its way, has to fit in beside what the step works on;
- where it would not fit in beside what an earlier step works on, copies wait for the end of that;
- a step begins when the one before is over and what it needs has arrived.

The host sees the end of a call before the next one begins. Whatever fits in beside the first step
may be sent then; since the next call begins at once, it makes no difference whether that is done
before the one ends or after the other begins.

A plan has less choice (its rooms are those of whole phases), and pays for pauses, which are left
out here: none can be faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from greenroom.core.simulate import Costs
from greenroom.core.trace import Step

_SAME = 1e-9  # seconds


@dataclass(frozen=True)
class _Moment:
    """Where a schedule has got to when a step has been ordered; two that differ in time only.

    done, link, host: when the device, the link and the host are through with what they have.
    ready, used: when each part there will have arrived, and when it may leave; 0 if that is past.
    ends: when each of the call's steps that have less room than later ones is over; 0 likewise.
    """

    done: float
    link: float
    host: float
    ready: tuple[float, ...]
    used: tuple[float, ...]
    ends: tuple[float, ...]

    @property
    def times(self) -> tuple[float, ...]:
        """All of it."""
        return (self.done, self.link, self.host, *self.ready, *self.used, *self.ends)

    def is_no_later(self, other: _Moment) -> bool:
        """Whether nothing is later here: whatever follows can be done from here as well."""
        return all(a <= b + _SAME for a, b in zip(self.times, other.times, strict=True))


@dataclass(frozen=True)
class _Choice:
    """What is given up before a step, what is sent, and what is there then; all sorted."""

    out: tuple[str, ...]
    sent: tuple[str, ...]  # in the order of need
    there: tuple[str, ...]
    nbytes: int  # of what is there


@dataclass(frozen=True)
class _Instance:
    steps: Sequence[Step]  # of all calls
    sizes: Mapping[str, int]
    budget: int
    costs: Costs
    per_call: int

    def room(self, i: int) -> int:
        return self.budget - (self.steps[i].beside_nbytes or 0)

    def is_first(self, i: int) -> bool:
        return i % self.per_call == 0

    def tight(self, i: int) -> list[int]:
        """The steps of the call before this one that have less room than all that follow them."""
        found: list[int] = []
        for j in range(i - i % self.per_call, i):
            while found and self.room(found[-1]) >= self.room(j):
                found.pop()
            found.append(j)
        return found

    def next_use(self, name: str, i: int) -> int:
        uses = (j for j in range(i, len(self.steps)) if name in self.steps[j].needs)
        return next(uses, len(self.steps))

    def nbytes(self, names: Sequence[str]) -> int:
        return sum(self.sizes[name] for name in names)

    def choices(self, i: int, there: tuple[str, ...]) -> Iterator[_Choice]:
        """All that may be done before a step, but what is never better than something else."""
        needs, room = self.steps[i].needs, self.room(i)
        least = min([room, *map(self.room, self.tight(i))])
        missing = [name for name in needs if name not in there]
        order = {name: self.next_use(name, i) for name in self.sizes}
        absent = [n for n in self.sizes if n not in there and n not in needs]
        absent = sorted((n for n in absent if order[n] < len(self.steps)), key=lambda n: order[n])
        for out in _subsets([name for name in there if name not in needs]):
            kept = [name for name in there if name not in out]
            for ahead in _subsets(absent):
                now = [*kept, *missing, *ahead]
                nbytes = self.nbytes(now)
                if nbytes > room:
                    continue
                # What could stay is better given up later.
                if any(nbytes + self.sizes[name] <= least for name in out):
                    continue
                yield _Choice(out, (*missing, *ahead), tuple(sorted(now)), nbytes)

    def after(self, i: int, there: tuple[str, ...], moment: _Moment, choice: _Choice) -> _Moment:
        """The moment at which a step has been ordered."""
        ready = dict(zip(there, moment.ready, strict=True))
        used = dict(zip(there, moment.used, strict=True))
        ends = dict(zip(self.tight(i), moment.ends, strict=True))
        host = max(moment.host, moment.done if self.is_first(i) else 0.0)
        host = max([host, *(used[name] for name in choice.out)])
        if choice.sent:
            host = max([host, *(end for j, end in ends.items() if self.room(j) < choice.nbytes)])
        link = moment.link
        for name in choice.sent:
            link = max(link, host) + self.costs.copy_s
            link += self.sizes[name] / self.costs.h2d_bytes_per_s
            ready[name] = link
        step = self.steps[i]
        done = max([moment.done, *(ready[name] for name in step.needs)]) + (step.seconds or 0.0)
        used.update(dict.fromkeys(step.needs, done))
        ends[i] = done
        tight = self.tight(i + 1) if not self.is_first(i + 1) else []
        return _Moment(
            done,
            max(link, host),
            host,
            tuple(ready[n] if ready[n] > done else 0.0 for n in choice.there),
            tuple(used[n] if used.get(n, 0.0) > host else 0.0 for n in choice.there),
            tuple(ends[j] if ends[j] > host else 0.0 for j in tight),
        )


def least_seconds(
    steps: Sequence[Step],
    sizes: Mapping[str, int],
    budget: int,
    costs: Costs,
    *,
    calls: int = 1,
    at_most: float = float("inf"),
) -> float | None:
    """Seconds of so many calls in a row, from an empty device, by the best schedule there is.

    None if that takes more than `at_most`: what is slower is not looked into.
    """
    if not steps:
        return 0.0
    instance = _Instance(list(steps) * calls, sizes, budget, costs, len(steps))
    left = [0.0]  # seconds of the steps from each one on
    for step in reversed(instance.steps):
        left.append(left[-1] + (step.seconds or 0.0))
    left.reverse()
    reached: dict[tuple[str, ...], list[_Moment]] = {(): [_Moment(0.0, 0.0, 0.0, (), (), ())]}
    for i in range(len(instance.steps)):
        following: dict[tuple[str, ...], list[_Moment]] = {}
        for there, moments in reached.items():
            for choice in instance.choices(i, there):
                found = following.setdefault(choice.there, [])
                for moment in moments:
                    new = instance.after(i, there, moment, choice)
                    if new.done + left[i + 1] <= at_most + _SAME:
                        found.append(new)
        reached = {there: _best(moments) for there, moments in following.items()}
    return min((m.done for moments in reached.values() for m in moments), default=None)


def _best(moments: Sequence[_Moment]) -> list[_Moment]:
    """Those that no other one is better than in every way."""
    best: list[_Moment] = []
    for moment in sorted(set(moments), key=lambda moment: moment.times):
        if not any(other.is_no_later(moment) for other in best):
            best.append(moment)
    return best


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for count in range(len(names) + 1):
        yield from combinations(names, count)
