"""The engine's log: what ran and what moved in the last few calls.

Noting something costs the host a few microseconds and never makes it wait: times are events that
the device passes by itself, and are read when somebody asks. What is resident and runs again is
counted, and nothing is recorded on the device but the end of its forward. What happens often is
noted as plain values; sums, causes in words and the like are for who reads. Events of a call that
is no longer kept are recorded again in a later one.

Note [Whose memory when]: weights live in the pool of the stream that copies, which takes their
memory and gives it back in the order in which the host asks, whatever the other streams are at. An
event on that stream beside each of the two tells when a byte was in use: a part from where its copy
begins until what is sent next may take its place, so that at no moment the sum is more than the
allocator counted. What the pipeline works on lives in the pool of the stream that computes, in that
stream's order. Of both together only the host's order tells the sum, which is the order in which
they are noted here; what is sent after a call has returned comes after all that it worked on.
"""

from __future__ import annotations

import collections
import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from .events import Call, Event, Offloaded, Onloaded, Ran

if TYPE_CHECKING:
    from ..core.trace import Step
    from ..device.backend import Backend

logger = logging.getLogger("greenroom")

_NOW = "it is needed now"
# Causes that name a part, put into words when somebody asks.
_AHEAD = "it is needed after {!r}, and there is room"
_ROOM = "room for {!r} and what follows it"

_CALLS = 4
_MOST_EVENTS = 20_000  # in a call: a FLUX of 57 blocks that streams for 100 steps takes as many


class _Run:
    """A stay in a part, as it is noted."""

    __slots__ = (
        "asked",
        "began",
        "beside_nbytes",
        "cleared",
        "demanded",
        "ended",
        "forwards",
        "found_ahead",
        "needs",
        "part",
    )

    def __init__(
        self,
        part: str,
        needs: tuple[str, ...],
        asked: Any,
        forwards: int,
        beside_nbytes: int | None,
    ) -> None:
        self.part = part
        self.needs = needs
        self.asked = asked
        self.forwards = forwards
        self.beside_nbytes = beside_nbytes
        self.cleared: Any = None
        self.began: Any = None
        self.ended: Any = None
        self.demanded: tuple[str, ...] = ()
        self.found_ahead: tuple[str, ...] = ()

    def read(self, clock: Callable[[Any], float | None], until: float | None) -> Ran:
        ended = clock(self.ended)
        return Ran(
            self.part,
            self.forwards,
            clock(self.asked),
            clock(self.asked if self.cleared is None else self.cleared),
            clock(self.began),
            until if ended is None else ended,
            self.demanded,
            self.found_ahead,
            self.beside_nbytes,
        )


#: Why something moved: in words, or the run that it moved for.
_Cause: TypeAlias = "str | _Run"
#: An onload or an offload as it is noted: the event's class, the part, its bytes, of them the
#: page-locked or the copied ones, two times, and the cause. Most of what the log notes are these.
_Move: TypeAlias = tuple[Any, str, int, int, Any, Any, _Cause]


def _read_move(move: _Move, clock: Callable[[Any], float | None]) -> Onloaded | Offloaded:
    kind, part, nbytes, of_them, first, last, cause = move
    began, ended = clock(first), clock(last)
    if kind is Onloaded:
        is_ahead = _is_ahead(part, cause)
        return Onloaded(part, nbytes, of_them, is_ahead, began, ended, _why_sent(part, cause))
    if began is not None and ended is not None:
        began = min(began, ended)  # it was free before the device came to what had been queued
    return Offloaded(part, nbytes, of_them, began, ended, _why_gone(cause))


def _is_ahead(part: str, cause: _Cause) -> bool:
    return isinstance(cause, str) or part not in cause.needs


def _why_sent(part: str, cause: _Cause) -> str:
    if isinstance(cause, str):
        return cause
    return _NOW if part in cause.needs else _AHEAD.format(cause.part)


def _why_gone(cause: _Cause) -> str:
    return cause if isinstance(cause, str) else _ROOM.format(cause.part)


