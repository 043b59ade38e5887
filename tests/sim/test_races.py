"""The race detector: every planted race is found, and its ordered twin is silent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sim.machines import ROUND

import greenroom.sim as sim

N = 4096


def stream() -> Any:
    return torch.sim.Stream()


def event_of(stream: Any) -> Any:
    event = torch.sim.Event()
    event.record(stream)
    return event


def main() -> Any:
    return torch.sim.current_stream()


def pinned() -> torch.Tensor:
    return torch.ones(N).pin_memory()


# Each scenario takes `ordered`: with it nothing may be found, without it exactly the named race.
# Those that are not about freeing end with a wait, so that their own tensors are freed in order.


def read_before_copy(ordered: bool) -> None:
    side, weight = stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        weight.copy_(pinned(), non_blocking=True)
    if ordered:
        main().wait_stream(side)
    weight.sum()
    torch.sim.synchronize()


def event_recorded_too_early(ordered: bool) -> None:
    side, weight = stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    early = event_of(side)
    with side:
        weight.copy_(pinned(), non_blocking=True)
    main().wait_event(event_of(side) if ordered else early)
    weight.sum()
    torch.sim.synchronize()


def pageable_copy_is_no_promise(ordered: bool) -> None:
    # The host is held while pageable memory is staged, but another stream must still wait for the
    # last piece.
    side, weight = stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        weight.copy_(torch.ones(N), non_blocking=not ordered)
    weight.sum()
    torch.sim.synchronize()


def read_of_another_streams_result(ordered: bool) -> None:
    side, x = stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        x.add_(1)
    if ordered:
        side.synchronize()
    x.sum()
    torch.sim.synchronize()


def slot_overwritten_while_read(ordered: bool) -> None:
    side, slot = stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    slot.sum()
    if ordered:
        side.wait_event(event_of(main()))
    with side:
        slot.copy_(pinned(), non_blocking=True)
    side.synchronize()
    torch.sim.synchronize()


def two_writers(ordered: bool) -> None:
    side, x = stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    x.fill_(1)
    if ordered:
        side.wait_stream(main())
    with side:
        x.fill_(2)
    torch.sim.synchronize()


def overlapping_slots(ordered: bool) -> None:
    # Views of one arena: disjoint slots need no order, overlapping ones do.
    side, arena = stream(), torch.zeros(4 * N, device="sim")
    torch.sim.synchronize()
    arena[:N].sum()
    begin = N if ordered else N // 2
    with side:
        arena[begin : begin + N].copy_(pinned(), non_blocking=True)
    side.synchronize()
    torch.sim.synchronize()


def waited_for_the_wrong_stream(ordered: bool) -> None:
    side, other, x = stream(), stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        x.add_(1)
    (side if ordered else other).synchronize()
    x.sum()
    torch.sim.synchronize()


def chain_with_a_missing_link(ordered: bool) -> None:
    first, second, x = stream(), stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with first:
        x.add_(1)
    if ordered:
        second.wait_stream(first)
    main().wait_stream(second)
    x.sum()
    torch.sim.synchronize()


def read_back_while_written(ordered: bool) -> None:
    side, x = stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        x.copy_(pinned(), non_blocking=True)
    if ordered:
        main().wait_stream(side)
    x.to("cpu")
    torch.sim.synchronize()


def freed_while_another_stream_reads(ordered: bool) -> None:
    side, x = stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        x.sum()
    if ordered:
        x.record_stream(side)
    del x


def recorded_the_wrong_stream(ordered: bool) -> None:
    # current_stream() read inside the side stream's block is the side stream: the reader stays
    # unknown to the allocator.
    side, compute = stream(), main()
    with side:
        x = torch.zeros(N, device="sim")
        x.record_stream(compute if ordered else torch.sim.current_stream())
    compute.wait_stream(side)
    x.sum()
    del x


def freed_before_the_reader_was_waited_for(ordered: bool) -> None:
    side = stream()
    with side:
        x = pinned().to("sim", non_blocking=True)
    main().wait_stream(side)
    x.sum()
    if ordered:
        main().synchronize()
    del x


def recycled_memory_used_too_early(ordered: bool) -> None:
    # The block comes from the cache of the main stream, whose last kernel may still use those
    # bytes.
    side = stream()
    torch.zeros(N, device="sim").add_(1)
    x = torch.empty(N, device="sim")
    if ordered:
        side.wait_stream(main())
    with side:
        x.copy_(pinned(), non_blocking=True)
    side.synchronize()
    torch.sim.synchronize()


def source_changed_in_flight(ordered: bool) -> None:
    source, weight = pinned(), torch.zeros(N, device="sim")
    weight.copy_(source, non_blocking=True)
    if ordered:
        torch.sim.synchronize()
    source[7] = 3.0
    torch.sim.synchronize()


def upload_of_bytes_still_coming_down(ordered: bool) -> None:
    side, host = stream(), pinned()
    x, y = torch.zeros(N, device="sim"), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        host.copy_(x, non_blocking=True)
    if ordered:
        main().wait_stream(side)
    y.copy_(host, non_blocking=True)
    torch.sim.synchronize()


def download_over_bytes_still_going_up(ordered: bool) -> None:
    side, host = stream(), pinned()
    x, y = torch.zeros(N, device="sim"), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        y.copy_(host, non_blocking=True)
    if ordered:
        main().wait_stream(side)
    host.copy_(x, non_blocking=True)
    torch.sim.synchronize()


def unregistered_in_flight(ordered: bool) -> None:
    host, weight = torch.ones(N), torch.zeros(N, device="sim")
    sim.host_register(host)
    weight.copy_(host, non_blocking=True)
    if ordered:
        torch.sim.synchronize()
    sim.host_unregister(host)
    torch.sim.synchronize()


def other_device_synchronised(ordered: bool) -> None:
    side, x = stream(), torch.zeros(N, device="sim:0")
    torch.sim.synchronize(0)
    with side:
        x.add_(1)
    torch.sim.synchronize(0 if ordered else 1)
    x.sum()
    torch.sim.synchronize()


READ, WRITE, FREE, HOST = "unordered-read", "unordered-write", "unordered-free", "host-write"
SCENARIOS: list[tuple[Callable[[bool], None], str]] = [
    (read_before_copy, READ),
    (event_recorded_too_early, READ),
    (pageable_copy_is_no_promise, READ),
    (read_of_another_streams_result, READ),
    (waited_for_the_wrong_stream, READ),
    (chain_with_a_missing_link, READ),
    (read_back_while_written, READ),
    (upload_of_bytes_still_coming_down, READ),
    (other_device_synchronised, READ),
    (slot_overwritten_while_read, WRITE),
    (two_writers, WRITE),
    (overlapping_slots, WRITE),
    (recycled_memory_used_too_early, WRITE),
    (download_over_bytes_still_going_up, WRITE),
    (freed_while_another_stream_reads, FREE),
    (recorded_the_wrong_stream, FREE),
    (freed_before_the_reader_was_waited_for, FREE),
    (unregistered_in_flight, FREE),
    (source_changed_in_flight, HOST),
]
by_name = pytest.mark.parametrize(
    ("scenario", "kind"), SCENARIOS, ids=[scenario.__name__ for scenario, _ in SCENARIOS]
)


@by_name
def test_planted_race_is_found(scenario: Callable[[bool], None], kind: str) -> None:
    sim.configure(ROUND, devices=2)
    scenario(False)
    assert [race.kind for race in sim.races()] == [kind]


@by_name
def test_ordered_twin_is_silent(scenario: Callable[[bool], None], kind: str) -> None:
    sim.configure(ROUND, devices=2)
    scenario(True)
    assert sim.races() == []


@by_name
def test_races_off_reports_nothing(scenario: Callable[[bool], None], kind: str) -> None:
    sim.configure(ROUND, devices=2, races="off")
    scenario(False)
    assert sim.races() == []


def test_a_race_reads_as_a_sentence() -> None:
    sim.configure(ROUND)
    read_before_copy(False)
    (race,) = sim.races()
    assert race.other_op == "copy h2d pinned" and race.op == "aten::sum"
    assert race.nbytes == 4 * N and race.device == 0 and race.stream == 0
    assert str(race).startswith(
        "unordered-read: 'aten::sum' on stream 0 and 'copy h2d pinned' on stream "
    )


def test_raise_stops_before_the_operation() -> None:
    sim.configure(ROUND, races="raise")
    side, weight = stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        weight.copy_(pinned(), non_blocking=True)
    with pytest.raises(RuntimeError, match=r"RaceError: unordered-write: 'aten::fill_'"):
        weight.fill_(5)
    torch.sim.synchronize()
    assert weight.cpu().eq(1).all()


def test_what_was_refused_has_not_happened() -> None:
    sim.configure(ROUND, races="raise")
    side, third, x = stream(), stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        x.add_(1)
    for _ in range(2):  # asked again, refused again
        with pytest.raises(RuntimeError, match="unordered-write"):
            x.add_(5)
    side.synchronize()
    with third:
        x.sum()
    torch.sim.synchronize()


def test_a_source_that_its_owner_still_holds_is_watched_until_the_host_waits() -> None:
    sim.configure(ROUND)
    source, weight = pinned(), torch.zeros(N, device="sim")
    weight.copy_(source, non_blocking=True)
    for _ in range(2):  # time passes, and the pinned allocator looks around
        torch.empty(2**24, dtype=torch.uint8, pin_memory=True)
    source[0] = 9
    torch.sim.synchronize()
    assert [race.kind for race in sim.races()] == [HOST]


def test_a_download_waited_for_in_steps_is_no_write_of_the_hosts() -> None:
    sim.configure(ROUND)
    side, host = stream(), pinned()
    x, y = torch.zeros(N, device="sim"), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        y.copy_(host, non_blocking=True)
    main().wait_stream(side)
    host.copy_(x, non_blocking=True)
    main().synchronize()
    side.synchronize()
    assert sim.races() == []


def test_raise_at_a_free_comes_with_the_next_operation() -> None:
    sim.configure(ROUND, races="raise")
    freed_while_another_stream_reads(False)
    with pytest.raises(RuntimeError, match="RaceError: unordered-free"):
        torch.zeros(1, device="sim").add_(1)


def test_measure_collects_the_races_inside_it() -> None:
    sim.configure(ROUND)
    read_before_copy(False)
    with sim.measure() as cost:
        read_before_copy(False)
    assert len(cost.races) == 1 and len(sim.races()) == 2


def test_bytes_from_the_device_arrive_when_the_host_has_waited() -> None:
    sim.configure(ROUND)
    host, x = torch.zeros(N).pin_memory(), torch.ones(N, device="sim")
    host.copy_(x, non_blocking=True)
    x.fill_(7)  # later on the stream: what is on its way does not change
    assert host.eq(0).all()
    torch.sim.synchronize()
    assert host.eq(1).all()


def test_waiting_for_a_later_stream_delivers_too() -> None:
    sim.configure(ROUND)
    host, x, side = torch.zeros(N).pin_memory(), torch.ones(N, device="sim"), stream()
    host.copy_(x, non_blocking=True)
    side.wait_stream(main())
    side.synchronize()
    assert host.eq(1).all()


def test_a_query_that_says_done_orders_like_a_wait() -> None:
    sim.configure(ROUND)
    side, x = stream(), torch.zeros(N, device="sim")
    torch.sim.synchronize()
    with side:
        x.add_(1)
    polls = 0
    while not side.query():
        polls += 1
    x.sum()
    assert sim.races() == [] and polls > 0


def test_reading_on_many_streams_is_no_race() -> None:
    sim.configure(ROUND)
    x = torch.zeros(N, device="sim")
    torch.sim.synchronize()
    for _ in range(3):
        with stream():
            x.sum()
    assert sim.races() == []
    x.add_(1)  # one report for the operand, not one for each reader
    assert [race.kind for race in sim.races()] == [WRITE]
