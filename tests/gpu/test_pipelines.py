"""Every pipeline of the catalogue on a real device: the bits of the resident one, nothing left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines.catalogue import CATALOGUE, Case, run
from torch import nn

import greenroom

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("device", ["cuda"], indirect=True),
]

NAMES = [name for name in CATALOGUE if not name.startswith("modular-")]


def on(device: torch.device, case: Case, pipe: Any) -> torch.Tensor:
    """The case's answer; whatever is drawn without a generator is the same each time."""
    torch.manual_seed(0)
    return run(case, pipe)


def modules_of(pipe: Any) -> list[nn.Module]:
    return [m for m in pipe.components.values() if isinstance(m, nn.Module)]


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_are_those_of_the_resident_pipeline(name: str, device: torch.device) -> None:
    case = CATALOGUE[name]
    resident = case.build().to(device)
    expected = on(device, case, resident)
    torch.cuda.reset_peak_memory_stats(device)
    repeats = torch.equal(on(device, case, resident), expected)
    beside = torch.cuda.max_memory_allocated(device)
    del resident

    pipe = case.build()
    nbytes = sum(t.nbytes for m in modules_of(pipe) for t in (*m.parameters(), *m.buffers()))
    beside -= nbytes
    for budget in (None, nbytes // 2 + 2 * max(0, beside) + 2**20):
        greenroom.enable_model_cpu_offload(pipe, device=device, budget=budget)
        for _ in range(2):
            found = on(device, case, pipe)
            assert found.shape == expected.shape
            assert torch.equal(found, expected) or not repeats, f"budget={budget}"
    greenroom.disable_model_cpu_offload(pipe)
    held = {t.device.type for m in modules_of(pipe) for t in (*m.parameters(), *m.buffers())}
    assert held <= {"cpu"}
    if not repeats:  # all else was checked
        pytest.skip("not even the resident pipeline gives the same bits twice")