@dataclass(eq=False)
class _Raw:
    """A call as it is noted."""

    pipeline: str
    owner: Callable[[], object]
    budget: int | None
    began: Any
    resident: dict[str, int]
    times: list[Any]  # events of the device that are its alone
    kind: Hashable = None
    entries: list[_Run | _Move] = field(default_factory=list)
    missed: int = 0
    returned: Any = None
    returned_at: int | None = None  # as many entries were noted before
    outcome: str = "running"
    peak: tuple[int, _Run] | None = None
    is_by_step: bool = False  # it is learned: others measure the memory that each step takes
    others_nbytes: int | None = None  # on the device when it began, and no weights of ours

    @property
    def is_outside(self) -> bool:
        """Whether it is what happens outside of all calls."""
        return not self.pipeline

    @property
    def runs(self) -> list[_Run]:
        """Those of its entries that ran."""
        return [entry for entry in self.entries if isinstance(entry, _Run)]

    def returns(self, now: Any) -> None:
        """What is noted from now on is for the next call."""
        if self.returned_at is None:
            self.returned, self.returned_at = now, len(self.entries)

    def note(self, entry: _Run | _Move) -> None:
        if len(self.entries) < _MOST_EVENTS:
            self.entries.append(entry)
        else:
            self.missed += 1


