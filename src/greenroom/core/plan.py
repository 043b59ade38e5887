"""Decides what stays on the device and what streams through it, for a call whose steps are known.

How it works
------------
A call is folded into phases: loops (the denoising steps), and what runs once. Of a loop that does
not fit, a fixed subset of the parts stays, and the rest streams: each of those is dropped after its
last use in a round, and fetched before its first use in the next. Replacing the least recently used
would move everything in every round; this moves what does not fit, and no more. The streamed parts
are spread evenly over the round, so that each copy finds compute to hide under. Some room, the
*ring*, is left for copies on their way while the part before is still at work.

Between phases, and from one call to the next, a part stays if there is room for it all the way;
those needed again soonest come first (Belady's rule).

Copies start as early as there is room, in the order of need. Now and then that is wrong: a small
part that comes ahead takes the room in which a large one could have come under a long step. Such a
part is *late*: it comes when its step begins, and those after it come before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

from .simulate import Costs, run, simulate
from .trace import Phase, Step, phases, sizes_of

_RINGS = (1.0, 1.5, 2.0, 3.0, 4.0)  # times the largest streamed part
_ENOUGH = 0.999  # what is less than a thousandth faster is not worth more traffic
_FEWER = 0.99  # of the bytes; what presses comes at the last moment, and makes the host wait
_SURELY_MORE = 1 + 1e-9  # sums of thousands of seconds in another order are off by less


@dataclass(frozen=True)
class Plan:
    """What is given up after which step; everything else stays until something presses.

    drops: position of a step -> parts that leave the device when the step is over.
    late: number of a phase -> parts that are fetched for it when their step begins, not ahead.
    """

    steps: tuple[Step, ...]
    sizes: Mapping[str, int]
    budget: int
    drops: Mapping[int, tuple[str, ...]]
    phases: tuple[Phase, ...]
    rooms: tuple[int, ...]  # bytes for weights in each phase
    costs: Costs
    streamed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # by phase's begin
    late: Mapping[int, Set[str]] = field(default_factory=dict)
    unforeseen_room: int | None = None  # the same for steps that nobody expected; None: half of all

    @cached_property
    def fits(self) -> bool:
        """Whether everything that the call needs may stay on the device all the time."""
        return sizes_of(self.steps, self.sizes) <= min(self.rooms, default=0)

    def room(self, position: int | None) -> int:
        """Bytes for weights while a step runs; None is one that nobody expected."""
        if position is None:
            return self.budget // 2 if self.unforeseen_room is None else self.unforeseen_room
        return self.rooms[self.of_step[position]]

    def squeezed(self, room: int, *, at: int | None = None) -> Plan:
        """The same with at most so many bytes for weights; in every phase, or in a position's."""
        where = None if at is None else self.phase_at(at) % len(self.phases)
        rooms = tuple(
            min(room, before) if where in (None, i) else before
            for i, before in enumerate(self.rooms)
        )
        return replace(self, rooms=rooms, unforeseen_room=min(room, self.room(None)))

    def narrowed(self, position: int, room: int) -> Plan:
        """The same with at most so many bytes for weights in the phase of a step."""
        which = self.of_step[position]
        rooms = (*self.rooms[:which], min(room, self.rooms[which]), *self.rooms[which + 1 :])
        return replace(self, rooms=rooms)

    def phase_at(self, position: int) -> int:
        """The number of the phase; those of the next call follow on this one's."""
        rounds, inside = divmod(position, len(self.steps))
        return rounds * len(self.phases) + self.of_step[inside]

    def begin_of(self, phase: int) -> int:
        """The first position of a phase, by its number."""
        rounds, which = divmod(phase, len(self.phases))
        return rounds * len(self.steps) + self.phases[which].begin

    def kept_into(self, which: int) -> Set[str]:
        """What is kept from before a phase, in this call or the last one, for it or a later one."""
        return self._kept[which]

    @cached_property
    def _kept(self) -> list[set[str]]:
        needed = [
            {name for i in phase.cycle for name in self.steps[i].needs} for phase in self.phases
        ]
        kept: set[str] = set()
        found: list[set[str]] = []
        for _ in range(2):  # the second time with what the call before has kept
            found = []
            for phase, names in zip(self.phases, needed, strict=True):
                found.append(set(kept))
                kept |= names
                for i in range(phase.end - phase.length, phase.end):
                    kept.difference_update(self.drops.get(i, ()))
        return found

    @cached_property
    def of_step(self) -> list[int]:
        """The number of each step's phase."""
        return [i for i, phase in enumerate(self.phases) for _ in range(phase.begin, phase.end)]

    def __str__(self) -> str:
        lines = []
        for which, phase in enumerate(self.phases):
            parts = {name for i in phase.cycle for name in self.steps[i].needs}
            flows = self.streamed.get(phase.begin, ())
            nbytes = sum(self.sizes[name] for name in parts)
            flowing = sum(self.sizes[name] for name in flows)
            late = f", {len(self.late[which])} late" if which in self.late else ""
            lines.append(
                f"{phase.times:4} x {self.steps[phase.begin].part}: {len(parts)} parts, "
                f"{nbytes / 1e9:.2f} GB, of which {len(flows)} ({flowing / 1e9:.2f} GB) stream"
                f"{late}"
            )
        return "\n".join(lines)


