"""The virtual clock agrees with closed formulas; the same program always takes the same time."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from sim.machines import ROUND

import greenroom.sim as sim
from greenroom.zoo.tiny import call_kwargs, tiny

MB = 1_000_000
LAUNCH, KERNEL, LATENCY = 1e-6, 2e-6, 1e-5


def exactly(seconds: float) -> object:
    return pytest.approx(seconds, abs=2e-12)  # two picoseconds: each duration is rounded to one


@pytest.fixture(autouse=True)
def machine() -> None:
    sim.configure(ROUND)


def on_device(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device="sim")


def on_host(nbytes: int, *, pin: bool = True) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pin)


@pytest.mark.parametrize("pin", [True, False])
@pytest.mark.parametrize("nbytes", [1, 10 * MB])
def test_one_copy_down(nbytes: int, pin: bool) -> None:
    source, target = on_host(nbytes, pin=pin), on_device(nbytes)
    with sim.measure() as cost:
        target.copy_(source)
    assert cost.seconds == exactly(LAUNCH + LATENCY + nbytes / (1e10 if pin else 5e9))
    assert (cost.h2d_bytes, cost.h2d_copies, cost.d2h_bytes, cost.kernels) == (nbytes, 1, 0, 0)


@pytest.mark.parametrize("pin", [True, False])
def test_one_copy_up(pin: bool) -> None:
    target, source = on_host(4 * MB, pin=pin), on_device(4 * MB)
    with sim.measure() as cost:
        target.copy_(source)
    assert cost.seconds == exactly(LAUNCH + LATENCY + 4 * MB / (8e9 if pin else 4e9))
    assert (cost.d2h_bytes, cost.d2h_copies, cost.h2d_bytes) == (4 * MB, 1, 0)


def test_a_pageable_copy_holds_the_host() -> None:
    source, target = on_host(10 * MB, pin=False), on_device(10 * MB)
    before = sim.seconds()
    target.copy_(source, non_blocking=True)
    assert sim.seconds() - before == exactly(LAUNCH + LATENCY + 10 * MB / 5e9)


def test_a_pinned_copy_does_not_hold_the_host() -> None:
    source, target = on_host(10 * MB), on_device(10 * MB)
    before = sim.seconds()
    target.copy_(source, non_blocking=True)
    assert sim.seconds() - before == exactly(LAUNCH)


def test_a_matmul_is_bound_by_flops_or_by_memory() -> None:
    a = torch.zeros(512, 512, device="sim")
    with sim.measure() as cost:
        a @ a
    assert cost.seconds == exactly(LAUNCH + 2 * 512**3 / 1e12)
    row = torch.zeros(1, 2048, device="sim")
    b = torch.zeros(2048, 2048, device="sim")
    with sim.measure() as cost:
        row @ b
    assert cost.seconds == exactly(LAUNCH + 4 * (2048 * 2048 + 2 * 2048) / 1e11)


def test_half_precision_has_its_own_rate() -> None:
    a = torch.zeros(512, 512, device="sim", dtype=torch.float16)
    with sim.measure() as cost:
        a @ a
    assert cost.seconds == exactly(LAUNCH + 2 * 512**3 / 2e12)


def test_a_convolution_counts_its_multiply_adds() -> None:
    x, w = torch.zeros(1, 64, 32, 32, device="sim"), torch.zeros(64, 64, 3, 3, device="sim")
    with sim.measure() as cost:
        torch.nn.functional.conv2d(x, w, padding=1)
    assert cost.busy["compute"] == exactly(2 * 64 * 32 * 32 * 64 * 9 / 1e12)


def test_attention_counts_two_products() -> None:
    q = torch.zeros(1, 2, 256, 64, device="sim")
    with sim.measure() as cost:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert cost.busy["compute"] == exactly(2 * 2 * (2 * 256 * 256 * 64) / 1e12)
    assert cost.kernels == 1


def test_small_kernels_take_the_least_time_and_queue_behind_each_other() -> None:
    x = torch.zeros(4, device="sim")
    with sim.measure() as cost:
        for _ in range(10):
            x.add_(1)
    # The first starts once it is issued; a kernel takes longer than an issue, so the rest queue.
    assert cost.seconds == exactly(LAUNCH + 10 * KERNEL)
    assert cost.kernels == 10


def test_views_cost_nothing() -> None:
    x = torch.zeros(8, 8, device="sim")
    with sim.measure() as cost:
        x.view(64)[8:16].unsqueeze(0).t().expand(8, 3)
    assert (cost.seconds, cost.kernels) == (0.0, 0)


def test_copy_and_compute_overlap() -> None:
    side = torch.sim.Stream()
    source, target = on_host(10 * MB), on_device(10 * MB)
    a = torch.zeros(1024, 1024, device="sim")
    copy_s, matmul_s = LATENCY + 10 * MB / 1e10, 2 * 1024**3 / 1e12
    with sim.measure() as cost:
        with side:
            target.copy_(source, non_blocking=True)
        a @ a
    assert cost.seconds == exactly(2 * LAUNCH + max(copy_s - LAUNCH, matmul_s))
    assert cost.busy["h2d"] == exactly(copy_s) and cost.busy["compute"] == exactly(matmul_s)


def test_two_streams_share_one_engine() -> None:
    sides = [torch.sim.Stream() for _ in range(2)]
    sources, targets = [on_host(MB) for _ in sides], [on_device(MB) for _ in sides]
    with sim.measure() as cost:
        for side, source, target in zip(sides, sources, targets, strict=True):
            with side:
                target.copy_(source, non_blocking=True)
    assert cost.seconds == exactly(LAUNCH + 2 * (LATENCY + MB / 1e10))


def test_each_direction_has_its_engine() -> None:
    down, up = torch.sim.Stream(), torch.sim.Stream()
    source, target = on_host(8 * MB), on_device(8 * MB)
    back, sender = on_host(8 * MB), on_device(8 * MB)
    with sim.measure() as cost:
        with down:
            target.copy_(source, non_blocking=True)
        with up:
            back.copy_(sender, non_blocking=True)
    assert cost.seconds == exactly(2 * LAUNCH + LATENCY + 8 * MB / 8e9)


def test_a_stream_that_waits_does_not_hold_the_engine_for_others() -> None:
    waiting, free = torch.sim.Stream(), torch.sim.Stream()
    sources, targets = [on_host(MB) for _ in range(2)], [on_device(MB) for _ in range(2)]
    a = torch.zeros(1024, 1024, device="sim")
    copy_s, matmul_s = LATENCY + MB / 1e10, 2 * 1024**3 / 1e12
    done = torch.sim.Event()
    with sim.measure() as cost:
        a @ a
        waiting.wait_stream(torch.sim.current_stream())
        with waiting:
            targets[0].copy_(sources[0], non_blocking=True)
        with free:
            targets[1].copy_(sources[1], non_blocking=True)
            done.record()
        before = sim.seconds()
        done.synchronize()
        assert sim.seconds() - before == exactly(copy_s)
    assert cost.seconds == exactly(LAUNCH + matmul_s + copy_s)


def test_events_tell_virtual_milliseconds() -> None:
    begin, end = torch.sim.Event(enable_timing=True), torch.sim.Event(enable_timing=True)
    a = torch.zeros(1024, 1024, device="sim")
    torch.sim.synchronize()
    begin.record()
    a @ a
    end.record()
    torch.sim.synchronize()
    assert begin.elapsed_time(end) == pytest.approx(1e3 * (LAUNCH + 2 * 1024**3 / 1e12), abs=1e-9)


def test_item_waits_for_the_stream_and_reads_over_the_link() -> None:
    a = torch.zeros(1024, 1024, device="sim")
    with sim.measure() as cost:
        (a @ a)[0, 0].item()
    assert cost.seconds >= 2 * 1024**3 / 1e12
    assert (cost.syncs, cost.d2h_bytes) == (1, 4)


def test_one_wait_is_one_sync() -> None:
    with sim.measure() as cost:
        torch.sim.synchronize()
        torch.sim.current_stream().synchronize()
    assert cost.syncs == 2


def test_pinning_costs_time() -> None:
    before = sim.seconds()
    torch.empty(2**20, dtype=torch.uint8, pin_memory=True)
    assert sim.seconds() - before == exactly(1e-4 + 2**20 / 2e9)


def test_a_slow_link() -> None:
    source, target = on_host(MB), on_device(MB)
    sim.slow_link(3, direction="h2d")
    with sim.measure() as cost:
        target.copy_(source)
    assert cost.seconds == exactly(LAUNCH + LATENCY + 3 * MB / 1e10)


def test_strided_copies_are_staged() -> None:
    rows, columns = torch.zeros(1000, 1000), torch.empty(1000, 1000, device="sim").t()
    with sim.measure() as cost:
        columns.copy_(rows)  # through a dense tensor on the device, and rearranged there
    assert (cost.h2d_bytes, cost.h2d_copies, cost.kernels) == (4 * MB, 1, 1)
    with sim.measure() as cost:
        columns.t().copy_(rows.t())  # rearranged on the host
    assert (cost.h2d_bytes, cost.h2d_copies, cost.kernels) == (4 * MB, 1, 0)


def test_a_cast_is_the_hosts_if_the_copy_blocks_and_else_the_devices() -> None:
    source, target = torch.zeros(MB, dtype=torch.float16), torch.empty(MB, device="sim")
    with sim.measure() as cost:
        target.copy_(source)
    assert (cost.h2d_bytes, cost.kernels) == (4 * MB, 0)
    with sim.measure() as cost:
        target.copy_(source.pin_memory(), non_blocking=True)
    assert (cost.h2d_bytes, cost.kernels) == (2 * MB, 1)


def test_a_copy_between_devices_uses_both_links() -> None:
    sim.configure(ROUND, devices=2)
    source, target = torch.zeros(MB, device="sim:0"), torch.empty(MB, device="sim:1")
    torch.sim.synchronize(0)
    with sim.measure(1) as cost:
        target.copy_(source)
        torch.sim.synchronize(1)
    assert cost.seconds == exactly(LAUNCH + LATENCY + 4 * MB / 8e9)
    assert cost.busy["h2d"] == exactly(LATENCY + 4 * MB / 8e9)
    assert sim.counters(0).peer_bytes == 4 * MB and cost.kernels == 0


def test_pinned_memory_is_used_again_once_its_copy_has_ended() -> None:
    target = torch.empty(MB, dtype=torch.uint8, device="sim")
    for _ in range(10):
        source = on_host(MB)
        target.copy_(source, non_blocking=True)
        del source
    # Ten requests, but never more than a few copies in flight.
    assert torch.sim.host_memory_stats()["allocated_bytes.peak"] <= 4 * 2**20
    torch.sim.synchronize()


def test_a_masked_write_makes_the_host_wait() -> None:
    x, mask = torch.zeros(8, device="sim"), torch.ones(8, dtype=torch.bool, device="sim")
    with sim.measure() as cost:
        x[mask] = torch.ones(8, device="sim")
    assert cost.syncs == 1


# ---- determinism ---------------------------------------------------------------------------------


def streamed_program() -> float:
    sim.configure(ROUND)
    side, x = torch.sim.Stream(), torch.zeros(256, 256, device="sim")
    weights = [torch.zeros(256, 256).pin_memory() for _ in range(4)]
    for weight in weights * 2:
        with side:
            w = weight.to("sim", non_blocking=True)
        torch.sim.current_stream().wait_stream(side)
        w.record_stream(torch.sim.current_stream())
        x = x @ w + x.mean()
    torch.sim.synchronize()
    return sim.seconds()


def test_a_hundred_runs_one_number() -> None:
    assert len({streamed_program() for _ in range(100)}) == 1


PIPELINE = """
import torch, greenroom.sim as sim
from greenroom.zoo.tiny import call_kwargs, tiny
pipe = tiny("flux")
device = torch.device("sim:0")
pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)
with sim.measure() as cost:
    pipe(**call_kwargs("flux"))
