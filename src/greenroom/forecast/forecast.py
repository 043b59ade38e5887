"""What a pipeline will take on a card, before it runs there: the answer of `greenroom plan`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core.units import format_bytes
from .recording import Recording
from .within import Within, with_first_call, within

if TYPE_CHECKING:
    from rich.console import RenderableType

_FREE = 1.01  # times what a resident call takes: who would notice?
_HALVINGS = 4  # of the stretch of budgets in which it begins to cost nothing
_POINTS = 10  # of the curve, besides those that mean something


@dataclass(frozen=True, repr=False)
class Forecast:
    """Whether a pipeline runs on a card within a budget, how fast, and why not faster.

    >>> print(greenroom.predict("FLUX.1-dev", device="rtx-4090", budget="12GiB"))

    Attributes:
        recording: the measured call that all of it is computed from.
        asked: what it takes within the budget that was asked for.
        curve: what it takes within other budgets, smallest first; of first calls it tells for those
            that mean something.
        smallest: of those in which it runs.
        free: the smallest within which a later call takes at most 1 % longer than a resident one.
        resident: the smallest within which everything stays on the device.
    """

    recording: Recording
    asked: Within
    curve: tuple[Within, ...]
    smallest: Within
    free: Within
    resident: Within

    @property
    def fits(self) -> bool:
        """Whether it runs within the budget that was asked for."""
        return self.asked.fits

    def to_dict(self) -> dict[str, Any]:
        """The forecast as plain values: bytes, and seconds."""
        recording, card = self.recording, self.recording.card
        return {
            "pipeline": recording.pipeline,
            "dtype": recording.dtype,
            "settings": dict(recording.settings),
            "device": card.name,
            "simulated": card.is_simulated,
            "memory_bytes": card.memory_nbytes,
            "link_bytes_per_s": card.link_bytes_per_s,
            "weights_bytes": sum(share.nbytes for share in self.asked.shares),
            "prepare_s": recording.prepare_s,
            "fits": self.fits,
            "smallest_budget_bytes": self.smallest.budget,
            "free_budget_bytes": self.free.budget,
            "resident_budget_bytes": self.resident.budget,
            **_point(self.asked),
            "components": [
                {
                    "name": share.name,
                    "weights_bytes": share.nbytes,
                    "stays_bytes": share.stays_nbytes,
                    "h2d_bytes": share.h2d_nbytes,
                    "forwards": share.forwards,
                    "compute_s": share.compute_s,
                    "besides_weights_bytes": share.beside_nbytes,
                }
                for share in self.asked.shares
            ],
            "curve": [_point(point) for point in self.curve],
        }

    def why(self) -> str:
        """In a sentence or two: what a later call's time goes by, and what would change it."""
        asked, rate = self.asked, self.recording.card.link_bytes_per_s / 1e9
        if not asked.fits:
            return (
                f"It does not run within {format_bytes(asked.budget)}: it needs "
                f"{format_bytes(asked.needs_nbytes)} at once. The smallest budget that it runs "
                f"within is {exactly(self.smallest.budget)}."
            )
        moved = f"{format_bytes(asked.h2d_nbytes)} cross the link in each call, at {rate:.1f} GB/s"
        if asked.bound_by == "compute":
            hidden = "" if asked.h2d_nbytes == 0 else f"; {moved}, beside it"
            return f"It is bound by compute: the device hardly waits for weights{hidden}."
        memory = self.recording.card.memory_nbytes
        beyond = ", more than the device has," if memory and self.free.budget > memory else ""
        return (
            f"It is bound by the link: {moved}, and the device waits {seconds(asked.stalled_s)} "
            f"for them. Within {format_bytes(self.free.budget)}{beyond} it would not."
        )

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Draw seconds over the budget, as a PNG.

        Raises:
            OSError: the file cannot be written.
        """
        from .picture import draw

        draw(self, path)

    def __rich__(self) -> RenderableType:
        from .show import render

        return render(self)

    def __str__(self) -> str:
        from .show import as_text

        return as_text(self)

    def __repr__(self) -> str:
        where, budget = self.recording.card.name, format_bytes(self.asked.budget)
        return f"<Forecast of {self.recording.pipeline} on {where} within {budget}; print it>"

    def _repr_html_(self) -> str:
        from ..columns import as_html

        return as_html(str(self))


def _point(point: Within) -> dict[str, Any]:
    return {
        "budget_bytes": point.budget,
        "runs": point.fits,
        "peak_bytes": point.needs_nbytes,
        "first_call_s": point.first_s,
        "later_call_s": point.later_s,
        "compute_s": point.compute_s,
        "stalled_s": point.stalled_s,
        "copying_s": point.copying_s,
        "first_call_h2d_bytes": point.first_h2d_nbytes,
        "h2d_bytes": point.h2d_nbytes,
        "bound_by": point.bound_by,
        "lower_bound_s": point.bound_s,
        "efficiency": point.efficiency,
    }


def forecast(
    recording: Recording, budget: int, note: Callable[[], object] = lambda: None
) -> Forecast:
    """Compute the forecast. `note` is called after each budget that was planned."""

    @functools.cache
    def at(nbytes: int) -> Within:
        found = within(recording, nbytes)
        note()
        return found

    asked = at(budget)
    smallest = _smallest(recording, at)
    resident = at(max(recording.cut_for(2**62).whole, smallest.budget))
    curve = {smallest.budget, resident.budget}
    ratio = (resident.budget / smallest.budget) ** (1 / (_POINTS + 1))
    curve |= {int(smallest.budget * ratio**i) for i in range(1, _POINTS + 1)}
    if asked.fits:
        curve.add(budget)
    points = [at(nbytes) for nbytes in sorted(curve)]
    free = _free(points, resident, at)
    known = {point.budget: point for point in (*points, free)}
    for budget in dict.fromkeys(p.budget for p in (asked, smallest, free, resident)):
        known[budget] = with_first_call(recording, at(budget))
        note()
    curve_of = sorted(known) if asked.fits else sorted(known.keys() - {asked.budget})
    return Forecast(
        recording,
        known[asked.budget],
        tuple(known[budget] for budget in curve_of),
        known[smallest.budget],
        known[free.budget],
        known[resident.budget],
    )


def most_points() -> int:
    """How many budgets are planned at most, or about."""
    return _POINTS + 4 + _HALVINGS + 4


def _smallest(recording: Recording, at: Callable[[int], Within]) -> Within:
    """The smallest budget within which it runs, of the cuts that were recorded."""
    least = sorted(cut.least for cut in recording.cuts)
    budget = next((nbytes for nbytes in least if at(nbytes).fits), least[-1])
    while not at(budget).fits:
        budget += max(budget // 16, 1)
    return at(budget)


def _free(points: list[Within], resident: Within, at: Callable[[int], Within]) -> Within:
    """Between the last point that costs time and the next one, by halves."""
    longest_s = _FREE * resident.later_s
    slow = [i for i, point in enumerate(points) if point.later_s > longest_s]
    if not slow:
        return points[0]
    if slow[-1] + 1 == len(points):
        return resident
    below, above = points[slow[-1]], points[slow[-1] + 1]
    for _ in range(_HALVINGS):
        middle = at((below.budget + above.budget) // 2)
        if middle.later_s > longest_s:
            below = middle
        else:
            above = middle
    return above


def seconds(spent: float | None) -> str:
    """Seconds, as people read them."""
    if spent is None:
        return ""
    return f"{spent:.2f} s" if spent >= 1 else f"{spent * 1e3:.1f} ms"


def exactly(nbytes: int) -> str:
    """A budget as people read it, and as --budget takes it to the byte."""
    return f"{format_bytes(nbytes)} (--budget {nbytes})"


def settings_said(settings: Mapping[str, Any]) -> str:
    """Arguments of a call in a line."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())
