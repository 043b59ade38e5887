"""The machine's table, its policy, and what holds whatever happens."""

from __future__ import annotations

import copy
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from greenroom.core.machine import (
    TABLE,
    CallEnded,
    Done,
    Event,
    Failed,
    IllegalEvent,
    Instruction,
    Left,
    Machine,
    Needed,
    Offload,
    Onload,
    Release,
    State,
)

KINDS = (Needed, Release, Done, Failed)


def machine_in(state: State) -> Machine:
    machine = Machine()
    machine.add("x", kept=state is State.KEPT)
    if state in (State.ONLOADING, State.RESIDENT, State.OFFLOADING):
        machine.handle(Needed("x"))
    if state in (State.RESIDENT, State.OFFLOADING):
        machine.handle(Done("x"))
    if state is State.OFFLOADING:
        machine.handle(CallEnded())
    assert machine.state("x") is state
    return machine


def everything_in(machine: Machine) -> dict[str, Any]:
    """All that a machine knows, to be compared later; who was at work nowhere is left out."""
    found = copy.deepcopy(vars(machine))
    for entry in found["_entries"].values():
        entry.depth = {thread: depth for thread, depth in entry.depth.items() if depth}
    return found


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", [Needed, Done, Failed])
def test_every_pair_is_legal_with_a_known_result_or_refused_unchanged(
    state: State, kind: type[Needed] | type[Done] | type[Failed]
) -> None:
    machine = machine_in(state)
    move = TABLE.get((state, kind))
    before = everything_in(machine)
    if move is None:
        with pytest.raises(IllegalEvent, match=f"'x', which is {state.value}"):
            machine.handle(kind("x"))
        assert everything_in(machine) == before
    else:
        instructions = machine.handle(kind("x"))
        assert machine.state("x") is move[0]
        assert [type(i) for i in instructions] == ([move[1]] if move[1] else [])
        assert all(i.stimulus == kind("x") for i in instructions)


@pytest.mark.parametrize("state", [State.ONLOADING, State.OFFLOADING])
def test_a_component_that_is_on_its_way_is_refused_before_anybody_goes(state: State) -> None:
    machine = machine_in(State.HOME)
    machine.add("other")
    machine.handle(Needed("other", enters=True))
    machine.handle(Done("other"))
    machine.handle(Needed("x"))
    if state is State.OFFLOADING:
        machine.handle(Done("x"))
        machine.handle(CallEnded(thread=1))  # the other one is at work in thread 0
    machine.handle(Left("other"))
    assert (machine.state("x"), machine.state("other")) == (state, State.RESIDENT)
    before = everything_in(machine)
    with pytest.raises(IllegalEvent):
        machine.handle(Needed("x"))
    assert everything_in(machine) == before


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", [CallEnded(), Needed("other")])
def test_in_every_state_others_reach_only_what_is_resident(state: State, event: Event) -> None:
    machine = machine_in(state)
    machine.add("other")
    moves = [i for i in machine.handle(event) if i.name == "x"]
    if state is State.RESIDENT:
        after, instruction = TABLE[state, Release]
        assert [type(i) for i in moves] == [instruction] and machine.state("x") is after
        assert all(i.stimulus == event for i in moves)
    else:
        assert moves == [] and machine.state("x") is state
        assert TABLE.get((state, Release), (state, None)) == (state, None)


@pytest.mark.parametrize("state", State)
def test_in_every_state_a_forward_that_returns_moves_nothing(state: State) -> None:
    machine = machine_in(state)
    before = everything_in(machine)
    assert machine.handle(Left("x")) == () and machine.handle(Left("ghost")) == ()
    assert everything_in(machine) == before


@pytest.mark.parametrize("state", State)
def test_in_every_state_a_component_can_be_forgotten(state: State) -> None:
    machine = machine_in(state)
    machine.remove("x")
    machine.remove("x")
    assert machine.names() == [] and not machine.is_resident("x")
    # Its instruction may still be under way.
    for event in (Done("x"), Failed("x"), Left("x"), CallEnded()):
        assert machine.handle(event) == ()
    with pytest.raises(IllegalEvent):
        machine.handle(Needed("x"))
    machine.add("x")
    assert [type(i) for i in machine.handle(Needed("x"))] == [Onload]


