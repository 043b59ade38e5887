"""Ctrl-C waits until weights are where they belong.

Python raises `KeyboardInterrupt` between any two instructions of the main thread: also when a part
has left the device and nobody has noted it yet. What moves weights is therefore `Uninterrupted`: a
Ctrl-C that comes meanwhile is handed on after it, milliseconds later.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

_MAIN = threading.main_thread().ident


class _CtrlC:
    """Stands before whoever handles the signal in Python, for as long as a block lasts."""

    def __init__(self) -> None:
        self.handler: Callable[..., Any] | None = None  # before which it stands
        self.depth = 0  # of blocks that it has to wait for
        self._came: tuple[Any, ...] | None = None

    def take(self) -> bool:
        """Whether it stands there from now on, and did not before."""
        handler = signal.getsignal(signal.SIGINT)
        if handler == self._handle or not callable(handler):
            return False
        self.handler = handler
        signal.signal(signal.SIGINT, self._handle)
        return True

    def give_back(self) -> None:
        if signal.getsignal(signal.SIGINT) == self._handle:  # else somebody has taken it since
            signal.signal(signal.SIGINT, self.handler)

    def hand_on(self) -> None:
        """What has come meanwhile, if nothing has to wait any more."""
        if self._came is None or self.depth > 0:
            return
        came, self._came = self._came, None
        if self.handler is not None:
            self.handler(*came)

    def _handle(self, *signal_and_frame: Any) -> None:
        if self.depth > 0:
            self._came = signal_and_frame
        elif self.handler is not None:
            self.handler(*signal_and_frame)


_ctrl_c = _CtrlC()


class Uninterrupted:
    """A block that Ctrl-C comes after, not into. Blocks may nest.

    In other threads than the main one, or where nobody handles the signal in Python, it does
    nothing: there it raises nothing either.
    """

    __slots__ = ("_is_first",)

    def __enter__(self) -> Uninterrupted:
        self._is_first = False
        if threading.get_ident() == _MAIN:
            self._is_first = not _ctrl_c.depth and _ctrl_c.take()
            _ctrl_c.depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if threading.get_ident() != _MAIN:
            return
        _ctrl_c.depth = max(0, _ctrl_c.depth - 1)
        try:
            _ctrl_c.hand_on()
        finally:
            if self._is_first:
                _ctrl_c.give_back()

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside of it Ctrl-C comes as ever, as does what has come before."""
        if threading.get_ident() != _MAIN:
            yield
            return
        depth = _ctrl_c.depth
        try:
            _ctrl_c.depth = 0
            _ctrl_c.hand_on()
            yield
        finally:
            _ctrl_c.depth = depth
