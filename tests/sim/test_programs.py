"""Books on memory hold for any program, and for several threads at once."""

from __future__ import annotations

import gc
import threading

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from sim.books import KIB, block, books, pinned, pinned_books
from sim.machines import ROUND

import greenroom.sim as sim

CAPACITY = 16 * KIB
STREAMS = 3
STEPS = st.one_of(
    st.tuples(st.just("alloc"), st.integers(0, STREAMS - 1), st.integers(0, 6000)),
    st.tuples(st.just("free"), st.integers(0, 99), st.just(0)),
    st.tuples(st.just("use"), st.integers(0, STREAMS - 1), st.integers(0, 99)),
    st.tuples(st.sampled_from(["sync", "empty", "reset"]), st.just(0), st.just(0)),
)


@pytest.fixture(autouse=True)
def machine() -> None:
    sim.configure(ROUND, capacity=64 * KIB)


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