def make_plan(
    steps: Sequence[Step],
    sizes: Mapping[str, int],
    budget: int,
    costs: Costs,
    *,
    unmeasured_nbytes: int | None = None,
) -> Plan:
    """The plan for these steps within `budget` bytes, activations included.

    Where it was never measured what steps work on, `unmeasured_nbytes` are left for it. None is for
    where nobody can make room as it turns out: then it is half the budget, or more.

    What stays between phases is chosen from a few ways to weigh them, by simulating each; the best
    is then improved by giving up one part more or less at a time, or having it come late, as long
    as that is worth it and `_MOST_STEPS` were not simulated yet.
    """
    found = phases(steps)
    rooms = [_room(steps, phase, sizes, budget, unmeasured_nbytes) for phase in found]
    streams = [
        _streamed([steps[i] for i in phase.cycle], sizes, room, costs)
        if phase.times > 1 and _whole(steps, phase, sizes) > room
        else set()
        for phase, room in zip(found, rooms, strict=True)
    ]
    short = [steps[i] for i in _folded(found)]
    call = _Call(short, sizes, budget, _folded_phases(found), rooms, costs)
    worth = _worth(found)
    within = frozenset(
        _Choice(_WITHIN, i, offset, name)
        for i, (phase, flows) in enumerate(zip(found, streams, strict=True))
        for offset, name in _ends(steps, phase, flows)
    )
    trials = _Trials(call, worth)
    is_measured = _is_measured(short)
    for weighing in _WEIGHINGS if is_measured and len(found) > 1 else _WEIGHINGS[:1] * bool(found):
        spare = _spare(call, streams, weighing)
        trials.consider(within | _given_up_between(call, streams, spare))
    if is_measured:
        trials.consider(within)  # only what presses
        trials.improve()
    plan = _plan(_Call(steps, sizes, budget, found, rooms, costs), trials.best, streams)
    if unmeasured_nbytes is None:
        return plan
    return replace(plan, unforeseen_room=budget - unmeasured_nbytes)


_WITHIN, _AFTER, _LATE = "after every round but the last", "after the last round", "late"


class _Choice(NamedTuple):
    """Something that a plan may say of a part in a phase: when it is given up, or that it is late.

    offset: in a round, of the step after which it is given up.
    """

    what: str
    phase: int
    offset: int
    part: str


@dataclass(frozen=True)
class _Call:
    """What a plan is made for."""

    steps: Sequence[Step]
    sizes: Mapping[str, int]
    budget: int
    phases: Sequence[Phase]
    rooms: Sequence[int]
    costs: Costs


