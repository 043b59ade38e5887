"""The budget that is whatever is free when a call begins."""

from __future__ import annotations

import pytest
import torch
from offload.small import Small, assert_sound, result, within_of

import greenroom
import greenroom.sim as sim

CAPACITY = 4 * 2**20
WIDTH = 256  # of 257 KiB a block: digests are small beside it


@pytest.fixture(autouse=True)
def plans_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenroom.core.plan._MOST_STEPS", 100)


def test_what_others_take_and_give_back_is_seen_when_a_call_begins() -> None:
    expected = result(Small(width=WIDTH))
    sim.configure("rtx-4090", capacity=CAPACITY)
    pipe = Small(width=WIDTH)
    pipe.enable_model_cpu_offload(budget="auto")
    for taken in (0, 5 * CAPACITY // 8, 0):
        other = torch.zeros(taken, dtype=torch.uint8, device="sim")
        for _ in range(2):  # the first one begins with what was there before
            with sim.measure() as cost:
                assert torch.equal(result(pipe), expected)
        assert cost.peak_bytes - taken <= within_of(pipe).budget
        assert within_of(pipe).budget <= CAPACITY * 7 // 8 - taken
        assert torch.sim.memory_stats()["num_ooms"] == 0
        del other
        assert_sound(pipe)
    with sim.measure() as cost:
        assert torch.equal(result(pipe), expected)
    assert cost.h2d_bytes < 8192  # everything stays: 1.3 of 3.5 MiB


def test_memory_that_another_program_takes_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    sim.configure("rtx-4090", capacity=CAPACITY)
    pipe = Small(width=WIDTH)
    pipe.enable_model_cpu_offload(budget="auto")
    result(pipe)
    assert within_of(pipe).budget == CAPACITY * 7 // 8
    monkeypatch.setattr(
        "greenroom.device.backend.Backend.free_bytes",
        lambda _: CAPACITY // 2 - torch.sim.memory_allocated(),
    )
    for _ in range(2):
        with sim.measure() as cost:
            result(pipe)
        assert within_of(pipe).budget <= CAPACITY // 2 - CAPACITY // 8
        assert cost.peak_bytes <= within_of(pipe).budget


def test_weights_larger_than_the_device_are_refused() -> None:
    sim.configure("rtx-4090", capacity=4096)
    with pytest.raises(greenroom.BudgetTooSmall):
        Small().enable_model_cpu_offload(budget="auto")
