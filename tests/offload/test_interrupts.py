"""Ctrl-C at any line of greenroom's: weights are home afterwards, and the next call works."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from offload.test_threads import on_device

import greenroom
import greenroom.sim as sim
from greenroom.core import director, plan, simulate, trace
from greenroom.interrupts import Uninterrupted
from greenroom.zoo import call_kwargs, tiny

OURS = str(Path(greenroom.__file__).parent)
# Plans take millions of lines, and move nothing.
PLANNING = {plan.__file__, simulate.__file__, director.__file__, trace.__file__}
SAMPLES = 30


@pytest.fixture(autouse=True)
def pythons_own_handler() -> Iterator[None]:
    """Also where pytest's worker ignores the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class CtrlC:
    """Counts how often each line of greenroom's runs, and sends the signal before one of them."""

    def __init__(self, at: tuple[str, int] = ("", 0), nth: int = 0) -> None:
        self.lines: Counter[tuple[str, int]] = Counter()
        self._at, self._nth = at, nth

    def _line(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            where = (frame.f_code.co_filename, frame.f_lineno)
            self.lines[where] += 1
            if where == self._at and self.lines[where] == self._nth:
                signal.raise_signal(signal.SIGINT)
        return self._line

    def _call(self, frame: FrameType, *_: Any) -> Any:
        name = frame.f_code.co_filename
        # Before the first line of the pipeline's own `__call__` nothing has begun.
        is_left_out = name in PLANNING or frame.f_code.co_name == "__call__"
        return self._line if name.startswith(OURS) and not is_left_out else None

    def run(self, function: Callable[[], Any]) -> bool:
        """Whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            function()
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False


ARGUMENTS = call_kwargs("sdxl")


def images(pipe: Any, steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found = pipe(**{**ARGUMENTS, "num_inference_steps": steps, "generator": generator}).images
    assert isinstance(found, torch.Tensor)
    return found.cpu()


@pytest.mark.parametrize("budget", [None, "3MiB"])
def test_ctrl_c_at_any_line(budget: str | None) -> None:
    expected = {steps: images(tiny("sdxl").to("sim"), steps) for steps in (1, 2)}
    pipe = tiny("sdxl")
    greenroom.enable_model_cpu_offload(pipe, budget=budget)
    lines = {}
    for steps in expected:
        count = CtrlC()
        assert not count.run(lambda steps=steps: images(pipe, steps))  # type: ignore[misc]
        images(pipe, steps)
        lines[steps] = sorted(count.lines.items())
    r = random.Random(0)
    interrupted = 0
    for i in range(SAMPLES):
        steps = 1 + i % 2
        if i % 4 < 2:  # a first call, of which nothing is known
            greenroom.disable_model_cpu_offload(pipe)
            greenroom.enable_model_cpu_offload(pipe, budget=budget)
        at, times = r.choice(lines[steps])
        nth = r.randint(1, times)
        if CtrlC(at, nth).run(lambda steps=steps: images(pipe, steps)):  # type: ignore[misc]
            interrupted += 1
            assert on_device(pipe) == [], (at, nth)
        assert torch.equal(images(pipe, steps), expected[steps]), (at, nth)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert interrupted > SAMPLES // 2
    assert sim.races() == []
    greenroom.disable_model_cpu_offload(pipe)
    assert torch.equal(images(pipe.to("sim"), 1), expected[1])


def test_it_comes_after_the_outermost_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted():
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("inner")
        done.append("outer")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_it_comes_at_once_where_the_block_is_lifted() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), Uninterrupted() as block:
        try:
            with block.lifted():
                signal.raise_signal(signal.SIGINT)
                done.append("not reached")
        finally:
            done.append("ends")
    assert done == ["ends"]
    with pytest.raises(KeyboardInterrupt), Uninterrupted() as block:
        signal.raise_signal(signal.SIGINT)
        with block.lifted():
            done.append("not reached")
    assert done == ["ends"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_is_called_and_stays() -> None:
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append("mine"))
    try:
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert came == []
        assert came == ["mine"]
        with Uninterrupted() as block, block.lifted():
            other = signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # set meanwhile: not taken back
        assert callable(other)
        with Uninterrupted():  # nobody handles it in Python
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert came == ["mine"]


def test_in_another_thread_nothing_is_taken() -> None:
    found = []

    def look() -> None:
        with Uninterrupted() as block:
            found.append(signal.getsignal(signal.SIGINT))
            with block.lifted():
                found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler] * 2
