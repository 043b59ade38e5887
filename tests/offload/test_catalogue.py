"""What diffusers' own tests ask of offloading, for every pipeline of the catalogue."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload
from pipelines.catalogue import CATALOGUE, Case, run
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.hooks import OffloadHook

pytestmark = pytest.mark.usefixtures("quick_collections")

# Modular pipelines have no such method; theirs is the components manager's own way.
NAMES = [name for name in CATALOGUE if not name.startswith("modular-")]

#: Bytes of the device that diffusers' own classes hold on to, whatever offloads the pipeline: both
#: rotary tables, 4096 x 8 complex numbers, and what the 4 patches of a tiny picture take of them.
HELD_BY_DIFFUSERS = dict.fromkeys(("qwen-image", "qwen-image-img2img"), 2 * 4096 * 8 * 8 + 512)


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    greenroom.install()
    yield
    greenroom.uninstall()


@pytest.mark.parametrize("name", NAMES)
def test_enabled_twice_and_run_twice_a_pipeline_leaves_no_trace(name: str) -> None:
    enable_and_run_twice(CATALOGUE[name])
    gc.collect()
    assert torch.sim.memory_allocated() <= HELD_BY_DIFFUSERS.get(name, 0)
    assert sim.races() == []


def enable_and_run_twice(case: Case) -> None:
    expected = run(case, case.build())
    pipe = case.build()
    pipe.enable_model_cpu_offload(device="sim")
    with sim.measure() as cost:
        assert torch.equal(run(case, pipe), expected)
    assert_all_at_home(pipe)
    pipe.enable_model_cpu_offload()
    assert_all_at_home(pipe)
    # Within a budget: some stays, some goes, and blocks travel by themselves.
    budget = cost.peak_bytes + nbytes_of(pipe) // 4 + 64 * 1024
    greenroom.enable_model_cpu_offload(pipe, budget=budget)
    gc.collect()
    others = torch.sim.memory_allocated()  # what classes keep, and answers
    assert torch.equal(run(case, pipe), expected)
    with sim.measure() as cost:  # what a call works on is known now
        assert torch.equal(run(case, pipe), expected)
    # Parts of a few KB are as many allocations, each of whole 512 bytes.
    assert cost.peak_bytes <= budget + others + 32 * 1024
    greenroom.disable_model_cpu_offload(pipe)
    assert_all_at_home(pipe, is_hooked=False)


def components_of(pipe: Any) -> dict[str, nn.Module]:
    return {
        name: component
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module) and name not in pipe._exclude_from_cpu_offload
    }


def nbytes_of(pipe: Any) -> int:
    return sum(t.nbytes for module in components_of(pipe).values() for t in module.parameters())


def assert_all_at_home(pipe: Any, *, is_hooked: bool = True) -> None:
    for name, module in components_of(pipe).items():
        if is_hooked:
            assert isinstance(module._hf_hook, (OffloadHook, CpuOffload))
        held = [t.device.type for t in (*module.parameters(), *module.buffers())]
        assert set(held) <= {"cpu"}, name
