"""Parts that were ordered to the device, and are sent as the link gets there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core.simulate import Costs
    from .device.backend import Backend
    from .hooks import Part

_USUAL_STEP_S = 0.01  # until the step was measured
_ALWAYS_FLYING = 128 * 2**20  # bytes: 5 ms on PCIe 4.0, which a host may be away
_MOST_RUNNING = 4096  # steps that a host may be ahead


class Outbox:
    """What is still to be sent, in order; what is on its way; and what the device works on."""

    def __init__(self, backend: Backend, part: Callable[[str], Part]) -> None:
        self._backend = backend
        self._part = part
        self._unsent: deque[str] = deque()
        #: Steps: begun at this event, seconds.
        self._running: deque[tuple[Any, float]] = deque(maxlen=_MOST_RUNNING)
        self._flying: deque[tuple[Any, int]] = deque()  # copies: over at this event, bytes
        #: Sent, and their modules do not use it yet.
        self.coming: set[str] = set()

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes that are still to be sent, of parts of these sizes."""
        if not self._unsent:
            return 0
        return sum(sizes.get(name, 0) for name in self._unsent)

    def __bool__(self) -> bool:
        return bool(self._unsent)

    def __contains__(self, name: str) -> bool:
        return name in self._unsent

    def order(self, names: Iterable[str]) -> None:
        """These are to be sent, after what was ordered before."""
        self._unsent.extend(names)

    def withdraw(self, name: str) -> None:
        """Do not send this one, if it was not sent yet, and have nobody wait for it."""
        self.coming.discard(name)
        if name in self._unsent:
            self._unsent.remove(name)

    def clear(self) -> None:
        """Send nothing of what was ordered."""
        self._unsent.clear()

    def send(self, name: str, masters: object) -> None:
        """Start a part's way to the device, before others if it stands behind them."""
        part = self._part(name)
        self._unsent.remove(name)
        part.send(masters)
        self.coming.add(name)
        self._flying.append((self._backend.record_copies(), part.store.nbytes))

    def send_all(self, masters: object) -> bool:
        """Send everything that was ordered; whether that was anything."""
        is_any = bool(self._unsent)
        while self._unsent:
            self.send(self._unsent[0], masters)
        return is_any

    def send_while_busy(self, masters: object) -> None:
        """Send what was ordered part by part, until the device has nothing else to do."""
        begun: list[Any] = []
        while self._unsent and self._backend.is_busy():
            self.send(self._unsent[0], masters)
            begun.append(self._flying[-1][0])
            if len(begun) > 1:  # two at a time keep the link busy
                begun[-2].synchronize()

    def send_ahead(self, masters: object, costs: Callable[[], Costs]) -> None:
        """Send so much of what was ordered that the link is busy as long as the device is.

        And a little longer, until this is called again; but not more: what the pipeline itself
        copies (its latents, say) would wait behind it, and the host for that.
        """
        if not self._unsent:
            return
        while self._flying and self._flying[0][0].query():
            self._flying.popleft()
        flying = sum(nbytes for _, nbytes in self._flying)
        enough = _ALWAYS_FLYING + self._backlog_s() * costs().h2d_bytes_per_s
        while self._unsent and flying < enough:
            flying += self._part(self._unsent[0]).store.nbytes
            self.send(self._unsent[0], masters)

    # ---- what the device works on

    def call_begins(self) -> None:
        """What was ordered of the device before does not count."""
        self._running.clear()

    def step_ends(self, stream: Any, seconds: float | None) -> Any:
        """A step that takes so long has been ordered: it ends here on the device.

        Returns:
            An event there that tells its time.
        """
        ended = self._backend.record_time(stream)
        self._running.append((ended, _USUAL_STEP_S if seconds is None else seconds))
        return ended

    def _backlog_s(self) -> float:
        """How long the device will work on the steps that have been ordered, this one included."""
        while len(self._running) > 1 and self._running[1][0].query():
            self._running.popleft()
        return sum(seconds for _, seconds in self._running)
