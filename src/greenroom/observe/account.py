"""What a pipeline's call cost, by component: a value, and a table of it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ..core.bound import Start
from ..core.outlook import Outlook, Planned, start_of
from ..core.units import format_bytes
from ..grant import smallest_for
from .events import Call
from .story import OTHERS, Story, story_of

if TYPE_CHECKING:
    from rich.console import Group

_NOTEWORTHY = 0.05  # of a call's time, or of a budget
_LEAST_GAIN = 0.01  # of a call's time


@dataclass(frozen=True)
class PartFacts:
    """What a part is, apart from any call.

    nbytes: on the device. pinned_nbytes: of its host memory, page-locked. mapped_nbytes: of it,
    mapped from files and not taken in yet.
    """

    component: str
    nbytes: int
    pinned_nbytes: int
    mapped_nbytes: int = 0


@dataclass(frozen=True)
class ComponentReport:
    """One component's share of a call.

    Attributes:
        name: as the pipeline calls it.
        nbytes: of its weights.
        forwards: how many of its forwards began.
        compute_s: seconds in which it was at work and had its weights. What a pipeline does between
            two forwards of the same component, a scheduler's step say, is in it.
        stalled_s: seconds in which the device waited for its weights, and for room for them.
        clearing_s: of `stalled_s`, until there was room: what leaves is looked at for changes.
        h2d_nbytes, d2h_nbytes: copied to the device, and home because they had changed.
        pageable_nbytes: of `h2d_nbytes`, from host memory that was not page-locked.
        onloads: copies to the device, by part.
        found_ahead: of its parts, how often one was needed that had been sent before.
        demanded: how often one was sent only when it was needed.
        offloads: how often one left the device.
        host_pinned_nbytes, host_pageable_nbytes, host_mapped_nbytes: its host memory, when the
            report was made: page-locked, not, and not but mapped from a file.
    """

    name: str
    nbytes: int
    forwards: int = 0
    compute_s: float = 0.0
    stalled_s: float = 0.0
    clearing_s: float = 0.0
    h2d_nbytes: int = 0
    pageable_nbytes: int = 0
    d2h_nbytes: int = 0
    onloads: int = 0
    found_ahead: int = 0
    demanded: int = 0
    offloads: int = 0
    host_pinned_nbytes: int = 0
    host_pageable_nbytes: int = 0
    host_mapped_nbytes: int = 0

    @property
    def unlocked_nbytes(self) -> int:
        """Its host memory that is not page-locked."""
        return self.host_pageable_nbytes + self.host_mapped_nbytes


@dataclass(frozen=True, repr=False)
class Report:
    """What one call of a pipeline cost. Seconds are the device's: virtual on the simulator.

    >>> print(greenroom.report(pipe))

    Attributes:
        call: what happened, event by event; its `seconds`, `budget`, `outcome` and peak.
        components: the pipeline's, in its order; what was there of others comes last.
        total: the sum of them.
        lower_bound_s: the least that any order of copies could have taken within the budget; None
            without one, and where the call was not as those like it.
        planned: what is known of calls like it, within a budget.
    """

    call: Call
    components: tuple[ComponentReport, ...]
    total: ComponentReport
    component_of: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    lower_bound_s: float | None = None
    planned: Planned | None = dataclasses.field(default=None, repr=False)

    @property
    def outlook(self) -> Outlook | None:
        """What later calls like it are bound by, and what a larger budget would gain.

        It is simulated when somebody first asks, which for a large pipeline takes some seconds.
        """
        return None if self.planned is None else self.planned.outlook

    @property
    def efficiency(self) -> float | None:
        """The lower bound over what the call took: 1 is the best there is."""
        if self.lower_bound_s is None or not self.call.seconds:
            return None
        return self.lower_bound_s / self.call.seconds

    @cached_property
    def story(self) -> Story:
        """The call over time."""
        return story_of(self.call, self._component)

    def _component(self, part: str) -> str:
        return self.component_of.get(part, OTHERS)

    @property
    def advice(self) -> tuple[str, ...]:
        """What could be done, or should be known, in a sentence each."""
        return tuple(_advice(self))

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, without the single events."""
        call = dataclasses.asdict(dataclasses.replace(self.call, events=()))
        del call["events"], call["resident"]
        return {
            **call,
            "resident_nbytes": sum(self.call.resident.values()),
            "lower_bound_s": self.lower_bound_s,
            "efficiency": self.efficiency,
            "outlook": _plain(self.outlook),
            "total": dataclasses.asdict(self.total),
            "components": [dataclasses.asdict(component) for component in self.components],
            "advice": list(self.advice),
        }

    def __rich__(self) -> Group:
        from .table import table_of

        return table_of(self)

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=120, color_system=None, highlight=False)
        console.print(self)
        return str(console.file.getvalue()).rstrip()  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        call = self.call
        what = call.pipeline or "what ran outside of calls"
        return f"<Report of {what} on {call.device}, {call.outcome}; print it>"

    def _repr_html_(self) -> str:
        from ..columns import as_html

        return as_html(str(self))