class Log:
    """What one engine did, for the last few calls. Its lock is held by who notes and who reads."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._calls: collections.deque[_Raw] = collections.deque(maxlen=_CALLS)
        self._open: _Raw | None = None  # a pipeline's call that runs
        self._run: _Run | None = None
        self._component = ""  # whose part that is
        self._resident: dict[str, int] = {}  # bytes of what is there or on its way
        self._used: set[str] = set()  # of it, all but what was sent ahead and not used yet
        self._bringing: _Run | None = None  # whose needs are being brought
        self._stream: Any = None  # that it runs on
        self._is_other = False  # whether another component runs than before
        self._weights_nbytes = 0  # on the device as long as it runs, where there is no budget
        self._cause = "it was asked for"
        self._is_told = False  # whether each move is a line for people at once
        self._times: list[Any] = []  # of the call that was begun last
        self._spare = backend.transfer.spare_times

    # ---- a call

    def begin(
        self, pipeline: str, owner: object, budget: int | None, kind: Hashable = None
    ) -> None:
        """A pipeline's call begins. `owner` tells one pipeline from another.

        `kind` is what calls within a budget have in common that are planned alike.
        """
        within = "without a budget" if budget is None else f"within {budget} bytes"
        logger.debug("a call of %s begins, %s", pipeline, within)
        self._open = self._begun(pipeline, weakref.ref(owner), budget)
        self._open.kind = kind
        self.because("another call begins")
        self._backend.newest_peak()

    def _begun(self, pipeline: str, owner: Callable[[], object], budget: int | None) -> _Raw:
        if self._calls and self._calls[-1].is_outside and not self._calls[-1].runs:
            self._calls.pop()  # nobody will ask for it
        if len(self._calls) == _CALLS:
            self._spare[:] = self._calls.popleft().times  # and what is left of those before goes
        self._times = []
        call = _Raw(pipeline, owner, budget, self.now(), dict(self._resident), self._times)
        self._calls.append(call)
        self._run, self._bringing, self._stream = None, None, None
        return call

    def finds(self, others_nbytes: int) -> None:
        """So much is on the device as a call within a budget begins that is no weight of ours."""
        if self._open is not None and self._open.others_nbytes is None:
            self._open.others_nbytes = others_nbytes

    def returns(self) -> None:
        """The call is over; what follows, until `end`, is for the next one."""
        if self._open is not None:
            self._read_peak()
            self._open.returns(self.now())
            self.because("the call is over")

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more will be noted for the call."""
        if self._open is not None:
            self._open.outcome = "returned" if error is None else f"raised {type(error).__name__}"
            if self._open.returned_at is None:
                self._read_peak()
                self._open.returns(self.now())
            self._backend.restore_peak()
            logger.debug("the call of %s %s", self._open.pipeline, self._open.outcome)
        self._open, self._run, self._bringing = None, None, None
        self.because("it was asked for")

    def because(self, cause: str) -> None:
        """Why parts come and go from now on, unless one that is needed is why."""
        self._cause = cause
        self._is_told = logger.isEnabledFor(logging.DEBUG)

    # ---- what runs

    def needs(
        self,
        step: Step,
        moves: bool = False,
        every: bool = False,
        beside_nbytes: int | None = None,
        asked: Any = None,
    ) -> bool:
        """A part is about to run.

        Args:
            step: which, and what has to be there for it.
            moves: whether anything will be sent or given up for it.
            every: note it also if it goes on with what ran before, and nothing moves.
            beside_nbytes: device memory that it is known to take besides weights.
            asked: the point that the device has come to then, which is the log's from now on; None
                if nobody has recorded it yet.

        Returns:
            Whether `runs` is to be told.
        """
        part, names, opens = step.part, step.needs, step.opens
        run, component, used = self._run, _component(part), self._used
        is_other = run is None or self._component != component
        are_used = used.issuperset(names)
        if run is not None and are_used and not (is_other or moves or every):
            if opens:
                run.forwards += 1
            if beside_nbytes is not None and beside_nbytes > (run.beside_nbytes or 0):
                run.beside_nbytes = beside_nbytes
            return self._bringing is not None
        if is_other:
            self._read_peak()
            self._component, self._weights_nbytes = component, 0
        self._is_other = is_other
        call = self._open or self._call()
        if is_other or opens or self._stream is None:
            # To ask for it costs more than all else of a time, and nobody changes it in the middle
            # of a component's forward.
            self._stream = self._backend.current_stream() if self._backend.keeps_time else None
            self._is_told = logger.isEnabledFor(logging.DEBUG)
        if asked is None:
            asked = self._time(self._stream)
        else:
            self._times.append(asked)
        run = _Run(part, names, asked, 1 if opens else 0, beside_nbytes)
        if not are_used:
            for name in names:
                if name not in used and name in self._resident:
                    run.found_ahead += (name,)
                    used.add(name)
        if every:
            call.is_by_step = True
        call.note(run)
        self._run = self._bringing = run
        self._cause = "the pipeline asked for it"
        return True

    def runs(self) -> None:
        """What is needed is there, or the device waits for it by itself."""
        run, self._bringing = self._run, None
        if run is not None and run.began is None:
            if run.demanded or run.found_ahead:
                run.began = self._time(self._stream)
            else:
                run.began = run.asked if run.cleared is None else run.cleared
            if self._open is not None and self._open.budget is None:
                self._weights_nbytes = sum(self._resident.values())
            if self._is_other:
                self._read_peak(is_alone=False)

    def is_at(self, part: str) -> bool:
        """Whether this part is the last that was needed."""
        return self._run is not None and self._run.part == part

    def took(self, beside_nbytes: int) -> None:
        """So much device memory besides weights was in use at most since the part began to run."""
        if self._run is not None:
            self._run.beside_nbytes = beside_nbytes

    def left(self, part: str) -> None:
        """A forward of the component is over."""
        run = self._run
        if run is None or self._component != _component(part):
            return
        if run.ended is None:
            run.ended = self._time(self._stream)
        else:
            run.ended.record(self._stream)

    # ---- what moves

    def now(self) -> Any:
        """What the device does next is timed by this event; None if it keeps no time."""
        return self._time(self._backend.current_stream()) if self._backend.keeps_time else None

    def _time(self, stream: Any) -> Any:
        """The point that a stream has come to. See `Transfer.spare_times`."""
        if stream is None:
            return None
        event = self._spare.pop() if self._spare else self._backend.transfer.new_time()
        event.record(stream)
        self._times.append(event)
        return event

    def sent(self, part: str, nbytes: int, pinned_nbytes: int, journey: tuple[Any, Any]) -> None:
        """A part was sent; `journey` has the events of its first byte and its last, which are the
        log's from now on.
        """
        if nbytes == 0:  # it has no weights, or they are there
            if part not in self._resident:
                self._resident[part] = 0
                self._used.add(part)
            return
        run = self._bringing
        cause: _Cause = self._cause if run is None else run
        if run is not None and part in run.needs:
            run.demanded += (part,)
            self._used.add(part)
        else:
            self._used.discard(part)
        if self._is_told:
            logger.debug("onload %s, %d bytes: %s", part, nbytes, _why_sent(part, cause))
        self._resident[part] = nbytes
        call = self._open or self._call()
        began, ended = journey
        call.note((Onloaded, part, nbytes, pinned_nbytes, began, ended, cause))
        if began is not None:
            call.times += journey

    def leaves(self, part: str) -> Any:
        """A part is about to leave the device: when; None if it is not there."""
        if part not in self._resident:
            return None
        run = self._bringing
        if run is not None:  # it is noted already
            return run.asked if run.cleared is None else run.cleared
        # Of no call yet: it may be noted in one that begins after this.
        return self._backend.record_time() if self._backend.keeps_time else None

    def forget(self, part: str) -> None:
        """A part is no more, and its memory on the device is free."""
        self._resident.pop(part, None)
        self._used.discard(part)

    def came_home(self, part: str, copied_nbytes: int, began: Any) -> None:
        """A part left the device, and so many of its bytes were copied to the host."""
        nbytes = self._resident.pop(part, None)
        if nbytes is None:
            return  # it was not there
        self._used.discard(part)
        call = self._open or self._call()
        freed = self._time(self._backend.transfer.h2d_stream)
        run = self._bringing
        cause: _Cause = self._cause
        if run is not None:
            cause = run
            run.cleared = self._time(self._stream)
        if self._is_told:
            said = _why_gone(cause)
            logger.debug("offload %s, %d bytes copied home: %s", part, copied_nbytes, said)
        call.note((Offloaded, part, nbytes, copied_nbytes, began, freed, cause))

    # ---- reading

    def read(self, owner: object, parts: Iterable[str], which: int = -1) -> Call | None:
        """A call of a pipeline; None if the log has it not. Waits until the device has done it all.

        Args:
            owner: as in `begin`.
            parts: that the pipeline has; of what ran outside of calls, one of these must have.
            which: -1 for the last, -2 for the one before.
        """
        call = self._find(owner, parts, which)
        if call is None:
            return None
        self._backend.synchronize()
        return _read(call, str(self._backend.device))

    def kind_of(self, owner: object, parts: Iterable[str], which: int = -1) -> Hashable:
        """The kind of the call that `read` gives; None if it has none."""
        call = self._find(owner, parts, which)
        return None if call is None else call.kind

    def _find(self, owner: object, parts: Iterable[str], which: int) -> _Raw | None:
        known = set(parts)
        found = [
            call
            for call in self._calls
            if call.owner() is owner
            or (call.is_outside and any(run.part in known for run in call.runs))
        ]
        try:
            return found[which]
        except IndexError:
            return None

    def _call(self) -> _Raw:
        if self._open is not None:
            return self._open
        last = self._calls[-1] if self._calls else None
        if last is None or not last.is_outside or len(last.entries) >= _MOST_EVENTS:
            self._begun("", _nobody, None)
        return self._calls[-1]

    def _read_peak(self, *, is_alone: bool = True) -> None:
        """What was taken at most since this was last read: by the part that runs, if alone."""
        call = self._open
        if call is None or self._run is None or call.is_by_step:
            return
        peak = self._backend.newest_peak()
        if peak is None:
            return
        if call.peak is None or peak > call.peak[0]:
            call.peak = (peak, self._run)
        if is_alone and self._run.beside_nbytes is None and call.budget is None:
            self._run.beside_nbytes = max(0, peak - self._weights_nbytes)


