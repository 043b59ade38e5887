"""Says, step by step, what leaves the device and what goes there, within a budget.

It follows a plan as long as the call goes as expected, and finds its place again when it does not:
never wrong, only slower. Pure: events in, orders out. `simulate` and the engine follow the very
same director.

Note [What is fetched ahead]: parts are sent in the order in which they are needed, each as soon as
there is room for it beside what the steps until then work on. Everything that is needed before the
*horizon* is there or on its way, but for what the plan says comes late, so nothing else will be
sent before it.

Note [Released and gone]: whether a part was changed can be told only when its last step is over,
and nothing may take its place before. So what a plan gives up after a step is *released* when the
next one begins, and makes room for what is fetched ahead from the one after that, when it is known:
meanwhile the device always has a step to work on. Where the next step is so long that a short pause
before it does not matter, and for what is needed at once, the host waits.

Note [Room until then]: what is fetched ahead must fit in beside everything that the plan keeps, at
every moment until it is needed. Within a phase that is what is there now. Later ones may have less
room, but the plan may also have given something up by then.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Set
from typing import NamedTuple

from .plan import Plan
from .trace import Step


class Orders(NamedTuple):
    """What to do before a step: first let go, then send on the way, in this order.

    release: what is given up from now on, but stays until its room is wanted: time to find out
        whether it was changed.
    settles: what comes has to wait until every step before is over: beside one that may still run
        there is no room for it.
    """

    offload: tuple[str, ...] = ()
    onload: tuple[str, ...] = ()
    release: tuple[str, ...] = ()
    settles: bool = False


NOTHING = Orders()
_WORTH_A_PAUSE_S = 5e-3  # the pause is about 150 microseconds


class Director:
    """One budget, what is within it, and where the call is in its plan."""

    def __init__(self, plan: Plan, sizes: Callable[[], Mapping[str, int]] | None = None) -> None:
        self._known = sizes
        self.deviations = 0
        self.pressed: list[tuple[int, str]] = []  # what had to go unplanned, after which step
        self.resident: dict[str, int] = {}  # bytes of what is there or on its way
        self.resident_nbytes = 0
        self._loose: set[str] = set()  # resident, and to be given up as soon as its room is wanted
        self._fresh: set[str] = set()  # released just now
        # By later phase: what is there and will be when that begins; see `_fits_until`.
        self._staying: dict[int, dict[str, int]] = {}
        self._staying_nbytes: dict[int, int] = {}
        self._staying_since = -1  # the phase that these were seen from
        self._least_room: float = math.inf  # of the steps that may still run, by whatever plan
        self.follow(plan)

    def follow(self, plan: Plan, *, at: int = -1) -> None:
        """Go by this plan from now on; the step that runs, or ran last, is its `at`-th."""
        self.plan = plan
        self.position = at
        self._horizon = 0
        self._staying.clear()
        where: defaultdict[str, list[int]] = defaultdict(list)
        for i, step in enumerate(plan.steps):
            for name in step.needs:
                where[name].append(i)
        self._where: dict[str, list[int]] = dict(where)
        self._opens = [i for i, step in enumerate(plan.steps) if step.opens]
        self._drops = sorted(plan.drops)
        self._least_room = min(self._least_room, plan.room(at if at >= 0 else None))
        self.is_quiet = False

    def begin_call(self) -> None:
        """The next step is the plan's first, again."""
        count = len(self.plan.steps)
        self._horizon = max(0, self._horizon - count) if self.position == count - 1 else 0
        self.position = -1
        self._least_room = min(self._least_room, self.plan.room(None))
        self._staying.clear()
        self.deviations = 0
        self.pressed.clear()

    def begin(self, step: Step) -> Orders:
        """A part is about to run.

        If that makes the stay in a component a quiet one (`is_quiet`), its other steps need not be
        told of: all it needs is there, and nothing comes or goes before the next one opens.
        """
        orders = self._begin(step)
        self.is_quiet = orders is NOTHING and step.opens and self._stays_quiet(step)
        if self.is_quiet:
            stay, of_step = self.stay, self.plan.of_step
            rooms = self.plan.rooms[of_step[stay.start] : of_step[stay.stop - 1] + 1]
            self._least_room = min(self._least_room, *rooms)
        return orders

    def _stays_quiet(self, step: Step) -> bool:
        """Whether nothing comes or goes before the next component's forward begins."""
        steps, stay = self.plan.steps, self.stay
        if (
            self._fresh  # something may come as soon as it may go
            or self.position < 0
            or steps[self.position].place != step.place
            or stay.stop == len(steps)  # at the end of the call the next one's parts may come
            or bisect_left(self._drops, stay.start) != bisect_left(self._drops, stay.stop)
        ):
            return False
        needs = {name for i in stay for name in steps[i].needs}
        return needs <= self.resident.keys() and needs.isdisjoint(self._loose)

    @property
    def stay(self) -> range:
        """The steps from the last one told of until the next component's forward begins."""
        following = bisect_right(self._opens, self.position)
        is_last = following == len(self._opens)
        return range(
            max(0, self.position),
            len(self.plan.steps) if is_last else self._opens[following],
        )

    def _begin(self, step: Step) -> Orders:
        needs, resident = step.needs, self.resident
        position = self._find(step)
        released = self._loosen(position, needs)
        arrived: list[str] = []
        coming = 0
        for name in needs:
            if name not in resident:
                arrived.append(name)
                coming += self._size(name)
            elif name in self._loose:
                self._loose.discard(name)
                self._stays(name)
        plan = self.plan
        room = plan.room(None) if position is None else plan.rooms[plan.of_step[position]]
        out: list[str] = []
        if self.resident_nbytes + coming > room:
            out = self._make_room(coming, room, needs, position)
        for name in arrived:
            self._join(name)
        if position is not None:
            self.position = position
            if self._fresh and (plan.steps[position].seconds or 0.0) >= _WORTH_A_PAUSE_S:
                self._fresh.clear()
            self._fetch_ahead(position, arrived, out, room)
        settles = bool(arrived) and self.resident_nbytes > self._least_room
        self._least_room = room if settles else min(room, self._least_room)
        if not (out or arrived or released):
            return NOTHING
        gone = set(out)
        stayed = gone.intersection(arrived)  # there is room for it after all
        if stayed:
            gone -= stayed
            out = [name for name in out if name in gone]
            arrived = [name for name in arrived if name not in stayed]
        if gone:
            released = [name for name in released if name not in gone]
        return Orders(tuple(out), tuple(arrived), tuple(released), settles)

    def end_call(self, *, is_done: bool = True, room: int | None = None) -> Orders:
        """The call is over; what the next one begins with may come already.

        Args:
            is_done: as long as the device still works on it, somebody may wait for its result, and
                should not wait for weights as well.
            room: bytes for weights beside that result; None if it takes nothing.
        """
        last = self.position
        arrived: list[str] = []
        out: list[str] = []
        if is_done:
            self._least_room = math.inf
        if self.is_at_end:
            self._loosen(last + 1, ())
            self._fresh.clear()  # the host has seen the end of the call
            most, urgent = self.plan.room(0), self._urgent_nbytes() if is_done else 0.0
            room = most if room is None else min(most, room)
            self._fetch_ahead(last, arrived, out, room, begin=last + 1, most=urgent)
        return Orders(tuple(out), tuple(arrived))  # none is in both: nothing is given up by force

    @property
    def is_at_end(self) -> bool:
        """Whether the plan's last step has begun: the call was not cut short."""
        return self.position == len(self.plan.steps) - 1 >= 0

    def look_ahead(self, room: int) -> tuple[str, ...]:
        """The call is over for the host alone; what the next one begins with may come already.

        Within `room` bytes, and those of its first phase, beside all that is there: nothing can
        leave before the device is done.
        """
        arrived: list[str] = []
        if self.is_at_end:
            self._fresh = set(self._loose)
            room = min(room, self.plan.room(0))
            self._fetch_ahead(self.position, arrived, [], room, begin=self.position + 1)
        return tuple(arrived)

    def press(self, room: int, needs: Set[str]) -> Orders:
        """No more than `room` bytes are left for weights, until another plan is followed.

        What the step that runs `needs` stays in any case.
        """
        self.follow(self.plan.squeezed(room), at=self.position)
        position = self.position if self.position >= 0 else None
        return Orders(tuple(self._make_room(0, room, tuple(needs), position)))

    @property
    def room(self) -> int:
        """Bytes for weights in the step that runs, or ran last."""
        return self.plan.room(self.position if self.position >= 0 else None)

    @property
    def next_needs(self) -> tuple[str, ...]:
        """What the step needs that is expected next in this call, after a quiet stay."""
        following = self.stay.stop if self.is_quiet else self.position + 1
        return self.plan.steps[following].needs if following < len(self.plan.steps) else ()

    @property
    def expected_beside(self) -> int | None:
        """What the step that runs, or a quiet stay, took besides weights when it was measured."""
        steps = self.plan.steps
        if not 0 <= self.position < len(steps):
            return None
        if not self.is_quiet:
            return steps[self.position].beside_nbytes
        return max((steps[i].beside_nbytes or 0 for i in self.stay), default=0)

    def _urgent_nbytes(self) -> float:
        """How much of what the next call needs has to be there when it begins.

        The rest can be fetched while it computes, as Note [What is fetched ahead] says: a pause
        between two calls is no loss then, and no pause is none either.
        """
        plan = self.plan
        if plan.fits:
            return float("inf")  # once there, it stays
        seconds, nbytes, urgent = 0.0, 0, 0.0
        missing = self._where.keys() - self.resident.keys()
        for step in plan.steps:
            if not missing:
                break
            for name in step.needs:
                if name in missing:
                    missing.discard(name)
                    nbytes += self._size(name)
                    urgent = max(urgent, nbytes - seconds * plan.costs.h2d_bytes_per_s)
            seconds += step.seconds or 0.0
        return urgent

    def gone(self, names: Iterable[str]) -> None:
        """Parts left the device by somebody else's decision, or never came."""
        for name in names:
            if name in self.resident:
                self._leave(name)
        self._horizon = 0

    def recount(self, there: Iterable[str]) -> None:
        """Something went wrong while orders were carried out: these parts are there, no others."""
        there = set(there)
        self.gone(self.resident.keys() - there)
        for name in sorted(there - self.resident.keys()):
            self._join(name)

    # ---- where we are

    def _find(self, step: Step) -> int | None:
        """The step's position in the plan: the expected one, or the nearest that is like it."""
        steps, expected = self.plan.steps, self.position + 1
        if self.is_quiet:  # nobody told of those in between
            stay = self.stay
            told = (i for i in stay if steps[i].place == step.place and not step.opens)
            expected = next(told, stay.stop)
        if expected < len(steps):
            planned = steps[expected]
            if planned is step or planned.place == step.place:
                return expected
        self.deviations += 1
        where = [i for i in self._where.get(step.part, ()) if steps[i].place == step.place]
        if not where:
            return None
        found = min(where, key=lambda i: (abs(i - expected), -i))
        self._horizon = found
        return found

    def _next(self, name: str, position: int) -> int:
        """When the part is needed next, from a position on; maybe in the next call."""
        where = self._where.get(name)
        count = len(self.plan.steps)
        if not where:
            return position + 2 * count
        if position <= where[-1]:
            return where[bisect_left(where, position)]
        rounds, inside = divmod(position, count)
        i = bisect_left(where, inside)
        return rounds * count + (where[i] if i < len(where) else count + where[0])

    def _last(self, name: str, position: int) -> int:
        """When the part was needed last, before a position; maybe in the last call (negative)."""
        where = self._where.get(name)
        if not where:
            return -1
        i = bisect_left(where, position)
        return where[i - 1] if i > 0 else where[-1] - len(self.plan.steps)

    def _latest_first(self, names: Set[str], position: int) -> list[str]:
        """These parts, the one first that is needed last from a position on."""
        if len(names) < 2:
            return list(names)
        return sorted(names, key=lambda name: (-self._next(name, position), name))

    # ---- what goes, what comes

    def _loosen(self, position: int | None, needs: tuple[str, ...]) -> list[str]:
        """What the plan gives up after the last step may go."""
        drops = self.plan.drops.get(self.position)
        if not drops:
            self._fresh.clear()
            return []
        released = [
            name
            for name in drops
            if name in self.resident and name not in needs and name not in self._loose
        ]
        after = self.position + 1 if position is None else position
        for name in released:
            self._horizon = min(self._horizon, self._next(name, after))
            self._loose.add(name)
            self._goes(name)
        self._fresh = set(released)
        return released

    def _make_room(
        self, coming: int, room: int, needs: tuple[str, ...], position: int | None
    ) -> list[str]:
        """Give up what is loose, and then what is needed last, until `coming` bytes fit."""
        out: list[str] = []
        missing = self.resident_nbytes + coming - room
        if missing <= 0:
            return out
        at = max(0, self.position) if position is None else position
        latest_first = self._latest_first
        loose = self._loose.difference(needs)
        for name in latest_first(loose - self._fresh, at) + latest_first(loose & self._fresh, at):
            if missing <= 0:
                return out
            missing -= self._leave(name)
            out.append(name)
        if missing > 0:
            for name in latest_first(self.resident.keys() - set(needs), at):
                self._horizon = min(self._horizon, self._next(name, at))
                self.pressed.append((self._last(name, at), name))
                missing -= self._leave(name)
                out.append(name)
                if missing <= 0:
                    break
        return out

    def _fetch_ahead(
        self,
        position: int,
        arrived: list[str],
        out: list[str],
        room: int,
        *,
        begin: int | None = None,
        most: float = float("inf"),
    ) -> None:
        steps, resident, given_up = self.plan.steps, self.resident, self._loose
        phases, sizes, count = self.plan.of_step, self.plan.sizes, len(steps)
        now = position if begin is None else begin
        phase = phases[now] if now < count else None
        ahead, end = max(self._horizon, position + 1), position + count
        while ahead < end and most > 0:
            missing: list[str] = []
            loose: list[str] = []
            coming = kept = 0
            where = ahead if ahead < count else ahead - count
            late = self.plan.late.get(phases[where], ())
            for name in steps[where].needs:
                if name not in resident:
                    if name not in late:
                        missing.append(name)
                        coming += sizes[name]
                elif name in given_up:
                    loose.append(name)
                    kept += sizes[name]
            if not (missing or loose):
                ahead += 1
                continue
            # Within a phase there is room, as nearly always; it is not worth a call to find out.
            is_here = ahead < count and phases[ahead] == phase == self._staying_since
            if not is_here and not self._fits_until(ahead, now, coming + kept):
                break
            for name in loose:
                given_up.discard(name)
                self._stays(name)
            lacking = self.resident_nbytes + coming - room
            if lacking > 0 and not self._give_up_loose(lacking, now, out):
                break
            for name in missing:
                self._join(name)
            arrived += missing
            most -= coming
            ahead += 1
        self._horizon = ahead

    def _fits_until(self, ahead: int, position: int, coming: int) -> bool:
        """Whether there is room for `coming` bytes in every phase from the next one to `ahead`'s.

        See Note [Room until then].
        """
        plan = self.plan
        phases, count = plan.of_step, len(plan.steps)
        first = phases[position] if position < count else plan.phase_at(position)
        last = phases[ahead] if ahead < count else plan.phase_at(ahead)
        if first != self._staying_since:
            self._staying.clear()
            self._staying_since = first
        if first == last:
            return True
        for phase in range(first + 1, last + 1):
            room = plan.rooms[phase % len(plan.rooms)]
            if self.resident_nbytes + coming <= room:
                continue
            if phase not in self._staying:
                self._staying[phase] = found = {
                    name: size
                    for name, size in self.resident.items()
                    if name not in self._loose and self._will_be_there(name, phase, position)
                }
                self._staying_nbytes[phase] = sum(found.values())
            if self._staying_nbytes[phase] + coming > room:
                return False
        return True

    def _will_be_there(self, name: str, phase: int, position: int) -> bool:
        """Whether something that is there, and not given up, is until a later phase begins."""
        plan = self.plan
        return name in plan.kept_into(phase % len(plan.rooms)) or self._next(
            name, position
        ) >= plan.begin_of(phase)

    def _stays(self, name: str) -> None:
        """Something has come, or is not to be given up after all."""
        for phase, found in self._staying.items():
            if self._will_be_there(name, phase, max(0, self.position)):
                found[name] = self.resident[name]
                self._staying_nbytes[phase] += found[name]

    def _goes(self, name: str) -> None:
        """Something has left, or is to be given up."""
        for phase, found in self._staying.items():
            self._staying_nbytes[phase] -= found.pop(name, 0)

    def _give_up_loose(self, nbytes: int, position: int, out: list[str]) -> bool:
        """Give up so many bytes of what is loose, or nothing if that is not enough."""
        free = self._loose - self._fresh if self._fresh else self._loose
        if not free or sum([self.resident[name] for name in free]) < nbytes:
            return False
        for name in self._latest_first(free, position):
            nbytes -= self._leave(name)
            out.append(name)
            if nbytes <= 0:
                break
        return True

    def _size(self, name: str) -> int:
        size = self.plan.sizes.get(name)
        if size is None:  # a part that came after the plan was made
            size = self._known()[name] if self._known is not None else 0
        return size

    def _join(self, name: str) -> None:
        self.resident[name] = self._size(name)
        self.resident_nbytes += self.resident[name]
        if self._staying:
            self._stays(name)

    def _leave(self, name: str) -> int:
        if self._staying:
            self._goes(name)
        nbytes = self.resident.pop(name)
        self.resident_nbytes -= nbytes
        self._loose.discard(name)
        self._fresh.discard(name)
        return nbytes
