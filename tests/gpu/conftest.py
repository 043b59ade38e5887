"""What the tests on a real device share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Before CUDA begins: with workspaces of other sizes than usual cuBLAS may choose other kernels from
# one run to the next, and on some cards the usual ones take more than a tiny pipeline's budget.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")
os.environ.setdefault("CUBLASLT_WORKSPACE_SIZE", "128")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """A device with nothing on it; the tests of a device choose it with `on_each`."""
    found = torch.device(request.param, 0)
    module: Any = torch.get_device_module(found)
    if found.type == "cuda":
        torch.cuda.init()  # statistics can be restarted only then
        torch.backends.cudnn.benchmark = False  # else its choice depends on the room there is
        torch.backends.cudnn.deterministic = True  # and some kernels add up in any order
    gc.collect()
    module.empty_cache()
    module.reset_peak_memory_stats(found)
    before = module.memory_allocated(found)
    yield found
    gc.collect()
    if found.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
    left = module.memory_allocated(found) - before
    # Some classes keep tables for as long as they live.
    assert left <= 2**21, f"{left} bytes were left on {found}"
