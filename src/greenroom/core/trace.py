"""The order in which parts of a pipeline run: recorded, expected, and folded into loops.

A *part* is what moves as one: a run of a component's blocks, or what lies beside its blocks. A
*step* begins when a part is about to run and ends when the next one is. While a component's forward
runs, what lies beside its blocks is held: a step needs its own part and what is held.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

_LONGEST_LOOP = 8  # visits; UNet with two ControlNets, CFG's two passes and an upscaler are fewer


@dataclass(frozen=True)
class Step:
    """A part at work.

    seconds: what the device computes until the next step; None if it was never measured.
    beside_nbytes: the most device memory besides weights meanwhile; None if never measured.
    opens: whether a component's forward begins here.
    """

    part: str
    held: tuple[str, ...] = ()
    seconds: float | None = None
    beside_nbytes: int | None = None
    opens: bool = False

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """What has to be on the device."""
        return self.held if self.part in self.held else (*self.held, self.part)

    @cached_property
    def place(self) -> tuple[str, tuple[str, ...], bool]:
        """What tells steps apart: the same part, run in the same place."""
        return (self.part, self.held, self.opens)


@functools.lru_cache(maxsize=16_384)
def step_of(part: str, held: tuple[str, ...], opens: bool) -> Step:
    """A step that was not measured: the very same object every time, which knows what it needs."""
    return Step(part, held, opens=opens)


@dataclass(frozen=True)
class Phase:
    """Steps that are run `times` times in a row: positions `begin` to `begin + times * length`."""

    begin: int
    length: int
    times: int

    @property
    def end(self) -> int:
        """The first position behind it."""
        return self.begin + self.length * self.times

    @property
    def cycle(self) -> range:
        """The positions of its first round."""
        return range(self.begin, self.begin + self.length)


def visits(steps: Sequence[Step]) -> Iterator[range]:
    """The positions of each stay in a component: from where its forward begins to the next one."""
    begin = 0
    for i in range(1, len(steps) + 1):
        if i == len(steps) or steps[i].opens or not steps[i].held:
            yield range(begin, i)
            begin = i


def phases(steps: Sequence[Step]) -> list[Phase]:
    """Fold a call into its loops.

    Greedy from the left: the repetition that covers the most steps, of the shortest round.
    """
    spans = list(visits(steps))
    names: dict[tuple[object, ...], int] = {}
    kinds = [
        names.setdefault(tuple((steps[i].part, steps[i].held) for i in span), len(names))
        for span in spans
    ]
    found: list[Phase] = []
    i = 0
    while i < len(kinds):
        best, times = 1, 1
        for period in range(1, min(_LONGEST_LOOP, len(kinds) - i) + 1):
            rounds = 1
            while kinds[i : i + period] == kinds[i + rounds * period : i + (rounds + 1) * period]:
                rounds += 1
            if rounds > 1 and rounds * period > times * best:
                best, times = period, rounds
        length = spans[i + best - 1].stop - spans[i].start
        found.append(Phase(spans[i].start, length, times))
        i += best * times
    return found


def sizes_of(steps: Sequence[Step], sizes: Mapping[str, int]) -> int:
    """Bytes of all parts that the steps need."""
    return sum(sizes[name] for name in {name for step in steps for name in step.needs})