print(cost.seconds.hex(), cost.kernels, cost.peak_bytes)
"""


@pytest.mark.slow
def test_a_pipeline_takes_the_same_time_in_every_process() -> None:
    lines = {
        subprocess.run(
            [sys.executable, "-c", PIPELINE],
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads, **_environment()},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert len(lines) == 1


def _environment() -> dict[str, str]:
    import os

    return {k: v for k, v in os.environ.items() if k not in ("PYTHONHASHSEED", "OMP_NUM_THREADS")}


@pytest.mark.slow
def test_a_pipeline_run_a_hundred_times_takes_one_time() -> None:
    pipe = tiny("sdxl")
    pipe.enable_model_cpu_offload(device="sim")
    kwargs = call_kwargs("sdxl") | {"num_inference_steps": 1}

    def once() -> float:
        with sim.measure() as cost:
            pipe(**kwargs)
        return round(cost.seconds * 1e12)

    once()
    assert len({once() for _ in range(100)}) == 1


@settings(max_examples=40)
@given(
    jobs=st.lists(
        st.tuples(
            st.integers(0, 2), st.sampled_from(["copy", "matmul", "wait"]), st.integers(1, 4)
        ),
        max_size=12,
    )
)
def test_bounds_hold_for_any_program(jobs: list[tuple[int, str, int]]) -> None:
    """No program is faster than its busiest engine, nor slower than all of its parts in a row."""
    sim.configure(ROUND, races="off")
    streams = [torch.sim.Stream() for _ in range(3)]
    a, host, target = torch.zeros(64, 64, device="sim"), on_host(MB), on_device(MB)
    with sim.measure() as cost:
        for where, what, n in jobs:
            with streams[where]:
                if what == "copy":
                    target[: n * 1000].copy_(host[: n * 1000], non_blocking=True)
                elif what == "matmul":
                    for _ in range(n):
                        a @ a
                else:
                    streams[where].wait_stream(streams[n % 3])
    issues = (cost.kernels + cost.h2d_copies) * LAUNCH
    assert max(cost.busy.values()) <= cost.seconds + 1e-12
    assert cost.seconds <= sum(cost.busy.values()) + issues + 1e-12


def test_a_small_pageable_copy_passes_what_other_streams_have_queued() -> None:
    sim.configure(dataclasses.replace(ROUND, inline_copy_bytes=4096))
    weights = torch.zeros(10**7, dtype=torch.uint8).pin_memory()
    side = torch.sim.Stream()
    with torch.sim.stream(side):
        weights.to("sim", non_blocking=True)  # a millisecond
    before = sim.seconds()
    torch.zeros(4096, dtype=torch.uint8).to("sim")
    assert sim.seconds() - before < 1e-4
    torch.zeros(4097, dtype=torch.uint8).to("sim")
    assert sim.seconds() - before > 9e-4