class _Trials:
    """Tries what may be given up in a call whose loops go round a few times, and keeps the best."""

    def __init__(self, call: _Call, worth: Sequence[int]) -> None:
        """Of a call of which each step stands for so many."""
        self._call = call
        self._worth = worth
        self._left = _MOST_STEPS
        self._seen: set[frozenset[_Choice]] = set()
        self.best: frozenset[_Choice] = frozenset()
        self._least_s = float("inf")  # of a first call and of those after it
        self._fewest_nbytes = self._fewest_pressed = 0  # that move, that have to go unplanned
        self._is_ideal = False  # the device waits for the first fill alone
        self._compute_s = sum(
            (step.seconds or 0.0) * n for step, n in zip(call.steps, worth, strict=True)
        )
        self._ideal_s = _first_fill_s(call) + _CALLS * self._compute_s

    def consider(self, chosen: frozenset[_Choice]) -> bool:
        """Whether these are better than the best so far; they are the best then."""
        if self._left <= 0 or chosen in self._seen:
            return False
        self._seen.add(chosen)
        self._left -= _CALLS * len(self._call.steps)
        most_stalled_s = self._least_s / _ENOUGH * _SURELY_MORE - _CALLS * self._compute_s
        plan, costs = _plan(self._call, chosen), self._call.costs
        calls = run(plan, costs, calls=_CALLS, most_stalled_s=most_stalled_s, worth=self._worth)
        if len(calls) < _CALLS:
            return False
        seconds = sum(self._compute_s + call.stalled_s for call in calls)
        nbytes = sum(call.h2d_nbytes for call in calls)
        pressed = sum(len(call.pressed) for call in calls)
        is_leaner = nbytes < self._fewest_nbytes * _FEWER or (
            nbytes <= self._fewest_nbytes and pressed < self._fewest_pressed
        )
        is_better = seconds < self._least_s * _ENOUGH or (
            seconds * _ENOUGH <= self._least_s and is_leaner
        )
        if is_better:
            self.best, self._fewest_nbytes, self._fewest_pressed = chosen, nbytes, pressed
            self._least_s = min(seconds, self._least_s)  # of all, lest many thousandths add up
            self._is_ideal = seconds * _ENOUGH <= self._ideal_s
            # What has to go anyway is better given up as soon as its last step is over.
            self.consider(chosen.union(self._given_up(calls[-1].pressed)))
        return is_better

    def _given_up(self, pressed: Iterable[tuple[int, str]]) -> Iterator[_Choice]:
        for position, name in pressed:
            position %= len(self._call.steps)
            which = next(i for i, p in enumerate(self._call.phases) if position < p.end)
            phase = self._call.phases[which]
            turn, offset = divmod(position - phase.begin, phase.length)
            yield _Choice(_AFTER if turn == phase.times - 1 else _WITHIN, which, offset, name)

    def improve(self) -> None:
        """Give up one part more, or less, or have it late, or two, as long as that is better."""
        ends = [
            (which, offset, name)
            for which, phase in enumerate(self._call.phases)
            for offset, name in _ends_of_all(self._call.steps, phase)
        ]
        single = [
            _Choice(what, *end)
            for end in ends
            for what in ((_AFTER, _WITHIN) if self._call.phases[end[0]].times > 1 else (_AFTER,))
        ]
        # What a call begins with is never late: it may come before, in the pause between two calls.
        single += [_Choice(_LATE, which, 0, name) for which, _, name in ends if which > 0]
        changes = itertools.chain(
            ((change,) for change in single), itertools.combinations(single, 2)
        )
        for change in changes:
            if self._left <= 0 or self._is_ideal:
                return
            if self.consider(self.best.symmetric_difference(change)):
                self.improve()
                return


_MOST_STEPS = 9_000  # to simulate: a tenth of a second
_ROUNDS = 3  # of a loop, until those in between are known
_CALLS = 3  # in a row, until they are alike
_LONG = 100  # steps


@dataclass(frozen=True)
class _Weighing:
    """How much room is kept for what runs once, so that less of the rest stays.

    share: of what such a phase needs, what fits in beside all that stays through it; a ring always.
    ahead: whether there is room before it, as a long step works, for what can come meanwhile.
    """

    share: float
    ahead: bool


