"""What model offloading costs at full size: wholly on the card, diffusers' way, greenroom's.

Published pipelines in dry runs on simulated cards, so seconds are virtual: no load on this machine
changes them. Each way of each case runs in a fresh process, and more than once, to show what else
might.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dry

CASES = (
    ("sdxl", "rtx-4090"),
    ("sdxl", "h200"),
    ("flux", "rtx-4090"),
    ("flux", "h200"),
    ("wan2.2", "h200"),
)
WAYS = ("resident", "diffusers", "greenroom")


# ---- in a process of its own
# ------------------------------------------------------------------------------


def measure(name: str, profile: str, way: str, calls: int, capacity: str | None) -> dict[str, Any]:
    """Enable one way and call the pipeline a few times."""
    import greenroom

    ways: dict[str, dry.Enable] = {
        "resident": lambda pipe: pipe.to("sim"),
        "diffusers": lambda pipe: pipe.enable_model_cpu_offload(device="sim"),
        "greenroom": lambda pipe: greenroom.enable_model_cpu_offload(pipe, device="sim"),
    }
    return dry.measure(dry.load(name, profile, capacity), name, ways[way], calls)


# ---- all ways of one case
# ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One pipeline on one card."""

    name: str
    profile: str
    calls: int
    repetitions: int

    def run(self) -> dict[str, Any]:
        """Measure every way, as often as asked."""
        rows = {}
        for way in WAYS:
            print(f"{self.name} on {self.profile}, {way} ...", file=sys.stderr, flush=True)
            rows[way] = self._repeated(way)
        _compare(rows)
        return rows

    def _repeated(self, way: str) -> dict[str, Any]:
        fits, capacity = True, None
        runs: list[dict[str, Any]] = []
        while len(runs) < self.repetitions:
            job = (self.name, self.profile, way, self.calls, capacity)
            found = dry.in_fresh_process(__file__, *job, seed=len(runs))
            if found is not None:
                runs.append(found)
            elif way == "resident" and capacity is None:
                # What it would take is still the yardstick: the same card with memory enough.
                fits, capacity = False, "1TiB"
            else:
                return {"fits": False}
        return {
            "fits": fits,
            **runs[0],
            "first_picture_s": runs[0]["enable"]["seconds"] + runs[0]["calls"][0]["seconds"],
            "repetitions": {
                "count": self.repetitions,
                "identical": all(run == runs[0] for run in runs),
                "largest_spread_s": dry.largest_spread_s(runs),
            },
        }


def _compare(rows: dict[str, dict[str, Any]]) -> None:
    """Add to each row what offloading costs: what is beyond the resident pipeline's."""
    yardstick = rows["resident"]["calls"]
    for row in rows.values():
        for call, resident in zip(row.get("calls", ()), yardstick, strict=False):
            call["lost_s"] = call["seconds"] - resident["seconds"]
            call["weights_h2d_bytes"] = call["h2d_bytes"] - resident["h2d_bytes"]
            call["weights_d2h_bytes"] = call["d2h_bytes"] - resident["d2h_bytes"]
    ours, theirs = rows["greenroom"], rows["diffusers"]
    if not (ours.get("calls") and theirs.get("calls")):
        return
    for call, incumbents in zip(ours["calls"], theirs["calls"], strict=True):
        call["lost_of_incumbents"] = call["lost_s"] / incumbents["lost_s"]
    ours["worse_than_incumbent"] = _worse(ours, theirs)