def _nobody() -> None:
    return None


def _read(call: _Raw, device: str) -> Call:
    def clock(event: Any) -> float | None:
        if event is None or call.began is None:
            return None
        try:
            return float(call.began.elapsed_time(event)) / 1e3
        except (RuntimeError, ValueError):  # it was recorded while a graph was captured
            return None

    events: list[Event] = []
    seconds = until = clock(call.returned)
    for entry in reversed(call.entries):
        if isinstance(entry, _Run):
            ran = entry.read(clock, until)
            until = ran.asked_s if ran.asked_s is not None else until
            events.append(ran)
        else:
            events.append(_read_move(entry, clock))
    peak, run = summed = _summed_peak(call)
    if call.peak is not None:
        peak, run = call.peak  # of a component: in which of its runs that was, the sums tell
        if summed[1] is not None and _component(summed[1].part) == _component(run.part):
            run = summed[1]
    return Call(
        call.pipeline,
        device,
        call.budget,
        call.outcome,
        seconds,
        dict(call.resident),
        peak,
        run.part if run is not None else None,
        clock(run.began) if run is not None else None,
        tuple(reversed(events)),
        call.missed,
        call.is_by_step,
        call.others_nbytes or 0,
    )


def _summed_peak(call: _Raw) -> tuple[int | None, _Run | None]:
    """The most that weights and what was measured beside them took together, and at what.

    See note [Whose memory when].
    """
    resident = dict(call.resident)
    run: _Run | None = None
    most: tuple[int | None, _Run | None] = (None, None)
    for entry in [*call.entries[: call.returned_at], None]:
        if isinstance(entry, tuple):
            kind, part, nbytes, *_ = entry
            if kind is Onloaded:
                resident[part] = nbytes
            else:
                resident.pop(part, None)
            continue
        if run is not None and run.beside_nbytes is not None:
            taken = sum(resident.values()) + run.beside_nbytes + (call.others_nbytes or 0)
            if most[0] is None or taken > most[0]:
                most = (taken, run)
        run = entry
    return most


@functools.cache
def _component(part: str) -> str:
    """Whose a part is, so far as its name tells: ``"unet.mid_block#7"`` is of ``"unet"``."""
    return part.partition("#")[0].partition(".")[0]
