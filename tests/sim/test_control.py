"""Setting the machine up wrong, breaking it on purpose, and reading what it recorded."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sim.machines import ROUND

import greenroom.sim as sim


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"profile": "rtx-4009"}, "rtx-4090"),
        ({"profile": 4090}, "a name or a greenroom.sim.Profile"),
        ({"devices": 0}, "a number from 1 to 16, not 0"),
        ({"devices": True}, "a number from 1 to 16, not True"),
        ({"capacity": "8 gigs"}, "'8 gigs' is no size"),
        ({"capacity": -1}, "cannot be negative"),
        ({"capacity": 0}, "cannot be 0"),
        ({"pinned_capacity": "lots"}, "'lots' is no size"),
        ({"dry_above": "x"}, "'x' is no size"),
        ({"races": "maybe"}, "'report', 'raise' or 'off', not 'maybe'"),
    ],
)
def test_a_bad_configuration_is_refused_and_changes_nothing(
    options: dict[str, Any], words: str
) -> None:
    sim.configure(ROUND, capacity="1MiB", devices=2)
    with pytest.raises(ValueError, match=words):
        sim.configure(**options)
    assert sim.current_profile() is ROUND
    assert torch.sim.mem_get_info()[1] == 2**20 and torch.sim.device_count() == 2


def test_an_unknown_profile_names_the_near_miss() -> None:
    with pytest.raises(sim.UnknownProfile, match="rtx-4090"):
        sim.configure("rtx4090")


def test_out_of_memory_says_what_was_asked_and_what_was_true() -> None:
    sim.configure(capacity="1MiB")
    keep = torch.empty(2**19, dtype=torch.uint8, device="sim")
    words = (
        r"Tried to allocate 1\.00 MiB\. Device 0 has a capacity of 1\.00 MiB, "
        r"of which 524288 bytes is in use"
    )
    with pytest.raises(torch.OutOfMemoryError, match=words):
        torch.empty(2**20, dtype=torch.uint8, device="sim")
    assert torch.sim.memory_stats()["num_ooms"] == 1
    assert torch.empty(2**19, dtype=torch.uint8, device="sim").numel() == keep.numel()


# ---- faults --------------------------------------------------------------------------------------


def allocate() -> None:
    torch.empty(8, device="sim")


def pin() -> None:
    torch.empty(8, pin_memory=True)


def copy() -> None:
    torch.empty(8, device="sim").copy_(torch.zeros(8))


def kernel() -> None:
    torch.empty(8, device="sim").fill_(1)


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize(
    ("kind", "work", "error"),
    [
        ("copy", lambda: torch.zeros(1, device="sim").item(), RuntimeError),
        ("device_alloc", allocate, torch.OutOfMemoryError),
        ("pinned_alloc", pin, RuntimeError),
        ("copy", copy, RuntimeError),
        ("kernel", kernel, RuntimeError),
    ],
)
def test_the_nth_fails_once(kind: Any, work: Any, error: type[Exception], nth: int) -> None:
    sim.fail(kind, nth)
    for _ in range(nth - 1):
        work()
    with pytest.raises(error, match=f"injected fault: {kind}"):
        work()
    work()


def test_a_failed_kernel_has_done_nothing() -> None:
    x = torch.ones(4, device="sim")
    sim.fail("kernel")
    with pytest.raises(RuntimeError):
        x.add_(1)
    assert x.cpu().tolist() == [1.0] * 4


def test_a_failed_copy_has_done_nothing() -> None:
    x, host = torch.ones(4, device="sim"), torch.zeros(4)
    sim.fail("copy")
    with pytest.raises(RuntimeError):
        host.copy_(x)
    assert host.eq(0).all()


def test_every_allocation_of_a_program_can_fail() -> None:
    """The n-th fails, n rises until the program gets through; the books balance every time."""

    def program() -> float:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
        return float(model.to("sim")(torch.ones(3, 8, device="sim")).sum().item())

    for n in range(1, 100):
        sim.reset()
        sim.fail("device_alloc", n)
        with contextlib.suppress(torch.OutOfMemoryError):
            program()
            break
        assert torch.sim.memory_allocated() == 0
    assert 5 < n < 99


def test_a_failed_allocation_comes_before_the_kernel() -> None:
    """An operator without memory for its result draws no numbers and updates no buffer."""
    x = torch.ones(64, 8, device="sim")
    norm = torch.nn.BatchNorm1d(8).to("sim")
    state, mean = torch.sim.get_rng_state(), norm.running_mean.clone()
    for work in (lambda: torch.nn.functional.dropout(x, 0.5), lambda: norm(x * 3)):
        sim.fail("device_alloc")
        with pytest.raises(torch.OutOfMemoryError):
            work()
    assert torch.equal(torch.sim.get_rng_state(), state) and torch.equal(norm.running_mean, mean)


def test_a_result_too_large_is_refused_before_it_is_computed() -> None:
    sim.configure(capacity="1MiB")
    a, b = torch.ones(20000, 1, device="sim"), torch.ones(1, 20000, device="sim")
    with sim.measure() as cost, pytest.raises(torch.OutOfMemoryError):
        a @ b
    assert cost.busy["compute"] == 0 and torch.sim.memory_allocated() == a.nbytes * 2 + 384 * 2


def test_memory_that_was_given_up_cannot_be_used() -> None:
    x = torch.ones(8, device="sim")
    x.untyped_storage().resize_(0)
    for use in (lambda: x.add_(1), lambda: x.copy_(torch.ones(8)), lambda: x.cpu()):
        with pytest.raises(RuntimeError, match="resized to nothing"):
            use()


def test_a_reset_inside_a_measurement_starts_it_anew() -> None:
    with sim.measure() as cost:
        kernel()
        sim.reset()
        kernel()
    assert cost.kernels == 1 and cost.seconds > 0


def test_reset_forgets_faults_and_slow_links() -> None:
    sim.fail("kernel")
    sim.slow_link(100)
    sim.reset()
    kernel()
    assert sim.counters().kernels == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sim.fail("disk"), "there is no fault 'disk'"),  # type: ignore[arg-type]
        (lambda: sim.fail("copy", 0), "nth counts from 1"),
        (lambda: sim.slow_link(0), "factor is a positive, finite number"),
        (lambda: sim.slow_link(float("inf")), "factor is a positive, finite number"),
        (lambda: sim.slow_link(2, direction="up"), "direction is"),  # type: ignore[arg-type]
        (lambda: sim.slow_link(2, device=3), "sim:3 does not exist"),
        (lambda: sim.counters(1), "sim:1 does not exist"),
        (lambda: sim.host_register(torch.empty(1, device="sim")), "only host memory"),
        (lambda: sim.host_unregister(torch.empty(4)), "was not registered"),
    ],
)
def test_bad_requests_are_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


# ---- measuring -----------------------------------------------------------------------------------


def test_measure_fills_its_value_also_when_the_block_raises() -> None:
    with pytest.raises(KeyError), sim.measure() as cost:
        kernel()
        raise KeyError
    assert cost.kernels == 1 and cost.seconds > 0


def test_measure_fills_its_value_also_when_a_race_is_raised() -> None:
    sim.configure(ROUND, races="raise")
    side, x = torch.sim.Stream(), torch.zeros(8, device="sim")
    with pytest.raises(RuntimeError, match="RaceError"), sim.measure() as cost:
        with side:
            x.add_(1)
        x.add_(1)
    assert cost.kernels == 1


def test_reset_lets_go_of_pinned_memory_in_flight() -> None:
    torch.empty(2**20, dtype=torch.uint8, device="sim").copy_(
        torch.zeros(2**20, dtype=torch.uint8, pin_memory=True), non_blocking=True
    )
    sim.reset()
    assert torch.sim.host_memory_stats()["allocated_bytes.current"] == 0


def test_measured_blocks_nest() -> None:
    with sim.measure() as outer:
        big = torch.empty(2**20, dtype=torch.uint8, device="sim")
        del big
        with sim.measure() as inner:
            torch.empty(2**10, dtype=torch.uint8, device="sim").fill_(0)
    assert inner.peak_bytes == 2**10 and outer.peak_bytes == 2**20
    assert outer.kernels == inner.kernels == 1


def test_counters_go_on_until_reset() -> None:
    kernel()
    kernel()
    assert sim.counters().kernels == 2
    sim.reset()
    assert sim.counters().kernels == 0 and sim.seconds() == 0.0


def test_the_trace_opens_in_perfetto(tmp_path: Path) -> None:
    sim.configure(ROUND, trace=True)
    side = torch.sim.Stream()
    x = torch.zeros(1000).pin_memory().to("sim", non_blocking=True)
    torch.sim.synchronize()
    with side:
        x.add_(1)
    side.synchronize()
    sim.write_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    lanes = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    assert lanes[spans["copy h2d pinned"]["tid"]] == "h2d"
    assert spans["copy h2d pinned"]["args"] == {"bytes": 4000}
    assert spans["copy h2d pinned"]["dur"] == pytest.approx(10 + 0.4)  # microseconds
    assert lanes[spans["aten::add_"]["tid"]].startswith("stream ")
    assert any(event["ph"] == "C" and event["args"]["bytes"] == 4096 for event in events)


def test_without_trace_nothing_is_recorded() -> None:
    kernel()
    assert sim.trace()["traceEvents"] == []
