"""What is measured in a first call also has what happens only once in it; a later one tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from offload.small import Small, result, within_of

from greenroom.recording import Recording


@pytest.fixture
def slow_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries that are set up in the first call, so that its steps seem to take ten seconds."""
    measured = Recording.steps

    def steps(self: Recording) -> list[Any]:
        import dataclasses

        return [dataclasses.replace(step, seconds=10.0) for step in measured(self)]

    monkeypatch.setattr(Recording, "steps", steps)


def seconds_of(pipe: Small) -> float:
    director = within_of(pipe).director
    assert director is not None
    return sum(step.seconds or 0.0 for step in director.plan.steps)


@pytest.mark.usefixtures("slow_first_call")
@pytest.mark.parametrize("budget", ["28KiB", "1MiB"])
def test_the_first_call_that_goes_as_planned_tells_how_long_steps_take(budget: str) -> None:
    expected = result(Small(blocks=4), steps=5)
    pipe = Small(blocks=4)
    pipe.enable_model_cpu_offload(budget=budget)
    took = []
    for _ in range(4):
        assert torch.equal(result(pipe, steps=5), expected)
        took.append(seconds_of(pipe))
    assert took[0] == took[1] >= 70
    assert took[2] == took[3] < 1
    assert within_of(pipe).director.deviations == 0  # type: ignore[union-attr]


@pytest.mark.usefixtures("slow_first_call")
def test_a_call_that_raises_tells_nothing() -> None:
    pipe = Small(blocks=4)
    pipe.enable_model_cpu_offload(budget="28KiB")
    result(pipe)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        result(pipe, each_step=fail)
    result(pipe)
    assert seconds_of(pipe) >= 40
    result(pipe)
    assert seconds_of(pipe) < 1
