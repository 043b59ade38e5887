"""Plans within a budget: what holds for every pipeline, and how good they are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from greenroom.core.director import Director
from greenroom.core.plan import Plan, make_plan
from greenroom.core.simulate import Costs, run, simulate
from greenroom.core.trace import Step, phases

COSTS = Costs(h2d_bytes_per_s=10.0, copy_s=0.0)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[Step], dict[str, int]]:
    """A call of up to three components, each of some parts, some of them in loops."""
    steps: list[Step] = []
    sizes: dict[str, int] = {}
    for component in draw(st.permutations(["encoder", "denoiser", "decoder"])):
        count = draw(st.integers(0, 5))
        sizes[component] = draw(st.integers(1, 5))
        beside = draw(st.integers(0, 5))
        parts = [f"{component}.{i}" for i in range(count)]
        seconds = {p: draw(st.integers(0, 8)) / 4 for p in (component, *parts)}
        sizes |= {p: draw(st.integers(1, 10)) for p in parts}
        stay = [Step(component, (component,), seconds[component], beside, opens=True)]
        stay += [Step(p, (component,), seconds[p], beside) for p in parts]
        steps += stay * draw(st.sampled_from([1, 1, 2, 5]))
    return steps, sizes


def least_budget(steps: Sequence[Step], sizes: dict[str, int]) -> int:
    return max(sum(sizes[n] for n in s.needs) + (s.beside_nbytes or 0) for s in steps)


def fits(steps: Sequence[Step], sizes: dict[str, int]) -> st.SearchStrategy[int]:
    # What works on the most and what weighs the most need not be one step: of a phase, the most of
    # both is what has to fit.
    most = max(s.beside_nbytes or 0 for s in steps)
    heaviest = max(sum(sizes[n] for n in s.needs) for s in steps)
    return st.integers(most + heaviest, most + sum(sizes.values()) + 3)


@given(st.data())
def test_within_every_budget_everything_is_there_when_it_runs(data: st.DataObject) -> None:
    steps, sizes = data.draw(programs())
    budget = data.draw(fits(steps, sizes))
    director = Director(make_plan(steps, sizes, budget, COSTS))
    there: set[str] = set()
    for _ in range(3):
        director.begin_call()
        for step in steps:
            orders = director.begin(step)
            assert there.issuperset(orders.offload) and there.isdisjoint(orders.onload)
            there = there.difference(orders.offload).union(orders.onload)
            assert there.issuperset(step.needs) and there == set(director.resident)
            assert sum(sizes[n] for n in there) + (step.beside_nbytes or 0) <= budget
        orders = director.end_call()
        there = there.difference(orders.offload).union(orders.onload)
        assert sum(sizes[n] for n in there) <= budget
        assert director.deviations == 0


@given(st.data())
def test_whatever_runs_instead_of_what_was_planned(data: st.DataObject) -> None:
    steps, sizes = data.draw(programs())
    budget = data.draw(fits(steps, sizes))
    director = Director(make_plan(steps, sizes, budget, COSTS))
    director.begin_call()
    there: set[str] = set()
    for step in data.draw(st.lists(st.sampled_from(steps), max_size=40)):
        orders = director.begin(step)
        there = there.difference(orders.offload).union(orders.onload)
        assert there.issuperset(step.needs) and there == set(director.resident)
        assert sum(sizes[n] for n in there) + (step.beside_nbytes or 0) <= budget
    gone = data.draw(st.lists(st.sampled_from(sorted(sizes)), max_size=5))
    director.gone(gone)
    orders = director.begin(steps[0])
    assert set(director.resident).issuperset(steps[0].needs)


@given(st.data())
def test_after_orders_that_failed_what_is_there_is_what_counts(data: st.DataObject) -> None:
    steps, sizes = data.draw(programs())
    budget = data.draw(fits(steps, sizes))
    plan = make_plan(steps, sizes, budget, COSTS)
    director = Director(plan)
    director.begin_call()
    for step in steps:
        director.begin(step)
        if data.draw(st.integers(0, 3)) == 0:
            there = data.draw(st.sets(st.sampled_from(sorted(sizes))))
            director.recount(there)
            assert set(director.resident) == there
            assert director.resident_nbytes == sum(sizes[n] for n in there)
        if data.draw(st.integers(0, 3)) == 0:
            director.follow(plan.squeezed(0), at=director.position)
            orders = director.begin(step)
            assert set(director.resident) == set(step.needs)
            assert not set(orders.onload) - set(step.needs)
            director.follow(plan, at=director.position)


@given(st.data())
def test_where_everything_fits_the_second_call_moves_nothing(data: st.DataObject) -> None:
    steps, sizes = data.draw(programs())
    budget = sum(sizes.values()) + max(s.beside_nbytes or 0 for s in steps)
    plan = make_plan(steps, sizes, budget, COSTS)
    assert simulate(plan, COSTS, calls=2).h2d_nbytes == 0
    assert simulate(plan, COSTS, calls=2).stalled_s == 0


def least_recently_used(steps: Sequence[Step], sizes: dict[str, int], budget: int) -> list[float]:
    """Seconds of two calls that fetch on demand and give up what was used longest ago."""
    order: dict[str, None] = {}
    calls = []
    for _ in range(2):
        seconds = 0.0
        for step in steps:
            for name in step.needs:
                if name not in order:
                    seconds += sizes[name] / COSTS.h2d_bytes_per_s
                order.pop(name, None)
                order[name] = None
            room = budget - (step.beside_nbytes or 0)
            for name in [n for n in order if n not in step.needs]:
                if sum(sizes[n] for n in order) <= room:
                    break
                del order[name]
            seconds += step.seconds or 0.0
        calls.append(seconds)
    return calls


@settings(max_examples=300)
@given(st.data())
def test_no_plan_is_slower_than_least_recently_used(data: st.DataObject) -> None:
    steps, sizes = data.draw(programs())
    budget = data.draw(fits(steps, sizes))
    ours = [call.seconds for call in run(make_plan(steps, sizes, budget, COSTS), COSTS, calls=2)]
    theirs = least_recently_used(steps, sizes, budget)
    assert sum(ours) <= sum(theirs) + 1e-9
    assert ours[1] <= theirs[1] + 1e-9


@given(st.data())
def test_what_is_no_faster_moves_no_more_than_what_merely_gives_way(data: st.DataObject) -> None:
    steps, sizes = data.draw(programs())
    budget = data.draw(fits(steps, sizes))
    plan = make_plan(steps, sizes, budget, COSTS)
    if any(phase.times > 3 for phase in plan.phases):
        return  # of those not every round is simulated
    ours = run(plan, COSTS, calls=3)
    lazy = run(replace(plan, drops={}), COSTS, calls=3)
    if sum(call.seconds for call in lazy) * 0.999 <= sum(call.seconds for call in ours):
        moved, least = (sum(call.h2d_nbytes for call in calls) for calls in (ours, lazy))
        assert moved * 0.99 <= least


def a_loop(
    count: int, nbytes: int, seconds: float, times: int
) -> tuple[list[Step], dict[str, int]]:
    sizes = {"rest": 1} | {f"block{i}": nbytes for i in range(count)}
    turn = [Step("rest", ("rest",), 0.0, 0, opens=True)]
    turn += [Step(f"block{i}", ("rest",), seconds, 0) for i in range(count)]
    return turn * times, sizes


def test_a_loop_that_does_not_fit_moves_what_does_not_fit_and_a_ring() -> None:
    steps, sizes = a_loop(count=20, nbytes=10, seconds=1.0, times=30)
    plan = make_plan(steps, sizes, 101, COSTS)
    timeline = simulate(plan, COSTS, calls=2)
    # 10 of 20 blocks do not fit; at most two more make room for the next ones.
    assert 30 * 100 <= timeline.h2d_nbytes <= 30 * 120
    (flowing,) = plan.streamed.values()
    which = sorted(int(name.removeprefix("block")) for name in flowing)
    assert max(b - a for a, b in itertools.pairwise(which)) <= 3  # spread over the round
    assert timeline.stalled_s < 0.02 * timeline.seconds
    assert timeline.peak_nbytes <= 101


def stay(name: str, parts: int, seconds: float, beside: int = 0) -> list[Step]:
    """A forward of a component with so many parts, each of which takes so long."""
    inside = [Step(f"{name}{i}", (name,), seconds, beside) for i in range(parts)]
    return [Step(name, (name,), seconds / 10, beside, opens=True), *inside]


def test_what_slows_every_round_of_a_loop_is_not_kept_through_it() -> None:
    # The encoder's three parts are a quarter of what there is for copies on their way.
    steps = [*stay("encoder", 3, 0.5), *stay("loop", 110, 2.5) * 20, *stay("decoder", 0, 50.0)]
    sizes = {name: 2 for step in steps for name in step.needs}
    costs = Costs(h2d_bytes_per_s=1.0, copy_s=0.0)
    timeline = simulate(make_plan(steps, sizes, 80, costs), costs, calls=3)
    assert timeline.seconds < 1.001 * timeline.compute_s


def test_what_only_the_first_call_leaves_there_does_not_count() -> None:
    # After a first call the encoder is there for the next one, and then gives way to the others.
    steps = [*stay("encoder", 11, 0.01), *stay("expert", 20, 2.0) * 2, *stay("other", 20, 2.0) * 2]
    steps += stay("decoder", 0, 1000.0, beside=4)
    sizes = {name: 1 for step in steps for name in step.needs}
    costs = Costs(h2d_bytes_per_s=1.0, copy_s=0.0)
    calls = run(make_plan(steps, sizes, 38, costs), costs, calls=5)
    assert all(call.stalled_s < 0.1 for call in calls[1:])


def test_what_only_a_first_call_waits_for_counts_too() -> None:
    # No later call waits, whatever is given up. In the first one the decoder comes while the
    # denoiser works, if the encoder makes room for it.
    steps = [*stay("encoder", 0, 0.0), *stay("denoiser", 0, 20.0, 1), *stay("decoder", 0, 20.0)]
    plan = make_plan(steps, {"encoder": 1, "denoiser": 2, "decoder": 5}, 8, COSTS)
    first, *later = run(plan, COSTS, calls=3)
    assert first.stalled_s < 0.301  # until the encoder is there, and the denoiser
    assert sum(call.stalled_s for call in later) < 0.001


def test_what_runs_once_comes_while_a_long_step_before_it_works() -> None:
    # There is no time for the text encoder's 21 parts but that of the decoder. So the loop's leave
    # before it, and come while the encoder works.
    steps = [*stay("text", 20, 0.01), *stay("encoder", 0, 250.0, beside=15)]
    steps += [*stay("loop", 40, 1.0) * 10, *stay("decoder", 0, 250.0, beside=25)]
    sizes = {name: 1 for step in steps for name in step.needs}
    costs = Costs(h2d_bytes_per_s=1.0, copy_s=0.0)
    calls = run(make_plan(steps, sizes, 50, costs), costs, calls=4)
    assert all(call.stalled_s < 0.1 for call in calls[1:])


def test_what_is_small_comes_late_where_it_would_take_the_room_of_what_is_large() -> None:
    # While the denoiser works there is room for the encoder's large part, but not for both.
    steps = [Step("denoiser", ("denoiser",), 0.5, 4, opens=True)] * 2
    steps += [Step("encoder", ("encoder",), 0.0, 1, opens=True)]
    steps += [Step("large", ("encoder",), 0.25, 1)]
    steps += [Step("decoder", ("decoder",), 0.25, 3, opens=True)]
    sizes = {"denoiser": 2, "encoder": 2, "large": 10, "decoder": 4}
    plan = make_plan(steps, sizes, 16, COSTS)
    assert plan.late == {1: {"encoder"}}
    assert "2 parts, 0.00 GB, of which 0 (0.00 GB) stream, 1 late" in str(plan)
    assert simulate(plan, COSTS, calls=2).stalled_s < 1.0
    assert simulate(replace(plan, late={}), COSTS, calls=2).stalled_s > 1.3


def test_phases_fold_loops() -> None:
    first, _ = a_loop(3, 1, 1.0, 1)
    other = [Step("other", ("other",), opens=True)]
    found = phases([*other, *first * 4, *other])
    assert [(p.begin, p.length, p.times) for p in found] == [(0, 1, 1), (1, 4, 4), (17, 1, 1)]


def test_a_plan_prints_what_stays_and_what_streams() -> None:
    steps, sizes = a_loop(count=20, nbytes=10**9, seconds=1.0, times=30)
    plan = make_plan(steps, sizes, 10 * 10**9, Costs(25e9))
    assert isinstance(plan, Plan)
    assert str(plan).startswith("  30 x rest: 21 parts, 20.00 GB, of which ")


def test_loops_that_look_like_others_with_fewer_rounds() -> None:
    steps = [Step(part, (part,), 1.0, 0, opens=True) for part in "bccccbccc"]
    found = phases(steps)
    assert [phase.times for phase in found] == [1, 4, 1, 3]
    fewer = [steps[0], *steps[1:4], *steps[5:]]  # as many rounds as are simulated
    assert len(phases(fewer)) == 1
    plan = make_plan(steps, {"b": 3, "c": 4}, 5, COSTS)
    assert list(plan.phases) == found
    assert simulate(plan, COSTS).peak_nbytes <= 5
