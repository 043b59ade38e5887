"""The engine's log: bytes are those that the simulator counts, times those of its clock."""

from __future__ import annotations

import gc
import itertools
import logging
from typing import Any

import pytest
import torch
from offload.own import Chain
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.observe.events import Call, Offloaded, Onloaded, Ran
from greenroom.observe.log import Log
from greenroom.pipeline import hook_of, state_of

KIB, MIB = 2**10, 2**20


@pytest.fixture(autouse=True)
def names_are_free() -> None:
    """Components of pipelines that are no more have their names until they are collected."""
    gc.collect()


def wide() -> nn.Module:
    """4 MiB of weights."""
    return nn.Linear(1024, 1024, bias=False)


def chain(**options: Any) -> Chain:
    pipe = Chain(first=wide(), second=wide())
    greenroom.enable_model_cpu_offload(pipe, device="sim", **options)
    return pipe


def inputs() -> torch.Tensor:
    return torch.ones(4, 1024)


def log_of(pipe: Any) -> Log:
    state = state_of(pipe)
    assert state is not None
    return state.engine.log


def call_of(pipe: Any, which: int = -1) -> Any:
    return log_of(pipe).read(state_of(pipe), ["first", "second"], which)


def test_what_is_copied_and_when_is_what_the_simulator_counts() -> None:
    pipe = chain()
    with sim.measure() as cost:
        pipe(inputs())
    call = call_of(pipe)
    assert (call.pipeline, call.device, call.budget) == ("Chain", "sim:0", None)
    assert call.outcome == "returned"
    assert [run.part for run in call.runs] == ["first", "second"]
    assert [run.demanded for run in call.runs] == [("first",), ("second",)]
    assert [up.nbytes for up in call.onloads] == [4 * MIB, 4 * MIB]
    assert sum(up.nbytes for up in call.onloads) == cost.h2d_bytes - inputs().nbytes
    assert [down.copied_nbytes for down in call.offloads] == [0, 0]
    assert call.seconds == pytest.approx(cost.seconds, rel=1e-6)
    assert call.peak_nbytes == cost.peak_bytes
    copying = sum(up.ended_s - up.began_s for up in call.onloads)
    assert copying == pytest.approx(cost.busy["h2d"], rel=0.1)
    for run, up in zip(call.runs, call.onloads, strict=True):
        # The device waited for all of the copy, and not for much more than that.
        assert run.asked_s <= up.began_s < up.ended_s <= run.began_s < run.ended_s
    first, second = call.runs
    assert first.ended_s <= second.asked_s


def test_the_same_call_takes_as_long_on_the_clock_as_without_a_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spent() -> tuple[Any, ...]:
        gc.collect()  # the last pipeline is in cycles, and goes when somebody looks
        sim.configure()
        pipe = chain(budget="6MiB")
        costs = []
        for _ in range(3):
            with sim.measure() as cost:
                pipe(inputs())
            costs.append((cost.seconds, cost.peak_bytes, cost.h2d_bytes, cost.syncs))
        return tuple(costs)

    spent()  # now the link's speed is known
    with_log = spent()
    for name in ("needs", "runs", "left", "sent", "came_home"):
        monkeypatch.setattr(Log, name, lambda *_, **__: None)
    monkeypatch.setattr(Log, "now", lambda _: None)
    assert spent() == with_log


@pytest.mark.parametrize("options", [{}, {"budget": "64MiB"}], ids=str)
def test_what_is_resident_and_runs_again_adds_no_event(options: dict[str, Any]) -> None:
    key = f"alone{len(options)}"
    many = {key: wide()}
    greenroom.enable_model_cpu_offload(many, sequence=key, device="sim", **options)
    for _ in range(100):
        many[key](inputs())
    mine = [event for event in greenroom.report(many).call.events if event.part == key]
    assert [type(event) for event in mine] == [Ran, Onloaded]
    assert mine[0].forwards == 100 and mine[0].demanded == (key,)


