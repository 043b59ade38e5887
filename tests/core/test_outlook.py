"""What a larger budget would gain: pure simulation, checked against what is known by thought."""

from __future__ import annotations

import pytest

from greenroom.core.bound import Start, lower_bound
from greenroom.core.outlook import Planned, start_of
from greenroom.core.simulate import Costs
from greenroom.core.trace import Step

GB = 10**9
COSTS = Costs(10e9)


def loop(block_s: float, usable_nbytes: int) -> Planned:
    """Eight blocks of 1 GB, ten times round: 0.1 s each to copy."""
    names = [f"block{i}" for i in range(8)]
    steps = [Step(name, (), block_s, 0, opens=name == names[0]) for name in names] * 10
    return Planned(tuple(steps), dict.fromkeys(names, GB), usable_nbytes, COSTS)


def test_where_copies_take_longer_than_compute_the_link_binds_and_memory_gains() -> None:
    known = loop(0.02, 4 * GB)
    outlook = known.outlook
    assert outlook.bound_by == "link"
    # What computes for 0.16 s a round hides 1.6 GB of copies: some 6.4 GB have to stay, and a ring.
    assert 6.4 * GB <= outlook.enough_nbytes <= 8 * GB
    more = loop(0.02, outlook.enough_nbytes).outlook
    assert (more.bound_by, more.gain) == ("compute", 0.0)
    assert more.later_s == pytest.approx(outlook.later_s * (1 - outlook.gain))
    assert 0.4 < outlook.gain < 0.9


def test_where_compute_hides_all_copies_more_memory_gains_nothing() -> None:
    outlook = loop(0.2, 4 * GB).outlook
    assert (outlook.bound_by, outlook.enough_nbytes, outlook.gain) == ("compute", 4 * GB, 0.0)
    assert outlook.later_s == pytest.approx(16.0, rel=0.01)


@pytest.mark.parametrize("start", Start)
def test_the_bound_is_that_of_the_steps(start: Start) -> None:
    known = loop(0.2, 4 * GB)
    bound = lower_bound(known.steps, known.sizes, 4 * GB, COSTS, start)
    assert known.bound_s(start) == bound.seconds


def test_steps_are_taken_for_no_longer_than_a_call_was_seen_to_compute() -> None:
    known = loop(0.2, 4 * GB)
    assert known.within(20.0) is known
    shorter = known.within(8.0)
    assert sum(step.seconds or 0.0 for step in shorter.steps) == pytest.approx(8.0)


def test_a_call_begins_with_what_it_needs_of_what_is_there() -> None:
    assert start_of({"other": GB, "block0": 0}, ["block0"], is_first=True) is Start.EMPTY
    assert start_of({}, ["block0"], is_first=False) is Start.EMPTY
    assert start_of({"block0": GB}, ["block0"], is_first=True) is Start.RESTED
    assert start_of({"block0": GB}, ["block0"], is_first=False) is Start.IN_A_ROW
