"""What deciding costs the host: making a plan, and each step of a call that follows it.

Nothing moves and nothing is computed: steps, bytes and seconds are those of made-up pipelines, of
the numbers that published ones have.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conditions import RESULTS, host, versions, write
from rich.console import Console
from rich.table import Table

from greenroom.core.director import Director, Orders
from greenroom.core.plan import Plan, make_plan
from greenroom.core.simulate import Costs
from greenroom.core.trace import Step

COSTS = Costs(25e9)
MB, GB = 10**6, 10**9
SHARES = (0.3, 0.6, 0.9, 1.2)  # of the weights' bytes
NOTHING = Orders()


@dataclass(frozen=True)
class Stay:
    """A component's forwards: how many, of how many parts of how many bytes and milliseconds."""

    name: str
    rounds: int
    parts: int
    nbytes: int
    ms: float

    def steps(self) -> list[Step]:
        held, beside, seconds = (self.name,), GB // 2, self.ms / 1e3
        stay = [Step(self.name, held, seconds / 10, beside, opens=True)]
        stay += [Step(part, held, seconds, beside) for part in self.sizes() if part != self.name]
        return stay * self.rounds

    def sizes(self) -> dict[str, int]:
        return {self.name: 10 * MB} | {f"{self.name}.{i}": self.nbytes for i in range(self.parts)}


#: About what the parts of published pipelines are on an RTX 4090, and one call of 10 000 steps.
PIPELINES: dict[str, list[Stay]] = {
    "sdxl": [
        Stay("text_encoder", 1, 2, 120 * MB, 1),
        Stay("text_encoder_2", 1, 12, 110 * MB, 1),
        Stay("unet", 30, 48, 106 * MB, 4),
        Stay("vae", 1, 1, 100 * MB, 200),
    ],
    "flux": [
        Stay("text_encoder", 1, 2, 120 * MB, 1),
        Stay("text_encoder_2", 1, 75, 127 * MB, 1),
        Stay("transformer", 28, 190, 125 * MB, 6),
        Stay("vae", 1, 1, 100 * MB, 200),
    ],
    "wan2.2": [
        Stay("text_encoder", 1, 90, 126 * MB, 1),
        Stay("transformer", 52, 230, 124 * MB, 20),
        Stay("transformer_2", 28, 230, 124 * MB, 20),
        Stay("vae", 1, 1, 150 * MB, 2000),
    ],
    "10 000 steps": [
        Stay("encoder", 1, 24, 120 * MB, 1),
        Stay("transformer", 99, 100, 120 * MB, 5),
    ],
}


# ---- measuring
# ------------------------------------------------------------------------------------------------


def measure(stays: Sequence[Stay], share: float, repetitions: int) -> dict[str, Any]:
    steps = [step for stay in stays for step in stay.steps()]
    sizes = {part: nbytes for stay in stays for part, nbytes in stay.sizes().items()}
    budget = int(share * sum(sizes.values())) + GB // 2
    plan = make_plan(steps, sizes, budget, COSTS)
    plans, firsts, laters, slowest, ordered = [], [], [], [], 0
    gc.collect()
    gc.disable()
    try:
        for _ in range(repetitions):
            began = time.process_time_ns()
            make_plan(steps, sizes, budget, COSTS)
            plans.append((time.process_time_ns() - began) / 1e6)
            director = Director(plan)
            firsts.append(_call(director, plan) / len(steps) / 1e3)
            laters.append(_call(director, plan) / len(steps) / 1e3)
            each, ordered = _each(director, plan)
            slowest.append(max(each) / 1e3)
    finally:
        gc.enable()
    return {
        "share_of_weights": share,
        "budget_gb": round(budget / GB, 3),
        "steps": len(steps),
        "parts": len(sizes),
        "steps_with_orders": ordered,  # in the third call
        "make_plan_ms": _spread(plans),
        "begin_us_first_call": _spread(firsts),
        "begin_us_later_call": _spread(laters),
        "begin_us_slowest_step": _spread(slowest),
    }


def _call(director: Director, plan: Plan) -> int:
    """Nanoseconds of processor time of all steps of a call; what is between calls is not in it."""
    director.begin_call()
    steps, begin = plan.steps, director.begin
    began = time.process_time_ns()
    for step in steps:
        begin(step)
    spent = time.process_time_ns() - began
    director.end_call()
    return spent


def _each(director: Director, plan: Plan) -> tuple[list[int], int]:
    """Nanoseconds of each step of a call, and before how many of them anything is ordered."""
    director.begin_call()
    spent, ordered = [], 0
    for step in plan.steps:
        began = time.process_time_ns()
        orders = director.begin(step)
        spent.append(time.process_time_ns() - began)
        ordered += orders != NOTHING
    director.end_call()
    return spent, ordered


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    spread = {"median": median, "quartile_1": low, "quartile_3": high}
    spread |= {"least": min(values), "most": max(values)}
    return {name: round(value, 3) for name, value in spread.items()}


# ---- for people
# ------------------------------------------------------------------------------------------------


def show(results: dict[str, list[dict[str, Any]]]) -> None:
    table = Table(title="what deciding costs", caption="processor time; medians")
    headings = (
        "pipeline",
        "steps",
        "parts",
        "GB",
        "with orders",
        "plan ms",
        "first us",
        "later us",
    )
    for heading in (*headings, "slowest us"):
        table.add_column(heading, justify="left" if heading == "pipeline" else "right")
    for name, rows in results.items():
        for row in rows:
            table.add_row(
                name,
                str(row["steps"]),
                str(row["parts"]),
                f"{row['budget_gb']:.1f}",
                str(row["steps_with_orders"]),
                f"{row['make_plan_ms']['median']:.0f}",
                f"{row['begin_us_first_call']['median']:.2f}",
                f"{row['begin_us_later_call']['median']:.2f}",
                f"{row['begin_us_slowest_step']['median']:.0f}",
            )
        table.add_section()
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PIPELINES, help="one pipeline; keeps no file")
    parser.add_argument("--repetitions", type=int, default=7, help="of each plan, and its calls")
    parser.add_argument("--out", type=Path, default=RESULTS / "planning.json")
    options = parser.parse_args()
    machine = host()
    chosen = [options.only] if options.only else list(PIPELINES)
    results = {
        name: [measure(PIPELINES[name], share, options.repetitions) for share in SHARES]
        for name in chosen
    }
    show(results)
    if options.only:
        return
    result = {
        "benchmark": "planning",
        "time": "processor time of the process",
        "machine": machine,
        "link_bytes_per_s": COSTS.h2d_bytes_per_s,
        "versions": versions(),
        "repetitions": options.repetitions,
        "pipelines": results,
    }
    write(options.out, result)


if __name__ == "__main__":
    main()
