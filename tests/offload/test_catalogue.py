"""What diffusers' own tests ask of offloading, for every pipeline of the catalogue."""

from __future__ import annotations

import gc
from collections.abc import Iterator

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
    for device in ("sim", None):
        pipe.enable_model_cpu_offload(device=device)
        assert torch.equal(run(case, pipe), expected)
        for part, module in pipe.components.items():
            if not isinstance(module, nn.Module) or part in pipe._exclude_from_cpu_offload:
                continue
            assert isinstance(module._hf_hook, (OffloadHook, CpuOffload))
            held = [t.device.type for t in (*module.parameters(), *module.buffers())]
            assert set(held) <= {"cpu"}, part
