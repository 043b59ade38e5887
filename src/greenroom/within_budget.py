"""Runs pipelines within a budget: records steps, has them planned, and carries out the orders.

The first call with new arguments is recorded: what runs after what, how long the device computes
for it, and how much memory it takes besides weights. Times are read from events of the device.
After the first stay in each component the rest of the call is planned anew, with what was measured;
after the call, the next one like it is planned whole.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .activations import ActivationWatch, is_compiled
from .core.director import Director, Orders
from .core.expect import and_more, is_near, rest_of_call
from .core.plan import Plan, make_plan
from .core.trace import Step, step_of
from .core.units import format_bytes
from .errors import DeviceOutOfMemory
from .grant import (
    ACTIVATION_PARTS,
    AUTO,
    Budget,
    free_now,
    largest_step,
    smallest_for,
)
from .known_calls import KnownCalls
from .moves import Moves
from .recording import Recording, Timing
from .second_try import refusal_of

if TYPE_CHECKING:
    from .engine import Engine
    from .hooks import Part
    from .traces import KeptTrace

logger = logging.getLogger("greenroom")

_NOBODY_FORESEES = contextlib.nullcontext()


def locking_bar() -> tqdm[Any]:
    """Tells how far page-locking is, on a terminal, if it takes long."""
    return tqdm(desc="page-locking weights", unit="B", unit_scale=True, delay=1, disable=None)


class WithinBudget:
    """What a device's engine does when it was granted a budget."""

    def __init__(self, engine: Engine, budget: Budget) -> None:
        self.engine = engine
        self._is_auto = budget == AUTO
        self.budget = free_now(engine.backend, 0) if budget == AUTO else budget
        #: The budget that components are taken apart for.
        self.divided_for = self.budget
        if self._is_auto:  # more may be free when they run
            self.divided_for = max(self.budget, engine.backend.memory_bytes() // 4)
        #: What is known of calls that were seen.
        backend = engine.backend
        self.known = KnownCalls(backend.transfer.bytes_per_s, backend.unusable_nbytes)
        backend.let_segments_grow()
        self._moves = Moves(engine.backend, engine.part, engine.is_known, self.known.costs)
        self._kept: KeptTrace | None = None  # of the call that goes on
        self._before: Mapping[str, int] = {}  # bytes of all parts when the call began
        self._cast: dict[str, int] = {}  # seen while a call is learned: bytes after it
        self._to_be_cast: list[str] = []
        self._key: Hashable = None
        self._prior: list[Step] = []
        self._inside: list[str] = []  # components whose forwards run: what lies beside their blocks
        self._now: Step | None = None
        self._is_watched = False
        self._recording: Recording | None = None  # while a call is learned
        self._timing: Timing | None = None  # of the last call that went by a new plan
        self._foresees = False  # what a component works on, while it runs first
        self._is_moving = False  # weights
        #: Nothing comes or goes while the component that runs does: its parts need not be told of.
        self.is_quiet = False
        self.quiet_thread = 0  # in which it runs
        #: What is left for what was never measured; None where nobody foresees it.
        self._unmeasured_nbytes: int | None = None
        self._unpressed: Plan | None = None  # what is followed but for what a component works on
        self._refused_at = 0  # bytes that were allocated when the device refused last
        self._unsqueezed: Plan | None = None  # what is followed but for a refusal

    @property
    def director(self) -> Director | None:
        """Who says what goes and comes; None before the first call."""
        return self._moves.director

    @property
    def came_home_nbytes(self) -> int:
        """Bytes that were copied home so far."""
        return self._moves.came_home_nbytes

    @property
    def expected(self) -> tuple[Step, ...]:
        """The steps that the last call was begun with, if no call like it had been seen."""
        return tuple(self._prior)

    @property
    def cast_nbytes(self) -> Mapping[str, int]:
        """Of the plan's sizes, what parts take besides that were cast for their work."""
        sizes = self.director.plan.sizes if self.director is not None else {}
        return {name: n - self._before[name] for name, n in sizes.items() if name in self._before}

    def lock_memory(self) -> None:
        """Page-lock the weights of every part, so that no call has to."""
        with locking_bar() as bar:
            for part in self._moves.in_order:
                part.store.settle_all()
                bar.update(part.store.nbytes)

    def grant_anew(self) -> None:
        """A call is about to begin: if the budget is what is free, see how much that is."""
        if self._is_auto:
            self.budget = free_now(self.engine.backend, self._moves.ours_nbytes)

    def add(self, part: Part) -> None:
        """Know a part from now on."""
        self._moves.parts.add(part)

    def remove(self, part: Part) -> None:
        """It was taken down, and has no say in where its weights are, however long it lives."""
        self._moves.parts.discard(part)

    # ---- a call

    def begin_call(
        self,
        key: Hashable,
        prior: Sequence[Step],
        *,
        casts: Sequence[str] = (),
        is_watched: bool = False,
        kept: KeptTrace | None = None,
    ) -> None:
        """A pipeline's call begins.

        Args:
            key: tells which calls are alike.
            prior: the order to expect if no call like it was ever seen.
            casts: parts that are expected to be cast for their work.
            is_watched: whether somebody else's code runs in it, which may look at weights, and
                change them.
            kept: what another process may have learned of calls like it.
        """
        self._is_watched, self.is_quiet = is_watched, False
        self._moves.masters = None if is_watched else object()
        self._inside, self._now, self._key = [], None, key
        self._unsqueezed = self._unpressed = None
        self._refused_at = 0
        self._prior = list(prior)
        self._take_in_what_others_did()
        for part in self._moves.parts:  # until the call is over, if nobody else's code runs in it
            if is_watched:
                part.watch()
            else:
                part.trust()
        self._moves.outside_nbytes = self.engine.backend.allocated_bytes() - self._moves.ours_nbytes
        self._before = self._moves.sizes
        self._kept = kept
        if self._timing is not None:
            self.known.learn_times(self._timing, kept if key == self._timing.key else None)
        self._timing = None
        plan = self.known.plan(key, self._before, self.budget, kept)
        if plan is not None and self.known.is_to_be_timed(key):
            self._timing = Timing(self.engine.backend, key, plan)
        self._recording = Recording(self.engine.backend) if plan is None else None
        self._cast = {}
        if plan is None:
            modules = [module for part in self._moves.parts for module in part.modules]
            is_seen = key is not None and not any(map(is_compiled, modules))
            self._unmeasured_nbytes = self.budget // ACTIVATION_PARTS if is_seen else None
            plan = self._guess(self._prior)
        director = self.director
        if director is None:
            director = self._moves.director = Director(plan, lambda: self._moves.sizes)
        elif director.plan is not plan:
            director.follow(plan)
        director.begin_call()
        self._to_be_cast = [
            name
            for name, nbytes in director.plan.sizes.items()
            if self._before.get(name, nbytes) != nbytes
        ]
        self._to_be_cast += [name for name in casts if name not in self._to_be_cast]

    def _take_in_what_others_did(self) -> None:
        """Parts with new tensors since the last call, by a cast or an adapter say, go home."""
        self._moves.call_begins()
        self._moves.follow_stream()
        for part in list(self._moves.parts):
            if part.store.has_grown:
                self.send_home(part)
        self._send_replaced_home()

    def _send_replaced_home(self) -> None:
        """Parts that use other memory than they were given go home: it is in no account.

        And what was cast at home, and back, takes its place there again.
        """
        for part in list(self._moves.parts):
            nbytes = part.store.nbytes  # of what was sent while it was cast, more than before
            if not part.store.is_as_it_came or nbytes != self._before.get(part.key, nbytes):
                self.send_home(part)
            if part.store.was_cast:
                part.store.lay_out()

    def _send_cast_home(self, opens: Part) -> None:
        """What was cast for its work, and back, goes home when another component's turn comes.

        It uses other memory than it was given; and cast once more it would go home in that dtype.
        """
        if opens.key in self._to_be_cast or self.director is None or self.director.plan.fits:
            return  # where there is room for all it is in nobody's way
        for part in map(self.engine.part, self._to_be_cast):
            if part.store.is_here and not part.store.is_as_it_came:
                self.send_home(part)

    def end_call(self) -> None:
        """The call is over; what the next one needs first may come."""
        director = self.director
        if director is None:
            return
        self._inside, self._now, self.is_quiet = [], None, False
        is_done = not self.engine.backend.is_busy()
        is_as_planned = self._recording is not None or not director.deviations
        if is_as_planned:
            if self._recording is not None:
                self._finish_record(self._recording)
                self._begin_next(director, self._recording)
            self._send_replaced_home()  # the decoder, cast for its work, say
        if self._recording is not None:
            steps = self._recording.steps()
            self._recording = None
            self.engine.backend.restore_peak()
            plan = make_plan(steps, self._sizes_at_work(), self._usable_now, self.known.costs())
            self.known.learn(self._key, plan, self._before, self._kept)
            self._warn_if_exceeded(steps)
            logger.info("plan for the next call within %d bytes:\n%s", self.budget, plan)
            director.follow(plan, at=len(steps) - 1)
        elif is_as_planned and self._timing is not None:
            self._timing.end(director)
        elif not is_as_planned and not self._refused_at:
            logger.info("%d steps were not as planned: learning anew", director.deviations)
            self.known.forget(self._key)
        for part in self._moves.parts:
            part.is_watched = True  # what is sent now is there when others may change it
        result = self.engine.backend.allocated_bytes() - self._moves.ours_nbytes
        room = self._usable_now - max(0, result - self._moves.outside_nbytes)
        orders = director.end_call(is_done=is_done, room=room) if is_as_planned else Orders()
        try:
            self._moves.carry_out(orders, (), director.plan.room(0), self.budget)
            self._moves.send_all()
            # Also what was sent before, and is of the next call.
            self._moves.show(director.resident)
        except torch.OutOfMemoryError:  # the call itself is over, and its result is there
            logger.warning("no room for what the next call begins with: everything goes home")
            self.send_all_home()
        self._expect_changes()

    def _begin_next(self, director: Director, recording: Recording) -> None:
        """While the device works on the rest of a first call, what the next one needs may come.

        By the plan that was guessed, and with as much room as was measured: the next call's plan is
        made when the device is done.
        """
        self._relax()
        if self.engine.backend.is_busy():
            ahead = director.look_ahead(self._usable_now - recording.beside_of_last())
            self._moves.send_while_busy(ahead)

    def _warn_if_exceeded(self, steps: Sequence[Step]) -> None:
        most, step = largest_step(steps, self._before)
        if step is not None and most > self.budget:
            warnings.warn(
                f"{step.part!r} took {format_bytes(most)}, more than the budget of "
                f"{format_bytes(self.budget)}; that could not be known before. Calls like this one "
                f"will be refused: raise the budget to at least {smallest_for(most)}",
                stacklevel=2,
            )

    def _expect_changes(self) -> None:
        """Whoever runs now may change weights, wherever they are: note what is on the device."""
        self._moves.masters = self._kept = None
        self._is_watched = True
        for part in self._moves.parts:
            part.watch()

    def send_all_home(self) -> None:
        """Everything goes home, whoever may need it."""
        self._inside, self._now, self._recording = [], None, None
        self.is_quiet = False
        try:
            failed = self._moves.send_all_home()
        finally:
            self._expect_changes()
        if failed is not None:
            raise failed

    @property
    def at_work(self) -> str | None:
        """The component whose forward runs, if any does."""
        return self.engine.part(self._inside[-1]).store.name if self._inside else None

    def give_way(self, *, goes_on: bool) -> None:
        """Everything goes home for somebody else; whether a call then goes on."""
        if not goes_on:
            self.send_all_home()
            return
        if self._recording is not None:
            self._finish_record(self._recording)
        self._send_home_but(())

    def raised(self, part: Part) -> None:
        """A forward of the component has raised: it does not run any more."""
        self.is_quiet = False
        if part.key in self._inside:
            del self._inside[self._inside.index(part.key) :]

    def send_home(self, part: Part) -> None:
        """A part goes home, whoever may need it."""
        self._now, self.is_quiet = None, False
        self._interrupt()
        if part.key in self._inside:
            self._inside.remove(part.key)
        self._moves.send_home(part)

    def forget(self, key: str) -> None:
        """A part is no more."""
        self._moves.forget(key)

    # ---- a step

    def need(self, part: Part, *, enters: bool) -> None:
        """A part is about to run."""
        self._is_moving, self.is_quiet = True, False
        try:
            self._need(part, enters=enters)
        finally:
            self._is_moving = False

    def _need(self, part: Part, *, enters: bool) -> None:
        moves, log, now = self._moves, self.engine.log, self._now
        moves.follow_stream()
        if not enters and (
            part.key in self._inside
            or (now is not None and now.part == part.key and now.held == self._held(part))
        ):
            return
        if enters:
            if part.key in self._inside:  # its last forward raised, and has not said that it left
                del self._inside[self._inside.index(part.key) :]
            self._inside.append(part.key)
        if part.has_entrances and now is not None and now.part == part.key:
            return  # through another of its doors, one after the other
        step = step_of(part.key, self._held(part), enters)
        if self._recording is not None:
            self._finish_record(self._recording)
        if moves.director is None:  # no pipeline's call, which would end: nothing is learned
            self.begin_call(None, [], is_watched=True)
            self._recording = moves.masters = None
            if enters:
                self._inside.append(part.key)
        director = moves.director
        assert director is not None
        if self._inside == [part.key]:  # what the one before it worked on is gone
            self._relax()
            self._send_cast_home(part)
        orders = director.begin(step)
        is_noted = log.needs(
            step,
            bool(orders.offload or orders.onload),
            self._recording is not None,
            self._expected_beside(),
            moves.step_ends(),
        )
        try:
            moves.carry_out(orders, step.needs, director.room, self.budget)
        except torch.OutOfMemoryError:
            is_refused = True
        else:
            is_refused = False
        if is_refused:
            self._send_alone(part, step.needs)
        if is_noted:
            log.runs()
        self._now = step
        if self._recording is not None:
            self._note_casts(step.needs)
            self._recording.begin(step)
        else:
            self.is_quiet = director.is_quiet and not moves.waits_to_send
            self.quiet_thread = threading.get_ident()
            if enters and self._timing is not None:
                self._timing.begin(director)

    def left(self, part: Part) -> None:
        """A component's forward has returned: its weights are for others to see."""
        self._is_moving, self.is_quiet = True, False
        try:
            self._left(part)
        finally:
            self._is_moving = False

    def _left(self, part: Part) -> None:
        if part.key in self._inside:
            self._inside.remove(part.key)
        if part.has_entrances:
            return
        self._now = None
        if self._to_be_cast:
            # What comes next and will be cast is to be cast there, not at home.
            self._moves.show_sent(self._to_be_cast)
        if self._is_watched:
            self._moves.send_all()
            self._moves.show_what_comes()
        if self._recording is not None and not self._inside:
            self._replan(part, self._recording)

    def _relax(self) -> None:
        """What pressed is over: follow the plan as it was."""
        if self.director is not None and self._unpressed is not None:
            self.director.follow(self._unpressed, at=self.director.position)
        self._unpressed = None

    def foresee(self, part: Part) -> contextlib.AbstractContextManager[object]:
        """While a component runs first, what it works on makes room for itself."""
        recording = self._recording
        if (
            recording is None
            or self._unmeasured_nbytes is None
            or self._foresees
            or len(recording.opened(part.key)) != 1
        ):
            return _NOBODY_FORESEES
        return self._foreseeing()

    @contextlib.contextmanager
    def _foreseeing(self) -> Iterator[None]:
        self._foresees = True
        try:
            with ActivationWatch(self.engine.device, self._make_room_beside):
                yield
        finally:
            self._foresees = False

    def _make_room_beside(self, nbytes: int) -> int:
        """So many bytes are about to be worked on besides weights; returns what there is for it."""
        director, backend = self.director, self.engine.backend
        assert director is not None
        if self._is_moving or self._recording is None:
            return nbytes  # it is our own
        others = self._moves.there_nbytes + self._moves.outside_nbytes
        beside = backend.allocated_bytes() - others
        room = min(director.room, sum(director.plan.sizes.values()))
        if self._usable_now - room - beside < nbytes:
            # A little more, not to do it for every operation.
            room = max(0, self._usable_now - beside - nbytes - self.budget // 32)
            self._recording.look(others)
            needs = {*self._inside, *(self._now.needs if self._now is not None else ())}
            self._unpressed = self._unpressed or director.plan
            self.engine.log.because("what a component works on needs room")
            self._moves.carry_out(director.press(room, needs), (), room, self.budget)
            backend.restart_peak()
        return self._usable_now - max(room, director.resident_nbytes) - beside

    def _held(self, part: Part) -> tuple[str, ...]:
        """What has to be there while a part runs, itself perhaps apart."""
        held = tuple(self._inside)
        if part.beside is not None and part.beside.key not in held:
            held = (*held, part.beside.key)
        # What brought a shared weight here first stays as long as it is needed.
        return (*held, *(k for k in part.kin if k not in held and self._is_mine(k)))

    def _is_mine(self, key: str) -> bool:
        return self.engine.part(key).within is self

    # ---- when the device refuses

    def fail_call(self, error: BaseException) -> None:
        """The call has raised: everything goes home."""
        if isinstance(error, torch.OutOfMemoryError) and not isinstance(error, DeviceOutOfMemory):
            self._was_refused()  # else that is known, and everything was sent home since
        try:
            self.send_all_home()
        except Exception:  # what the call has raised matters more
            logger.exception("not everything could go home; the next call begins with what stayed")

    def make_room(self, part: Part) -> None:
        """Everything goes home but what the forwards around this part's need.

        For the rest of the call no more than what is needed stays, until `went_well`.
        """
        director = self.director
        assert director is not None
        self._was_refused()
        around = self._inside[: self._inside.index(part.key)] if part.key in self._inside else ()
        self._send_home_but(around)
        if self._recording is not None:
            self._recording.forget_stay(part.key)
        self._relax()
        if self._unsqueezed is None:
            self._unsqueezed = director.plan
        director.follow(director.plan.squeezed(0), at=director.position)

    def _was_refused(self) -> None:
        """The device has refused: remember at how many bytes, if that was not foreseen."""
        backend, director = self.engine.backend, self.director
        self._refused_at = backend.allocated_bytes() - self._moves.outside_nbytes
        if director is not None and self._recording is None and self._expected_beside() is not None:
            self.known.limit(self._key, min(self._refused_at, self._usable_now))
        self.engine.log.because("the device has no room")
        backend.restart_peak()

    def _send_home_but(self, stays: Iterable[str]) -> None:
        self._now, self.is_quiet = None, False
        self._interrupt()
        self._moves.send_home_but(stays)

    def _interrupt(self) -> None:
        if self._recording is not None:
            self._recording.interrupt()

    def _send_alone(self, part: Part, needs: tuple[str, ...]) -> None:
        """The device has refused to take what a step needs: it gets all there is."""
        assert self.director is not None
        self._was_refused()
        self._send_home_but(needs)
        try:
            self._moves.send_now(needs)
        except torch.OutOfMemoryError as error:
            raise self.refusal(part.store.name, error, is_alone=True) from error
        finally:
            self._moves.recount()

    def went_well(self, part: Part) -> None:
        """There was room for the second try; keep as much more there as leaves it."""
        director = self.director
        assert director is not None
        if self._recording is not None:
            self._finish_record(self._recording)
            beside = self._recording.beside_of_stay(part.key)
        else:
            there = director.resident_nbytes + self._moves.outside_nbytes
            beside = max(0, self.engine.backend.restart_peak() - there)
        logger.info("%s takes %d bytes besides weights", part.key, beside)
        if self._unsqueezed is not None:
            room = max(0, min(self._usable_now, self._refused_at) - beside)
            at = director.position
            plan = self._unsqueezed.squeezed(room)
            if self._recording is None and at >= 0 and self._key is not None:
                # Within what there seems to be, and as if it were so in this phase alone.
                again = self.known.plan(self._key, self._before, self.budget, self._kept)
                if again is not None and len(again.steps) == len(plan.steps):
                    plan = again.squeezed(room, at=at)
            director.follow(plan, at=at)
            self._unsqueezed = None

    def refusal(
        self, name: str, error: BaseException, *, is_alone: bool = False
    ) -> DeviceOutOfMemory:
        """The error that says so."""
        free = self.engine.backend.free_bytes()
        return refusal_of(self, name, error, free_nbytes=free, is_alone=is_alone)

    @property
    def _usable_now(self) -> int:
        """Bytes for the call that goes on."""
        return self.known.usable(self._key, self.budget)

    # ---- learning

    def _finish_record(self, recording: Recording) -> None:
        assert self.director is not None
        beside = recording.end(self._moves.there_nbytes + self._moves.outside_nbytes)
        if beside is not None:
            self.engine.log.took(beside)
            self._expect_more(beside)

    def _expect_more(self, beside_nbytes: int) -> None:
        """Steps like the last one may work on more than was expected: make room for that."""
        director, expected = self.director, self._expected_beside()
        assert director is not None
        room = self._usable_now - and_more(beside_nbytes)
        if expected is None or not is_near(beside_nbytes, self._usable_now - director.room):
            return
        position = director.position
        director.follow(director.plan.narrowed(position, room), at=position)
        if self._unpressed is not None:
            self._unpressed = self._unpressed.narrowed(position, room)

    def _expected_beside(self) -> int | None:
        """What the step that runs, or a quiet stay, took besides weights when it was measured."""
        director = self.director
        if director is None or not 0 <= director.position < len(director.plan.steps):
            return None
        steps = director.plan.steps
        if not director.is_quiet:
            return steps[director.position].beside_nbytes
        return max((steps[i].beside_nbytes or 0 for i in director.stay), default=0)

    def _replan(self, part: Part, recording: Recording) -> None:
        """After the first stay in a component: expect what was expected, and what was measured."""
        assert self.director is not None
        opened = recording.opened(part.key)
        if len(opened) != 1:
            return
        self._finish_record(recording)
        done = recording.steps()
        helpers = {p.key for p in self._moves.parts if not p.in_sequence}
        # In the last turn all may be cast that is there for what comes, to twice its size.
        used = {step.part for step in (*done, *self._prior)}.intersection(self._to_be_cast)
        cast = sum(2 * self._moves.sizes[name] for name in used)
        rest = rest_of_call(done, opened[0], self._prior, helpers, least_nbytes=cast)
        plan, self._unpressed = self._guess([*done, *rest]), None
        self.director.follow(plan, at=len(done) - 1)

    def _guess(self, steps: Sequence[Step]) -> Plan:
        """A plan for steps of which some were never measured."""
        return make_plan(
            steps,
            self._moves.sizes,
            self._usable_now,
            self.known.costs(),
            unmeasured_nbytes=self._unmeasured_nbytes,
        )

    def _note_casts(self, names: Iterable[str]) -> None:
        """Parts that have another size than when the call began were cast for their work."""
        for name in names:
            nbytes = self.engine.part(name).store.nbytes
            if self._before.get(name, nbytes) != nbytes:
                self._cast[name] = max(nbytes, self._cast.get(name, 0))

    def _sizes_at_work(self) -> dict[str, int]:
        """What parts take while they work: those that are cast, before it and after it."""
        return {name: n + self._cast.get(name, 0) for name, n in self._moves.sizes.items()}
