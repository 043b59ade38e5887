"""The bound: below every plan, and where it can be worked out in one's head."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
from core.test_plan import COSTS, a_loop, fits, programs
from hypothesis import given, settings

from greenroom.core.bound import Bound, Start, lower_bound
from greenroom.core.director import Director
from greenroom.core.plan import Plan, make_plan
from greenroom.core.simulate import Costs, simulate
from greenroom.core.trace import Step

A_LITTLE = 1e-9


@dataclass(frozen=True)
class Turn:
    """One of several calls in a row, each of which begins when the one before is over."""

    seconds: float
    nbytes: int  # that were sent before its last step
    nbytes_at_its_end: int  # that were sent then, for the next one
    resident: frozenset[str]
    backlog_s: float  # what is on its way when it is over


def in_a_row(plan: Plan, calls: int) -> list[Turn]:
    """As `simulate`, with a link that goes on between the calls."""
    director = Director(plan)
    done = link = 0.0
    ready: dict[str, float] = {}
    turns = []
    for _ in range(calls):
        begin = done
        sent = [0, 0]
        director.begin_call()
        for step in plan.steps:
            for name in director.begin(step).onload:
                link = max(link, done) + plan.sizes[name] / COSTS.h2d_bytes_per_s
                ready[name] = link
                sent[0] += plan.sizes[name]
            done = max([done, *(ready[name] for name in step.needs)]) + (step.seconds or 0.0)
        for name in director.end_call().onload:
            link = max(link, done) + plan.sizes[name] / COSTS.h2d_bytes_per_s
            ready[name] = link
            sent[1] += plan.sizes[name]
        resident = frozenset(director.resident)
        turns.append(Turn(done - begin, *sent, resident, max(0.0, link - done)))
    return turns


@settings(max_examples=300)
@given(st.data())
def test_no_plan_is_below_it(data: st.DataObject) -> None:
    steps, sizes = data.draw(programs())
    budget = data.draw(fits(steps, sizes))
    plan = make_plan(steps, sizes, budget, COSTS)
    bounds = {start: lower_bound(steps, sizes, budget, COSTS, start) for start in Start}
    turns = in_a_row(plan, 5)
    for i, turn in enumerate(turns):
        bound = bounds[Start.RESTED if i else Start.EMPTY]
        call = simulate(plan, COSTS, calls=i + 1)
        assert call.seconds >= bound.seconds - A_LITTLE
        assert call.compute_s == pytest.approx(bound.compute_s)
        assert turn.seconds >= bound.seconds - A_LITTLE
        assert turn.nbytes >= bound.h2d_nbytes
    last, before = turns[-1], turns[-2]
    if last.resident == before.resident and last.backlog_s == pytest.approx(before.backlog_s):
        bound = bounds[Start.IN_A_ROW]
        assert last.nbytes + last.nbytes_at_its_end >= bound.h2d_nbytes
        assert last.seconds >= bound.seconds - A_LITTLE


@settings(max_examples=300)
@given(st.data())
def test_more_memory_less_preparation_and_a_slower_link(data: st.DataObject) -> None:
    steps, sizes = data.draw(programs())
    budget = data.draw(fits(steps, sizes))
    bounds = {s: lower_bound(steps, sizes, budget, COSTS, s) for s in Start}
    rested, in_a_row, first = (bounds[s] for s in (Start.RESTED, Start.IN_A_ROW, Start.EMPTY))
    assert rested.seconds <= in_a_row.seconds + A_LITTLE
    assert rested.seconds <= first.seconds + A_LITTLE
    assert rested.h2d_nbytes <= in_a_row.h2d_nbytes <= first.h2d_nbytes
    used = {name for step in steps for name in step.needs}
    assert first.h2d_nbytes >= sum(sizes[name] for name in used)
    for start, bound in bounds.items():
        # The familiar bound is never the better one.
        copying = bound.h2d_nbytes / COSTS.h2d_bytes_per_s
        assert bound.seconds >= max(bound.compute_s + bound.first_fill_s, copying) - A_LITTLE
        more = lower_bound(steps, sizes, budget + data.draw(st.integers(0, 20)), COSTS, start)
        assert more.seconds <= bound.seconds + A_LITTLE
        assert more.h2d_nbytes <= bound.h2d_nbytes
        slower = lower_bound(steps, sizes, budget, replace(COSTS, h2d_bytes_per_s=5.0), start)
        assert bound.seconds - A_LITTLE <= slower.seconds <= 2 * bound.seconds + A_LITTLE


def test_a_loop_moves_what_the_best_replacement_misses() -> None:
    # Of 20 blocks of a byte, 10 are there beside the rest. Whatever is moved takes the place of the
    # block before, so of 19 uses after that one 9 hit: 10 misses in 19 uses.
    steps, sizes = a_loop(count=20, nbytes=1, seconds=0.01, times=10)
    bound = lower_bound(steps, sizes, 11, Costs(10.0), Start.IN_A_ROW)
    assert bound.h2d_nbytes == 200 * 10 // 19
    assert bound.seconds == pytest.approx(200 / 10 * 10 / 19)
    first = lower_bound(steps, sizes, 11, Costs(10.0), Start.EMPTY)
    assert first.h2d_nbytes == 111 and first.first_fill_s == 0.1  # which is the rest alone


def test_with_room_for_everything_a_first_call_waits_for_its_first_step() -> None:
    steps, sizes = a_loop(count=4, nbytes=5, seconds=1.0, times=3)
    bound = lower_bound(steps, sizes, 100, Costs(10.0), Start.EMPTY)
    # "rest" and the first block take 0.6 s; the others come while the first ones are at work.
    assert bound == Bound(pytest.approx(12.6), 12.0, 21, 0.1)
    for start in (Start.IN_A_ROW, Start.RESTED):
        assert lower_bound(steps, sizes, 100, Costs(10.0), start) == Bound(12.0, 12.0, 0, 0.0)


def test_what_one_phase_copies_does_not_hide_under_another() -> None:
    # The encoder takes no time, and the loop after it needs all the memory until its end.
    sizes = {"encoder": 100, "loop": 100}
    steps = [Step("encoder", ("encoder",), 0.0, 0, opens=True)]
    steps += [Step("loop", ("loop",), 10.0, 0, opens=True)] * 5
    bound = lower_bound(steps, sizes, 100, Costs(10.0))
    assert bound.h2d_nbytes == 200
    assert bound.seconds == pytest.approx(10 + 10 + 50)  # the familiar bound says 50
    rested = lower_bound(steps, sizes, 100, Costs(10.0), Start.RESTED)
    assert rested.seconds == pytest.approx(10 + 50)


def test_what_does_not_fit_in_beside_the_long_step_of_a_round_comes_after_it() -> None:
    # Only "long" fits in beside what it works on: in each round x and y take 2 s after it.
    sizes = {"rest": 1, "long": 2, "x": 10, "y": 10}
    turn = [Step("rest", ("rest",), 0.0, 0, opens=True), Step("x", ("rest",), 0.25, 0)]
    turn += [Step("long", ("rest",), 10.0, 20), Step("y", ("rest",), 0.25, 0)]
    rounds = 20
    for start in Start:
        bound = lower_bound(turn * rounds, sizes, 23, Costs(10.0), start)
        # What is there in the beginning, or comes while x and y work, is less than a round's.
        assert bound.seconds >= (rounds - 1) * (10.0 + 2.0)
        assert bound.seconds <= rounds * (10.0 + 2.0 + 0.5 + 0.2)
    # The familiar bound sees neither.
    assert max(bound.compute_s, bound.h2d_nbytes / 10) == pytest.approx(rounds * 10.5)


def test_what_a_step_works_on_is_room_that_is_missing() -> None:
    sizes = {"a": 10, "b": 10}
    steps = [Step("a", ("a",), 1.0, 0, opens=True), Step("b", ("b",), 1.0, 0, opens=True)]
    assert lower_bound(steps, sizes, 20, COSTS).h2d_nbytes == 0
    steps[1] = replace(steps[1], beside_nbytes=4)
    assert lower_bound(steps, sizes, 20, COSTS).h2d_nbytes == 4


def test_a_call_without_steps_takes_nothing() -> None:
    assert lower_bound([], {}, 10, COSTS) == Bound(0.0, 0.0, 0, 0.0)


def test_long_calls_take_a_moment() -> None:
    steps, sizes = a_loop(count=99, nbytes=10, seconds=0.5, times=100)
    start = time.process_time()
    for begin in Start:
        lower_bound(steps, sizes, 505, COSTS, begin)
    assert time.process_time() - start < 5
