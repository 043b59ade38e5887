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

When copies start is no part of the plan: always as early as there is room, in the order of need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .simulate import Costs, simulate
from .trace import Phase, Step, phases

_RINGS = (1.0, 1.5, 2.0, 3.0, 4.0)  # times the largest streamed part
_ENOUGH = 0.999  # what is less than a thousandth faster is not worth more traffic


@dataclass(frozen=True)
class Plan:
    """What is given up after which step; everything else stays until something presses.

    drops: position of a step -> parts that leave the device when the step is over.
    """

    steps: tuple[Step, ...]
    sizes: Mapping[str, int]
    budget: int
    drops: Mapping[int, tuple[str, ...]]
    phases: tuple[Phase, ...]
    rooms: tuple[int, ...]  # bytes for weights in each phase
    streamed: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # by phase's begin

    def room(self, begin: int | None, end: int | None) -> int:
        """Bytes for weights from one position to another; one past the call's end is the next's."""
        if begin is None or end is None:
            return self.budget // 2  # a step that nobody expected
        of_step = self._of_step
        if end < len(of_step) and of_step[begin] == of_step[end]:
            return self.rooms[of_step[begin]]
        first, last = self._phase_at(begin), self._phase_at(end)
        return min(self.rooms[i % len(self.rooms)] for i in range(first, last + 1))

    def _phase_at(self, position: int) -> int:
        rounds, inside = divmod(position, len(self.steps))
        return rounds * len(self.phases) + self._of_step[inside]

    @cached_property
    def _of_step(self) -> list[int]:
        return [i for i, phase in enumerate(self.phases) for _ in range(phase.begin, phase.end)]

    def __str__(self) -> str:
        lines = []
        for phase in self.phases:
            parts = {name for i in phase.cycle for name in self.steps[i].needs}
            flows = self.streamed.get(phase.begin, ())
            nbytes = sum(self.sizes[name] for name in parts)
            flowing = sum(self.sizes[name] for name in flows)
            lines.append(
                f"{phase.times:4} x {self.steps[phase.begin].part}: {len(parts)} parts, "
                f"{nbytes / 1e9:.2f} GB, of which {len(flows)} ({flowing / 1e9:.2f} GB) stream"
            )
        return "\n".join(lines)


def make_plan(steps: Sequence[Step], sizes: Mapping[str, int], budget: int, costs: Costs) -> Plan:
    """The plan for these steps within `budget` bytes, activations included.

    What stays between phases is chosen from a few ways to weigh them, by simulating each.
    """
    found = phases(steps)
    rooms = [_room(steps, phase, sizes, budget) for phase in found]
    streams = [
        _streamed([steps[i] for i in phase.cycle], sizes, room, costs)
        if phase.times > 1 and _whole(steps, phase, sizes) > room
        else set()
        for phase, room in zip(found, rooms, strict=True)
    ]
    short = _folded(steps, found)
    brief, shortened = [steps[i] for i in short], phases([steps[i] for i in short])
    best, least = _WEIGHINGS[0], float("inf")
    for weighing in _WEIGHINGS if len(found) > 1 else ():
        candidate = _plan(brief, sizes, budget, shortened, rooms, streams, weighing)
        timeline = simulate(candidate, costs, calls=2)
        if timeline.seconds < least * _ENOUGH:
            best, least = weighing, timeline.seconds
        if least * _ENOUGH < timeline.compute_s:
            break
    return _plan(steps, sizes, budget, found, rooms, streams, best)


@dataclass(frozen=True)
class _Weighing:
    """How much of what runs once is to be there before it runs, and what gives way for it.

    share: of a phase that runs once, what is kept free for it in its phase, beyond a ring.
    late: whether of a loop the parts at the end of its round give way first, or those at its begin.
    """

    share: float
    late: bool


_WEIGHINGS = [_Weighing(share, late) for share in (0.0, 0.5, 1.0) for late in (True, False)]


