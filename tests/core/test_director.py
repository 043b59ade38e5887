"""The director's orders: what holds for any order of steps, and the rules one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import hypothesis.strategies as st
import pytest
from core.test_plan import COSTS, fits, programs
from hypothesis import given

from greenroom.core.director import Director, Orders
from greenroom.core.plan import Plan, make_plan
from greenroom.core.trace import Step, phases

# ---- whatever runs
# --------------------------------------------------------------------------------


@dataclass
class Host:
    """Carries orders out, far ahead of the device: a step is over only if something waited for it.

    It waits for the last step of what it gives up, for every step where it is told so, and for all
    at the end of a call.
    """

    director: Director
    sizes: Mapping[str, int]
    budget: int
    there: set[str] = field(default_factory=set)
    running: list[Step] = field(default_factory=list)

    def begin(self, step: Step) -> Orders:
        orders = self.director.begin(step)
        self.carry_out(orders, step.needs)
        self.running.append(step)
        assert self.there.issuperset(step.needs)
        self.check_room()
        return orders

    def carry_out(self, orders: Orders, needs: tuple[str, ...]) -> None:
        for names in (orders.offload, orders.onload, orders.release):
            assert len(names) == len(set(names))
        assert self.there.issuperset(orders.offload), "what goes was there"
        assert set(orders.offload).isdisjoint(needs), "what is needed does not go"
        assert set(orders.offload).isdisjoint(orders.onload), "nothing goes and comes at once"
        for i in reversed(range(len(self.running))):
            if not set(orders.offload).isdisjoint(self.running[i].needs):
                del self.running[: i + 1]
                break
        self.there.difference_update(orders.offload)
        assert self.there.issuperset(orders.release), "what is released is there, and stays"
        if orders.settles:
            self.running.clear()
        assert self.there.isdisjoint(orders.onload), "what comes was not there"
        self.there.update(orders.onload)
        assert self.there == set(self.director.resident)
        assert self.director.resident_nbytes == sum(self.sizes[name] for name in self.there)

    def check_room(self) -> None:
        nbytes = sum(self.sizes[name] for name in self.there)
        for step in self.running:  # any of them may still be at work
            assert nbytes + (step.beside_nbytes or 0) <= self.budget

    def begin_call(self) -> None:
        self.director.begin_call()

    def end_call(self) -> Orders:
        beside = max((step.beside_nbytes or 0 for step in self.running), default=0)
        ahead = self.director.look_ahead(self.budget - beside)
        self.carry_out(Orders(onload=ahead), ())
        self.check_room()  # while the device is still at work
        self.running.clear()
        orders = self.director.end_call()
        self.carry_out(orders, ())
        assert sum(self.sizes[name] for name in self.there) <= self.budget
        return orders


@given(st.data())
def test_there_is_room_also_for_steps_that_the_device_has_not_got_to(data: st.DataObject) -> None:
    steps, sizes = data.draw(programs())
    budget = data.draw(fits(steps, sizes))
    host = Host(Director(make_plan(steps, sizes, budget, COSTS)), sizes, budget)
    for _ in range(3):
        host.begin_call()
        for step in steps:
            host.begin(step)
        host.end_call()
        assert host.director.deviations == 0


@given(st.data())
def test_steps_of_a_quiet_stay_need_not_be_told_of(data: st.DataObject) -> None:
    steps, sizes = data.draw(programs())
    budget = data.draw(fits(steps, sizes))
    plan = make_plan(steps, sizes, budget, COSTS)
    loaded = []
    for tells_all in (True, False):
        host = Host(Director(plan), sizes, budget)
        for _ in range(4):
            host.begin_call()
            came: list[str] = []
            for step in steps:
                if host.director.is_quiet and not step.opens and not tells_all:
                    assert host.there.issuperset(step.needs)
                    host.running.append(step)
                    continue
                came += host.begin(step).onload
            came += host.end_call().onload
            assert host.director.deviations == 0
        loaded.append(sum(sizes[name] for name in came))
    assert loaded[0] == loaded[1]


@given(st.data())
def test_whatever_runs_and_whoever_takes_parts_away(data: st.DataObject) -> None:
    steps, sizes = data.draw(programs())
    budget = data.draw(fits(steps, sizes))
    host = Host(Director(make_plan(steps, sizes, budget, COSTS)), sizes, budget)
    for _ in range(data.draw(st.integers(1, 3))):
        host.begin_call()
        begin = data.draw(st.integers(0, len(steps)))
        end = data.draw(st.integers(begin, len(steps)))
        odd = data.draw(st.lists(st.sampled_from(steps), max_size=8))
        for step in [*steps[:begin], *odd, *steps[begin:end]]:
            host.begin(step)
        gone = data.draw(st.sets(st.sampled_from([*sizes, "never there"]), max_size=4))
        host.director.gone(sorted(gone))
        host.there -= gone
        is_whole = host.director.position == len(steps) - 1
        orders = host.end_call()
        assert is_whole or orders == Orders()


# ---- one by one
# --------------------------------------------------------------------------------


def stay(name: str, parts: str) -> list[Step]:
    opening = Step(name, (name,), 1e-3, 0, opens=True)
    return [opening, *(Step(part, (name,), 1e-3, 0) for part in parts)]


def test_a_loop_in_which_everything_stays_is_quiet_but_for_its_last_round() -> None:
    steps = [*stay("E", "f"), *stay("U", "vwx") * 4, *stay("D", "e")]
    director = Director(planned(steps, 1000))
    for _ in range(2):
        director.begin_call()
        quiet = []
        for step in steps:
            director.begin(step)
            quiet.append(director.is_quiet)
    opens = [i for i, step in enumerate(steps) if step.opens]
    assert [i for i, is_quiet in enumerate(quiet) if is_quiet] == opens[:-1]
    # What is given up after the last round, or streams in each, is told of.
    director = Director(planned(steps, 1000, {15: "v"}))
    run(director, steps)
    director.begin_call()
    told = 0
    for step in steps:
        if not director.is_quiet or step.opens:
            director.begin(step)
            told += 1
    assert director.deviations == 0 and director.position == len(steps) - 1
    assert told < len(steps)


def test_a_part_that_went_in_a_quiet_stay_is_found_where_it_is_needed() -> None:
    steps = [*stay("U", "vwx") * 3, *stay("D", "e")]
    director = Director(planned(steps, 1000))
    run(director, steps)
    director.begin_call()
    director.begin(steps[0])
    assert director.is_quiet
    director.gone(["w"])
    assert director.begin(steps[2]).onload == ("w",)
    assert not director.is_quiet and director.deviations == 0 and director.position == 2
    run_rest = [director.begin(step) for step in steps[3:]]
    assert run_rest and director.deviations == 0


def step(part: str, beside: int = 0, *, seconds: float = 1e-3, opens: bool = True) -> Step:
    return Step(part, (part,), seconds, beside, opens)


def letters(text: str) -> list[Step]:
    return [step(part) for part in text]


def planned(
    steps: Sequence[Step], budget: int, drops: Mapping[int, str] | None = None, nbytes: int = 10
) -> Plan:
    """A plan of parts of 10 bytes each, that gives up after a step what is said there."""
    sizes = {name: nbytes for step in steps for name in step.needs}
    found = phases(steps)
    rooms = [
        budget - max(steps[i].beside_nbytes or 0 for i in range(phase.begin, phase.end))
        for phase in found
    ]
    given_up = {i: tuple(names) for i, names in (drops or {}).items()}
    return Plan(tuple(steps), sizes, budget, given_up, tuple(found), tuple(rooms), COSTS)


def run(director: Director, steps: Iterable[Step]) -> list[Orders]:
    director.begin_call()
    return [director.begin(step) for step in steps]


def test_where_everything_fits_it_is_ordered_at_once_and_then_nothing() -> None:
    steps = letters("abc")
    director = Director(planned(steps, 30))
    # Nobody knew how much room there was before the first step.
    assert run(director, steps) == [
        Orders(onload=("a", "b", "c"), settles=True),
        *[Orders()] * 2,
    ]
    assert director.end_call() == Orders()
    assert run(director, steps) == [Orders()] * 3


def test_what_is_given_up_goes_a_step_later_when_it_is_known_whether_it_was_changed() -> None:
    steps = letters("abcd")
    director = Director(planned(steps, 20, {0: "a", 1: "b"}))
    first, second, third, fourth = run(director, steps)
    assert first.onload == ("a", "b")
    assert second == Orders(release=("a",))  # its last step may still be running
    assert third == Orders(offload=("a",), release=("b",), onload=("c",))
    assert fourth == Orders(offload=("b",), onload=("d",))


def test_before_a_long_step_the_host_can_wait_a_moment() -> None:
    steps = [step("a"), step("b", seconds=0.1), step("c")]
    director = Director(planned(steps, 20, {0: "a"}))
    _, second, third = run(director, steps)
    assert second == Orders(offload=("a",), onload=("c",))  # and so is not released any more
    assert third == Orders()


def test_what_is_released_stays_if_nothing_takes_its_room() -> None:
    steps = letters("abb")
    director = Director(planned(steps, 20, {0: "a"}))
    assert run(director, steps)[1] == Orders(release=("a",))
    assert director.resident.keys() == {"a", "b"}
    director.end_call()
    assert run(director, steps)[0] == Orders()


def test_what_is_needed_at_once_takes_the_place_of_what_is_needed_last() -> None:
    steps = letters("abca")
    director = Director(planned(steps, 20))
    orders = run(director, steps)
    assert orders[2] == Orders(offload=("b",), onload=("c",))  # a is needed sooner
    assert director.pressed == [(1, "b")]  # the plan did not give it up; its last step was 1
    director.begin_call()
    assert director.pressed == []


def test_copies_wait_where_there_is_more_room_than_before() -> None:
    steps = [step("a", beside=20), step("b", beside=20), step("c"), step("d")]
    director = Director(planned(steps, 40, {0: "a", 1: "b"}))
    orders = run(director, steps)
    assert [o.settles for o in orders] == [False, False, True, False]
    assert orders[2].onload == ("c", "d")  # beside what b works on there was no room
    # Where nothing is ordered there is nothing to wait for.
    director = Director(planned(steps, 60))
    assert run(director, steps)[1:] == [Orders()] * 3


def test_copies_wait_for_every_step_that_may_still_run_and_has_less_room() -> None:
    # Nothing came before b, so nobody waited for a, which may still be at work when c comes.
    steps = [step("a", beside=10), step("b"), step("c")]
    director = Director(replace(planned(steps, 30), late={2: {"c"}}))
    orders = run(director, steps)
    assert orders[1:] == [Orders(), Orders(onload=("c",), settles=True)]
    # Where what is there fits in beside a as well, nobody waits.
    director = Director(replace(planned(steps, 60), late={2: {"c"}}))
    assert run(director, steps)[1:] == [Orders(), Orders(onload=("c",))]


def test_copies_of_the_next_pipeline_wait_for_the_last_one() -> None:
    # Nobody waited for the end of a's call, and beside a there is no room for b and c.
    sizes = {"a": 10, "b": 20, "c": 20}
    first, second = [step("a", beside=70)], [step("b"), step("c")]
    host = Host(Director(make_plan(first, sizes, 100, COSTS)), sizes, 100)
    host.begin_call()
    host.begin(first[0])
    host.director.end_call(is_done=False)
    host.director.follow(make_plan(second, sizes, 100, COSTS))
    host.begin_call()
    assert host.begin(second[0]).settles
    assert host.there == {"a", "b", "c"}


@pytest.mark.parametrize("how", ["same", "narrowed", "pressed"])
def test_copies_wait_for_earlier_steps_also_by_another_plan(how: str) -> None:
    sizes = {"a": 20, "b": 20, "c": 20}
    steps = [step("a", beside=60), step("b"), step("c")]
    plan = replace(make_plan(steps, sizes, 100, COSTS), late={1: {"c"}, 2: {"c"}})
    host = Host(Director(plan), sizes, 100)
    host.begin_call()
    host.begin(steps[0])
    host.begin(steps[1])
    director = host.director
    if how == "pressed":
        host.carry_out(director.press(90, {"b"}), ("b",))
    else:
        director.follow(plan if how == "same" else plan.narrowed(1, 90), at=1)
    assert host.begin(steps[2]).settles


def test_copies_wait_for_what_pressed() -> None:
    steps = letters("abc")
    plan = replace(planned(steps, 60, nbytes=20), late={0: {"b", "c"}})
    host = Host(Director(plan), plan.sizes, 60)
    host.begin_call()
    host.begin(steps[0])
    host.carry_out(host.director.press(20, {"a"}), ("a",))
    host.running[-1] = replace(steps[0], beside_nbytes=40)  # that was what pressed
    host.director.follow(plan, at=0)
    assert host.begin(steps[1]).settles


def test_at_the_end_what_the_next_call_needs_last_goes_first() -> None:
    steps = letters("abc")
    plan = replace(planned(steps, 5, {0: "a", 1: "b", 2: "c"}), sizes={"a": 4, "b": 1, "c": 3})
    director = Director(plan)
    run(director, steps)
    assert director.end_call() == Orders(offload=("c",), onload=("a",))


def test_what_is_late_comes_when_its_step_begins_and_what_follows_before() -> None:
    steps = letters("abc")
    director = Director(replace(planned(steps, 20, {0: "a", 1: "b"}), late={1: {"b"}}))
    orders = run(director, steps)
    assert [o.onload for o in orders] == [("a", "c"), ("b",), ()]
    assert orders[1].offload == ("a",)
    assert director.pressed == []


def test_what_is_given_up_goes_even_if_all_until_its_next_step_is_there() -> None:
    # When the second a begins, all that follows is there, up to the next call's first one.
    steps = [step("a"), step("a"), step("b"), step("c", beside=10)]
    director = Director(planned(steps, 30, {1: "a"}))
    orders = run(director, steps)
    assert orders[2].release == ("a",)
    assert orders[3] == Orders(offload=("a",))  # b is needed later, and would press
    assert director.pressed == []


def test_what_is_fetched_ahead_has_room_until_it_is_needed() -> None:
    # While b works there is room for one only, so that c cannot come before.
    steps = [step("a"), step("b", beside=20), step("c")]
    director = Director(planned(steps, 30, {0: "a", 1: "b"}))
    orders = run(director, steps)
    assert [o.onload for o in orders] == [("a", "b"), (), ("c", "a")]


# ---- calls that do not go as planned


def test_steps_that_are_not_as_planned_are_counted_and_the_place_is_found_again() -> None:
    director = Director(planned(letters("abcde"), 50))
    director.begin_call()
    for part, position, deviations in [
        ("a", 0, 0),
        ("c", 2, 1),  # b was left out
        ("d", 3, 1),
        ("d", 3, 2),  # once more
        ("e", 4, 2),
        ("b", 1, 3),  # back
        ("c", 2, 3),
    ]:
        director.begin(step(part))
        assert (director.position, director.deviations) == (position, deviations)
    director.begin_call()
    assert (director.position, director.deviations) == (-1, 0)


def test_a_step_that_runs_again_does_not_release_what_it_needs() -> None:
    director = Director(planned(letters("ab"), 20, {0: "a"}))
    orders = run(director, letters("aa"))
    assert orders[1] == Orders()


def test_what_is_released_is_not_released_again() -> None:
    director = Director(planned(letters("ab"), 50, {0: "a"}), lambda: {"x": 1, "y": 1})
    orders = run(director, letters("axy"))
    assert [o.release for o in orders] == [(), ("a",), ()]


def test_of_two_places_it_takes_the_nearest_and_of_two_as_near_the_later_one() -> None:
    director = Director(planned(letters("xabbx"), 50))
    director.begin_call()
    director.begin(step("x"))
    director.begin(step("x"))  # expected at 1: 0 is nearer than 4
    assert director.position == 0
    director.begin(step("a"))
    director.begin(step("b"))
    director.begin(step("x"))  # expected at 3: 4
    assert director.position == 4
    director = Director(planned(letters("xabxcdx"), 70))
    director.begin_call()
    for part in "xab":
        director.begin(step(part))
    director.position = 4
    director.begin(step("d"))
    director.begin(step("a"))
    assert director.position == 1


def test_the_same_part_elsewhere_is_another_step() -> None:
    director = Director(planned(letters("ab"), 50))
    director.begin_call()
    director.begin(step("a"))
    director.begin(step("b", opens=False))  # not through its component's forward
    assert (director.position, director.deviations) == (0, 1)


def test_a_step_that_nobody_expected_gets_half_the_budget() -> None:
    sizes = {"a": 10, "b": 10, "c": 10, "new": 20, "newer": 20}
    director = Director(planned(letters("abc"), 60), lambda: sizes)
    assert run(director, letters("abc"))[0].onload == ("a", "b", "c")
    orders = director.begin(step("new"))
    # 30 of the 60 bytes. What has just run may run again; of the others, b is needed last.
    assert orders == Orders(offload=("b", "a"), onload=("new",)) and director.deviations == 1
    assert director.resident == {"c": 10, "new": 20}
    # The plan never needs it, so that it goes first, after no step of the plan.
    assert director.begin(step("newer")) == Orders(offload=("new",), onload=("newer",))
    assert director.pressed[-1] == (-1, "new")
    # Back in the plan, it stays as long as there is room.
    director.begin(step("a"))
    assert director.position == 0 and "newer" in director.resident


def test_a_part_of_unknown_size_counts_as_nothing_if_nobody_can_tell() -> None:
    director = Director(planned(letters("a"), 10))
    assert run(director, [step("new")])[0].onload == ("new",)
    assert director.resident_nbytes == 0


def test_what_is_gone_comes_again() -> None:
    director = Director(planned(letters("abc"), 30))
    run(director, letters("a"))
    director.gone(["b", "c", "never there"])
    assert director.resident == {"a": 10} and director.resident_nbytes == 10
    assert director.begin(step("b")).onload == ("b", "c")
    director.gone(["b"])  # while it runs
    assert director.begin(step("c")).onload == ("b",)  # for the next call
    director.gone(sorted(director.resident))
    assert (director.resident, director.resident_nbytes) == ({}, 0)


def test_another_plan_goes_on_with_what_is_there() -> None:
    director = Director(planned(letters("abc"), 30))
    run(director, letters("a"))
    director.follow(planned(letters("axc"), 40), at=0)
    assert director.begin(step("x")).onload == ("x",)
    assert director.begin(step("c")) == Orders()
    assert director.deviations == 0


# ---- between two calls


def test_at_the_end_what_the_next_call_would_wait_for_comes() -> None:
    # 1 s for each copy of 10 bytes; a and b compute nothing, c long enough for d to come meanwhile.
    steps = [step("a", seconds=0), step("b", seconds=0), step("c", seconds=9.0), step("d")]
    director = Director(planned(steps, 40, {1: "ab", 2: "c"}))
    run(director, steps)
    director.gone(["a", "b", "c", "d"])
    assert director.end_call().onload == ("a", "b", "c")
    assert run(director, steps)[0].onload == ("d",)


def test_before_the_device_is_done_what_fits_beside_all_that_is_there_comes() -> None:
    steps = [*letters("abc"), step("d", beside=20)]
    director = Director(planned(steps, 40, {0: "a", 1: "b", 2: "c"}))
    run(director, steps)
    assert set(director.resident) == {"a", "d"}
    assert director.look_ahead(20) == ()
    assert director.look_ahead(30) == ("b",)
    assert director.end_call() == Orders(onload=("c",))


def test_before_the_device_is_done_no_more_comes_than_the_next_call_begins_with() -> None:
    steps = [step("a", beside=10), step("b"), step("c")]
    director = Director(planned(steps, 30))
    run(director, steps)
    director.gone(["a", "b"])
    assert director.look_ahead(30) == ("a",)


def test_at_the_end_there_is_room_for_what_the_call_returns() -> None:
    steps = letters("abc")
    director = Director(planned(steps, 30))
    run(director, steps)
    director.gone("abc")
    assert director.end_call(room=20).onload == ("a", "b")


def test_at_the_end_there_is_the_room_of_the_next_calls_first_step() -> None:
    steps = [step("a", beside=20), step("b")]
    director = Director(planned(steps, 30))
    run(director, steps)
    director.gone(["a", "b"])
    assert director.end_call().onload == ("a",)


def test_what_is_given_up_after_the_last_step_goes_at_once_if_its_room_is_wanted() -> None:
    steps = letters("ab")
    director = Director(planned(steps, 10, {0: "a", 1: "b"}))
    run(director, steps)
    assert director.end_call() == Orders(offload=("b",), onload=("a",))


@pytest.mark.parametrize("ran", ["", "ab", "abca"])
def test_after_a_call_that_was_cut_short_or_ended_elsewhere_nothing_comes(ran: str) -> None:
    director = Director(planned(letters("abc"), 20, {0: "a", 1: "b"}))
    run(director, letters(ran))
    assert director.end_call() == Orders()