@pytest.mark.parametrize("state", State)
def test_in_every_state_a_component_is_added_once(state: State) -> None:
    machine = machine_in(state)
    before = everything_in(machine)
    machine.add("x", in_sequence=False, kept=True)
    assert everything_in(machine) == before


def test_an_error_tells_the_components_story() -> None:
    machine = machine_in(State.HOME)
    for _ in range(5):
        machine.handle(Needed("x"))
        machine.handle(Done("x"))
        machine.handle(CallEnded())
        machine.handle(Done("x"))
    told = r"which is home \(home( -> (onloading|resident|offloading|home)){8}\)"  # the last eight
    with pytest.raises(IllegalEvent, match=told):
        machine.handle(Done("x"))


def test_the_table_names_only_states_and_events_there_are() -> None:
    assert {state for state, _ in TABLE} == set(State)
    assert {kind for _, kind in TABLE} == set(KINDS)


def test_what_was_never_added_is_refused() -> None:
    with pytest.raises(IllegalEvent, match="'ghost' is needed, but no such component"):
        Machine().handle(Needed("ghost"))


# ---- golden traces: the instructions of named pipelines ------------------------------------------


def trace(sequence: str, calls: str, *, helpers: str = "") -> list[str]:
    """Run `calls` ("te unet vae |", "|" ends a call) and write down what moves: "+te"."""
    machine, moves = Machine(), []
    for name in sequence.split():
        machine.add(name)
    for name in helpers.split():
        machine.add(name, in_sequence=False)
    for step in calls.split():
        event: Event = CallEnded() if step == "|" else Needed(step)
        for instruction in machine.handle(event):
            moves.append(("+" if isinstance(instruction, Onload) else "-") + instruction.name)
            machine.handle(Done(instruction.name))
    return moves


def moves_of(text: str) -> list[str]:
    return text.split()


def test_text_to_image() -> None:
    assert trace("te te2 unet vae", "te te2 unet unet unet vae |") == (
        moves_of("+te -te +te2 -te2 +unet -unet +vae -vae")
    )


def test_image_to_image_has_no_vae_beside_the_unet() -> None:
    moves = moves_of("+te -te +vae -vae +unet -unet +vae -vae")
    assert trace("te unet vae", "te vae unet unet vae |") == moves
    assert trace("te unet vae", "te vae unet vae | te vae unet vae |") == moves * 2


def test_a_controlnet_stays_beside_its_unet_and_nobody_else() -> None:
    moves = trace("te unet vae", "te cn unet cn unet cn unet vae |", helpers="cn")
    assert moves == moves_of("+te -te +cn +unet -unet -cn +vae -vae")


def test_a_helper_that_comes_second_costs_one_more_copy() -> None:
    moves = trace("unet vae", "unet cn unet cn unet vae |", helpers="cn")
    assert moves.count("+unet") == 2 and moves.count("+cn") == 1


def test_two_of_the_sequence_that_take_turns_become_companions() -> None:
    moves = trace("a b", "a b a b a b a b | a b a b |")
    assert moves.count("+a") + moves.count("+b") <= 3 + 1 + 2


def test_two_experts_change_once() -> None:
    assert trace("te t1 t2 vae", "te t1 t1 t2 t2 vae |") == (
        moves_of("+te -te +t1 -t1 +t2 -t2 +vae -vae")
    )


def test_nobody_is_sent_away_while_its_forward_runs() -> None:
    machine = Machine()
    machine.add("outer")
    machine.add("inner")
    machine.handle(Needed("outer", enters=True))
    machine.handle(Done("outer"))
    assert [type(i) for i in machine.handle(Needed("inner"))] == [Onload]
    machine.handle(Done("inner"))
    machine.handle(Left("outer"))
    machine.handle(CallEnded())
    assert machine.state("outer") is State.OFFLOADING