_WEIGHINGS = [_Weighing(share, ahead) for ahead in (False, True) for share in (0.0, 0.5, 1.0)]


def _spare(call: _Call, streams: Sequence[set[str]], weighing: _Weighing) -> list[int]:
    """Bytes of each phase that are free for what it does not need itself."""
    spare = []
    for phase, capacity, flows in zip(call.phases, call.rooms, streams, strict=True):
        whole = _whole(call.steps, phase, call.sizes)
        if flows:
            spare.append(0)
        elif phase.times > 1:
            spare.append(capacity - whole)
        else:
            cycle = [call.steps[i] for i in phase.cycle]
            at_once = max(sum(call.sizes[name] for name in step.needs) for step in cycle)
            ring = at_once + 2 * max(call.sizes[name] for step in cycle for name in step.needs)
            spare.append(capacity - min(whole, max(ring, int(weighing.share * whole))))
    if weighing.ahead:
        spare = [nbytes - _comes_ahead(call, which) for which, nbytes in enumerate(spare)]
    return spare


def _comes_ahead(call: _Call, which: int) -> int:
    """Bytes for the phases after one, until the next loop, that can come while it is at work."""
    phase = call.phases[which]
    following = [*call.phases[which + 1 :], *call.phases[:which]]
    once = itertools.takewhile(lambda phase: phase.times == 1, following)
    needed = sum(_whole(call.steps, phase, call.sizes) for phase in once)
    seconds = sum(step.seconds or 0.0 for step in call.steps[phase.begin : phase.end])
    return min(needed, int(seconds * call.costs.h2d_bytes_per_s))


def _plan(call: _Call, chosen: Set[_Choice], streams: Sequence[set[str]] = ()) -> Plan:
    drops: dict[int, list[str]] = {}
    late: dict[int, set[str]] = {}
    for what, which, offset, name in sorted(chosen):
        phase = call.phases[which]
        if what == _LATE:
            late.setdefault(which, set()).add(name)
            continue
        turns = range(phase.times - 1) if what == _WITHIN else [phase.times - 1]
        for turn in turns:
            drops.setdefault(phase.begin + offset + turn * phase.length, []).append(name)
    return Plan(
        tuple(call.steps),
        dict(call.sizes),
        call.budget,
        {position: tuple(names) for position, names in drops.items()},
        tuple(call.phases),
        tuple(call.rooms),
        call.costs,
        {p.begin: tuple(sorted(s)) for p, s in zip(call.phases, streams, strict=False) if s},
        late,
    )


def _whole(steps: Sequence[Step], phase: Phase, sizes: Mapping[str, int]) -> int:
    """Bytes of all that a phase needs."""
    return sum(sizes[name] for name in {name for i in phase.cycle for name in steps[i].needs})


def _is_measured(steps: Sequence[Step]) -> bool:
    """Whether enough is known to tell by simulation which of two plans is faster."""
    return sum(step.seconds is None for step in steps) * 10 < len(steps)


def _folded(found: Sequence[Phase]) -> list[int]:
    """The positions of a call whose loops go round a few times at most."""
    return [
        i
        for phase in found
        for i in range(phase.begin, phase.begin + phase.length * min(phase.times, _ROUNDS))
    ]


def _folded_phases(found: Sequence[Phase]) -> list[Phase]:
    """The same loops in that call; found anew they might be others, as fewer rounds look alike."""
    folded: list[Phase] = []
    for phase in found:
        begin = folded[-1].end if folded else 0
        folded.append(replace(phase, begin=begin, times=min(phase.times, _ROUNDS)))
    return folded


def _worth(found: Sequence[Phase]) -> list[int]:
    """How many steps of a call each one of the folded call stands for.

    A loop's first round begins with what came before, and its last one ends with what comes next.
    Those in between are like the second one.
    """
    worth: list[int] = []
    for phase in found:
        rounds = [1] * min(phase.times, _ROUNDS)
        if phase.times > _ROUNDS:
            rounds[1] += phase.times - _ROUNDS
        worth += [n for n in rounds for _ in range(phase.length)]
    return worth


