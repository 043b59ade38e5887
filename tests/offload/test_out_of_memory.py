"""A forward that finds no room within a budget: it gets more, once, if that can do no harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from offload.small import BLOCK_NBYTES, WIDTH, Small, assert_sound, result, within_of
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.zoo.tiny import call_kwargs, tiny


@pytest.fixture(autouse=True)
def plans_in_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenroom.core.plan._MOST_STEPS", 100)


def offloaded(budget: int | str = "28KiB", **options: Any) -> Small:
    pipe = Small(**options)
    pipe.enable_model_cpu_offload(budget=budget)
    return pipe


def fail_in(module: nn.Module, *, times: int = 1) -> list[int]:
    """Let the allocations of a module's forward fail, so many times; returns where it is noted."""
    failed: list[int] = []
    original = module.forward

    def forward(*args: Any) -> Any:
        if len(failed) < times:
            failed.append(1)
            sim.fail("device_alloc")
        return original(*args)

    module.forward = forward  # type: ignore[method-assign]
    return failed


@pytest.mark.parametrize("calls_before", [0, 2])
def test_a_forward_is_tried_again_with_the_same_random_numbers(calls_before: int) -> None:
    expected = result(Small())
    pipe = offloaded()
    for _ in range(calls_before):
        result(pipe)
    failed = fail_in(pipe.denoiser.blocks[2])
    assert torch.equal(result(pipe), expected)
    assert failed and torch.equal(result(pipe), expected)
    assert_sound(pipe)
    assert torch.equal(result(pipe), expected)
    assert sim.races() == []


def test_a_forward_that_fails_again_is_refused_with_what_to_do() -> None:
    expected = result(Small())
    pipe = offloaded()
    fail_in(pipe.denoiser.blocks[0], times=2)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        result(pipe)
    assert isinstance(caught.value, greenroom.DeviceOutOfMemory)
    for said in ("'denoiser' found no room on sim:0", "alone", "28.0 KiB", "smaller"):
        assert said in str(caught.value)
    del caught
    assert_sound(pipe)
    assert torch.equal(result(pipe), expected)


def test_what_has_changed_something_is_not_tried_again() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("sum", torch.zeros(4))
            self.weight = nn.Parameter(torch.ones(WIDTH))
            self.how = ""

        def forward(self, x: torch.Tensor, seen: list[int]) -> torch.Tensor:
            if self.how == "list":
                seen.append(1)
            elif self.how == "input":
                x.add_(1)
            elif self.how == "buffer":
                self.sum.add_(1)
            elif self.how == "data":
                self.weight.data.mul_(2)
            fails = self.how
            if fails:
                sim.fail("device_alloc")
            return x * self.weight

    for how in ("list", "input", "buffer", "data"):
        module = Counts()
        greenroom.enable_model_cpu_offload(
            pipe := {"counts": module}, sequence="counts", budget="1MiB"
        )
        seen: list[int] = []
        module(torch.ones(WIDTH), seen)
        module.how = how
        with pytest.raises(greenroom.DeviceOutOfMemory):
            module(torch.ones(WIDTH, device="sim"), seen)
        module.how = ""
        module(torch.ones(WIDTH), seen)
        greenroom.disable_model_cpu_offload(pipe)
        assert "forward" not in vars(module)
        assert len(seen) == (how == "list")
        assert module.sum[0] == (how == "buffer")
        assert module.weight[0] == (2 if how == "data" else 1)


def test_a_device_smaller_than_the_budget_is_found_out() -> None:
    """The plan grants more than there is: less stays from then on, and the pictures are right."""
    expected = result(Small(blocks=8))
    sim.configure("rtx-4090", capacity=10 * BLOCK_NBYTES)
    pipe = offloaded("1MiB", blocks=8)
    for _ in range(6):
        assert torch.equal(result(pipe), expected)
        assert_sound(pipe)
    oomed = torch.sim.memory_stats()["num_ooms"]
    for _ in range(2):
        assert torch.equal(result(pipe), expected)
    assert torch.sim.memory_stats()["num_ooms"] == oomed
    assert within_of(pipe).known._limits
    assert sim.races() == []


def test_activations_that_nobody_knew_of_make_their_room() -> None:
    pipe = Small(works_on=60)
    expected = result(pipe, 8)
    with sim.measure() as cost:
        greenroom.enable_model_cpu_offload(pipe)
        result(pipe, 8)
    greenroom.disable_model_cpu_offload(pipe)
    capacity = cost.peak_bytes + 4096
    sim.configure("rtx-4090", capacity=capacity)
    greenroom.enable_model_cpu_offload(pipe, budget=capacity)
    for _ in range(3):
        assert torch.equal(result(pipe, 8), expected)
        assert_sound(pipe)


def test_a_call_that_is_refused_twice_is_limited_once() -> None:
    expected = result(Small(blocks=8))
    pipe = offloaded("1MiB", blocks=8)
    for _ in range(3):
        result(pipe)
    fail_in(pipe.denoiser.blocks[4], times=2)
    there = within_of(pipe).director.resident_nbytes  # type: ignore[union-attr]
    with pytest.raises(greenroom.DeviceOutOfMemory):
        result(pipe)
    (limit,) = within_of(pipe).known._limits.values()
    assert limit >= there  # not what is left when everything has gone home
    with sim.measure():
        assert torch.equal(result(pipe), expected)
    with sim.measure() as cost:
        assert torch.equal(result(pipe), expected)
    assert cost.h2d_bytes < 6 * BLOCK_NBYTES  # not all of it, in each step


def test_disabling_leaves_the_forwards_as_they_were() -> None:
    pipe = Small()
    before = [{**vars(m)} for c in vars(pipe).values() for m in c.modules()]
    pipe.enable_model_cpu_offload(budget="1MiB")
    result(pipe)
    pipe.disable_model_cpu_offload()
    after = [{**vars(m)} for c in vars(pipe).values() for m in c.modules()]
    assert [b.keys() for b in before] == [a.keys() for a in after]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("sdxl", "text_encoder"),
        ("sdxl", "unet"),
        ("sdxl", "vae"),
        ("flux", "transformer"),
        ("wan2.2", "transformer_2"),
    ],
)
def test_models_of_diffusers_are_tried_again(name: str, component: str) -> None:
    def picture(pipe: Any) -> torch.Tensor:
        output = pipe(**call_kwargs(name))
        return torch.as_tensor(output.images if hasattr(output, "images") else output.frames).cpu()

    pipe = tiny(name)
    expected = picture(pipe)
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    nbytes = sum(p.nbytes for m in modules for p in m.parameters())
    greenroom.enable_model_cpu_offload(pipe, budget=int(0.8 * nbytes) + 2**22)
    assert torch.equal(picture(pipe), expected)
    layers = [m for m in getattr(pipe, component).modules() if m._parameters]
    failed = fail_in(layers[-1])
    for _ in range(2):
        assert torch.equal(picture(pipe), expected)
    assert failed
    assert sim.races() == []


def test_a_decoder_that_keeps_a_cache_is_not_tried_again() -> None:
    pipe = tiny("wan2.2")
    greenroom.enable_model_cpu_offload(pipe, budget="64MiB")
    fail_in(pipe.vae.decoder.conv_out)
    with pytest.raises(greenroom.DeviceOutOfMemory, match=r"'vae.decoder' found no room"):
        pipe(**call_kwargs("wan2.2"))