def test_a_forward_that_raised_does_not_keep_its_component() -> None:
    machine = machine_in(State.HOME)
    machine.handle(Needed("x", enters=True))
    machine.handle(Done("x"))
    assert [type(i) for i in machine.handle(CallEnded())] == [Offload]


def test_what_is_kept_never_moves() -> None:
    machine = machine_in(State.KEPT)
    machine.add("y")
    machine.handle(Needed("y"))
    machine.handle(Done("y"))
    assert machine.handle(Needed("x")) == ()
    assert [i.name for i in machine.handle(CallEnded())] == ["y"]


# ---- who is at work ------------------------------------------------------------------------------


def resident(*names: str) -> Machine:
    """A machine where all of these are at work in thread 0, and so resident."""
    machine = Machine()
    for name in names:
        machine.add(name)
        machine.handle(Needed(name, enters=True))
        machine.handle(Done(name))
    return machine


def gone(instructions: tuple[Instruction, ...]) -> list[str]:
    return [i.name for i in instructions if isinstance(i, Offload)]


def test_what_is_at_work_in_another_thread_stays() -> None:
    machine = resident("x")
    machine.add("y")
    assert gone(machine.handle(Needed("y", thread=1))) == []
    machine.handle(Done("y"))
    assert gone(machine.handle(CallEnded(thread=1))) == ["y"]
    assert machine.is_busy("x") and not machine.is_busy("x", but=0)
    assert gone(machine.handle(CallEnded(thread=0))) == ["x"]


def test_what_two_threads_run_is_at_work_until_both_have_returned() -> None:
    machine = resident("x")
    machine.handle(Needed("x", enters=True, thread=1))
    machine.handle(Left("x", thread=0))
    assert machine.is_busy("x", but=0) and not machine.is_busy("x", but=1)
    machine.handle(Left("x", thread=1))
    assert not machine.is_busy("x")


def test_a_forward_inside_its_own_forward_has_to_return_twice() -> None:
    machine = resident("x")
    machine.handle(Needed("x", enters=True))
    machine.handle(Left("x"))
    assert machine.is_busy("x")
    machine.handle(Left("x"))
    machine.handle(Left("x"))  # once more than it was entered
    machine.handle(Needed("x", enters=True))
    assert machine.is_busy("x")


def test_what_a_dead_thread_ran_is_at_work_no_more() -> None:
    machine = resident("x", "y")
    machine.handle(Needed("y", enters=True, thread=1))
    machine.forget_threads_but(frozenset({1}))
    assert not machine.is_busy("x") and machine.is_busy("y")
    assert gone(machine.handle(CallEnded(thread=2))) == ["x"]


def test_what_shares_a_weight_with_what_is_at_work_stays() -> None:
    machine = resident("x", "y")
    machine.make_kin("x", "y")
    machine.handle(Left("x"))
    machine.add("z")
    assert gone(machine.handle(Needed("z"))) == []
    machine.handle(Done("z"))
    machine.remove("y")  # which was at work
    assert not machine.is_busy("x")
    assert gone(machine.handle(CallEnded(thread=1))) == ["x", "z"]


def test_what_somebody_else_sent_home_is_at_work_no_more() -> None:
    machine = resident("x")
    machine.went_home("x")
    assert machine.state("x") is State.HOME
    assert not machine.is_busy("x") and not machine.is_resident("x")
    assert [type(i) for i in machine.handle(Needed("x"))] == [Onload]


def test_a_helper_goes_when_the_sequence_moves_on_from_what_was_sent_home_or_forgotten() -> None:
    for leave in (Machine.went_home, Machine.remove):
        machine = Machine()
        for name in ("unet", "vae"):
            machine.add(name)
        machine.add("helper", in_sequence=False)
        for name in ("helper", "unet"):
            machine.handle(Needed(name))
            machine.handle(Done(name))
        leave(machine, "unet")
        # Between two of the sequence: the helper may be the next one's.
        assert gone(machine.handle(Needed("vae"))) == []
        machine.handle(Done("vae"))
        assert gone(machine.handle(CallEnded())) == ["vae", "helper"]