def _plan(
    steps: Sequence[Step],
    sizes: Mapping[str, int],
    budget: int,
    found: Sequence[Phase],
    rooms: Sequence[int],
    streams: Sequence[set[str]],
    weighing: _Weighing,
) -> Plan:
    spare = []
    for phase, capacity, flows in zip(found, rooms, streams, strict=True):
        whole = _whole(steps, phase, sizes)
        if flows:
            spare.append(0)
        elif phase.times > 1:
            spare.append(capacity - whole)
        else:
            cycle = [steps[i] for i in phase.cycle]
            at_once = max(sum(sizes[name] for name in step.needs) for step in cycle)
            ring = at_once + 2 * max(sizes[name] for step in cycle for name in step.needs)
            spare.append(capacity - min(whole, max(ring, int(weighing.share * whole))))
    drops: dict[int, list[str]] = {}
    for phase, flows in zip(found, streams, strict=True):
        for offset, name in _ends(steps, phase, flows):
            for turn in range(phase.times - 1):
                drops.setdefault(phase.begin + offset + turn * phase.length, []).append(name)
    for position, name in _given_up_between(steps, sizes, found, streams, spare, weighing.late):
        drops.setdefault(position, []).append(name)
    return Plan(
        tuple(steps),
        dict(sizes),
        budget,
        {position: tuple(names) for position, names in drops.items()},
        tuple(found),
        tuple(rooms),
        {p.begin: tuple(sorted(s)) for p, s in zip(found, streams, strict=True) if s},
    )


def _whole(steps: Sequence[Step], phase: Phase, sizes: Mapping[str, int]) -> int:
    """Bytes of all that a phase needs."""
    return sum(sizes[name] for name in {name for i in phase.cycle for name in steps[i].needs})


def _folded(steps: Sequence[Step], found: Sequence[Phase]) -> list[int]:
    """The positions of a call whose loops go round three times at most."""
    return [
        i
        for phase in found
        for i in range(phase.begin, phase.begin + phase.length * min(phase.times, 3))
    ]


def _room(steps: Sequence[Step], phase: Phase, sizes: Mapping[str, int], budget: int) -> int:
    """Bytes for weights in a phase: the budget without what the steps work on.

    Where that was never measured, half the budget is left for it, or more if the weights are small.
    """
    inside = [steps[i] for i in range(phase.begin, phase.end)]
    known = [s.beside_nbytes for s in inside if s.beside_nbytes is not None]
    if len(known) == len(inside):
        return budget - max(known)
    whole = sum(sizes[name] for name in {name for step in inside for name in step.needs})
    largest = max(sum(sizes[name] for name in step.needs) for step in inside)
    return max(min(whole, budget // 2), largest)


def _streamed(
    cycle: Sequence[Step], sizes: Mapping[str, int], capacity: int, costs: Costs
) -> set[str]:
    """Which parts of a loop stream: the choice that is fastest, then the one that moves least."""
    largest = max(sizes[step.part] for step in cycle)
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
    """Seconds of one round of a loop, once it goes round: the third of three."""
    plain = [Step(s.part, s.held, s.seconds, 0, s.opens) for s in cycle]
    phase = Phase(0, len(plain), 3)
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
    )
    ends = simulate(plan, costs).ends
    return ends[-1] - ends[2 * phase.length - 1]


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


def _given_up_between(
    steps: Sequence[Step],
    sizes: Mapping[str, int],
    found: Sequence[Phase],
    streams: Sequence[set[str]],
    spare: list[int],
    late: bool,
) -> list[tuple[int, str]]:
    """Parts that do not stay until the phase, or the call, in which they are needed again."""
    stays: dict[str, list[tuple[int, int, int]]] = {}  # (phase, first, last position in it)
    for which, phase in enumerate(found):
        span: dict[str, tuple[int, int]] = {}
        for i in range(phase.begin, phase.end):
            for name in steps[i].needs:
                span[name] = (span.get(name, (i, i))[0], i)
        for name, (first, last) in span.items():
            stays.setdefault(name, []).append((which, first, last))
    gaps = []
    for name, where in stays.items():
        following = [*where[1:], (where[0][0] + len(found), where[0][1] + len(steps), 0)]
        for (before, _, last), (until, again, _) in zip(where, following, strict=True):
            gaps.append((again - last, last if late else -last, name, last, before, until))
    given_up = []
    for _, _, name, last, before, until in sorted(gaps):
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
            given_up.append((last, name))
    return given_up
