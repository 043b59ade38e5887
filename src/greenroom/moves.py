"""Carries orders out: what is on a device within a budget, on its way there, and home again."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .core.director import Director, Orders
from .device.reserve import Reserve
from .outbox import Outbox

if TYPE_CHECKING:
    from .core.simulate import Costs
    from .device.backend import Backend
    from .hooks import Part

logger = logging.getLogger("greenroom")


class Moves:
    """The parts within one budget, and where they are."""

    def __init__(
        self,
        backend: Backend,
        part: Callable[[str], Part],
        is_known: Callable[[str], bool],
        costs: Callable[[], Costs],
    ) -> None:
        self._backend = backend
        self._part = part
        self._is_known = is_known
        self._costs = costs
        self._outbox = Outbox(backend, part)
        self._reserve = Reserve(backend)
        self._room = -1  # bytes for weights in the phase that runs
        self._stream: Any = None  # that calls run on
        self.parts: weakref.WeakSet[Part] = weakref.WeakSet()
        self.director: Director | None = None
        #: See `WeightStore.send`.
        self.masters: object = None
        #: On the device when the call began, and not ours.
        self.outside_nbytes = 0
        #: Bytes that were copied home because they had changed, or nobody could tell.
        self.came_home_nbytes = 0

    @property
    def in_order(self) -> list[Part]:
        """The parts, in the same order every time."""
        return sorted(self.parts, key=lambda part: part.key)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each part."""
        return {part.key: part.store.nbytes for part in self.parts}

    @property
    def ours_nbytes(self) -> int:
        """Bytes of weights on the device."""
        return sum(part.store.nbytes for part in self.parts if part.store.is_away)

    @property
    def there_nbytes(self) -> int:
        """The same by the director's account."""
        director = self.director
        assert director is not None
        return director.resident_nbytes - self._outbox.nbytes(director.resident)

    # ---- orders

    def carry_out(self, orders: Orders, needs: Sequence[str], room: int, budget: int) -> None:
        """Do as the director says.

        Args:
            orders: what leaves and what comes.
            needs: what runs next, and has to be in use.
            room: bytes that the phase leaves for weights.
            budget: bytes for all.

        Raises:
            torch.OutOfMemoryError: the device refused; what is there is in the director's account.
        """
        try:
            for name in orders.offload:
                self.go_home(name)
            for name in orders.release:
                if not self._part(name).is_watched:  # else somebody may still change it
                    self._part(name).check()
            if orders.settles:
                self._backend.transfer.settle()
            self._outbox.order(orders.onload)
            self._keep_reserve(room, budget)
            for name in needs:
                if name in self._outbox:
                    self._outbox.send(name, self.masters)
                self._arrive(name)
            self._outbox.send_ahead(self.masters, self._costs)
            self._reserve.note(self.there_nbytes)
        except BaseException:
            self.recount()
            raise

    def room_as_it_is(self, budget: int) -> int:
        """Bytes for weights, if nobody empties the allocator's cache and waits for the device."""
        return self._reserve.room(budget + self.outside_nbytes)

    def send_while_busy(self, names: Iterable[str]) -> None:
        """Send so many of these as the device has work for, and leave the rest."""
        self._outbox.order(names)
        try:
            self._outbox.send_while_busy(self.masters)
            self._reserve.note(self.there_nbytes)
        except torch.OutOfMemoryError:
            logger.debug("no room yet for what the next call begins with")
        finally:
            self.recount()

    def _keep_reserve(self, room: int, budget: int) -> None:
        """See Note [Two pools] in `device/reserve.py`."""
        director = self.director
        assert director is not None
        if room == self._room:
            return
        self._room = room
        most_nbytes = min(room, sum(director.plan.sizes.values()))
        budget += self.outside_nbytes
        self._reserve.make_fit(self.there_nbytes, most_nbytes, room, budget)

    def send_all(self) -> None:
        """Send all that was ordered."""
        if self._outbox.send_all(self.masters):
            self._reserve.note(self.there_nbytes)

    def show_sent(self, names: Iterable[str]) -> None:
        """Have those of these in use that are on their way; what the next step needs is sent."""
        director = self.director
        if director is None:
            return
        for name in names:
            if name in self._outbox and name in director.next_needs:
                self._outbox.send(name, self.masters)
            if name in director.resident and name not in self._outbox:
                self._arrive(name)

    def send_now(self, names: Iterable[str]) -> None:
        """Have these in use, whoever ordered what."""
        for name in names:
            part = self._part(name)
            if not part.store.is_away:
                part.send(self.masters)
            self._arrive(name)

    def show(self, names: Iterable[str]) -> None:
        """Let modules use what is on its way.

        Until it arrives a module uses its masters, and nothing tells of a change to those that no
        version counts.
        """
        for name in [name for name in names if self._is_known(name)]:
            self._arrive(name)

    def show_what_comes(self) -> None:
        """The same with all that is on its way."""
        if self._outbox.coming:
            self.show(self._outbox.coming)

    def _arrive(self, name: str) -> None:
        self._part(name).arrive()
        self._outbox.coming.discard(name)

    def step_ends(self) -> Any:
        """A step is about to be ordered: the one before it ends here on the device.

        Returns:
            An event there that tells its time; None if the step is not in the plan.
        """
        director = self.director
        if director is None or director.position < 0:
            return None
        steps = director.plan.steps
        seconds = steps[director.position].seconds
        if director.is_quiet:
            seconds = sum(steps[i].seconds or 0.0 for i in director.stay)
        return self._outbox.step_ends(self._stream, seconds)

    @property
    def waits_to_send(self) -> bool:
        """Whether something that was ordered was not sent yet."""
        return bool(self._outbox)

    def follow_stream(self) -> None:
        """Whoever computes on another stream now comes after all that was done on the last one."""
        stream = self._backend.current_stream()
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def call_begins(self) -> None:
        """What was ordered of the device before does not count, nor what its memory was for."""
        self._outbox.call_begins()
        self._room = -1  # the last call's result has gone since, say

    # ---- home

    def go_home(self, name: str) -> None:
        """A part goes home; the director has said so, or will be told."""
        self._outbox.withdraw(name)
        self.came_home_nbytes += self._part(name).go_home()

    def send_home(self, part: Part) -> None:
        """A part goes home, whoever may need it."""
        if self.director is not None and part.key in self.director.resident:
            self.go_home(part.key)
            self.director.gone([part.key])

    def send_home_but(self, stays: Iterable[str]) -> None:
        """Everything else goes home."""
        stays = set(stays)
        try:
            for part in self.in_order:
                if part.store.is_away and part.key not in stays:
                    self.go_home(part.key)
        finally:
            self.recount()

    def send_all_home(self) -> Exception | None:
        """Everything goes home. What cannot stays, and is accounted for; the error is returned."""
        self._outbox.clear()
        self._outbox.call_begins()  # what comes next, maybe much later, is another one
        failed: Exception | None = None
        try:
            for part in self.in_order:
                if part.store.is_away:
                    try:
                        self.go_home(part.key)
                    except Exception as error:
                        failed = error
        finally:  # also if somebody presses Ctrl-C once more
            self.recount()
        return failed

    def recount(self) -> None:
        """Something went wrong: what is on the device is what is on the device."""
        self._outbox.clear()
        if self.director is not None:
            self.director.recount(part.key for part in self.parts if part.store.is_away)

    def forget(self, key: str) -> None:
        """A part is no more."""
        if self.director is not None:
            self.director.gone([key])
        self._outbox.withdraw(key)
