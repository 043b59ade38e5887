"""What diffusers' own tests ask of offloading, for every pipeline of the catalogue."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate.hooks import CpuOffload
from pipelines.catalogue import CATALOGUE, run
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.hooks import OffloadHook

# Modular pipelines have no such method; theirs is the components manager's own way.
NAMES = [name for name in CATALOGUE if not name.startswith("modular-")]


@pytest.fixture(autouse=True)
def installed() -> Iterator[None]:
    greenroom.install()
    yield
    greenroom.uninstall()


@pytest.mark.parametrize("name", NAMES)
def test_enabled_twice_and_run_twice(name: str) -> None:
    case = CATALOGUE[name]
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
    assert sim.races() == []