def test_companions_are_forgotten_with_either() -> None:
    machine = Machine()
    for name in ("a", "b"):
        machine.add(name)
    for name in "ababa":
        for instruction in machine.handle(Needed(name)):
            machine.handle(Done(instruction.name))
    assert machine.companions == {frozenset("ab")}
    machine.remove("a")
    assert machine.companions == frozenset()


def test_what_never_came_is_not_at_work() -> None:
    machine = Machine()
    machine.add("x")
    machine.add("y")
    machine.handle(Needed("x", enters=True))
    machine.handle(Failed("x"))
    assert not machine.is_busy("x")
    machine.handle(Needed("x", enters=True))
    machine.handle(Done("x"))
    machine.handle(Left("x"))
    assert gone(machine.handle(Needed("y"))) == ["x"]


# ---- properties ----------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "h")
THREADS = st.integers(0, 2)


class AnyProgram(RuleBasedStateMachine):
    """Any order of needs, ends and failures in three threads, and of components that come and go.

    Device and machine agree, nothing is stuck, and what is at work stays.
    """

    @initialize()
    def start(self) -> None:
        self.machine = Machine()
        self.on_device: set[str] = set()
        self.at_work: list[tuple[str, int]] = []  # component, thread
        for name in NAMES:
            self.machine.add(name, in_sequence=name != "h")

    def carry_out(self, instructions: tuple[Instruction, ...], fail_at: int | None = None) -> bool:
        for i, instruction in enumerate(instructions):
            if i == fail_at:
                for rest in instructions[i:]:
                    self.machine.handle(Failed(rest.name))
                return False
            if isinstance(instruction, Onload):
                assert instruction.name not in self.on_device
                self.on_device.add(instruction.name)
            else:
                self.on_device.remove(instruction.name)
            self.machine.handle(Done(instruction.name))
        return True

    @rule(
        name=st.sampled_from(NAMES),
        enters=st.booleans(),
        thread=THREADS,
        fail_at=st.none() | st.integers(0, 2),
    )
    def need(self, name: str, enters: bool, thread: int, fail_at: int | None) -> None:
        if name not in self.machine.names():
            return
        instructions = self.machine.handle(Needed(name, enters, thread))
        if self.carry_out(instructions, fail_at):
            assert name in self.on_device
            if enters:
                self.at_work.append((name, thread))
        elif enters:
            self.machine.handle(Left(name, thread))

    @rule(name=st.sampled_from(NAMES), thread=THREADS)
    def leave(self, name: str, thread: int) -> None:
        self.machine.handle(Left(name, thread))
        if (name, thread) in self.at_work:
            self.at_work.remove((name, thread))

    @rule(thread=THREADS)
    def end_call(self, thread: int) -> None:
        assert self.carry_out(self.machine.handle(CallEnded(thread)))
        self.at_work = [(n, t) for n, t in self.at_work if t != thread]
        assert self.on_device == {name for name, _ in self.at_work}

    @rule(thread=THREADS)
    def die(self, thread: int) -> None:
        self.at_work = [(n, t) for n, t in self.at_work if t != thread]
        self.machine.forget_threads_but(frozenset(t for _, t in self.at_work))

    @rule(name=st.sampled_from(NAMES))
    def send_home(self, name: str) -> None:
        if name in self.on_device and not self.machine.is_busy(name):
            self.machine.went_home(name)
            self.on_device.remove(name)

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name: str) -> None:
        self.machine.remove(name)
        self.on_device.discard(name)
        self.at_work = [(n, t) for n, t in self.at_work if n != name]

    @rule(name=st.sampled_from(NAMES))
    def add(self, name: str) -> None:
        self.machine.add(name, in_sequence=name != "h")

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "machine"):
            assert set(self.machine.names(State.RESIDENT)) == self.on_device
            assert self.machine.names(State.ONLOADING, State.OFFLOADING) == []
            busy = {name for name in self.machine.names() if self.machine.is_busy(name)}
            assert busy == {name for name, _ in self.at_work} <= self.on_device


TestAnyProgram = AnyProgram.TestCase
