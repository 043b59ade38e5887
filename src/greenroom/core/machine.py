"""Decides which component is on the device, and when.

How it works
------------
One machine speaks for one device. It knows components by name, and nothing else about them. Events
come in (`Needed`: somebody is about to run this component; `Done`, `Failed`: how an instruction
ended; `CallEnded`: everything may go home), instructions go out (`Onload`, `Offload`), each
carrying the event that caused it. An instruction is a promise: until `Done` or `Failed` comes back
for it, its component is in a state between, and only those two events move it. An event that is not
legal in the present state raises `IllegalEvent` and changes nothing.

The policy without a budget
---------------------------
Only the component now at work is on the device: one that is needed sends the others home first, but
never one whose forward is running (it may have called the other), in whatever thread, and never one
that shares a weight with such a one. Two exceptions keep weights from going back and forth:

- A component outside the pipeline's sequence (a ControlNet) is called in turn with the component of
  the sequence that runs with it, and stays until the sequence moves on to another one.
- Two components that were seen to drive each other out are *companions* from then on and stay
  together.

Which companions there are is remembered from call to call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import NoReturn, TypeAlias


class State(Enum):
    """Where a component's weights are."""

    HOME = "home"  # in host memory only
    ONLOADING = "onloading"  # an Onload is being carried out
    RESIDENT = "resident"  # usable on the device
    OFFLOADING = "offloading"  # an Offload is being carried out
    KEPT = "kept"  # on the device for good, by the pipeline's wish


@dataclass(frozen=True)
class Needed:
    """A component is about to run. With `enters` it is at work until `Left` says otherwise.

    `thread`: who runs it.
    """

    name: str
    enters: bool = False
    thread: int = 0


@dataclass(frozen=True)
class Left:
    """A component's forward has returned."""

    name: str
    thread: int = 0


@dataclass(frozen=True)
class CallEnded:
    """The pipeline's call is over, well or badly: everybody goes home.

    Except who is at work in another thread.
    """

    thread: int = 0


@dataclass(frozen=True)
class Done:
    """The component's instruction was carried out."""

    name: str


@dataclass(frozen=True)
class Failed:
    """The component's instruction was not carried out; nothing of it remains."""

    name: str


Event: TypeAlias = Needed | Left | CallEnded | Done | Failed


@dataclass(frozen=True)
class Onload:
    """Copy the component's weights to the device."""

    name: str
    stimulus: Event


@dataclass(frozen=True)
class Offload:
    """Let the component's weights on the device go; what changed comes home first."""

    name: str
    stimulus: Event


Instruction: TypeAlias = Onload | Offload


class IllegalEvent(RuntimeError):
    """An event that makes no sense in the present state: our own bug. Nothing has changed."""


# The whole of it: (state, event) -> (next state, the instruction that takes it there). What is not
# here is illegal. `Release` is how CallEnded, or another component's need, reaches a component.
class Release:
    """A component may go home."""


TABLE: dict[tuple[State, type], tuple[State, type | None]] = {
    (State.HOME, Needed): (State.ONLOADING, Onload),
    (State.HOME, Release): (State.HOME, None),
    (State.ONLOADING, Done): (State.RESIDENT, None),
    (State.ONLOADING, Failed): (State.HOME, None),
    (State.RESIDENT, Needed): (State.RESIDENT, None),
    (State.RESIDENT, Release): (State.OFFLOADING, Offload),
    (State.OFFLOADING, Done): (State.HOME, None),
    (State.OFFLOADING, Failed): (State.RESIDENT, None),
    (State.KEPT, Needed): (State.KEPT, None),
    (State.KEPT, Release): (State.KEPT, None),
}


@dataclass
class _Entry:
    state: State
    in_sequence: bool
    depth: Counter[int] = field(default_factory=Counter)  # forwards that are running, by thread
    kin: set[str] = field(default_factory=set)  # who shares weights with it
    story: list[str] = field(default_factory=list)  # its last transitions, for error messages