def test_host_memory_is_told_to_be_page_locked_or_not() -> None:
    pipe = chain()
    pipe(inputs())  # it computes too little for anything to be locked meanwhile
    assert [up.pinned_nbytes for up in call_of(pipe).onloads] == [0, 0]
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget="32MiB")
    pipe(inputs())
    ups = call_of(pipe).onloads
    assert ups and all(up.pinned_nbytes == up.nbytes for up in ups)


def test_weights_that_changed_are_told_to_come_home_and_why_parts_move() -> None:
    class Changes(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.data.mul_(2)
            return super().forward(x)

    pipe = Chain(first=Changes(1024, 1024, bias=False), second=wide())
    greenroom.enable_model_cpu_offload(pipe, device="sim")
    with torch.no_grad():
        pipe(inputs())
    first, second = call_of(pipe).offloads
    assert (first.part, first.copied_nbytes) == ("first", 4 * MIB)
    assert first.ended_s - first.began_s > 4 * MIB / 30e9  # no link is faster
    assert second.copied_nbytes == 0
    assert first.cause == "room for 'second' and what follows it"
    assert second.cause == "the call is over"


def test_within_a_budget_what_comes_ahead_is_told_from_what_comes_on_demand() -> None:
    pipe = chain(budget="32MiB")  # all of it stays
    for _ in range(3):
        pipe(inputs())
    call = call_of(pipe)
    assert call.budget == 32 * MIB
    assert sum(call.resident.values()) == 8 * MIB
    assert call.onloads == call.offloads == ()
    assert call.peak_nbytes is not None and 8 * MIB < call.peak_nbytes < 9 * MIB

    sim.configure()
    pipe = chain(budget="6MiB")  # one at a time
    for _ in range(3):
        pipe(inputs())
    call = call_of(pipe)
    ahead = [name for run in call.runs for name in run.found_ahead]
    demanded = [name for run in call.runs for name in run.demanded]
    assert set(ahead) | set(demanded) == {part for part in known_parts(pipe)}
    assert all(up.is_ahead == (up.part not in demanded) for up in call.onloads)


class Works(nn.Linear):
    """Keeps the device busy, so that the host is ahead of it; works on `takes` bytes meanwhile."""

    def __init__(self, times: int, takes: int = 0) -> None:
        super().__init__(1024, 1024, bias=False)
        self.times, self.takes = times, takes

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        taken = torch.empty(self.takes, dtype=torch.uint8, device=x.device)
        for _ in range(self.times):
            x = super().forward(x)
        return x + taken.numel()


@pytest.mark.parametrize("budget", ["6MiB", "9MiB"])
def test_a_part_has_memory_from_its_copy_on_until_another_may_take_its_place(budget: str) -> None:
    pipe = Chain(first=Works(20), second=Works(20))
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=budget)
    for _ in range(3):
        with sim.measure() as cost:
            pipe(torch.ones(64, 1024))
        call = call_of(pipe)
        arrived: dict[str, float] = dict.fromkeys(call.resident, 0.0)
        changes = [(0.0, nbytes) for nbytes in call.resident.values()]
        for event in call.events:
            if isinstance(event, Onloaded):
                assert event.began_s < event.ended_s
                arrived[event.part] = event.ended_s
                changes.append((event.began_s, event.nbytes))
            elif isinstance(event, Offloaded):
                assert arrived.pop(event.part) <= event.ended_s
                changes.append((event.ended_s, -event.nbytes))
        sums = itertools.accumulate(nbytes for _, nbytes in sorted(changes))
        assert max(sums) <= cost.peak_bytes


def test_what_is_sent_for_the_next_call_is_not_beside_what_this_one_worked_on() -> None:
    pipe = Chain(first=Works(1), second=Works(1, 6 * MIB))
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget="12MiB")
    with sim.measure() as cost:
        pipe(inputs())
    call = call_of(pipe)
    assert call.onloads[-1].part == "first" and call.onloads[-1].began_s > call.seconds
    assert call.peak_nbytes == pytest.approx(cost.peak_bytes, rel=0.01)


