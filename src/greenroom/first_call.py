"""A call whose like was never seen: it is recorded as it runs, and planned piece by piece.

It begins with the order that is expected, and a guess at what is worked on besides weights. While a
component runs first, what it works on is foreseen and makes room for itself; after that, the rest
of the call is planned anew, with what was measured.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import TYPE_CHECKING

from .activations import ActivationWatch, is_compiled
from .core.expect import and_more, is_near, rest_of_call
from .core.plan import Plan, make_plan
from .grant import ACTIVATION_PARTS
from .interrupts import Uninterrupted
from .recording import Recording

if TYPE_CHECKING:
    from .core.director import Director
    from .core.simulate import Costs
    from .core.trace import Step
    from .engine import Engine
    from .hooks import Part
    from .moves import Moves

NOBODY_FORESEES = contextlib.nullcontext()


class FirstCall:
    """A call that is learned.

    Args:
        engine: of its device.
        moves: of the parts within its budget.
        budget: bytes for all.
        usable: of these, how many it may use.
        costs: what moving takes.
        prior: the order to expect.
        at_work: what the step that runs needs; None while weights move.
        foresees: whether what a component works on is foreseen while it runs first.
    """

    def __init__(
        self,
        engine: Engine,
        moves: Moves,
        *,
        budget: int,
        usable: int,
        costs: Callable[[], Costs],
        prior: Sequence[Step],
        at_work: Callable[[], Set[str] | None],
        foresees: bool,
    ) -> None:
        self._engine = engine
        self._moves = moves
        self._budget = budget
        self._usable = usable
        self._costs = costs
        self._prior = prior
        self._at_work = at_work
        self._before = moves.sizes
        self._cast: dict[str, int] = {}  # bytes after it
        self._recording = Recording(engine.backend)
        modules = (module for part in moves.parts for module in part.modules)
        #: What is left for what was never measured; None where nobody foresees it.
        self._unmeasured_nbytes = (
            budget // ACTIVATION_PARTS if foresees and not any(map(is_compiled, modules)) else None
        )
        self._is_foreseeing = False
        self._unpressed: Plan | None = None  # what is followed but for what a component works on

    @property
    def _director(self) -> Director:
        assert self._moves.director is not None
        return self._moves.director

    def guess(self, steps: Sequence[Step]) -> Plan:
        """A plan for steps of which some were never measured."""
        return make_plan(
            steps,
            self._moves.sizes,
            self._usable,
            self._costs(),
            unmeasured_nbytes=self._unmeasured_nbytes,
        )

    @property
    def is_empty(self) -> bool:
        """Whether no component ran: there is nothing to learn."""
        return self._recording.is_empty

    # ---- a step

    def begin_step(self, step: Step) -> None:
        """A step runs; the one before it was ended."""
        self._note_casts(step.needs)
        self._recording.begin(step)

    def end_step(self) -> None:
        """The last step is over, or has been for a while."""
        beside = self._recording.end(self._moves.there_nbytes + self._moves.outside_nbytes)
        if beside is not None:
            self._engine.log.took(beside)
            self._expect_more(beside)

    def interrupt(self) -> None:
        """Weights go home, or somebody else runs."""
        self._recording.interrupt()

    def forget_stay(self, part: Part) -> None:
        """The last stay in a component has not been."""
        self._recording.forget_stay(part.key)

    def beside_of_stay(self, part: Part) -> int:
        """The most that the last stay in a component took besides weights."""
        self.end_step()
        return self._recording.beside_of_stay(part.key)

    def _note_casts(self, names: Iterable[str]) -> None:
        """Parts that have another size than when the call began were cast for their work."""
        for name in names:
            nbytes = self._engine.part(name).store.nbytes
            if self._before.get(name, nbytes) != nbytes:
                self._cast[name] = max(nbytes, self._cast.get(name, 0))

    # ---- what it works on

    def foresee(self, part: Part) -> contextlib.AbstractContextManager[object]:
        """While a component runs first, what it works on makes room for itself."""
        is_first = len(self._recording.opened(part.key)) == 1
        if self._unmeasured_nbytes is None or self._is_foreseeing or not is_first:
            return NOBODY_FORESEES
        return self._foreseeing()

    @contextlib.contextmanager
    def _foreseeing(self) -> Iterator[None]:
        self._is_foreseeing = True
        try:
            with ActivationWatch(self._engine.device, self._make_room_beside):
                yield
        finally:
            self._is_foreseeing = False

    def _make_room_beside(self, nbytes: int) -> int:
        """So many bytes are about to be worked on besides weights; returns what there is for it."""
        director, backend = self._director, self._engine.backend
        needs = self._at_work()
        if needs is None:
            return nbytes  # it is our own
        others = self._moves.there_nbytes + self._moves.outside_nbytes
        beside = backend.allocated_bytes() - others
        room = min(director.room, sum(director.plan.sizes.values()))
        if self._usable - room - beside < nbytes:
            # A little more, not to do it for every operation.
            room = max(0, self._usable - beside - nbytes - self._budget // 32)
            self._recording.look(others)
            self._unpressed = self._unpressed or director.plan
            self._engine.log.because("what a component works on needs room")
            with Uninterrupted():
                self._moves.carry_out(director.press(room, needs), (), room, self._budget)
            backend.restart_peak()
        return self._usable - max(room, director.resident_nbytes) - beside

    def relax(self) -> None:
        """What pressed is over: follow the plan as it was."""
        if self._unpressed is not None:
            self._director.follow(self._unpressed, at=self._director.position)
        self._unpressed = None

    def _expect_more(self, beside_nbytes: int) -> None:
        """Steps like the last one may work on more than was expected: make room for that."""
        director = self._director
        room = self._usable - and_more(beside_nbytes)
        is_known = director.expected_beside is not None
        if not is_known or not is_near(beside_nbytes, self._usable - director.room):
            return
        position = director.position
        director.follow(director.plan.narrowed(position, room), at=position)
        if self._unpressed is not None:
            self._unpressed = self._unpressed.narrowed(position, room)

    # ---- the rest of it, and the next one

    def replan(self, part: Part, to_be_cast: Iterable[str]) -> None:
        """After the first stay in a component: expect what was expected, and what was measured."""
        opened = self._recording.opened(part.key)
        if len(opened) != 1:
            return
        self.end_step()
        done = self._recording.steps()
        helpers = {p.key for p in self._moves.parts if not p.in_sequence}
        # In the last turn all may be cast that is there for what comes, to twice its size.
        used = {step.part for step in (*done, *self._prior)}.intersection(to_be_cast)
        cast = sum(2 * self._moves.sizes[name] for name in used)
        rest = rest_of_call(done, opened[0], self._prior, helpers, least_nbytes=cast)
        plan, self._unpressed = self.guess([*done, *rest]), None
        self._director.follow(plan, at=len(done) - 1)

    def begin_next(self) -> None:
        """While the device works on the rest of the call, what the next one needs may come.

        It is busy if its last component is an autoencoder's half, whose end nobody tells, or ran
        again. The next call's plan is made when the device is done; until then the one that was
        guessed says what comes, and there is as much room as the last component has left.
        """
        self.end_step()
        self.relax()
        if self._engine.backend.is_busy():
            left = self._usable - self._recording.beside_of_last()
            room = min(left, self._moves.room_as_it_is(self._budget))
            self._moves.send_while_busy(self._director.look_ahead(room))

    def plan_next(self) -> Plan:
        """The plan for the next call like it. Waits until the device has done this one."""
        steps = self._recording.steps()
        sizes = self._moves.sizes
        # Those that are cast, before it and after it.
        sizes = {name: nbytes + self._cast.get(name, 0) for name, nbytes in sizes.items()}
        return make_plan(steps, sizes, self._usable, self._costs())
