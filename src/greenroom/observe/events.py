"""What the engine did during one call, as values: what ran, what moved, how the call ended.

Times are seconds after the call began, read from events of the device: virtual on the simulator,
the GPU's own on a GPU, and never the host's. They are None where a device keeps no time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True)
class Ran:
    """A stay in a part: its component computed, and nothing had to be waited for in between.

    A part is what moves as one: a component, or a run of its blocks where it streams.

    Attributes:
        part: what was asked for.
        forwards: how many forwards of a component began.
        asked_s: the device had done all that came before.
        cleared_s: what had to leave for it had left, and was looked at for changes.
        began_s: the weights were there. From `asked_s` on, the device waited for this.
        ended_s: the last forward was over, or something else was asked for.
        demanded: parts that were sent only now.
        found_ahead: parts that had been sent before, and are used for the first time.
        beside_nbytes: most device memory in use besides weights meanwhile; None if not measured.
    """

    part: str
    forwards: int
    asked_s: float | None
    cleared_s: float | None
    began_s: float | None
    ended_s: float | None
    demanded: tuple[str, ...] = ()
    found_ahead: tuple[str, ...] = ()
    beside_nbytes: int | None = None

    @property
    def stalled_s(self) -> float:
        """How long the device waited for weights, and for room for them."""
        return _between(self.asked_s, self.began_s)

    @property
    def clearing_s(self) -> float:
        """How long of it, until there was room."""
        return _between(self.asked_s, self.cleared_s)

    @property
    def compute_s(self) -> float:
        """How long it had what it needed."""
        return _between(self.began_s, self.ended_s)


@dataclass(frozen=True)
class Onloaded:
    """A part was sent to the device.

    Attributes:
        part: which.
        nbytes: how many bytes.
        pinned_nbytes: of them from page-locked memory; the others held the host up.
        is_ahead: whether it was sent before it was needed.
        began_s: its device memory was taken, the link was free, and the copy began.
        ended_s: it arrived.
        cause: why, in words.
    """

    part: str
    nbytes: int
    pinned_nbytes: int
    is_ahead: bool
    began_s: float | None
    ended_s: float | None
    cause: str = ""


@dataclass(frozen=True)
class Offloaded:
    """A part left the device.

    Attributes:
        part: which.
        nbytes: of device memory that became free.
        copied_nbytes: copied to the host, because they had changed.
        began_s: the device had done all that came before, or the memory was free.
        ended_s: the memory was free.
        cause: why, in words.
    """

    part: str
    nbytes: int
    copied_nbytes: int
    began_s: float | None
    ended_s: float | None
    cause: str = ""


Event: TypeAlias = Ran | Onloaded | Offloaded


@dataclass(frozen=True)
class Call:
    """One call of a pipeline, or what ran outside of any.

    Attributes:
        pipeline: the class that was called.
        device: where, as torch names it.
        budget: bytes that were granted; None: one component at a time.
        outcome: ``"returned"``, ``"raised ValueError"``, or ``"running"``.
        seconds: from its begin until all of it was done. What is prepared then for the next call
            (parts that are sent, host memory that is page-locked) is not in it.
        resident: bytes of what was on the device when it began, by part.
        peak_nbytes: most device memory in use. None where that was not measured: torch's own
            statistics are not restarted for it, so that on a GPU only a new maximum tells.
        others_nbytes: of these, what was there when it began and is no weight of ours; a budget is
            not for it. 0 without one.
        peak_part: what ran then.
        peak_s: when that began to run.
        events: what happened, in the order in which it was asked for.
        missed: how many more events there were, which the log had no room for.
        is_first: no call like it was known, so that it was measured, for later ones to be planned.
    """

    pipeline: str
    device: str
    budget: int | None
    outcome: str
    seconds: float | None
    resident: Mapping[str, int] = field(default_factory=dict)
    peak_nbytes: int | None = None
    peak_part: str | None = None
    peak_s: float | None = None
    events: tuple[Event, ...] = ()
    missed: int = 0
    is_first: bool = False
    others_nbytes: int = 0

    @property
    def runs(self) -> tuple[Ran, ...]:
        """What ran."""
        return tuple(event for event in self.events if isinstance(event, Ran))

    @property
    def onloads(self) -> tuple[Onloaded, ...]:
        """What was sent to the device."""
        return tuple(event for event in self.events if isinstance(event, Onloaded))

    @property
    def offloads(self) -> tuple[Offloaded, ...]:
        """What left it."""
        return tuple(event for event in self.events if isinstance(event, Offloaded))


def _between(begin: float | None, end: float | None) -> float:
    return max(0.0, end - begin) if begin is not None and end is not None else 0.0
