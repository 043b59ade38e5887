"""Runs pipelines within a budget: has the director say what comes and goes, and does it.

The first call with new arguments is recorded: what runs after what, how long the device computes
for it, and how much memory it takes besides weights (see `first_call.py`). After it, the next one
like it is planned whole.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from .core.director import Director, Orders
from .core.plan import Plan
from .core.trace import Step, step_of
from .core.units import format_bytes
from .errors import DeviceOutOfMemory
from .first_call import NOBODY_FORESEES, FirstCall
from .grant import AUTO, Budget, free_now, largest_step, smallest_for
from .interrupts import Uninterrupted
from .known_calls import KnownCalls
from .moves import Moves
from .recording import Timing
from .second_try import refusal_of

if TYPE_CHECKING:
    from .engine import Engine
    from .hooks import Part
    from .traces import KeptTrace

logger = logging.getLogger("greenroom")


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
        self._to_be_cast: list[str] = []
        self._key: Hashable = None
        self._prior: list[Step] = []
        self._inside: list[str] = []  # components whose forwards run: what lies beside their blocks
        self._now: Step | None = None
        self._is_watched = False
        self._first: FirstCall | None = None  # while a call is learned
        self._timing: Timing | None = None  # of the last call that went by a new plan
        self._is_moving = False  # weights
        #: The thread of a component while which runs nothing comes or goes: its parts need not be
        #: told of. None if something may, or none runs.
        self.quiet_in: int | None = None
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
                with Uninterrupted():
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
        self._is_watched, self.quiet_in = is_watched, None
        self._moves.masters = None if is_watched else object()
        self._inside, self._now, self._key = [], None, key
        self._unsqueezed = None
        self._refused_at = 0
        self._prior = list(prior)
        self._take_in_what_others_did()
        for part in self._moves.parts:  # until the call is over, if nobody else's code runs in it
            if is_watched:
                part.watch()
            else:
                part.trust()
        self._moves.outside_nbytes = self.engine.backend.allocated_bytes() - self._moves.ours_nbytes
        self.engine.log.finds(self._moves.outside_nbytes)
        self._before = self._moves.sizes
        self._kept = kept
        if self._timing is not None:
            self.known.learn_times(self._timing, kept if key == self._timing.key else None)
        self._timing = None
        plan = self.known.plan(key, self._before, self.budget, kept)
        if plan is not None and self.known.is_to_be_timed(key):
            self._timing = Timing(self.engine.backend, key, plan)
        self._first = None
        if plan is None:
            self._first = FirstCall(
                self.engine,
                self._moves,
                budget=self.budget,
                usable=self._usable_now,
                costs=self.known.costs,
                prior=self._prior,
                at_work=self._needs_at_work,
                foresees=key is not None,
            )
            plan = self._first.guess(self._prior)
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
        self._inside, self._now, self.quiet_in = [], None, None
        is_done = not self.engine.backend.is_busy()
        first, self._first = self._first, None
        if first is not None and first.is_empty:
            self._expect_changes()
            return
        is_as_planned = first is not None or not director.deviations
        if first is not None:
            first.begin_next()
        if is_as_planned:
            self._send_replaced_home()  # the decoder, cast for its work, say
        if first is not None:
            plan = first.plan_next()
            self.known.learn(self._key, plan, self._before, self._kept)
            self._warn_if_exceeded(plan.steps)
            logger.info("plan for the next call within %d bytes:\n%s", self.budget, plan)
            director.follow(plan, at=len(plan.steps) - 1)
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
        self._inside, self._now, self._first = [], None, None
        self.quiet_in = None
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
        if self._first is not None:
            self._first.end_step()
        self._send_home_but(())

    def raised(self, part: Part) -> None:
        """A forward of the component has raised: it does not run any more."""
        self.quiet_in = None
        if part.key in self._inside:
            del self._inside[self._inside.index(part.key) :]

    def send_home(self, part: Part) -> None:
        """A part goes home, whoever may need it."""
        self._now, self.quiet_in = None, None
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
        self._is_moving, self.quiet_in = True, None
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
        if self._first is not None:
            self._first.end_step()
        if moves.director is None:  # no pipeline's call, which would end: nothing is learned
            self.begin_call(None, [], is_watched=True)
            self._first = moves.masters = None
            if enters:
                self._inside.append(part.key)
        director = moves.director
        assert director is not None
        if self._inside == [part.key]:  # what the one before it worked on is gone
            if self._first is not None:
                self._first.relax()
            self._send_cast_home(part)
        orders = director.begin(step)
        is_noted = log.needs(
            step,
            bool(orders.offload or orders.onload),
            self._first is not None,
            director.expected_beside,
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
        if self._first is not None:
            self._first.begin_step(step)
        else:
            if director.is_quiet and not moves.waits_to_send:
                self.quiet_in = threading.get_ident()
            if enters and self._timing is not None:
                self._timing.begin(director)

    def left(self, part: Part) -> None:
        """A component's forward has returned: its weights are for others to see."""
        self._is_moving, self.quiet_in = True, None
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
        if self._first is not None and not self._inside:
            self._first.replan(part, self._to_be_cast)

    def foresee(self, part: Part) -> contextlib.AbstractContextManager[object]:
        """While a component runs first, what it works on makes room for itself."""
        return NOBODY_FORESEES if self._first is None else self._first.foresee(part)

    def _needs_at_work(self) -> set[str] | None:
        """What the step that runs needs; None while weights move."""
        if self._is_moving:
            return None
        return {*self._inside, *(self._now.needs if self._now is not None else ())}

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
        if self._first is not None:
            self._first.forget_stay(part)
            self._first.relax()
        if self._unsqueezed is None:
            self._unsqueezed = director.plan
        director.follow(director.plan.squeezed(0), at=director.position)

    def _was_refused(self) -> None:
        """The device has refused: remember at how many bytes, if that was not foreseen."""
        backend, director = self.engine.backend, self.director
        self._refused_at = backend.allocated_bytes() - self._moves.outside_nbytes
        is_foreseen = director is not None and director.expected_beside is not None
        if is_foreseen and self._first is None:
            self.known.limit(self._key, min(self._refused_at, self._usable_now))
        self.engine.log.because("the device has no room")
        backend.restart_peak()

    def _send_home_but(self, stays: Iterable[str]) -> None:
        self._now, self.quiet_in = None, None
        self._interrupt()
        self._moves.send_home_but(stays)

    def _interrupt(self) -> None:
        if self._first is not None:
            self._first.interrupt()

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
        if self._first is not None:
            beside = self._first.beside_of_stay(part)
        else:
            there = director.resident_nbytes + self._moves.outside_nbytes
            beside = max(0, self.engine.backend.restart_peak() - there)
        logger.info("%s takes %d bytes besides weights", part.key, beside)
        if self._unsqueezed is not None:
            room = max(0, min(self._usable_now, self._refused_at) - beside)
            at = director.position
            plan = self._unsqueezed.squeezed(room)
            if self._first is None and at >= 0 and self._key is not None:
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