class Machine:
    """The state of every component of one device."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._companions: set[frozenset[str]] = set()
        # Within one call: who was sent home to make room for whom, and what the sequence is at.
        self._driven_out_by: dict[str, str] = {}
        self._swaps: Counter[frozenset[str]] = Counter()
        self._at_work: str | None = None

    # ---- who is there

    def add(self, name: str, *, in_sequence: bool = True, kept: bool = False) -> None:
        """Know a component from now on. A known one is left as it is."""
        if name not in self._entries:
            self._entries[name] = _Entry(State.KEPT if kept else State.HOME, in_sequence)

    def make_kin(self, name: str, other: str) -> None:
        """Two components share weights."""
        self._entries[name].kin.add(other)
        self._entries[other].kin.add(name)

    def remove(self, name: str) -> None:
        """Forget a component, wherever it is."""
        self._entries.pop(name, None)
        for entry in self._entries.values():
            entry.kin.discard(name)
        self._driven_out_by.pop(name, None)
        self._companions = {pair for pair in self._companions if name not in pair}
        if self._at_work == name:
            self._at_work = None

    def state(self, name: str) -> State:
        """Where a component is."""
        return self._entries[name].state

    def names(self, *states: State) -> list[str]:
        """The components in any of `states`, in the order they were added; all without argument."""
        return [n for n, entry in self._entries.items() if not states or entry.state in states]

    def is_busy(self, name: str, *, but: int | None = None) -> bool:
        """Whether the component, or one that shares weights with it, is at work.

        In any thread but one, if that is given.
        """
        entries = [self._entries[n] for n in (name, *self._entries[name].kin)]
        return any(n for e in entries for thread, n in e.depth.items() if thread != but)

    def forget_threads_but(self, alive: frozenset[int]) -> None:
        """Nobody is at work in other threads than these."""
        for entry in self._entries.values():
            for thread in entry.depth.keys() - alive:
                del entry.depth[thread]

    def is_resident(self, name: str) -> bool:
        """Whether the component is on the device."""
        return name in self._entries and self._entries[name].state is State.RESIDENT

    def went_home(self, name: str) -> None:
        """A component was sent home by somebody else's decision."""
        entry = self._entries[name]
        entry.state = State.HOME
        entry.depth.clear()
        if self._at_work == name:
            self._at_work = None

    @property
    def companions(self) -> frozenset[frozenset[str]]:
        """The pairs that stay on the device together."""
        return frozenset(self._companions)

    # ---- what happens

    def handle(self, event: Event) -> tuple[Instruction, ...]:
        """Take an event, return what is to be done, in order.

        Raises:
            IllegalEvent: not in this state; the message tells the component's story.
        """
        if isinstance(event, Needed):
            return self._needed(event)
        if isinstance(event, Left):
            if (entry := self._entries.get(event.name)) is not None:
                entry.depth[event.thread] = max(0, entry.depth[event.thread] - 1)
            return ()
        if isinstance(event, CallEnded):
            for entry in self._entries.values():
                entry.depth.pop(event.thread, None)  # a forward that raised has not said Left
            self._driven_out_by.clear()
            self._swaps.clear()
            self._at_work = None
            idle = [name for name in self.names(State.RESIDENT) if not self.is_busy(name)]
            return self._release(idle, event)
        self._move(event.name, type(event), event)
        return ()

    def _needed(self, event: Needed) -> tuple[Instruction, ...]:
        name = event.name
        if name not in self._entries:
            raise IllegalEvent(f"{name!r} is needed, but no such component was ever added")
        entry = self._entries[name]
        if entry.state in (State.KEPT, State.RESIDENT):
            entry.depth[event.thread] += event.enters
            if entry.in_sequence:
                self._at_work = name
            return ()
        if (entry.state, Needed) not in TABLE:
            self._refuse(entry, event)  # before anybody goes
        by = self._driven_out_by.pop(name, None)
        if by is not None and self._swaps[frozenset((name, by))] > 1:
            self._companions.add(frozenset((name, by)))
        leaving = [other for other in self.names(State.RESIDENT) if not self._stays(other, name)]
        if entry.in_sequence:
            self._at_work = name
        for other in leaving:
            self._driven_out_by[other] = name
            self._swaps[frozenset((name, other))] += 1
        instructions = self._release(leaving, event) + self._move(name, Needed, event)
        entry.depth[event.thread] += event.enters
        return instructions

    def _stays(self, other: str, name: str) -> bool:
        """Whether `other` stays on the device when `name` starts to work."""
        there = self._entries[other]
        if self.is_busy(other) or frozenset((other, name)) in self._companions:
            return True
        # What is outside the sequence helps the component of the sequence that runs next: it stays
        # until the sequence moves on. Helpers do not drive each other out.
        return not there.in_sequence and (
            not self._entries[name].in_sequence or self._at_work in (None, name)
        )

    def _release(self, names: Iterable[str], event: Event) -> tuple[Instruction, ...]:
        result: tuple[Instruction, ...] = ()
        for name in names:
            result += self._move(name, Release, event)
            if self._at_work == name:
                self._at_work = None  # between two components of the sequence
        return result

    def _refuse(self, entry: _Entry, event: Event) -> NoReturn:
        name = getattr(event, "name", "a component")
        story = " -> ".join([*entry.story, entry.state.value])
        raise IllegalEvent(
            f"{event} is not legal for {name!r}, which is {entry.state.value} ({story})"
        )

    def _move(self, name: str, kind: type, event: Event) -> tuple[Instruction, ...]:
        entry = self._entries.get(name)
        if entry is None:
            return ()  # it was removed while its instruction was carried out
        move = TABLE.get((entry.state, kind))
        if move is None:
            self._refuse(entry, event)
        if (entry.state, kind) == (State.ONLOADING, Failed):
            entry.depth.clear()  # it never came, so nobody runs it
        before, (entry.state, instruction) = entry.state, move
        if entry.state is not before:
            entry.story = [*entry.story[-7:], before.value]
        if instruction is None:
            return ()
        made: Instruction = instruction(name, event)
        return (made,)
