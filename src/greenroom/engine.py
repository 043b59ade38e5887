"""The thin shell around the machine: one engine for each device, shared by all pipelines on it.

Hooks say what is about to run; the machine decides; the weight stores act. One lock for each device
is held while a pipeline's call runs, so that calls of several threads, or of pipelines that share
components, take turns instead of sending each other's weights away.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch

from .core.machine import CallEnded, Done, Event, Failed, Left, Machine, Needed, Onload
from .core.pinning import LOCKED_IN_PLACE, PinningAllowance
from .core.trace import Step, step_of
from .core.units import format_bytes
from .device.backend import Backend
from .errors import DeviceOutOfMemory, UsageError
from .grant import Budget
from .interrupts import Uninterrupted
from .observe.log import Log
from .second_try import refusal_without_budget
from .within_budget import WithinBudget, locking_bar

if TYPE_CHECKING:
    from .device.layout import Segment
    from .hooks import Part
    from .traces import KeptTrace

logger = logging.getLogger("greenroom")

# Bytes that are gathered and page-locked after a forward: host work of about 0.1 s, which must not
# outlast what the device has queued. What is locked in place is not gathered.
_SETTLE_AT_ONCE = 192 * 2**20


def _nobody() -> None:
    return None


def _is_torch_refusal(error: BaseException) -> bool:
    is_out_of_memory = isinstance(error, torch.OutOfMemoryError)
    return is_out_of_memory and not isinstance(error, DeviceOutOfMemory)


class Engine:
    """What is on one device, and the way there."""

    _engines: ClassVar[dict[torch.device, Engine]] = {}

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.backend = Backend(device)
        self.machine = Machine()
        self.log = Log(self.backend)
        self.lock = threading.RLock()
        self._parts: weakref.WeakValueDictionary[str, Part] = weakref.WeakValueDictionary()
        self._budgets: weakref.WeakValueDictionary[Budget, WithinBudget] = (
            weakref.WeakValueDictionary()
        )
        self._serial = itertools.count()
        self._dropped: collections.deque[str] = collections.deque()
        self._callers: list[WithinBudget | None] = []  # of the calls that go on, outermost first
        # Whose parts may be on the device: of one budget, or of none.
        self._holder: Callable[[], WithinBudget | None] = _nobody
        self._pinning = PinningAllowance()
        self._is_settled = False  # since the last onload

    @classmethod
    def of(cls, device: torch.device) -> Engine:
        """The engine of a device (with its index)."""
        return cls._engines.setdefault(device, cls(device))

    def within(self, budget: Budget) -> WithinBudget:
        """What runs pipelines within so many bytes; one for all that were granted as many."""
        found = self._budgets.get(budget)
        if found is None:
            self._budgets[budget] = found = WithinBudget(self, budget)
        return found

    # ---- who is there

    def join(self, part: Part, name: str, *, in_sequence: bool) -> str:
        """Take a component in; returns the key it is known by, which is its name made unique."""
        with self.lock, Uninterrupted():
            self._forget_dropped()
            key = name if name not in self._parts else f"{name}#{next(self._serial)}"
            kin = [other for other, known in self._parts.items() if known.held & part.held]
            self._parts[key] = part
            if part.within is not None:
                part.within.add(part)
            self.machine.add(key, in_sequence=in_sequence)
            for other in kin:
                self.machine.make_kin(key, other)
                part.kin = (*part.kin, other)
                self._parts[other].kin = (*self._parts[other].kin, key)
            # Garbage is collected in any thread, at any moment: what went is noted, and no more.
            weakref.finalize(part, self._dropped.append, key).atexit = False
            return key

    def part(self, key: str) -> Part:
        """The part known by a key."""
        return self._parts[key]

    def is_known(self, key: str) -> bool:
        """Whether there is still such a part: components go when nobody needs them."""
        return key in self._parts

    def leave(self, key: str) -> None:
        """Send a component home and forget it."""
        with self.lock, Uninterrupted():
            self.send_home(key)
            part = self._parts.pop(key, None)
            if part is not None and part.within is not None:
                part.within.remove(part)
            self._forget(key)

    def _forget(self, key: str) -> None:
        self.machine.remove(key)
        self.log.forget(key)
        for within in list(self._budgets.values()):
            within.forget(key)

    def _forget_dropped(self) -> None:
        """Forget the components that are no more."""
        while self._dropped:
            key = self._dropped.popleft()
            if key not in self._parts:  # else another one has taken the name
                self._forget(key)

    # ---- what happens

    def need(self, key: str, *, enters: bool) -> None:
        """Have a component on the device when this returns.

        Raises:
            torch.OutOfMemoryError, WeightsError: it could not be brought there; it is at home then.
        """
        with self.lock, Uninterrupted():
            if self._dropped:
                self._forget_dropped()
            part = self._parts[key]
            if part.within is not self._holder():
                self._hand_over(part.within, part.store.nbytes)
            if part.within is not None:
                part.within.need(part, enters=enters)
                return
            if not self.machine.is_resident(key):
                self._forget_dead_threads()
            # An autoencoder's side has several entrances, one after the other.
            is_again = enters and part.has_entrances and self.log.is_at(key)
            is_noted = self.log.needs(step_of(key, (), enters and not is_again))
            self._carry_out(Needed(key, enters, threading.get_ident()))
            if is_noted:
                self.log.runs()

    def left(self, key: str) -> None:
        """A forward of the component has returned; while the device works, the host prepares."""
        with self.lock:
            part = self._parts[key]
            self.log.left(key)
            if part.within is not None:
                with Uninterrupted():
                    part.within.left(part)
                return
            self.machine.handle(Left(key, threading.get_ident()))
            self._settle_while_busy()

    @contextlib.contextmanager
    def call(self, pipeline: str, owner: object) -> Iterator[None]:
        """A pipeline's call without a budget: at its end, however it comes, everything is home.

        `pipeline` and `owner` are for the log: the class, and what tells it from others.
        """
        with self.lock, Uninterrupted() as uninterrupted:
            if not self._callers:
                self.log.begin(pipeline, owner, None)
                self._hand_over(None, 0)
            self._callers.append(None)
            raised: BaseException | None = None
            try:
                with uninterrupted.lifted():
                    yield
            except BaseException as error:
                raised = error
                if len(self._callers) == 1 and _is_torch_refusal(error):
                    raised = refusal_without_budget(pipeline, self.device, error)
                    raise raised from error
                raise
            finally:
                self._callers.pop()
                if not self._callers:
                    self.log.because("the call is over")
                    try:
                        self.end_call()
                    finally:
                        self.log.end(raised)
                raised = None  # its traceback holds this frame
            if not self._callers:
                with uninterrupted.lifted():
                    self._settle_what_was_saved()

    @contextlib.contextmanager
    def call_within(
        self,
        within: WithinBudget,
        kind: Hashable,
        order: Sequence[Step],
        *,
        casts: Sequence[str],
        kept: KeptTrace,
        pipeline: str,
        owner: object,
        is_watched: bool,
    ) -> Iterator[None]:
        """A pipeline's call within a budget: weights wait where the next one like it wants them.

        For `kind`, `order`, `casts`, `kept` and `is_watched` see `WithinBudget.begin_call`, for
        `pipeline` and `owner` see `call`. If the call raises, everything goes home.
        """
        with self.lock, Uninterrupted() as uninterrupted:
            self._forget_dropped()
            is_outermost, is_own = not self._callers, within not in self._callers
            raised: BaseException | None = None
            if is_own:
                self._hand_over(within, within.budget)
                within.grant_anew()
            if is_outermost:
                self.log.begin(pipeline, owner, within.budget, kind)
            self._callers.append(within)
            try:
                if is_own:
                    within.begin_call(kind, order, casts=casts, is_watched=is_watched, kept=kept)
                with uninterrupted.lifted():
                    yield
                if is_own:
                    self._hand_over(within, 0)
                    if is_outermost:
                        self.log.returns()
                    self._forget_dropped()
                    within.end_call()
                    if not is_outermost:
                        within.send_all_home()
            except BaseException as error:
                raised = error
                if is_own:
                    self.log.because("the call raised")
                    within.fail_call(error)
                    if _is_torch_refusal(error):
                        raised = within.refusal(pipeline, error)
                        raise raised from error
                raise
            finally:
                self._callers.pop()
                if is_outermost:
                    self.log.end(raised)
                raised = None  # its traceback holds this frame

    def _hand_over(self, within: WithinBudget | None, nbytes: int) -> None:
        """From now on the device is for parts of this budget, which take so many bytes.

        Or for those of none. What others have there goes home; a call of theirs that goes on, from
        whose callback this is, goes on afterwards.

        Raises:
            UsageError: a forward of theirs goes on, whose weights cannot go home.
        """
        before = self._holder()
        if within is before:
            return
        for caller in [c for c in self._callers if c is not None and c is not within]:
            if caller.at_work:
                raise UsageError(
                    f"inside a forward of {caller.at_work!r}, which has a budget of "
                    f"{format_bytes(caller.budget)}, something runs that has another budget or "
                    "none: their weights cannot take turns. Enable both with the same budget"
                )
            if nbytes > caller.budget:
                warnings.warn(
                    f"inside a call with a budget of {format_bytes(caller.budget)} something runs "
                    f"that may take {format_bytes(nbytes)}: the larger one counts meanwhile",
                    stacklevel=4,
                )
        for other in list(self._budgets.values()):
            if other is not within:
                other.give_way(goes_on=other in self._callers)
        if before is None:
            self._forget_dead_threads()
            self._carry_out(CallEnded(threading.get_ident()))
        self._holder = _nobody if within is None else weakref.ref(within)

    def end_call(self) -> None:
        """Send every component home."""
        with self.lock, Uninterrupted():
            if len(self._callers) <= 1:
                self._forget_dead_threads()
                self._carry_out(CallEnded(threading.get_ident()))

    def give_up(self, within: WithinBudget) -> None:
        """Ctrl-C came before a call began, or as it ended: what waits for the next one goes home.

        A call of another thread's is not waited for, and goes on.
        """
        if not self.lock.acquire(blocking=False):
            return
        try:
            with Uninterrupted():
                if not self._callers:
                    within.send_all_home()
        finally:
            self.lock.release()

    def send_home(self, key: str) -> bool:
        """Send one component home; False if it is at work in another thread, and stays."""
        with self.lock, Uninterrupted():
            part = self._parts.get(key)
            if part is not None and part.within is not None:
                part.within.send_home(part)
                return True
            if part is None or not self.machine.is_resident(key):
                return True
            self._forget_dead_threads()
            if self.machine.is_busy(key, but=threading.get_ident()):
                return False
            part.go_home()
            self.machine.went_home(key)
            return True

    def _forget_dead_threads(self) -> None:
        alive = (thread.ident for thread in threading.enumerate())
        self.machine.forget_threads_but(frozenset(i for i in alive if i is not None))

    def _carry_out(self, event: Event) -> None:
        instructions = list(self.machine.handle(event))
        while instructions:
            instruction = instructions[0]
            part = self._parts.get(instruction.name)
            try:
                if part is not None:
                    if isinstance(instruction, Onload):
                        part.go_to_device()
                        self._is_settled = next(self._unsettled(), None) is None
                    else:
                        self._pinning.dropped(part.store.nbytes - part.go_home())
            except BaseException:
                for failed in instructions:
                    self.machine.handle(Failed(failed.name))
                raise
            self.machine.handle(Done(instruction.name))
            instructions.pop(0)

    # ---- host memory

    def _settle_while_busy(self) -> None:
        """Page-lock some host weights, as long as the device has work."""
        if self._is_settled:
            return
        unsettled = self._unsettled()
        left = float(_SETTLE_AT_ONCE)
        while left > 0 and self.backend.is_busy():
            found = next(unsettled, None)
            if found is None:
                self._is_settled = True
                return
            part, segment = found
            with Uninterrupted():
                part.store.settle(segment)
            left -= segment.nbytes * (LOCKED_IN_PLACE if segment.may_stay else 1)

    def _settle_what_was_saved(self) -> None:
        """Page-lock as many host weights as the call has saved the time for."""
        left: float = self._pinning.take()
        with locking_bar() as bar:
            for part, segment in self._unsettled():
                left -= segment.nbytes * (LOCKED_IN_PLACE if segment.may_stay else 1)
                if left < 0:
                    return
                with Uninterrupted():
                    part.store.settle(segment)
                bar.update(segment.nbytes)

    def _unsettled(self) -> Iterator[tuple[Part, Segment]]:
        for part in [part for part in self._parts.values() if part.within is None]:
            while (segment := part.store.next_to_settle) is not None:
                yield part, segment
