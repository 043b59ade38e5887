"""Whatever fails, whenever: everything is accounted for, and the next call gives the right picture.

In the manner of SQLite's tests: the first allocation fails, then the second, until a call succeeds.
"""

from __future__ import annotations

import contextlib
from typing import Any, get_args

import pytest
import torch
from offload.small import Small, assert_sound, result

import greenroom
import greenroom.sim as sim
from greenroom.sim.control import Fault

MOST = 2000  # faults of one kind, before which every call has succeeded


def offloaded(**options: Any) -> Small:
    pipe = Small(**options)
    pipe.enable_model_cpu_offload(budget=BUDGET)
    return pipe


BUDGET = 26 * 1024  # of 33 KiB of weights: the denoiser streams


def has_happened(kind: Fault, nth: int) -> bool:
    """Whether the fault that was armed to be the `nth` has happened; it has after this."""
    try:
        host, device = torch.zeros(1), torch.zeros(1, device="sim")
        for _ in range(nth):
            if kind == "device_alloc":
                torch.empty(1, device="sim")
            elif kind == "pinned_alloc":
                torch.empty(1, pin_memory=True)
            elif kind == "copy":
                device.copy_(host)
            else:
                device.zero_()
    except RuntimeError:
        return False
    return True


@pytest.fixture(autouse=True)
def plans_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenroom.core.plan._MOST_STEPS", 100)


@pytest.mark.slow
@pytest.mark.parametrize("kind", get_args(Fault))
@pytest.mark.parametrize("call", [1, 3])
def test_any_step_of_a_call_may_fail(kind: Fault, call: int) -> None:
    expected = result(Small())
    for nth in range(1, MOST):
        if kind == "pinned_alloc":  # that is done beforehand
            sim.fail(kind, nth)
        pipe = offloaded()
        for _ in range(call - 1):
            result(pipe)
        if kind != "pinned_alloc":
            sim.fail(kind, nth)
        with contextlib.suppress(RuntimeError):
            assert torch.equal(result(pipe), expected)
        assert_sound(pipe)
        is_over = not has_happened(kind, nth)
        assert torch.equal(result(pipe), expected)
        assert_sound(pipe)
        greenroom.disable_model_cpu_offload(pipe)
        assert torch.sim.memory_allocated() == 0
        if is_over:
            break
    else:
        pytest.fail("no call has succeeded")
    assert sim.races() == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["device_alloc", "copy", "kernel"])
def test_no_change_of_a_weight_is_lost_whatever_fails(kind: Fault) -> None:
    for nth in range(1, MOST):
        pipe = offloaded()
        expected = pipe.denoiser.blocks[0].weight.detach().clone()

        def change(pipe: Small, step: int, expected: torch.Tensor = expected) -> None:
            pipe.denoiser.blocks[0].weight.data.mul_(2)  # no version counts this
            expected.mul_(2)

        result(pipe, each_step=change)
        sim.fail(kind, nth)
        with contextlib.suppress(RuntimeError):
            result(pipe, each_step=change)
        is_over = not has_happened(kind, nth)
        greenroom.disable_model_cpu_offload(pipe)
        assert torch.equal(pipe.denoiser.blocks[0].weight, expected)
        if is_over:
            break
    assert nth > 5
    assert sim.races() == []
