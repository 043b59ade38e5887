"""Page-locked memory of the host: every byte, and what locking costs."""

from __future__ import annotations

import pytest
import torch
from sim.books import MIB, pinned, pinned_books
from sim.machines import ROUND

import greenroom.sim as sim


@pytest.fixture(autouse=True)
def machine() -> None:
    sim.configure(ROUND)


@pytest.mark.parametrize(
    ("nbytes", "taken"), [(512, 512), (513, 1024), (1025, 2048), (3 * MIB, 4 * MIB), (MIB, MIB)]
)
def test_pinned_sizes_are_rounded_up_to_powers_of_two(nbytes: int, taken: int) -> None:
    x = pinned(nbytes)
    assert x.is_pinned() and x.device.type == "cpu" and pinned_books() == (taken, 0)
    del x
    assert pinned_books() == (taken, taken)
    torch.accelerator.empty_host_cache()
    assert pinned_books() == (0, 0)
    assert torch.sim.host_memory_stats()["allocated_bytes.peak"] == taken


def test_what_is_pinned() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    y = x.t().pin_memory()
    assert y.is_pinned() and y.stride() == (1, 4) and torch.equal(y, x.t())
    assert y[1:, 2:].is_pinned() and y.untyped_storage().is_pinned() and y.pin_memory() is y
    assert not x.is_pinned() and not y.clone().is_pinned() and not y.to("sim").is_pinned()
    assert torch.zeros(3, pin_memory=True).tolist() == [0, 0, 0]
    assert torch.tensor([1, 2], pin_memory=True).is_pinned()
    assert torch.ones(3, device="sim").to("cpu", non_blocking=True).is_pinned()  # as from CUDA
    assert not torch.ones(3, device="sim").cpu().is_pinned()
    assert torch.empty_like(torch.ones(2, device="sim"), device="cpu", pin_memory=True).is_pinned()
    with pytest.raises(RuntimeError, match="only dense CPU tensors can be pinned"):
        torch.ones(2, device="sim").pin_memory()
    with pytest.raises(RuntimeError, match="Only dense CPU tensors can be pinned"):
        torch.empty(3, device="sim", pin_memory=True)


def test_pinning_again_from_the_cache_is_free() -> None:
    x = pinned(MIB)
    cost = 1e-4 + MIB / 2e9  # ROUND's pin_s and pin_bytes_per_s
    assert sim.seconds() == pytest.approx(cost, abs=2e-12)
    del x
    x = pinned(MIB - 5)  # rounds to the same
    assert sim.seconds() == pytest.approx(cost, abs=2e-12) and pinned_books() == (MIB, 0)
    y = pinned(MIB // 2)  # another size is another block
    assert pinned_books() == (MIB + MIB // 2, 0) and x.numel() > y.numel()


def test_locking_memory_where_it_lies_has_a_rate_of_its_own() -> None:
    x = torch.empty(MIB, dtype=torch.uint8)
    sim.host_register(x)
    assert sim.seconds() == pytest.approx(1e-4 + MIB / 4e9, abs=2e-12)  # ROUND's
    sim.host_unregister(x)


def test_pinned_capacity() -> None:
    sim.configure(ROUND, pinned_capacity=4096)
    x = pinned(2048)
    y = pinned(1025)
    words = "out of pinned host memory. Tried to lock .* are locked already"
    with pytest.raises(RuntimeError, match=words):
        pinned(1)
    with pytest.raises(RuntimeError, match=words):
        torch.ones(1).pin_memory()
    host = torch.zeros(600, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=words):
        sim.host_register(host)
    assert not host.is_pinned() and pinned_books() == (4096, 0)
    del x  # now it lies cached, and is given back when another size needs the room
    z = pinned(600)
    assert pinned_books() == (3072, 0)
    sim.host_register(host)
    assert pinned_books() == (3672, 0) and y.is_pinned() and z.is_pinned()
    sim.host_unregister(host)


def test_pinned_memory_in_flight_is_not_reused() -> None:
    source = torch.arange(1000).pin_memory()
    target = source.to("sim", non_blocking=True)
    del source
    assert pinned_books() == (8192, 0)
    other = torch.zeros(1000, dtype=torch.int64, pin_memory=True)
    assert pinned_books() == (16384, 0)
    torch.sim.synchronize()
    assert pinned_books() == (16384, 8192)
    assert target.tolist() == list(range(1000)) and other.count_nonzero() == 0


def test_registering_in_place() -> None:
    x = torch.arange(1000)
    before, address = sim.seconds(), x.data_ptr()
    sim.host_register(x)
    assert pinned_books() == (8000, 0)  # not rounded
    assert sim.seconds() - before == pytest.approx(1e-4 + 8000 / 4e9, abs=4e-12)
    assert x.is_pinned() and x[10:].is_pinned() and x.data_ptr() == address
    with sim.measure() as cost:
        y = x.to("sim", non_blocking=True)
    assert cost.seconds == pytest.approx(1e-6 + 1e-5 + 8000 / 1e10, abs=4e-12)  # a pinned copy
    with pytest.raises(ValueError, match="already"):
        sim.host_register(x)
    with pytest.raises(ValueError, match="already"):
        sim.host_register(x[5:])  # of the same storage
    sim.host_unregister(x)
    assert not x.is_pinned() and pinned_books() == (0, 0)
    with pytest.raises(ValueError, match="not registered"):
        sim.host_unregister(x)
    assert x.tolist() == y.tolist() == list(range(1000)) and sim.races() == []
    sim.host_register(x)  # and once more
    sim.host_unregister(x[3:])


def test_registering_what_overlaps_locked_memory_is_refused() -> None:
    # CUDA: cudaErrorHostMemoryAlreadyRegistered
    locked, memory = torch.ones(1000).pin_memory(), bytearray(8000)
    with pytest.raises(ValueError, match="already"):
        sim.host_register(locked)
    assert locked.is_pinned() and pinned_books() == (4096, 0)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    part = torch.frombuffer(memory, dtype=torch.uint8, offset=4000)
    for first, second in ((whole, part), (part, whole)):
        sim.host_register(first)
        try:
            with pytest.raises(ValueError, match="already"):
                sim.host_register(second)
            assert first.is_pinned()
        finally:
            sim.host_unregister(first)
        assert not whole.is_pinned() and not part.is_pinned()
    assert pinned_books() == (4096, 0)


def test_only_host_memory_can_be_registered() -> None:
    for tensor in (torch.ones(3, device="sim"), torch.empty(0)):
        with pytest.raises(ValueError, match="only host memory can be page-locked"):
            sim.host_register(tensor)
        with pytest.raises(ValueError):
            sim.host_unregister(tensor)