def make_report(
    call: Call, parts: Mapping[str, PartFacts], planned: Planned | None = None
) -> Report:
    """The report of a call of the pipeline that has these parts; `planned` is of calls like it."""
    component_of = {part: facts.component for part, facts in parts.items()}
    found: dict[str, dict[str, Any]] = {}

    def add(part: str, **values: float) -> None:
        row = found.setdefault(component_of.get(part, OTHERS), {})
        for name, value in values.items():
            row[name] = row.get(name, 0) + value

    for part, facts in parts.items():
        add(
            part,
            nbytes=facts.nbytes,
            host_pinned_nbytes=facts.pinned_nbytes,
            host_pageable_nbytes=facts.nbytes - facts.pinned_nbytes - facts.mapped_nbytes,
            host_mapped_nbytes=facts.mapped_nbytes,
        )
    for run in call.runs:
        add(run.part, forwards=run.forwards, compute_s=run.compute_s, stalled_s=run.stalled_s)
        add(run.part, clearing_s=run.clearing_s)
        for part in run.found_ahead:
            add(part, found_ahead=1)
        for part in run.demanded:
            add(part, demanded=1)
    for up in call.onloads:
        pageable = up.nbytes - up.pinned_nbytes
        add(up.part, onloads=1, h2d_nbytes=up.nbytes, pageable_nbytes=pageable)
    for down in call.offloads:
        add(down.part, offloads=1, d2h_nbytes=down.copied_nbytes)
    rows = tuple(
        ComponentReport(name, row.pop("nbytes", 0), **row)
        for name, row in sorted(found.items(), key=lambda item: item[0] == OTHERS)
    )
    total = _sum(rows)
    if planned is None or call.seconds is None or call.outcome != "returned":
        return Report(call, rows, total, component_of)
    planned = planned.within(total.compute_s)
    return Report(call, rows, total, component_of, _bound_s(call, call.seconds, planned), planned)


def _bound_s(call: Call, seconds: float, planned: Planned) -> float:
    needed = list(dict.fromkeys(name for step in planned.steps for name in step.needs))
    bound = planned.bound_s(start_of(call.resident, needed, is_first=call.is_first))
    if bound > seconds:  # there was time before it, in which weights came
        bound = planned.bound_s(Start.RESTED)
    return min(bound, seconds)


def _plain(outlook: Outlook | None) -> dict[str, Any] | None:
    if outlook is None:
        return None
    return {**dataclasses.asdict(outlook), "bound_by": outlook.bound_by}


def _sum(rows: Sequence[ComponentReport]) -> ComponentReport:
    names = [field.name for field in dataclasses.fields(ComponentReport)][1:]
    return ComponentReport("total", **{n: sum(getattr(row, n) for row in rows) for n in names})


def _advice(report: Report) -> list[str]:
    call, total = report.call, report.total
    found = []
    if call.missed:
        found.append(f"{call.missed} more events had no room in the log and are in no number here.")
    if call.seconds and total.stalled_s > _NOTEWORTHY * call.seconds:
        worst = max(report.components, key=lambda row: row.stalled_s)
        share = total.stalled_s / call.seconds
        found.append(
            f"The device waited for weights in {share:.0%} of the time, most of it for "
            f"{worst.name} ({seconds(worst.stalled_s)})."
        )
        if total.clearing_s > total.stalled_s / 2:
            found.append(
                f"Most of that ({seconds(total.clearing_s)}) went into making room: each part that "
                "leaves is looked at for changes first."
            )
        if call.budget is None:
            found.append(
                "With a budget the next component comes while this one computes: "
                "enable_model_cpu_offload(pipe, budget=...)."
            )
    if total.pageable_nbytes:
        found.append(
            f"{format_bytes(total.pageable_nbytes)} came from host memory that was not page-locked,"
            " which is slow and holds the host up. greenroom locks it from call to call"
            + (", and by now all of it is." if not total.unlocked_nbytes else ".")
        )
    if total.d2h_nbytes:
        names = ", ".join(row.name for row in report.components if row.d2h_nbytes)
        found.append(
            f"{format_bytes(total.d2h_nbytes)} of weights changed on the device and came home "
            f"({names})."
        )
    if call.budget is not None and call.peak_nbytes is not None:
        spare = call.budget + call.others_nbytes - call.peak_nbytes
        if spare < 0:
            found.append(
                f"The budget was exceeded by {format_bytes(-spare)}, at {call.peak_part}: a single "
                "step needs that much."
            )
        elif spare > _NOTEWORTHY * call.budget and total.h2d_nbytes:
            found.append(f"{format_bytes(spare)} of the budget were never in use.")
    if report.outlook is not None:
        found.append(_on_outlook(report.outlook))
        return found
    needed = _enough_for_all(report)
    if needed is not None and total.h2d_nbytes:
        found.append(f"A budget of {format_bytes(needed)} would hold all weights.")
    return found


def _on_outlook(outlook: Outlook) -> str:
    if outlook.bound_by == "compute":
        return "As planned, calls like it are bound by compute: a larger budget gains nothing."
    said = "As planned, calls like it are bound by the link"
    if outlook.gain < _LEAST_GAIN:
        return f"{said}, and a larger budget gains nothing that counts."
    enough = smallest_for(outlook.enough_nbytes)
    return f"{said}: raise the budget to {enough}: {outlook.gain:.0%} left to gain."


def _enough_for_all(report: Report) -> int | None:
    """Bytes in which all weights fit together with what was measured beside them."""
    beside = [run.beside_nbytes for run in report.call.runs]
    known = [nbytes for nbytes in beside if nbytes is not None]
    if not known or len(known) < len(beside):
        return None
    return (report.total.nbytes + max(known)) * 128 // 127 + 1  # a part is kept for digests


def seconds(value: float | None) -> str:
    """Seconds as people write them."""
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
