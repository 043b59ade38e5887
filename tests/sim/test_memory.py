"""Books on memory: every byte of the device and every page-locked byte of the host, exactly."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from sim.machines import ROUND

import greenroom.sim as sim

KIB, MIB = 2**10, 2**20


@pytest.fixture(autouse=True)
def machine() -> None:
    sim.configure(ROUND, capacity=64 * KIB)


def block(nbytes: int, device: str = "sim") -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def books(device: Any = None) -> tuple[int, int, int]:
    """Bytes of live tensors; those and freed ones held for a stream; those and the cache."""
    stats = torch.accelerator.memory_stats(device)
    kinds = ("allocated", "active", "reserved")
    allocated, active, reserved = (stats[f"{kind}_bytes.all.current"] for kind in kinds)
    assert (allocated, reserved) == (
        torch.sim.memory_allocated(device),
        torch.sim.memory_reserved(device),
    )
    assert torch.sim.mem_get_info(device)[0] == torch.sim.mem_get_info(device)[1] - reserved
    return allocated, active, reserved


def retries() -> int:
    return int(torch.sim.memory_stats()["num_alloc_retries"])


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


# ---- pinned host memory --------------------------------------------------------------------------


def pinned_books() -> tuple[int, int]:
    """Bytes locked, and how many of them wait in the cache."""
    stats = torch.sim.host_memory_stats()
    return stats["allocated_bytes.current"], stats["cached_bytes.current"]


def pinned(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


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
    assert sim.seconds() - before == pytest.approx(1e-4 + 8000 / 2e9, abs=4e-12)
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


# ---- any program ---------------------------------------------------------------------------------

CAPACITY = 16 * KIB
STREAMS = 3
STEPS = st.one_of(
    st.tuples(st.just("alloc"), st.integers(0, STREAMS - 1), st.integers(0, 6000)),
    st.tuples(st.just("free"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("use"), st.integers(0, STREAMS - 1), st.integers(0, 99)),
    st.tuples(st.sampled_from(["sync", "empty", "reset"]), st.just(0), st.just(0)),
)


def rounded(nbytes: int) -> int:
    return (nbytes + 511) // 512 * 512


@given(st.lists(STEPS, max_size=40))
def test_the_books_hold_for_any_program(steps: list[tuple[str, int, int]]) -> None:
    sim.configure(ROUND, capacity=CAPACITY)
    streams = [torch.sim.default_stream()] + [torch.sim.Stream() for _ in range(STREAMS - 1)]
    live: list[torch.Tensor] = []
    peak = total = 0
    for what, first, second in steps:
        expected = sum(rounded(t.numel()) for t in live)
        if what == "alloc":
            with streams[first]:
                try:
                    live.append(block(second))
                    total += rounded(second)
                    assert expected + rounded(second) <= CAPACITY
                except torch.OutOfMemoryError:
                    # After the retry nothing is cached or held any more: only live tensors count.
                    assert expected + rounded(second) > CAPACITY
                    assert books() == (expected,) * 3
        elif what == "free" and live:
            del live[first % len(live)]
        elif what == "use" and live:
            tensor = live[second % len(live)]
            for other in streams:
                streams[first].wait_stream(other)
            with streams[first]:
                tensor.fill_(1)
            tensor.record_stream(streams[first])
            del tensor
        elif what == "sync":
            torch.sim.synchronize()
        elif what == "empty":
            torch.sim.empty_cache()
        elif what == "reset":
            sim.reset()
            peak = total = 0
        expected = sum(rounded(t.numel()) for t in live)
        peak = max(peak, expected)
        allocated, active, reserved = books()
        assert allocated == expected <= active <= reserved <= CAPACITY
        stats = torch.sim.memory_stats()
        assert stats["requested_bytes.all.current"] == sum(t.numel() for t in live)
        assert stats["allocated_bytes.all.peak"] == peak
        assert stats["allocated_bytes.all.allocated"] == total
        assert stats["reserved_bytes.all.peak"] >= stats["active_bytes.all.peak"] >= peak
    live.clear()
    torch.sim.synchronize()
    torch.sim.empty_cache()
    assert books() == (0, 0, 0)


PINNED = st.one_of(
    st.tuples(st.sampled_from(["pin", "register"]), st.integers(1, 5000)),
    st.tuples(st.just("free"), st.integers(0, 99)),
    st.tuples(st.just("empty"), st.just(0)),
)


@given(st.lists(PINNED, max_size=30))
def test_the_books_on_pinned_memory_hold_for_any_program(steps: list[tuple[str, int]]) -> None:
    capacity = 16 * KIB
    sim.configure(ROUND, pinned_capacity=capacity)
    live: list[tuple[torch.Tensor, int, bool]] = []
    for what, number in steps:
        if what == "pin":
            size = max(512, 1 << (number - 1).bit_length())
            try:
                live.append((pinned(number), size, False))
            except RuntimeError:
                assert sum(size for _, size, _ in live) + size > capacity
        elif what == "register":
            tensor = torch.empty(number, dtype=torch.uint8)
            try:
                sim.host_register(tensor)
                live.append((tensor, number, True))
            except RuntimeError:
                assert sum(size for _, size, _ in live) + number > capacity
        elif what == "free" and live:
            tensor, _, registered = live.pop(number % len(live))
            if registered:
                sim.host_unregister(tensor)
            del tensor
        elif what == "empty":
            torch.accelerator.empty_host_cache()
            assert pinned_books()[1] == 0
        locked, cached = pinned_books()
        assert locked - cached == sum(size for _, size, _ in live)
        assert locked <= capacity and all(tensor.is_pinned() for tensor, _, _ in live)
    for tensor, _, registered in live:
        if registered:
            sim.host_unregister(tensor)
    live.clear()


def test_four_threads_at_once() -> None:
    sim.configure(ROUND)
    rounds, errors = 60, []

    def work(seed: int) -> None:
        try:
            a = torch.full((32, 32), float(seed), device="sim")
            side = torch.sim.Stream()
            for i in range(rounds):
                b = a @ a
                scratch = [block(1000 * (i % 7)) for _ in range(5)]
                side.wait_stream(torch.sim.current_stream())
                with side:
                    c = b + 1
                torch.sim.current_stream().wait_stream(side)
                b.record_stream(side)
                host = c.to("cpu", non_blocking=True)
                torch.sim.current_stream().synchronize()
                assert host.unique().tolist() == [32 * seed * seed + 1], host
                x = torch.ones(4, device="sim", requires_grad=True)
                (x * seed).sum().backward()
                assert x.grad.tolist() == [seed] * 4
                del b, c, scratch
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    torch.sim.synchronize()
    torch.sim.empty_cache()
    assert errors == [] and books() == (0, 0, 0)
    assert sim.counters().kernels >= 4 * rounds * 4


def test_threads_that_make_streams_while_others_work() -> None:
    errors, stop = [], threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                (torch.ones(8, device="sim") + 1).sum().item()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3000):
        torch.sim.Stream()
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
