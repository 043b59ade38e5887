"""Budgets that cannot work are refused before anything moves, with the smallest that would."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from offload.small import BLOCK_NBYTES, Small, assert_sound, result
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.core.units import parse_bytes


@pytest.fixture(autouse=True)
def plans_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenroom.core.plan._MOST_STEPS", 100)


def named_in(message: str) -> str:
    found = re.search(r"at least ([\d.]+ \w+)", message)
    assert found is not None
    return found[1]


def test_weights_that_have_to_be_together_are_known_beforehand() -> None:
    pipe = Small()
    with sim.measure() as cost, pytest.raises(greenroom.BudgetTooSmall) as caught:
        pipe.enable_model_cpu_offload(budget=BLOCK_NBYTES)
    assert cost.h2d_bytes == 0 and not hasattr(pipe.denoiser, "_hf_hook")
    assert "'encoder' needs 4.3 KiB for its weights alone" in str(caught.value)
    pipe.enable_model_cpu_offload(budget=named_in(str(caught.value)))


def test_a_budget_is_enough_that_is_named_for_larger_blocks() -> None:
    """A larger budget has larger runs of blocks: what is named holds those as well."""
    torch.manual_seed(0)
    wide = nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)))
    pipe = {"wide": wide, "alone": nn.Linear(512, 512)}
    with pytest.raises(greenroom.BudgetTooSmall) as caught:
        greenroom.enable_model_cpu_offload(pipe, sequence="wide->alone", budget="64KiB")
    assert "'alone' needs" in str(caught.value)
    greenroom.enable_model_cpu_offload(
        pipe, sequence="wide->alone", budget=named_in(str(caught.value))
    )


def test_a_call_that_is_known_to_exceed_the_budget_is_refused() -> None:
    pipe = Small(works_on=60)
    expected = result(pipe, 8)
    pipe.enable_model_cpu_offload(budget="32KiB")
    said = r"'decoder.*' took .* more than the budget of 32.0 KiB"
    with pytest.warns(UserWarning, match=said) as warned:
        assert torch.equal(result(pipe, 8), expected)  # not known yet
    with sim.measure() as cost, pytest.raises(greenroom.BudgetTooSmall, match="what it works on"):
        result(pipe, 8)
    assert cost.h2d_bytes == 0
    assert_sound(pipe)
    result(pipe, 1)  # a smaller one is none of its kind
    enough = named_in(str(warned[0].message))
    pipe.enable_model_cpu_offload(budget=enough)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in range(4):
            with sim.measure() as cost:
                assert torch.equal(result(pipe, 8), expected)
            if call:  # in the first one what it works on is not known
                assert cost.peak_bytes <= parse_bytes(enough)
