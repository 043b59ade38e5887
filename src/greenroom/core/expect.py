"""What is expected of a call that was never seen, after some of it was."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace

from .trace import Step, visits


def rest_of_call(
    done: Sequence[Step], begin: int, prior: Sequence[Step], helpers: Set[str]
) -> list[Step]:
    """What may follow after the first stay in a component, which began at `begin`.

    Args:
        done: what has been measured.
        prior: the order that was expected.
        helpers: parts of components outside the sequence.
    """
    part = done[begin].part
    spans = list(visits(prior))
    expected = [prior[span.start].part for span in spans]
    rest: list[Step] = []
    if part in expected:
        turn = _turn(done, begin, helpers)
        for i in range(expected.index(part) + 1, len(spans)):
            rest += turn if expected[i] == part else [prior[j] for j in spans[i]]
    else:  # it helps what comes next
        seen = {step.part for step in done}
        first = next((i for i, name in enumerate(expected) if name not in seen), len(spans))
        rest += [prior[j] for span in spans[first:] for j in span]
    return rest


def _turn(done: Sequence[Step], begin: int, helpers: Set[str]) -> list[Step]:
    """A round of a loop that may follow: the stay from `begin` on, and its helpers' before it.

    A ControlNet, which is outside the sequence, runs before each step of its UNet.
    """
    for span in reversed(list(visits(done[:begin]))):
        if done[span.start].part not in helpers:
            break
        begin = span.start
    return [replace(s, beside_nbytes=and_more(s.beside_nbytes or 0)) for s in done[begin:]]


def and_more(nbytes: int) -> int:
    """What may be worked on in a turn if it was so much in the last one.

    What a call works on grows as it goes on, as what components return is kept for others.
    """
    return nbytes + nbytes // 4


def is_near(nbytes: int, expected: int) -> bool:
    """Whether so much was worked on that the next turn's may be more than was expected."""
    return nbytes + nbytes // 8 > expected
