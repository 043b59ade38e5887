"""The machine's table, its policy, and what holds whatever happens."""

from __future__ import annotations

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


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("kind", [Needed, Done, Failed])
def test_every_pair_is_legal_with_a_known_result_or_refused_unchanged(
    state: State, kind: type[Needed] | type[Done] | type[Failed]
) -> None:
    machine = machine_in(state)
    move = TABLE.get((state, kind))
    if move is None:
        with pytest.raises(IllegalEvent, match=f"'x', which is {state.value}"):
            machine.handle(kind("x"))
        assert machine.state("x") is state
    else:
        instructions = machine.handle(kind("x"))
        assert machine.state("x") is move[0]
        assert [type(i) for i in instructions] == ([move[1]] if move[1] else [])
        assert all(i.stimulus == kind("x") for i in instructions)


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


# ---- properties ----------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "h")


class AnyProgram(RuleBasedStateMachine):
    """Any order of needs, ends and failures: device and machine agree, nothing is stuck."""

    @initialize()
    def start(self) -> None:
        self.machine = Machine()
        for name in NAMES:
            self.machine.add(name, in_sequence=name != "h")
        self.on_device: set[str] = set()

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

    @rule(name=st.sampled_from(NAMES), enters=st.booleans(), fail_at=st.none() | st.integers(0, 2))
    def need(self, name: str, enters: bool, fail_at: int | None) -> None:
        if self.carry_out(self.machine.handle(Needed(name, enters)), fail_at):
            assert name in self.on_device

    @rule(name=st.sampled_from(NAMES))
    def leave(self, name: str) -> None:
        self.machine.handle(Left(name))

    @rule()
    def end_call(self) -> None:
        assert self.carry_out(self.machine.handle(CallEnded()))
        assert self.on_device == set()

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "machine"):
            assert set(self.machine.names(State.RESIDENT)) == self.on_device
            assert self.machine.names(State.ONLOADING, State.OFFLOADING) == []


TestAnyProgram = AnyProgram.TestCase