def _first_fill_s(call: _Call) -> float:
    """What the device waits in a first call at least: whatever it needs has to come once."""
    seen: set[str] = set()
    stalled_s = copied_s = computed_s = 0.0
    for step in call.steps:
        for name in step.needs:
            if name not in seen:
                seen.add(name)
                copied_s += call.costs.copy_s + call.sizes[name] / call.costs.h2d_bytes_per_s
        stalled_s = max(stalled_s, copied_s - computed_s)
        computed_s += step.seconds or 0.0
    return stalled_s


def _room(
    steps: Sequence[Step],
    phase: Phase,
    sizes: Mapping[str, int],
    budget: int,
    unmeasured_nbytes: int | None,
) -> int:
    """Bytes for weights in a phase: the budget without what the steps work on.

    Where that was never measured, and nothing else is said, half the budget is left for it; and
    more, if not all weights of the call fit in the other half but those of the phase take less.
    """
    inside = [steps[i] for i in range(phase.begin, phase.end)]
    known = [s.beside_nbytes for s in inside if s.beside_nbytes is not None]
    if len(known) == len(inside):
        return budget - max(known)
    if unmeasured_nbytes is not None:
        return budget - max([unmeasured_nbytes, *known])
    if sizes_of(steps, sizes) <= budget // 2:
        return budget // 2
    largest = max(sum(sizes[name] for name in step.needs) for step in inside)
    return max(min(_whole(steps, phase, sizes), budget // 2), largest)


def _streamed(
    cycle: Sequence[Step], sizes: Mapping[str, int], capacity: int, costs: Costs
) -> set[str]:
    """Which parts of a loop stream: the choice that is fastest, then the one that moves least."""
    largest = max(sizes[step.part] for step in cycle)
    if any(step.beside_nbytes is None for step in cycle):
        return _used_last(cycle, sizes, capacity - 3 * largest)
    choices: list[set[str]] = []
    for ring in _RINGS:
        for by_time in (True, False):
            chosen = _spread(cycle, sizes, capacity - int(ring * largest), by_time=by_time)
            if chosen not in choices:
                choices.append(chosen)
    choices.sort(key=lambda chosen: sum(sizes[name] for name in chosen))
    compute = sum(step.seconds or 0.0 for step in cycle)
    best, least = choices[0], float("inf")
    for chosen in choices:
        copying = sum(sizes[name] for name in chosen) / costs.h2d_bytes_per_s
        if max(compute, copying) >= least * _ENOUGH:
            break  # those that move more cannot be worth it
        seconds = _round(cycle, sizes, chosen, capacity, costs)
        if seconds < least * _ENOUGH:
            best, least = chosen, seconds
    return best


def _used_last(cycle: Sequence[Step], sizes: Mapping[str, int], stays: int) -> set[str]:
    """What is used last in a round that was never measured; `stays` bytes are left.

    There will be more room in the second round, and time to fill it before these are needed.
    """
    held = {name for step in cycle for name in step.held}
    stays -= sum(sizes[name] for name in held)
    late = set()
    for name in dict.fromkeys(step.part for step in cycle):
        if name not in held:
            stays -= sizes[name]
            if stays < 0:
                late.add(name)
    return late


def _spread(
    cycle: Sequence[Step], sizes: Mapping[str, int], stays: int, *, by_time: bool
) -> set[str]:
    """Stream so much that `stays` bytes are left, spread evenly over the round's time or bytes."""
    first: dict[str, float] = {}
    held = {name for step in cycle for name in step.held}
    for step in cycle:
        if step.part not in held:
            first[step.part] = first.get(step.part, 0.0) + (step.seconds or 0.0)
    whole = sum(sizes[name] for name in {*first, *held})
    must = whole - stays
    weight = {n: (s if by_time else float(sizes[n])) for n, s in first.items()}
    total = sum(weight.values()) or 1.0
    chosen: set[str] = set()
    credit = 0.0
    for name in first:
        credit += must * weight[name] / total
        if 2 * credit >= sizes[name]:
            chosen.add(name)
            credit -= sizes[name]
    missing = must - sum(sizes[name] for name in chosen)
    for name in sorted(first, key=lambda n: sizes[n]):
        if missing <= 0:
            break
        if name not in chosen:
            chosen.add(name)
            missing -= sizes[name]
    return chosen


def _round(
    cycle: Sequence[Step],
    sizes: Mapping[str, int],
    chosen: set[str],
    capacity: int,
    costs: Costs,
) -> float:
    """Seconds of one round of a loop, once it goes round."""
    plain = [Step(s.part, s.held, s.seconds, 0, s.opens) for s in cycle]
    phase = Phase(0, len(plain), 3 if len(plain) < _LONG else 2)
    steps = plain * phase.times
    drops: dict[int, list[str]] = {}
    for offset, name in _ends(steps, phase, chosen):
        for turn in range(phase.times):
            drops.setdefault(offset + turn * phase.length, []).append(name)
    plan = Plan(
        tuple(steps),
        sizes,
        capacity,
        {i: tuple(names) for i, names in drops.items()},
        (phase,),
        (capacity,),
        costs,
    )
    ends = simulate(plan, costs).ends
    return ends[-1] - ends[-phase.length - 1]


def _ends(steps: Sequence[Step], phase: Phase, flows: set[str]) -> list[tuple[int, str]]:
    """Where in a round each streamed part is dropped: before its longest absence."""
    used: dict[str, list[int]] = {name: [] for name in flows}
    for offset in range(phase.length):
        for name in steps[phase.begin + offset].needs:
            if name in used:
                used[name].append(offset)
    ends = []
    for name, offsets in used.items():
        after = [*offsets[1:], offsets[0] + phase.length]
        _, end = max((nxt - now, now) for now, nxt in zip(offsets, after, strict=True))
        ends.append((end, name))
    return sorted(ends)


def _ends_of_all(steps: Sequence[Step], phase: Phase) -> list[tuple[int, str]]:
    """Where in a round each part is used last."""
    last: dict[str, int] = {}
    for offset in range(phase.length):
        for name in steps[phase.begin + offset].needs:
            last[name] = offset
    return sorted((offset, name) for name, offset in last.items())


def _given_up_between(
    call: _Call, streams: Sequence[set[str]], spare: list[int]
) -> frozenset[_Choice]:
    """Parts that do not stay until the phase, or the call, in which they are needed again."""
    steps, sizes, found = call.steps, call.sizes, call.phases
    stays: dict[str, list[tuple[int, int, int]]] = {}  # (phase, first, last position in it)
    for which, phase in enumerate(found):
        span: dict[str, tuple[int, int]] = {}
        for i in phase.cycle:
            for name in steps[i].needs:
                span[name] = (span.get(name, (i, i))[0], i)
        for name, (first, last) in span.items():
            stays.setdefault(name, []).append((which, first, last + phase.end - phase.cycle.stop))
    gaps = []
    for name, where in stays.items():
        following = [*where[1:], (where[0][0] + len(found), where[0][1] + len(steps), 0)]
        for (before, _, last), (until, again, _) in zip(where, following, strict=True):
            gaps.append((again - last, last, name, before, until))
    given_up = set()
    for _, last, name, before, until in sorted(gaps):
        takes = set()
        for i in range(before, until + 1):
            which = i % len(found)
            # Where all of a loop stays it is accounted for; elsewhere it takes room to spare.
            is_of_loop = i in (before, until) and found[which].times > 1
            if not is_of_loop or name in streams[which]:
                takes.add(which)
        if all(spare[which] >= sizes[name] for which in takes):
            for which in takes:
                spare[which] -= sizes[name]
        else:
            phase = found[before]
            given_up.add(_Choice(_AFTER, before, last - (phase.end - phase.length), name))
    return frozenset(given_up)
