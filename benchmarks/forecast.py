"""How good forecasts are: what is predicted for a budget, against greenroom within it.

Published pipelines at full size on simulated cards, so seconds are virtual. A call is recorded once
for a card, as `greenroom plan` does it, and a first and a later call within each budget are
computed from the recording. Then the pipeline runs within the budget.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dry
from budget import GB, GREENROOM, SHAPES, Shape, ways_on

GOAL = 0.02  # a forecast is at most so far off
CALLS = 3  # in a row: the third begins as all later ones do

ASKED = {**SHAPES, "sdxl, 8 steps": Shape("sdxl", {"num_inference_steps": 8})}

#: Shape, card, and budgets in GB.
CASES = (
    ("sdxl", "rtx-4090", (4, 6, 8, 12)),
    ("sdxl, 8 steps", "rtx-4090", (6,)),
    ("sdxl-img2img", "rtx-4090", (6,)),
    ("flux", "rtx-4090", (12,)),
)


# ---- in a process of its own
# ------------------------------------------------------------------------------------------------


def work(kind: str, *job: Any) -> dict[str, Any]:
    return {"predict": predict, "measure": measure}[kind](*job)


def predict(shape: str, profile: str, budgets: list[int]) -> dict[str, Any]:
    """Record the pipeline's call, and forecast it within each budget."""
    from greenroom import zoo
    from greenroom.forecast.recorder import Recorder
    from greenroom.forecast.within import with_first_call, within

    asked = ASKED[shape]
    pipe = dry.load(asked.pipeline, profile)
    arguments = asked.arguments
    recorder = Recorder(
        pipe, profile, lambda pipe: pipe(**zoo.full_call_kwargs(asked.pipeline, **arguments))
    )
    for budget in budgets:
        recorder.record(budget)
    recording = recorder.recording(type(pipe).__name__, str(pipe.dtype), arguments)
    found = []
    for budget in budgets:
        began = time.process_time()
        forecast = with_first_call(recording, within(recording, budget))
        found.append(
            {
                "fits": forecast.fits,
                "first_s": forecast.first_s,
                "later_s": forecast.later_s,
                "first_h2d_bytes": forecast.first_h2d_nbytes,
                "later_h2d_bytes": forecast.h2d_nbytes,
                "host_s": time.process_time() - began,
            }
        )
    return {"prepare_s": recording.prepare_s, "within": found}


def measure(shape: str, profile: str, budget: int) -> dict[str, Any]:
    """Call the pipeline within the budget, a few times in a row."""
    asked = ASKED[shape]
    pipe = dry.load(asked.pipeline, profile)
    enable = ways_on("sim:0", budget)[GREENROOM]
    found = dry.measure(pipe, asked.pipeline, enable, CALLS, asked.arguments)
    first, later = found["calls"][0], found["calls"][-1]
    return {
        "first_s": first["seconds"],
        "later_s": later["seconds"],
        "first_h2d_bytes": first["h2d_bytes"],
        "later_h2d_bytes": later["h2d_bytes"],
        **found,
    }


# ---- all budgets of one shape on one card
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One shape on one card, within several budgets."""

    shape: str
    profile: str
    gigabytes: tuple[int, ...]

    def run(self) -> dict[str, Any]:
        """{"prepare_s": to page-lock the weights, as predicted, "cells": by budget}."""
        budgets = [gigabytes * GB for gigabytes in self.gigabytes]
        predicted = self._run("predict", "", budgets)
        if predicted is None:
            sys.exit(f"{self.shape} on {self.profile} could not be recorded")
        cells = {}
        for gigabytes, forecast in zip(self.gigabytes, predicted["within"], strict=True):
            measured = self._run("measure", f" within {gigabytes} GB", gigabytes * GB)
            cells[gigabytes] = {"predicted": forecast, "measured": measured}
            if measured is not None:
                cells[gigabytes]["off"] = {
                    figure: forecast[figure] / measured[figure] - 1
                    for figure in ("first_s", "later_s", "first_h2d_bytes", "later_h2d_bytes")
                }
        return {"prepare_s": predicted["prepare_s"], "cells": cells}

    def _run(self, kind: str, within: str, *job: Any) -> dict[str, Any] | None:
        print(f"{self.shape} on {self.profile}, {kind}{within} ...", file=sys.stderr, end="")
        sys.stderr.flush()
        begun = time.monotonic()
        found = dry.in_fresh_process(__file__, kind, self.shape, self.profile, *job)
        print(f" {time.monotonic() - begun:.0f} s of real time", file=sys.stderr, flush=True)
        return found


# ---- for people
# ------------------------------------------------------------------------------------------------


def show(results: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="forecasts, and what came of them")
    shown.add_column("shape on card")
    headings = ("GB", "first", "came", "off", "later", "came", "off", "up", "came", "off")
    for heading in headings:
        shown.add_column(heading, justify="right")
    for result in results:
        name = f"{result['shape']} on {result['machine']['name']}"
        for gigabytes, cell in result["cells"].items():
            shown.add_row(name, str(gigabytes), *_figures(cell))
    console = Console(width=120, highlight=False)
    console.print(shown)
    offs = [
        (
            f"{result['shape']} on {result['machine']['name']} within {gigabytes} GB, {call} call",
            off,
        )
        for result in results
        for gigabytes, cell in result["cells"].items()
        if "off" in cell
        for call, off in (("first", cell["off"]["first_s"]), ("later", cell["off"]["later_s"]))
    ]
    for name, off in offs:
        if abs(off) > GOAL:
            console.print(f"{name}: {off:+.2%} off, outside the goal of {GOAL:.0%}")
    met = sum(abs(off) <= GOAL for _, off in offs)
    console.print(f"{met} of {len(offs)} calls are forecast within {GOAL:.0%}")


def _figures(cell: dict[str, Any]) -> list[str]:
    predicted, measured = cell["predicted"], cell["measured"]
    if measured is None:
        return ["does not fit", "", "", "is to fit" if predicted["fits"] else "as predicted"]
    row = []
    for figure, unit in (("first_s", 1.0), ("later_s", 1.0), ("later_h2d_bytes", GB)):
        row += [f"{each[figure] / unit:.2f}" for each in (predicted, measured)]
        row.append(f"{cell['off'][figure]:+.1%}")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", help="cases whose 'shape on card' has one of these in it: 'flux;sdxl, 8 steps'"
    )
    parser.add_argument("--out", type=Path, help="default: results/forecast.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        dry.answer(work, options.measure)
        return
    from conditions import RESULTS, chosen, simulated, versions, write

    begun, results = time.monotonic(), []
    cases = {f"{shape} on {profile}": Case(shape, profile, g) for shape, profile, g in CASES}
    for name in chosen(cases, options.only):
        case = cases[name]
        found = case.run()
        asked = ASKED[case.shape]
        call = {"pipeline": asked.pipeline, "arguments": dict(asked.arguments)}
        machine = simulated(case.profile)
        results.append({"shape": case.shape, **call, "machine": machine, **found})
    show(results)
    result = {
        "benchmark": "forecast",
        "time": "virtual seconds: computed from the card's figures, the same under any load",
        "versions": versions(),
        "goal": GOAL,
        "calls": CALLS,
        "real_s": time.monotonic() - begun,
        "cases": results,
    }
    # A part of the cases is no result to keep beside the others.
    out = options.out or (None if options.only else RESULTS / "forecast.json")
    if out is not None:
        write(out, result)


if __name__ == "__main__":
    main()
