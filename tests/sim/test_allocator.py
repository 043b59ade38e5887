"""The device's allocator: when memory runs out, and what streams hold of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sim.books import KIB, block, books
from sim.machines import ROUND

import greenroom.sim as sim


@pytest.fixture(autouse=True)
def machine() -> None:
    sim.configure(ROUND, capacity=64 * KIB)


def retries() -> int:
    return int(torch.sim.memory_stats()["num_alloc_retries"])


# ---- capacity ------------------------------------------------------------------------------------


def test_out_of_memory_exactly_one_byte_above() -> None:
    whole = block(64 * KIB)
    assert torch.sim.mem_get_info() == (0, 64 * KIB)
    del whole
    with pytest.raises(torch.OutOfMemoryError):
        block(64 * KIB + 1)
    assert books() == (0, 0, 0)
    keep = block(32 * KIB - 511)  # takes half, rounded
    with pytest.raises(torch.OutOfMemoryError):
        block(32 * KIB + 1)
    assert books() == (32 * KIB,) * 3
    rest = block(32 * KIB)
    with pytest.raises(torch.OutOfMemoryError):
        block(1)
    assert torch.sim.memory_stats()["num_ooms"] == 3
    assert books() == (64 * KIB,) * 3 and keep.numel() + rest.numel() == 64 * KIB - 511


FAILING: dict[str, Callable[[torch.Tensor], Any]] = {
    "result": lambda x: x.double(),
    "cat": lambda x: torch.cat([x] * 4),
    "list": lambda x: torch._foreach_add([x] * 5, 1),
    "out": lambda x: torch.add(x, x, out=torch.empty(0, dtype=torch.float64, device="sim")),
    "resize": lambda x: x.resize_(50 * KIB),
    "storage": lambda x: x.untyped_storage().resize_(50 * KIB),
    "copy": lambda x: torch.zeros(50 * KIB, dtype=torch.uint8).to("sim"),
    "empty": lambda x: torch.empty_like(x, dtype=torch.float64),
    "factory": lambda x: torch.arange(20_000, device="sim"),
    "module": lambda x: torch.nn.Linear(200, 200).to("sim"),
    "matmul": lambda x: x[:128, None].float() @ x[None, :128].float(),
}


@pytest.mark.parametrize("name", FAILING)
def test_whatever_runs_out_of_memory_leaves_all_as_it_was(name: str) -> None:
    x = torch.ones(20 * KIB, dtype=torch.uint8, device="sim")
    with pytest.raises(torch.OutOfMemoryError, match="sim out of memory"):
        FAILING[name](x)
    gc.collect()
    assert books()[:2] == (20 * KIB, 20 * KIB)
    assert x.shape == (20 * KIB,) and bool((x == 1).all())
    assert block(44 * KIB).numel() == 44 * KIB


def test_the_cache_of_another_stream_is_given_back_before_giving_up() -> None:
    a = block(40 * KIB)
    del a
    assert books() == (0, 0, 40 * KIB)
    with torch.sim.Stream():
        b = block(24 * KIB)
        assert retries() == 0
        c = block(40 * KIB)
    assert retries() == 1 and torch.sim.memory_stats()["num_ooms"] == 0
    assert books() == (64 * KIB,) * 3 and b.numel() + c.numel() == 64 * KIB


def test_a_retry_waits_for_what_another_stream_still_uses() -> None:
    side, x = torch.sim.Stream(), torch.zeros(10 * KIB, device="sim")
    side.wait_stream(torch.sim.current_stream())
    with side:
        x.add_(1)
    x.record_stream(side)
    del x
    assert books()[:2] == (0, 40 * KIB)
    before = sim.seconds()
    y = block(64 * KIB)
    assert retries() == 1 and books() == (64 * KIB,) * 3
    assert sim.seconds() > before and side.query() and y.numel() == 64 * KIB


def test_capacities_of_any_size() -> None:
    sim.configure(ROUND, capacity=1000)
    x = block(512)
    with pytest.raises(torch.OutOfMemoryError):
        block(1)  # the rest of the capacity is less than a granule
    sim.configure(ROUND, capacity=2048)
    assert block(1536).numel() + x.numel() == 2048
    assert sim.current_profile().memory_bytes == 2**30  # the profile's own
    sim.configure(ROUND)
    assert torch.sim.mem_get_info()[1] == 2**30


def test_a_request_larger_than_any_machine() -> None:
    for n in (2**40, 2**59):
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(n, dtype=torch.float64, device="sim")
    with pytest.raises(RuntimeError, match="overflow"):
        torch.empty(2**61, dtype=torch.float64, device="sim")
    assert books() == (0, 0, 0)


# ---- streams -------------------------------------------------------------------------------------


def test_the_cache_is_per_stream() -> None:
    side = torch.sim.Stream()
    a = block(4096)
    del a
    with side:
        b = block(4096)
    assert books() == (4096, 4096, 8192)  # new memory, though 4096 bytes lie cached
    c = block(4096)
    assert books() == (8192,) * 3
    del b
    with side:
        d = block(4096)
    assert books() == (8192,) * 3 and c.numel() == d.numel()


def test_a_recorded_stream_holds_the_block_until_its_work_has_ended() -> None:
    side, x = torch.sim.Stream(), torch.zeros(1000, device="sim")
    side.wait_stream(torch.sim.current_stream())
    with side:
        x.add_(1)
    done = side.record_event()
    x.record_stream(side)
    assert books()[:2] == (4096, 4096)
    del x
    assert books() == (0, 4096, 4096)
    y = block(4096)  # while the block is held, its memory is not given out
    assert books() == (4096, 8192, 8192)
    assert torch.sim.memory_stats()["active_bytes.all.peak"] == 8192
    done.synchronize()
    z = block(4096)
    assert books() == (8192,) * 3 and y.numel() == z.numel()
    assert sim.races() == []


def test_recording_the_own_stream_holds_nothing() -> None:
    x = torch.zeros(1000, device="sim") + 1
    x.record_stream(torch.sim.current_stream())
    del x
    assert books()[:2] == (0, 0)


def test_a_recorded_stream_without_work_holds_nothing() -> None:
    side, x = torch.sim.Stream(), block(4096)
    x.record_stream(side)
    del x
    assert books()[:2] == (0, 0)


def test_emptying_the_cache_waits_for_held_blocks_as_on_cuda() -> None:
    side, x = torch.sim.Stream(), torch.zeros(1000, device="sim")
    side.wait_stream(torch.sim.current_stream())
    with side:
        x.add_(1)
    x.record_stream(side)
    del x
    torch.sim.empty_cache()
    assert books() == (0, 0, 0) and side.query()
