"""Every pipeline of the catalogue works, and diffusers' own offloading gives the same bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pipelines.catalogue import CATALOGUE, Case, run

import greenroom.sim as sim

# What the libraries are about to change, and autocast to float32, says nothing about the catalogue.
pytestmark = [
    pytest.mark.filterwarnings("ignore:::(diffusers|torch|transformers)"),
    pytest.mark.usefixtures("quick_collections"),
]

#: What diffusers' own model offloading says where it fails.
INCUMBENT_FAILS: dict[str, str] = {
    # A modular pipeline has another way, which offloads when the device's memory runs short.
    name: "object has no attribute 'enable_model_cpu_offload'"
    for name in CATALOGUE
    if name.startswith("modular-")
}

#: What it leaves on the device, beside what a class excludes from offloading.
INCUMBENT_LEAVES: dict[str, set[str]] = {
    # Its own method keeps the last hook of its chain, and nobody calls it after the vocoder.
    "audioldm2": {"vocoder"},
}


@dataclass(frozen=True)
class Answered:
    """A case, its pipeline on the CPU and the answer that one gave first."""

    case: Case
    pipe: Any
    answer: torch.Tensor


@pytest.fixture(scope="module", params=CATALOGUE.values(), ids=CATALOGUE)
def answered(request: pytest.FixtureRequest) -> Answered:
    case: Case = request.param
    pipe = case.build()
    return Answered(case, pipe, run(case, pipe))


def test_the_answer_is_finite_and_the_same_again(answered: Answered) -> None:
    answer = answered.answer
    assert answer.device.type == "cpu" and answer.is_floating_point()
    assert answer.isfinite().all() and answer.std() > 0
    assert torch.equal(run(answered.case, answered.pipe), answer)


# From here on each test builds the pipeline anew: the same bits mean the same weights, too.


def test_resident_on_the_simulated_device(answered: Answered) -> None:
    pipe = answered.case.build().to("sim")
    assert torch.equal(run(answered.case, pipe), answered.answer)
    assert sim.races() == []


def test_offloaded_by_diffusers(answered: Answered) -> None:
    name = answered.case.name
    pipe = answered.case.build()
    if name in INCUMBENT_FAILS:
        with pytest.raises(Exception, match=INCUMBENT_FAILS[name]):
            offload_and_run(answered, pipe)
        return
    offload_and_run(answered, pipe)
    left = INCUMBENT_LEAVES.get(name, set())
    assert left <= away(pipe) <= left | set(pipe._exclude_from_cpu_offload)


def offload_and_run(answered: Answered, pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="sim")
    for _ in range(2):
        assert torch.equal(run(answered.case, pipe), answered.answer)


def away(pipe: Any) -> set[str]:
    """The components that are not at home on the CPU."""
    return {
        name
        for name, part in pipe.components.items()
        if isinstance(part, torch.nn.Module)
        and any(tensor.device.type != "cpu" for tensor in (*part.parameters(), *part.buffers()))
    }