def known_parts(pipe: Any) -> list[str]:
    hooks = [hook_of(module) for module in (pipe.first, pipe.second)]
    return [part.key for hook in hooks if hook is not None for part in hook.parts]


def test_an_error_is_the_calls_outcome() -> None:
    pipe = chain()
    for budget in (None, "6MiB"):
        greenroom.enable_model_cpu_offload(pipe, device="sim", budget=budget)
        with pytest.raises(RuntimeError):
            pipe(torch.ones(4, 5))
        call = call_of(pipe)
        assert call.outcome == "raised RuntimeError"
        try:
            raise ValueError
        except ValueError:  # another error that is being handled is none of the call's
            pipe(inputs())
        assert call_of(pipe).outcome == "returned"


def test_the_last_few_calls_are_kept_and_no_more_than_so_many_events(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = chain()
    for rows in range(1, 7):
        pipe(torch.ones(rows, 1024))
    assert call_of(pipe, -4) is not None
    assert call_of(pipe, -5) is None
    monkeypatch.setattr("greenroom.observe.log._MOST_EVENTS", 3)
    pipe(inputs())
    call = call_of(pipe)
    assert (len(call.events), call.missed) == (3, 3)


@pytest.mark.parametrize("budget", [None, "6MiB"])
def test_events_of_calls_that_are_gone_are_used_again_and_of_no_others(
    budget: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, made = torch.sim.Event.make, []

    def counted(**options: Any) -> Any:
        made.append(options)
        return make(**options)

    monkeypatch.setattr(torch.sim.Event, "make", staticmethod(counted))
    sim.configure(devices=2)
    pipe = Chain(first=wide(), second=wide())
    greenroom.enable_model_cpu_offload(pipe, device="sim:1", budget=budget)
    before: list[Any] = []
    for _ in range(8):
        made.clear()
        pipe(inputs())
        greenroom.offload_now(pipe)
        pipe.first(inputs())  # in no call
        greenroom.offload_now(pipe)
        now = [call_of(pipe, which) for which in (-4, -3, -2, -1)]
        assert [call.pipeline for call in now[2:]] == ["Chain", ""]
        assert not before or now[:2] == before[2:]
        before = now
    timed = [event for call in log_of(pipe)._calls for event in call.times]
    assert len(timed) == len({id(event) for event in timed}) > 40
    assert len([options for options in made if options.get("enable_timing")]) < 4


def test_a_call_can_be_looked_at_while_it_runs() -> None:
    seen = []

    class Looks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(greenroom.report(pipe))
            return super().forward(x)

    pipe = Chain(first=wide(), second=Looks(1024, 1024))
    greenroom.enable_model_cpu_offload(pipe, device="sim")
    pipe(inputs())
    (report,) = seen
    assert (report.call.outcome, report.call.seconds) == ("running", None)
    assert report.total.onloads == 2 and "running" in str(report)


def test_a_pipeline_sees_its_own_calls() -> None:
    one, other = chain(), chain()
    one(inputs())
    assert call_of(other) is None
    other(inputs())
    del one
    gc.collect()
    assert call_of(other, -1) is not None and call_of(other, -2) is None


def test_peaks_of_torch_are_what_they_would_be_without_a_log() -> None:
    big = torch.empty(64 * MIB, dtype=torch.uint8, device="sim")
    del big
    pipe = chain()
    pipe(inputs())
    assert torch.sim.max_memory_allocated() >= 64 * MIB
    peak = call_of(pipe).peak_nbytes
    assert peak is not None and 4 * MIB < peak < 5 * MIB


def test_peaks_of_a_call_that_is_measured_step_by_step_are_its_own() -> None:
    pipe = chain(budget="6MiB")
    big = torch.empty(64 * MIB, dtype=torch.uint8, device="sim")
    del big
    for _ in range(2):
        pipe(inputs())
        peak = call_of(pipe).peak_nbytes
        assert peak is not None and 4 * MIB < peak < 6 * MIB
        assert torch.sim.max_memory_allocated() >= 64 * MIB  # it is not restarted
    big = torch.empty(64 * MIB, dtype=torch.uint8, device="sim")
    greenroom.disable_model_cpu_offload(pipe)
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget="6MiB")
    del big
    with sim.measure() as cost:
        pipe(inputs())
    assert 4 * MIB < cost.peak_bytes < 6 * MIB


def test_what_others_have_on_the_device_is_not_of_the_budget() -> None:
    def calls() -> list[Call]:
        pipe = chain(budget="6MiB")
        found = []
        for _ in range(3):
            pipe(inputs())
            found.append(call_of(pipe))
            assert "exceeded" not in str(greenroom.report(pipe))
        return found

    alone = calls()
    gc.collect()
    others = torch.empty(4 * MIB, dtype=torch.uint8, device="sim")
    for one, other in zip(alone, calls(), strict=True):
        assert other.others_nbytes == one.others_nbytes + others.nbytes
        assert one.peak_nbytes is not None
        assert other.peak_nbytes == one.peak_nbytes + others.nbytes


def test_each_decision_is_a_line_that_says_why(caplog: pytest.LogCaptureFixture) -> None:
    pipe = chain()
    with caplog.at_level(logging.DEBUG, "greenroom"):
        pipe(inputs())
    assert caplog.messages == [
        "a call of Chain begins, without a budget",
        "onload first, 4194304 bytes: it is needed now",
        "offload first, 0 bytes copied home: room for 'second' and what follows it",
        "onload second, 4194304 bytes: it is needed now",
        "offload second, 0 bytes copied home: the call is over",
        "the call of Chain returned",
    ]


# ---- in step with what is there


def there(pipe: Any) -> dict[str, int]:
    """Bytes of the components that are on the device, or on their way there."""
    components = {"first": pipe.first, "second": pipe.second}
    stores = {name: hook_of(module).parts[0].store for name, module in components.items()}
    return {
        name: module.weight.nbytes
        for name, module in components.items()
        if module.weight.device.type == "sim" or stores[name]._coming
    }


@pytest.mark.parametrize("budget", [None, "5MiB", "6MiB", "9MiB", "64MiB"])
def test_the_log_knows_what_is_on_the_device_whatever_fails(budget: str | None) -> None:
    pipe = chain(budget=budget)
    for nth in range(1, 12):
        sim.fail("device_alloc", nth)
        outcome = "returned"
        try:
            pipe(inputs())
        except torch.OutOfMemoryError as error:
            assert isinstance(error, greenroom.DeviceOutOfMemory)
            outcome = "raised DeviceOutOfMemory"
        assert log_of(pipe)._resident == there(pipe)
        call = call_of(pipe)
        assert call.outcome == outcome
        now = dict(call.resident)
        for event in call.events:
            if isinstance(event, Onloaded):
                assert event.part not in now
                now[event.part] = event.nbytes
            elif isinstance(event, Offloaded):
                assert now.pop(event.part) == event.nbytes
        assert now == there(pipe)
    sim.reset()
    pipe(inputs())
    greenroom.offload_now(pipe)
    assert log_of(pipe)._resident == there(pipe) == {}


def test_what_is_sent_home_between_calls_takes_no_calls_place() -> None:
    pipe = chain(budget="64MiB")
    for _ in range(4):
        pipe(inputs())
        greenroom.offload_now(pipe)
    assert [call_of(pipe, which).pipeline for which in (-1, -2, -3)] == ["Chain"] * 3


def test_a_component_that_is_used_by_itself_for_long_keeps_what_came_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("greenroom.observe.log._MOST_EVENTS", 10)
    pipe = {"one": wide(), "two": wide()}
    greenroom.enable_model_cpu_offload(pipe, sequence="one->two", device="sim")
    for _ in range(20):
        pipe["two"](pipe["one"](inputs()))
    call = greenroom.report(pipe).call
    assert call.missed == 0 and 0 < len(call.events) <= 10
