"""What holds for every test: one thread, no network, a fresh simulated accelerator."""

import os

# Before torch is imported, which reads the first once. The models in the tests are so small that
# OpenMP's waiting threads cost far more time than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["GREENROOM_TRACES"] = "off"  # what one test learns of a call is no other's

import gc
import socket
import sys
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

# A shared machine can be slow for a moment; how long an example took says nothing about it. The
# same examples each time, so that a change is judged by what it changes; HYPOTHESIS_PROFILE=search
# looks for others.
hypothesis.settings.register_profile("greenroom", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "greenroom"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden",
        action="store_true",
        help="write what is ordered now to tests/golden/, and what is printed now to the "
        "documentation, instead of comparing",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    no_cuda = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(no_cuda)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to other machines; nothing in the suite needs any."""
    connect = socket.socket.connect

    def connect_nearby(self: socket.socket, address: Any) -> None:
        is_remote = self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in (
            "localhost",
            "127.0.0.1",
            "::1",
        )
        if is_remote:
            pytest.fail(f"a test tried to reach {address[0]}: tests run without a network")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect_nearby)


@pytest.fixture(autouse=True)
def fresh_simulator() -> None:
    """Give each test the simulator's defaults and a clock at zero.

    Only if the test's module has imported it: the pure parts need no simulator, and importing it
    may compile.
    """
    sim = sys.modules.get("greenroom.sim")
    if sim is None:
        return
    # pytest keeps the last failure, and with it that test's tensors, until the next test's call.
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        vars(sys).pop(name, None)
    in_use = [torch.sim.host_memory_stats()["allocated_bytes.current"]]  # page-locked
    in_use += map(torch.sim.memory_allocated, range(torch.sim.device_count()))
    if any(in_use):
        forget_rotary_tables()
        gc.collect()  # what the last test left in reference cycles
    sim.configure("rtx-4090")


def forget_rotary_tables() -> None:
    """Empty the caches in which classes of diffusers keep tensors for as long as the process lives.

    QwenEmbedRope has functools.lru_cache around two of its methods (in 0.42.1, on purpose:
    https://github.com/huggingface/diffusers/pull/12452). ``self`` is part of the key, so the class
    holds each instance, and the tables of each device where that ran, when the pipeline is gone.
    """
    for name, module in list(sys.modules.items()):
        if not name.startswith("diffusers.models."):
            continue
        methods = (
            method
            for kind in vars(module).values()
            if isinstance(kind, type) and kind.__module__ == name
            for method in vars(kind).values()
        )
        for method in methods:
            # diffusers' own decorator has the cache in its closure.
            cells = getattr(method, "__closure__", None) or ()
            for cached in (method, *(cell.cell_contents for cell in cells)):
                if hasattr(cached, "cache_clear"):
                    cached.cache_clear()


@pytest.fixture(scope="module")
def quick_collections() -> Iterator[None]:
    """Collect garbage among what the module's tests made: not through whole libraries each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