def _worse(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, list[float]]:
    """Every figure that is higher than the incumbent's, where it is highest: [ours, theirs]."""
    pairs: dict[str, list[tuple[float, float]]] = {
        "seconds to enable": [(ours["enable"]["seconds"], theirs["enable"]["seconds"])],
        "seconds to the first picture": [(ours["first_picture_s"], theirs["first_picture_s"])],
    }
    for our, their in zip(ours["calls"], theirs["calls"], strict=True):
        for figure in ("seconds", "peak_bytes", "h2d_bytes", "d2h_bytes", "kernels", "syncs"):
            pairs.setdefault(f"{figure} of a call", []).append((our[figure], their[figure]))
        computing = (our["busy"]["compute"], their["busy"]["compute"])
        pairs.setdefault("seconds of a call's kernels", []).append(computing)
        pairs.setdefault("races of a call", []).append((len(our["races"]), len(their["races"])))
    worst = {name: max(found, key=lambda pair: pair[0] - pair[1]) for name, found in pairs.items()}
    return {name: list(pair) for name, pair in worst.items() if pair[0] > pair[1]}


# ---- for people
# -----------------------------------------------------------------------------------------------


def show(case: Case, rows: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    numbers = range(1, case.calls + 1)
    table = Table(
        title=f"{case.name}, full size, on a simulated {case.profile}; seconds are virtual",
        caption=f"(of what diffusers' way loses); up, back: GB of weights in call {case.calls}",
    )
    table.add_column("way")
    headings = ["enable", *(f"call {i}" for i in numbers), "1st picture"]
    headings += [f"lost {i}" for i in numbers]
    for heading in [*headings, "peak GiB", "up", "back", "races"]:
        table.add_column(heading, justify="right")
    for way, row in rows.items():
        if "calls" not in row:
            table.add_row(way, "does not fit")
            continue
        calls, last = row["calls"], row["calls"][-1]
        races = [*row["enable"]["races"], *(race for call in calls for race in call["races"])]
        table.add_row(
            way if row["fits"] else f"{way} [1]",
            f"{row['enable']['seconds']:.2f}",
            *(f"{call['seconds']:.2f}" for call in calls),
            f"{row['first_picture_s']:.2f}",
            *map(_lost, calls),
            f"{max(call['peak_bytes'] for call in calls) / 2**30:.2f}",
            f"{last['weights_h2d_bytes'] / 1e9:.2f}",
            f"{last['weights_d2h_bytes'] / 1e9:.2f}",
            str(len(races)),
        )
    console = Console(width=170)
    console.print(table)
    if not rows["resident"]["fits"]:
        console.print(
            "[1] does not fit; simulated on the same card with memory enough", markup=False
        )
    for way, row in rows.items():
        if "repetitions" in row:
            again = row["repetitions"]
            same = "identical" if again["identical"] else "not identical"
            console.print(
                f"{way}: {again['count']} repetitions, {same}, "
                f"at most {again['largest_spread_s'] * 1e3:.3g} ms apart"
            )
    for figure, (ours, theirs) in rows["greenroom"].get("worse_than_incumbent", {}).items():
        console.print(f"greenroom is worse in {figure}: {ours:,.6g} against {theirs:,.6g}")


def _lost(call: dict[str, Any]) -> str:
    share = call.get("lost_of_incumbents")
    return f"{call['lost_s']:.2f}" + ("" if share is None else f" ({share:.0%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", help="cases whose 'pipeline on card' has one of these in it: 'flux;sdxl on h200'"
    )
    parser.add_argument("--calls", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: results/offload.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        dry.answer(measure, options.measure)
        return
    from conditions import RESULTS, chosen, simulated, versions, write

    results = []
    cases = {f"{name} on {profile}": (name, profile) for name, profile in CASES}
    for picked in chosen(cases, options.only):
        name, profile = cases[picked]
        case = Case(name, profile, options.calls, options.repetitions)
        rows = case.run()
        show(case, rows)
        results.append({"pipeline": name, "machine": simulated(profile), "ways": rows})
    result = {
        "benchmark": "offload",
        "time": "virtual seconds: computed from the card's figures, the same under any load",
        "versions": versions(),
        "cases": results,
    }
    # A part of the cases is no result to keep beside the others.
    out = options.out or (None if options.only else RESULTS / "offload.json")
    if out is not None:
        write(out, result)


if __name__ == "__main__":
    main()
