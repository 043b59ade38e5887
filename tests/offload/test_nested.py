"""Calls inside calls, on one device, of pipelines with different budgets or none."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from offload.small import Small, assert_sound, result, within_of

import greenroom
import greenroom.sim as sim

OUTER, INNER = 2 * 2**20, 2**20
WIDTH = 256  # a block of 257 KiB


@pytest.fixture(autouse=True)
def plans_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenroom.core.plan._MOST_STEPS", 100)


def outer(inner: Any) -> tuple[Small, Any]:
    """A pipeline of 1.5 MiB, and a callback that calls the other one and leaves no trace."""

    def call_inner(pipe: Small, step: int) -> None:
        state = torch.get_rng_state(), torch.sim.get_rng_state()
        assert torch.equal(result(inner), expected)
        torch.set_rng_state(state[0])
        torch.sim.set_rng_state(state[1])

    expected = result(Small(width=WIDTH))
    return Small(width=WIDTH, blocks=4), call_inner


@pytest.mark.parametrize("budget", [INNER, OUTER, None])
def test_a_callback_may_call_another_pipeline_and_both_keep_to_the_budget(
    budget: int | None,
) -> None:
    inner = Small(width=WIDTH)
    pipe, call_inner = outer(inner)
    expected = result(pipe)
    inner.enable_model_cpu_offload(budget=budget)
    pipe.enable_model_cpu_offload(budget=OUTER)
    for _ in range(3):
        with sim.measure() as cost:
            assert torch.equal(result(pipe, each_step=call_inner), expected)
        assert cost.peak_bytes <= OUTER
        if budget != OUTER:
            assert_sound(pipe)
    assert sim.races() == []
    (known,) = within_of(pipe).known._plans.values() if budget != OUTER else [None]
    if known is not None:  # what the other one took is no part of what this one needs
        assert max(s.beside_nbytes or 0 for s in known.plan.steps) < 2**17


def test_one_without_a_budget_may_call_one_with_one() -> None:
    inner = Small(width=WIDTH)
    pipe, call_inner = outer(inner)
    expected = result(pipe)
    inner.enable_model_cpu_offload(budget=INNER)
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        assert torch.equal(result(pipe, each_step=call_inner), expected)
    assert torch.sim.memory_allocated() < 4096


def test_one_that_takes_more_than_the_call_around_it_is_told_of() -> None:
    inner = Small(width=WIDTH)
    pipe, call_inner = outer(inner)
    inner.enable_model_cpu_offload(budget="1GiB")
    pipe.enable_model_cpu_offload(budget=INNER)
    with pytest.warns(UserWarning, match=r"budget of 1.0 MiB .* may take 1.0 GiB"):
        result(pipe, each_step=call_inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result(inner)  # by itself it may


@pytest.mark.parametrize("budget", [INNER, None])
def test_inside_a_forward_there_are_no_turns(budget: int | None) -> None:
    inner, pipe = Small(width=WIDTH), Small(width=WIDTH)
    expected = result(pipe)
    inner.enable_model_cpu_offload(budget=budget)
    pipe.enable_model_cpu_offload(budget=OUTER)
    hook = pipe.denoiser.blocks[1].register_forward_hook(lambda *_: inner() and None)
    with pytest.raises(greenroom.UsageError, match="inside a forward of 'denoiser'"):
        result(pipe)
    hook.remove()
    assert_sound(pipe)
    assert torch.equal(result(pipe), expected)


def test_components_called_by_hand_take_turns_with_what_waits() -> None:
    kept, other = Small(width=WIDTH), Small(width=WIDTH)
    kept.enable_model_cpu_offload(budget=OUTER)
    other.enable_model_cpu_offload()
    for _ in range(2):
        result(kept)
    with torch.no_grad():
        other.encoder(torch.ones(1, WIDTH))
        assert not within_of(kept).director.resident  # type: ignore[union-attr]
        kept.encoder(torch.ones(1, WIDTH))
    assert all(p.device.type == "cpu" for p in other.encoder.parameters())
