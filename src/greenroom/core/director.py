"""Says, step by step, what leaves the device and what goes there, within a budget.

It follows a plan as long as the call goes as expected, and finds its place again when it does not:
never wrong, only slower. Pure: events in, orders out. `simulate` and the engine follow the very
same director.

Note [What is fetched ahead]: parts are sent in the order in which they are needed, each as soon as
there is room for it beside what the steps until then work on. Everything that is needed before the
*horizon* is there or on its way, so nothing else will be sent before it, and no part that is needed
before it is given up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from .plan import Plan
from .trace import Step


@dataclass(frozen=True)
class Orders:
    """What to do before a step: first let go, then send on the way, in this order."""

    offload: tuple[str, ...] = ()
    onload: tuple[str, ...] = ()


class Director:
    """One budget, what is within it, and where the call is in its plan."""

    def __init__(self, plan: Plan, sizes: Callable[[], Mapping[str, int]] | None = None) -> None:
        self._known = sizes
        self.deviations = 0
        self.resident: dict[str, int] = {}  # bytes of what is there or on its way
        self.resident_nbytes = 0
        self._loose: set[str] = set()  # resident, and to be given up as soon as its room is wanted
        self.follow(plan)

    def follow(self, plan: Plan, *, at: int = -1) -> None:
        """Go by this plan from now on; the step that runs, or ran last, is its `at`-th."""
        self.plan = plan
        self.position = at
        self._horizon = 0
        self._where: dict[str, list[int]] = {}
        for i, step in enumerate(plan.steps):
            for name in step.needs:
                self._where.setdefault(name, []).append(i)

    def begin_call(self) -> None:
        """The next step is the plan's first, again."""
        count = len(self.plan.steps)
        self._horizon = max(0, self._horizon - count) if self.position == count - 1 else 0
        self.position = -1
        self.deviations = 0

    def begin(self, step: Step) -> Orders:
        """A part is about to run."""
        position = self._find(step)
        self._loosen(position)
        arrived = [name for name in step.needs if name not in self.resident]
        self._loose.difference_update(step.needs)
        coming = sum(map(self._size, arrived))
        room = self.plan.room(position, position)
        out = self._make_room(coming, room, step.needs, position)
        for name in arrived:
            self._join(name)
        if position is not None:
            self.position = position
            self._fetch_ahead(position, arrived, out)
        return Orders(tuple(out), tuple(arrived))

    def end_call(self) -> Orders:
        """The call is over; what the next one begins with may come already."""
        last = len(self.plan.steps) - 1
        arrived: list[str] = []
        out: list[str] = []
        if self.position == last:  # it was not cut short, and did not end elsewhere
            self._loosen(last + 1)
            self._fetch_ahead(last, arrived, out)
        return Orders(tuple(out), tuple(arrived))

    def gone(self, names: Iterable[str]) -> None:
        """Parts left the device by somebody else's decision, or never came."""
        for name in names:
            if name in self.resident:
                self._leave(name)
        self._horizon = 0

    # ---- where we are

    def _find(self, step: Step) -> int | None:
        """The step's position in the plan: the expected one, or the nearest that is like it."""
        steps, expected = self.plan.steps, self.position + 1
        if expected < len(steps) and steps[expected].place == step.place:
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
        rounds, inside = divmod(position, count)
        i = bisect_left(where, inside)
        return rounds * count + (where[i] if i < len(where) else count + where[0])

    # ---- what goes, what comes

    def _loosen(self, position: int | None) -> None:
        """What the plan gives up after the last step may go, if it is not needed very soon."""
        for name in self.plan.drops.get(self.position, ()):
            if name in self.resident and (
                position is None or self._next(name, position) >= self._horizon
            ):
                self._loose.add(name)

    def _make_room(
        self, coming: int, room: int, needs: tuple[str, ...], position: int | None
    ) -> list[str]:
        """Give up what is loose, and then what is needed last, until `coming` bytes fit."""
        out: list[str] = []
        if self.resident_nbytes + coming <= room:
            return out
        at = max(0, self.position) if position is None else position
        others = sorted(
            self.resident.keys() - set(needs),
            key=lambda name: (name not in self._loose, -self._next(name, at), name),
        )
        for name in others:
            if self.resident_nbytes + coming <= room:
                break
            if name not in self._loose:
                self._horizon = min(self._horizon, self._next(name, at))
            self._leave(name)
            out.append(name)
        return out

    def _fetch_ahead(self, position: int, arrived: list[str], out: list[str]) -> None:
        steps = self.plan.steps
        count = len(steps)
        ahead = max(self._horizon, position + 1)
        while ahead < position + count:
            needs = steps[ahead % count].needs
            if self._loose:
                self._loose.difference_update(needs)
            missing = [name for name in needs if name not in self.resident]
            if missing:
                room = self.plan.room(position, ahead)
                coming = sum(map(self._size, missing))
                if not self._give_up_loose(self.resident_nbytes + coming - room, position, out):
                    break
                for name in missing:
                    self._join(name)
                arrived += missing
            ahead += 1
        self._horizon = ahead

    def _give_up_loose(self, nbytes: int, position: int, out: list[str]) -> bool:
        """Give up so many bytes of what is loose, or nothing if that is not enough."""
        if nbytes <= 0:
            return True
        if sum(self.resident[name] for name in self._loose) < nbytes:
            return False
        for name in sorted(self._loose, key=lambda name: (-self._next(name, position), name)):
            nbytes -= self.resident[name]
            self._leave(name)
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

    def _leave(self, name: str) -> None:
        self.resident_nbytes -= self.resident.pop(name)
        self._loose.discard(name)
