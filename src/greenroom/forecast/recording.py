"""What was measured of a pipeline's call, enough to plan it anywhere: its steps, and the card.

    recording = Recording.load("flux.json")
    recording.cut_for(12 * 2**30).steps

Parts are cut finer for small budgets, so there may be several cuts of the same call.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..core.simulate import Costs
from ..core.trace import Step
from ..errors import UsageError
from ..grant import DIGESTS_NBYTES

FORMAT, VERSION = "greenroom trace", 1

#: Budgets from here on have their parts cut alike: a 32nd of it is as much as a part may have.
COARSEST = 4 * 2**30

_KERNELS_OF_A_CHECK = 10


def usable(budget: int) -> int:
    """The bytes of a budget that are planned with, as the engine does it."""
    return budget - budget // 128


def budget_of(nbytes: int) -> int:
    """The smallest budget of which so many bytes are planned with."""
    budget = nbytes * 128 // 127
    while usable(budget) < nbytes:
        budget += 1
    return budget


@dataclass(frozen=True)
class Cut:
    """The call with its parts as a budget of `cut_to` bytes cuts them.

    sizes: bytes of each part. steps: in the order in which they ran, measured.
    expected: the steps that a first call expects before anything was measured.
    outside_s: seconds of each call that are in no step.
    cast: of a part's bytes, what casts for its work add.
    """

    cut_to: int
    sizes: Mapping[str, int]
    steps: tuple[Step, ...]
    expected: tuple[Step, ...] = ()
    outside_s: float = 0.0
    cast: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def least(self) -> int:
        """The smallest budget in which every step has room for its weights and what it works on.

        Of that a step may take a little more in one call than in another.
        """
        most = max(
            sum(self.sizes[name] for name in step.needs) + (step.beside_nbytes or 0)
            for step in self.steps
        )
        return budget_of(most + DIGESTS_NBYTES)

    @cached_property
    def whole(self) -> int:
        """The smallest budget in which everything stays."""
        weights = sum(self.sizes[n] for n in {name for step in self.steps for name in step.needs})
        return budget_of(weights + max(step.beside_nbytes or 0 for step in self.steps))


@dataclass(frozen=True)
class Card:
    """What the device and its link do.

    memory_nbytes: None if nobody said.
    check_bytes_per_s: how fast weights are looked at for changes; None if that is not counted.
    kernel_s: the least that a kernel takes, of which each such look has some.
    """

    name: str
    is_simulated: bool
    memory_nbytes: int | None
    link_bytes_per_s: float
    check_bytes_per_s: float | None = None
    kernel_s: float = 0.0

    @property
    def costs(self) -> Costs:
        """What moving takes."""
        check_bytes_per_s = self.check_bytes_per_s or math.inf
        return Costs(self.link_bytes_per_s, check_bytes_per_s=check_bytes_per_s)

    def check_s(self, nbytes: int) -> float:
        """Seconds that the device takes to look at a part for changes."""
        if self.check_bytes_per_s is None:
            return 0.0
        return nbytes / self.check_bytes_per_s + _KERNELS_OF_A_CHECK * self.kernel_s


@dataclass(frozen=True)
class Recording:
    """One kind of call of one pipeline on one card.

    prepare_s: to page-lock its weights, once; None if that was not measured.
    """

    pipeline: str
    dtype: str
    settings: Mapping[str, Any]
    card: Card
    prepare_s: float | None
    cuts: tuple[Cut, ...]

    def cut_for(self, budget: int) -> Cut:
        """The call with its parts cut for a budget, or for the nearest that was recorded.

        Where the budget has no room for the nearest, a finer one may do: the engine cuts finer as
        budgets get smaller. A coarser one does not, whether or not there would be room for it; nor
        does any other where it is known how the engine cuts for this very budget.
        """
        wanted = min(budget, COARSEST)

        def away(cut: Cut) -> float:
            return max(cut.cut_to, wanted) / max(min(cut.cut_to, wanted), 1)

        nearest = min(self.cuts, key=away)
        if nearest.cut_to == wanted:
            return nearest
        fitting = [c for c in self.cuts if c.cut_to <= nearest.cut_to and c.least <= budget]
        return min(fitting or [nearest], key=away)

    # ---- files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a JSON file, of a megabyte at most for pipelines there are.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).write_text(json.dumps(self.to_dict(), separators=(",", ":")), encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """The recording as plain values; what they mean is said in it."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "about": "steps are indices of kinds; a kind is [index of the place, seconds or null, "
            "bytes besides weights or null]; a place is [index of the part, those held meanwhile, "
            "whether a forward begins]; expected are indices of places; cast are [index of the "
            "part, bytes of it that casts for its work add]",
            "pipeline": self.pipeline,
            "dtype": self.dtype,
            "settings": dict(self.settings),
            "card": {
                "name": self.card.name,
                "is_simulated": self.card.is_simulated,
                "memory_bytes": self.card.memory_nbytes,
                "link_bytes_per_s": self.card.link_bytes_per_s,
                "check_bytes_per_s": self.card.check_bytes_per_s,
                "kernel_s": self.card.kernel_s,
            },
            "prepare_s": self.prepare_s,
            "cuts": [_cut_to_dict(cut) for cut in self.cuts],
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read what `save` has written.

        Raises:
            UsageError: the file is no such thing, or of a later version.
            OSError: it cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{str(path)!r} is no trace: it is no JSON ({error})") from error
        return cls.from_dict(content, name=repr(str(path)))

    @classmethod
    def from_dict(cls, content: Any, *, name: str = "this") -> Recording:
        """The recording that `to_dict` gave these values.

        Raises:
            UsageError: they are of no recording, or of a later version. `name` is what they are
                called in the error.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise UsageError(
                f"{name} is no trace: a trace is what --save-trace writes, JSON with "
                f'"format": "{FORMAT}"'
            )
        if content.get("version") != VERSION:
            raise UsageError(
                f"{name} is a trace of version {content.get('version')!r}, and this greenroom "
                f"reads version {VERSION}: write it anew, or use the greenroom that wrote it"
            )
        try:
            card = content["card"]
            found = cls(
                str(content["pipeline"]),
                str(content["dtype"]),
                dict(content["settings"]),
                Card(
                    str(card["name"]),
                    bool(card["is_simulated"]),
                    card["memory_bytes"],
                    float(card["link_bytes_per_s"]),
                    card["check_bytes_per_s"],
                    float(card["kernel_s"]),
                ),
                content["prepare_s"],
                tuple(_cut_of(cut) for cut in content["cuts"]),
            )
            if not found.cuts or not all(cut.steps for cut in found.cuts):
                raise ValueError("it has no steps")
            if found.card.link_bytes_per_s <= 0:
                raise ValueError("a link that moves nothing")
        except (KeyError, IndexError, TypeError, ValueError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UsageError(f"{name} is a trace that cannot be read: {reason}") from error
        return found


def _cut_to_dict(cut: Cut) -> dict[str, Any]:
    names = {name: number for number, name in enumerate(cut.sizes)}
    places: dict[Any, int] = {}

    def place(step: Step) -> int:
        return places.setdefault(step.place, len(places))

    def kind(step: Step) -> int:
        seconds = None if step.seconds is None else round(step.seconds, 9)
        return kinds.setdefault((place(step), seconds, step.beside_nbytes), len(kinds))

    kinds: dict[tuple[int, float | None, int | None], int] = {}
    steps, expected = list(map(kind, cut.steps)), list(map(place, cut.expected))
    return {
        "cut_to": cut.cut_to,
        "outside_s": cut.outside_s,
        "parts": [[name, nbytes] for name, nbytes in cut.sizes.items()],
        "places": [
            [names[part], [names[name] for name in held], opens] for part, held, opens in places
        ],
        "kinds": [list(found) for found in kinds],
        "steps": steps,
        "expected": expected,
        "cast": [[names[name], nbytes] for name, nbytes in cut.cast.items() if name in names],
    }


def _cut_of(content: Mapping[str, Any]) -> Cut:
    names = [str(name) for name, _ in content["parts"]]
    places = [
        (names[part], tuple(names[number] for number in held), bool(opens))
        for part, held, opens in content["places"]
    ]

    def step(place: int, seconds: float | None, beside_nbytes: int | None) -> Step:
        part, held, opens = places[place]
        return Step(part, held, seconds, beside_nbytes, opens)

    return Cut(
        int(content["cut_to"]),
        {str(name): int(nbytes) for name, nbytes in content["parts"]},
        tuple(step(*content["kinds"][number]) for number in content["steps"]),
        tuple(step(place, None, None) for place in content["expected"]),
        float(content["outside_s"]),
        {names[part]: int(nbytes) for part, nbytes in content.get("cast", ())},
    )
