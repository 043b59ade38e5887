"""The record of a call that is learned: what ran after what, how long, and the memory it took."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .core.trace import Step

if TYPE_CHECKING:
    from .device.backend import Backend


@dataclass
class _Entry:
    step: Step
    began: Any
    ended: Any = None
    beside_nbytes: int = 0

    def measured(self) -> Step:
        seconds = self.began.elapsed_time(self.ended) / 1e3
        return replace(self.step, seconds=seconds, beside_nbytes=self.beside_nbytes)


class Recording:
    """Steps as they run. Times are read from events of the device, memory from its allocator."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._entries: list[_Entry] = []

    def begin(self, step: Step) -> None:
        """A step begins; the one before it has been ended."""
        self._backend.restart_peak()
        self._entries.append(_Entry(step, self._backend.record_time()))

    def end(self, there_nbytes: int) -> int | None:
        """The last step ends; so many bytes were on the device that it did not work on.

        Returns:
            The most bytes it took besides, also since it ended if it has; None: there is no step.
        """
        if not self._entries:
            return None
        self.look(there_nbytes)
        entry = self._entries[-1]
        if entry.ended is None:
            entry.ended = self._backend.record_time()
        return entry.beside_nbytes

    def look(self, there_nbytes: int) -> None:
        """Until now so many bytes were there that the last step does not work on; as `end`."""
        entry = self._entries[-1]
        beside = self._backend.restart_peak() - there_nbytes
        entry.beside_nbytes = max(entry.beside_nbytes, beside)

    def opened(self, part: str) -> list[int]:
        """Where stays in a component begin, by its part that opens them."""
        return [i for i, e in enumerate(self._entries) if e.step.part == part and e.step.opens]

    def forget_stay(self, part: str) -> None:
        """The last stay in a component has not been."""
        del self._entries[(self.opened(part) or [len(self._entries)])[-1] :]

    def beside_of_stay(self, part: str) -> int:
        """The most that the last stay in a component took besides weights."""
        stay = self._entries[(self.opened(part) or [len(self._entries)])[-1] :]
        return max((entry.beside_nbytes for entry in stay), default=0)

    def steps(self) -> list[Step]:
        """What was measured. Waits until the device has done it all, but for no copies."""
        if self._entries:
            self._entries[-1].ended.synchronize()
        return [entry.measured() for entry in self._entries]
