"""What a tensor takes of the device's memory, and what is measured of it: every byte, exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sim.books import KIB, block, books
from sim.machines import ROUND

import greenroom.sim as sim


@pytest.fixture(autouse=True)
def machine() -> None:
    sim.configure(ROUND, capacity=64 * KIB)


# ---- what a tensor takes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "taken"), [(0, 0), (1, 512), (511, 512), (512, 512), (513, 1024), (5000, 5120)]
)
def test_sizes_are_rounded_up_to_512(nbytes: int, taken: int) -> None:
    x = block(nbytes)
    assert books() == (taken, taken, taken)
    assert torch.sim.memory_stats()["requested_bytes.all.current"] == nbytes
    del x
    assert books() == (0, 0, taken)  # the allocator keeps it
    torch.sim.empty_cache()
    assert books() == (0, 0, 0)


def test_giving_memory_back_to_the_device_waits_for_its_work() -> None:
    x, kept = block(1024), block(2048)
    del kept
    with sim.measure() as waits:
        x.add_(1)
        torch.sim.empty_cache()
    with sim.measure() as does_not:
        x.add_(1)
        torch.sim.empty_cache()  # there is nothing to give back
    assert (waits.syncs, does_not.syncs) == (1, 0)


def test_results_of_operators_and_copies_count() -> None:
    x = torch.ones(1000, device="sim")
    y = x + 1
    assert books()[0] == 2 * 4096
    z = torch.ones(300).to("sim")
    assert books()[0] == 2 * 4096 + 1536
    y.add_(x)
    x = x.double()  # the old one goes when the new one is there
    assert books()[0] == 8192 + 4096 + 1536 and torch.sim.max_memory_allocated() == 17920
    del x, y, z
    assert books()[0] == 0


def test_views_keep_their_storage() -> None:
    x = block(4096)
    view = x[:1].view(1, 1)
    assert books()[0] == 4096
    del x
    assert books()[0] == 4096
    del view
    assert books()[0] == 0


def test_a_storage_that_is_resized() -> None:
    x = block(1000)
    x.untyped_storage().resize_(0)
    assert books()[0] == 0
    x.untyped_storage().resize_(3000)
    assert books()[0] == 3072
    x.resize_(5000)
    assert books()[0] == 5120
    out = torch.empty(0, device="sim")
    torch.add(torch.ones(200, device="sim"), 1, out=out)
    assert books()[0] == 5120 + 1024


def test_gradients_and_the_graph_are_freed() -> None:
    model = torch.nn.Linear(8, 8, device="sim")
    weights = books()[0]
    loss = model(torch.ones(2, 8, device="sim")).square().sum()
    assert books()[0] > weights
    loss.backward()
    del loss
    assert books()[0] == 2 * weights
    model.zero_grad()
    assert books()[0] == weights
    model.to("cpu")
    assert books()[0] == 0


def test_peaks() -> None:
    a, b = block(4096), block(8192)
    del a, b
    c = block(2048)
    assert torch.sim.max_memory_allocated() == 12288 == torch.sim.max_memory_reserved()
    torch.sim.reset_peak_memory_stats()
    assert torch.sim.max_memory_allocated() == 2048 == c.numel()
    assert torch.sim.max_memory_reserved() == 12288
    stats = torch.sim.memory_stats()
    assert stats["active_bytes.all.peak"] == 2048


def test_totals() -> None:
    a, b = block(512), block(1024)
    del a
    stats = torch.sim.memory_stats()
    names = ("allocated", "freed", "current", "peak")
    assert [stats[f"allocated_bytes.all.{name}"] for name in names] == [1536, 512, 1024, 1536]
    for forget in (torch.sim.reset_accumulated_memory_stats, sim.reset):
        forget()
        stats = torch.sim.memory_stats()
        assert [stats[f"allocated_bytes.all.{name}"] for name in names[:3]] == [0, 0, 1024]
        assert stats["active_bytes.all.freed"] == stats["reserved_bytes.all.freed"] == 0
    del b
    assert torch.sim.memory_stats()["allocated_bytes.all.freed"] == 1024


def test_each_device_has_its_own_books() -> None:
    sim.configure(ROUND, capacity=64 * KIB, devices=2)
    a, b = block(1024, "sim:0"), block(4096, "sim:1")
    assert books(0) == (1024,) * 3 and books("sim:1") == (4096,) * 3
    for name in (1, "sim:1", torch.device("sim", 1)):
        assert torch.sim.memory_allocated(name) == torch.accelerator.memory_allocated(name) == 4096
    with torch.sim.device(1):
        assert books() == (4096,) * 3
    block(64 * KIB - 4096, "sim:1")
    with pytest.raises(torch.OutOfMemoryError, match="Device 1"):
        block(64 * KIB, "sim:1")
    assert books(0) == (1024,) * 3 and a.numel() + b.numel() == 5120
    del b
    torch.accelerator.empty_cache()  # of every device
    assert books(1) == (0, 0, 0)


@pytest.mark.parametrize(
    ("dtype", "check"),
    [
        (torch.float32, torch.isnan),
        (torch.float16, torch.isnan),
        (torch.bfloat16, torch.isnan),
        (torch.float64, torch.isnan),
        (torch.complex64, torch.isnan),
        (torch.int8, lambda x: x == -1),
        (torch.int64, lambda x: x == -1),
        (torch.uint8, lambda x: x == 255),
        (torch.bool, lambda x: x),
    ],
)
def test_fresh_memory_is_poison(
    dtype: torch.dtype, check: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    made = [torch.empty(100, dtype=dtype, device="sim")]
    made.append(torch.empty_strided((4, 5), (1, 4), dtype=dtype, device="sim"))
    made.append(torch.empty_like(made[0]))
    made.append(made[0].new_empty(3))
    made.append(torch.zeros(3, dtype=dtype, device="sim").resize_(200)[3:])
    old = torch.zeros(100, dtype=dtype, device="sim")
    del old
    made.append(torch.empty(100, dtype=dtype, device="sim"))  # reused, and poisoned again
    assert all(bool(check(x).all()) for x in made)


def test_a_freed_tensor_cannot_be_read() -> None:
    model = torch.nn.Linear(4, 4, device="sim").to_empty(device="sim")
    assert model(torch.ones(4, device="sim")).isnan().all()  # weights that were never loaded


# ---- measure and reset ---------------------------------------------------------------------------


def test_peaks_in_nested_blocks() -> None:
    keep = block(1024)
    with sim.measure() as outer:
        with sim.measure() as first:
            a = block(8192)
            del a
        with sim.measure() as second:
            b = block(2048)
        with sim.measure() as third:
            pass
        del b
    assert first.peak_bytes == 1024 + 8192 == outer.peak_bytes == outer.peak_reserved_bytes
    assert second.peak_bytes == third.peak_bytes == 1024 + 2048
    assert second.peak_reserved_bytes == 1024 + 8192  # the cache of the first
    assert torch.sim.max_memory_allocated() == 1024 + 8192
    assert sim.counters().peak_bytes == 1024 + 8192 and keep.numel() == 1024


def test_a_peak_counts_held_blocks() -> None:
    side, x = torch.sim.Stream(), torch.zeros(1000, device="sim")
    side.wait_stream(torch.sim.current_stream())
    with sim.measure() as cost:
        with side:
            x.add_(1)
        x.record_stream(side)
        del x
        y = block(4096)
    assert cost.peak_bytes == 8192 and torch.sim.max_memory_allocated() == 4096 == y.numel()


def test_reset_keeps_tensors() -> None:
    x, pinned = torch.arange(1000, device="sim"), torch.arange(1000).pin_memory()
    y, gone = x + 1, torch.empty(1000, pin_memory=True)
    del y, gone
    sim.reset()
    assert books() == (8192, 8192, 8192) and sim.seconds() == 0
    assert torch.sim.max_memory_allocated() == torch.sim.max_memory_reserved() == 8192
    assert torch.sim.host_memory_stats()["allocated_bytes.current"] == 8192
    assert x.tolist() == pinned.tolist() and pinned.is_pinned()
    assert (x + 1).sum() == x.sum() + 1000 and sim.races() == []


def test_a_new_machine_keeps_tensors_of_devices_it_lacks() -> None:
    sim.configure(ROUND, devices=2)
    x = torch.arange(5, device="sim:1")
    sim.configure(ROUND)
    assert x.tolist() == [0, 1, 2, 3, 4] and torch.sim.device_count() == 1
    del x
    sim.configure(ROUND, devices=2)
    assert books(1)[:2] == (0, 0)
