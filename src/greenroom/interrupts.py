"""Ctrl-C waits until weights are where they belong.

Python raises `KeyboardInterrupt` between any two instructions of the main thread: also when a part
has left the device and nobody has noted it yet. What moves weights is therefore `Uninterrupted`: a
Ctrl-C that comes meanwhile is handed on after it, milliseconds later.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from threading import get_ident
from types import TracebackType
from typing import Any

_MAIN = threading.main_thread().ident
_SIGINT = int(signal.SIGINT)
# What `signal` itself calls, if it is CPython's: to make enums of the answers takes far longer.
_fast: Any = sys.modules.get("_signal", signal)
_get, _set = _fast.getsignal, _fast.signal


class _CtrlC:
    """Stands before whoever handles the signal in Python, for as long as a block lasts."""

    def __init__(self) -> None:
        self.handler: Callable[..., Any] | None = None  # before which it stands
        self.depth = 0  # of blocks that it has to wait for
        self.came: tuple[Any, ...] | None = None
        self._own = self._handle

    def take(self) -> bool:
        """Whether it stands there from now on, and did not before."""
        handler = _get(_SIGINT)
        if handler is self._own or not callable(handler):
            return False
        self.handler = handler
        _set(_SIGINT, self._own)
        return True

    def give_back(self) -> None:
        if _get(_SIGINT) is self._own:  # else somebody has taken it since
            _set(_SIGINT, self.handler)

    def hand_on(self) -> None:
        """What has come meanwhile, if nothing has to wait any more."""
        if self.came is None or self.depth > 0:
            return
        came, self.came = self.came, None
        if self.handler is not None:
            self.handler(*came)

    def _handle(self, *signal_and_frame: Any) -> None:
        if self.depth > 0:
            self.came = signal_and_frame
        elif self.handler is not None:
            self.handler(*signal_and_frame)


_ctrl_c = _CtrlC()


class Uninterrupted:
    """A block that Ctrl-C comes after, not into. Blocks may nest.

    In other threads than the main one, or where nobody handles the signal in Python, it does
    nothing: there it raises nothing either.
    """

    __slots__ = ("_is_first", "_is_main")

    def __enter__(self) -> Uninterrupted:
        self._is_main = get_ident() == _MAIN
        self._is_first = False
        if self._is_main:
            if not _ctrl_c.depth:
                self._is_first = _ctrl_c.take()
            _ctrl_c.depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_main:
            return
        if _ctrl_c.depth:  # else it was lifted, and what lifted it was interrupted
            _ctrl_c.depth -= 1
        try:
            if _ctrl_c.came is not None:
                _ctrl_c.hand_on()
        finally:
            if self._is_first:
                _ctrl_c.give_back()

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Inside of it Ctrl-C comes as ever, as does what has come before."""
        if not self._is_main:
            yield
            return
        depth = _ctrl_c.depth
        try:
            _ctrl_c.depth = 0
            _ctrl_c.hand_on()
            yield
        finally:
            _ctrl_c.depth = depth
