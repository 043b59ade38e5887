"""What a budget costs at full size: greenroom within it, and diffusers' ways that happen to fit.

Published pipelines in dry runs on simulated cards, so seconds are virtual. greenroom is given each
budget. diffusers' ways know none: each runs once on the card, and counts where its peak fits. What
no way can do better is computed for each budget, see `greenroom.core.bound`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from greenroom.core.simulate import Costs
    from greenroom.core.trace import Step

GB = 10**9
RESIDENT, GREENROOM = "resident", "greenroom"
#: diffusers' own: whole models, single layers, and group offload with a stream for its copies.
INCUMBENTS = ("model", "sequential", "blocks", "leaves", "leaves-record")
WAYS = (RESIDENT, GREENROOM, *INCUMBENTS)


@dataclass(frozen=True)
class Shape:
    """A pipeline and how it is called."""

    pipeline: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


#: Distilled models take four steps, and no second pass for guidance.
SHAPES = {
    "flux": Shape("flux"),
    "flux, 4 steps": Shape("flux-schnell"),
    "sdxl": Shape("sdxl"),
    "sdxl, 4 steps": Shape("sdxl", {"num_inference_steps": 4, "guidance_scale": 0.0}),
    "sdxl-img2img": Shape("sdxl-img2img"),
    "sdxl-controlnet": Shape("sdxl-controlnet"),
    "wan2.2": Shape("wan2.2"),
    "wan2.2, 4 steps": Shape(
        "wan2.2", {"num_inference_steps": 4, "guidance_scale": 1.0, "guidance_scale_2": 1.0}
    ),
}

TABLES = (
    ("flux", "rtx-4090", (8, 12, 16, 24)),
    ("flux", "h200", (8, 12, 16, 24, 32)),
    ("flux, 4 steps", "rtx-4090", (8, 12, 16, 24, 32)),
    ("sdxl", "rtx-4090", (4, 6, 8, 12)),
    ("sdxl, 4 steps", "rtx-4090", (4, 6, 8, 12)),
    ("sdxl-img2img", "rtx-4090", (4, 6, 8, 12)),
    ("sdxl-controlnet", "rtx-4090", (4, 6, 8, 12)),
    ("sdxl", "rtx-4060-laptop", (4, 6, 8)),
    ("wan2.2", "h200", (12, 16, 24, 32, 48)),
    ("wan2.2", "rtx-5090", (12, 16, 24, 32, 48)),
    ("wan2.2, 4 steps", "h200", (12, 16, 24, 32, 48)),
    ("wan2.2, 4 steps", "rtx-5090", (12, 16, 24, 32, 48)),
)


# ---- in a process of its own
# ------------------------------------------------------------------------------------------------


def measure(
    shape: str,
    profile: str,
    way: str,
    calls: int,
    capacity: str | None,
    budget: int | None,
    kernels_s: float | None,
) -> dict[str, Any]:
    """Enable one way and call the pipeline a few times; with a budget, the bounds as well.

    kernels_s: what the resident pipeline computes in a call.
    """
    import greenroom.sim as sim
    from greenroom.core.simulate import Costs

    asked = SHAPES[shape]
    pipe = dry.load(asked.pipeline, profile, capacity)
    enable = ways_on("sim:0", budget)[way]
    found = dry.measure(pipe, asked.pipeline, enable, calls, asked.arguments)
    if budget is not None:
        costs = Costs(sim.get_profile(profile).link.h2d_pinned, copy_s=0.0)
        found["bounds"] = bounds(*last_call("sim:0", budget), budget, costs, kernels_s)
    return found


def ways_on(device: str, budget: int | None) -> dict[str, dry.Enable]:
    """How each way is turned on; greenroom's within a budget of bytes, or with none."""
    import torch

    import greenroom

    def group(pipe: Any, **options: Any) -> None:
        # A VAE that the pipeline casts for its work comes back uncast, and fails: it has to stay.
        stays = ["vae"] if pipe.vae.dtype == torch.float16 else None
        pipe.enable_group_offload(
            onload_device=torch.device(device), use_stream=True, exclude_modules=stays, **options
        )

    return {
        RESIDENT: lambda pipe: pipe.to(device),
        GREENROOM: lambda pipe: greenroom.enable_model_cpu_offload(
            pipe, device=device, budget=budget
        ),
        "model": lambda pipe: pipe.enable_model_cpu_offload(device=device),
        "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device=device),
        "blocks": lambda pipe: group(pipe, offload_type="block_level", num_blocks_per_group=1),
        "leaves": lambda pipe: group(pipe, offload_type="leaf_level"),
        "leaves-record": lambda pipe: group(pipe, offload_type="leaf_level", record_stream=True),
    }


def last_call(device: str, budget: int) -> tuple[Sequence[Step], Mapping[str, int]]:
    """The steps of greenroom's last call, as its first one measured them, and the parts' bytes."""
    import torch

    from greenroom.engine import Engine

    director = Engine.of(torch.device(device)).within(budget).director
    assert director is not None
    return director.plan.steps, director.plan.sizes


def bounds(
    steps: Sequence[Step],
    sizes: Mapping[str, int],
    budget: int,
    costs: Costs,
    kernels_s: float | None,
) -> dict[str, Any]:
    """The bounds for a first and a later call.

    A step's seconds were measured while weights came, and the host locked memory. Where all of them
    are more than the kernels take, they are shortened to that, lest the bound be none.
    """
    import dataclasses

    from greenroom.core.bound import Start, lower_bound

    traced_s = sum(step.seconds or 0.0 for step in steps)
    factor = 1.0 if kernels_s is None else min(1.0, kernels_s / traced_s)
    steps = [dataclasses.replace(step, seconds=(step.seconds or 0.0) * factor) for step in steps]
    return {
        "first": dataclasses.asdict(lower_bound(steps, sizes, budget, costs, Start.EMPTY)),
        "later": dataclasses.asdict(lower_bound(steps, sizes, budget, costs, Start.IN_A_ROW)),
        "traced_s": traced_s,
        "steps": len(steps),
        "parts": len(sizes),
        "most_beside_bytes": max((step.beside_nbytes or 0 for step in steps), default=0),
    }


# ---- all ways of one shape on one card
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """One shape on one card, within several budgets."""

    shape: str
    profile: str
    gigabytes: tuple[int, ...]
    ways: tuple[str, ...]
    calls: int
    repetitions: int

    def run(self) -> dict[str, Any]:
        """Measure what is to be measured: {"ways": by way, "cells": by budget, "skipped": ...}."""
        import greenroom.sim as sim

        most = sim.get_profile(self.profile).memory_bytes
        ways = {way: self._run(way) for way in self.ways if way != GREENROOM}
        kernels = [call["busy"]["compute"] for call in ways.get(RESIDENT, {}).get("calls", ())]
        cells = {}
        for gigabytes in self.gigabytes:
            if gigabytes * GB <= most and GREENROOM in self.ways:
                cells[gigabytes] = self._run(GREENROOM, gigabytes * GB, *kernels)
                _judge(cells[gigabytes], gigabytes * GB, ways)
        skipped = [gigabytes for gigabytes in self.gigabytes if gigabytes * GB > most]
        return {"ways": ways, "cells": cells, "skipped": skipped, "memory_bytes": most}

    def _run(
        self, way: str, budget: int | None = None, kernels_s: float | None = None
    ) -> dict[str, Any]:
        # Where the resident pipeline does not fit, its kernels are still what has to be computed.
        capacity = "1TiB" if way == RESIDENT else None
        calls = {RESIDENT: 1, GREENROOM: self.calls}.get(way, min(self.calls, 2))
        within = "" if budget is None else f" within {budget // GB} GB"
        print(f"{self.shape} on {self.profile}, {way}{within} ...", file=sys.stderr, end="")
        sys.stderr.flush()
        begun, runs = time.monotonic(), []
        for seed in range(self.repetitions if way == GREENROOM else 1):
            job = (self.shape, self.profile, way, calls, capacity, budget, kernels_s)
            try:
                found = dry.in_fresh_process(__file__, *job, seed=seed)
            except subprocess.CalledProcessError:
                if way not in INCUMBENTS:
                    raise
                return {"fits": False, "fails": True, "real_s": time.monotonic() - begun}
            if found is None:
                break
            runs.append(found)
        real_s = time.monotonic() - begun
        print(f" {real_s:.0f} s of real time", file=sys.stderr, flush=True)
        if found is None:
            return {"fits": False, "real_s": real_s}
        return {
            "fits": True,
            **runs[0],
            "repetitions": {
                "count": len(runs),
                "identical": all(run == runs[0] for run in runs),
                "largest_spread_s": dry.largest_spread_s(runs),
            },
            "real_s": real_s,
        }


def _judge(cell: dict[str, Any], budget: int, ways: Mapping[str, dict[str, Any]]) -> None:
    """Add to a cell how near the bound it is, and who of diffusers' ways fits, and is better."""
    if not cell["fits"]:
        return
    kernels = [call["busy"]["compute"] for call in ways.get(RESIDENT, {}).get("calls", ())]
    cell["compute_s"] = {
        "trace": cell["bounds"]["traced_s"],
        "resident": kernels[0] if kernels else None,
        "greenroom": cell["calls"][-1]["busy"]["compute"],
    }
    cell["efficiency"] = _efficiencies(cell, cell["bounds"])
    cell["incumbents"] = {
        way: {"peak_bytes": _peak(row), "efficiency": _efficiencies(row, cell["bounds"])}
        for way, row in ways.items()
        if way in INCUMBENTS and row["fits"] and _peak(row) <= budget
    }
    fitting = [way for way in cell["incumbents"]]
    cell["fastest_incumbent"] = min(
        fitting, key=lambda way: ways[way]["calls"][-1]["seconds"], default=None
    )
    cell["losses"] = [loss for way in fitting for loss in _losses(cell, way, ways[way])]


def _efficiencies(row: dict[str, Any], bounds: dict[str, Any]) -> list[float]:
    """The bound's part of each call's seconds."""
    return [
        bounds["later" if i else "first"]["seconds"] / call["seconds"]
        for i, call in enumerate(row["calls"])
    ]


def _losses(ours: dict[str, Any], way: str, theirs: dict[str, Any]) -> list[dict[str, Any]]:
    """Every figure in which greenroom is worse than a way that fits; of bytes, by a megabyte."""
    first = [row["enable"]["seconds"] + row["calls"][0]["seconds"] for row in (ours, theirs)]
    later = [row["calls"][-1] for row in (ours, theirs)]
    pairs = {
        "seconds to the first result": first,
        "seconds of a later call": [call["seconds"] for call in later],
        "bytes up": [call["h2d_bytes"] for call in later],
        "bytes back": [call["d2h_bytes"] for call in later],
        "races": [len(_races(row)) for row in (ours, theirs)],
    }
    return [
        {"than": way, "in": figure, "ours": our, "theirs": their}
        for figure, (our, their) in pairs.items()
        if our - their > (10**6 if "bytes" in figure else 0)
    ]


def _peak(row: dict[str, Any]) -> int:
    return max(cost["peak_bytes"] for cost in (row["enable"], *row["calls"]))


def _held(row: dict[str, Any]) -> int:
    """The most that torch's allocator held: what was in use, and what it kept to use again."""
    return max(cost["peak_reserved_bytes"] for cost in (row["enable"], *row["calls"]))


def _races(row: dict[str, Any]) -> list[str]:
    return [race for cost in (row["enable"], *row["calls"]) for race in cost["races"]]


# ---- for people
# ------------------------------------------------------------------------------------------------


def show(table: Table, found: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=170)
    ways, cells = found["ways"], found["cells"]
    title = f"{table.shape}, full size, on a simulated {table.profile}; seconds are virtual"
    if cells:
        console.print(_of_cells(f"{title}; greenroom", cells, ways))
    if any(way in INCUMBENTS for way in ways):
        console.print(_of_incumbents("the same; diffusers' ways, which know no budget", ways))
    if ways.get(RESIDENT, {}).get("fits"):
        call = ways[RESIDENT]["calls"][0]
        print(f"with memory enough for all of it, the call takes {call['seconds']:.2f} s")
    for gigabytes in found["skipped"]:
        print(f"{gigabytes} GB: skipped, the card has {found['memory_bytes'] / GB:.1f} GB")
    for gigabytes, cell in cells.items():
        if not cell["fits"]:
            continue
        seconds = ", ".join(
            f"{name} {value:.2f}" for name, value in cell["compute_s"].items() if value is not None
        )
        again = cell["repetitions"]
        print(
            f"{gigabytes} GB: seconds of compute: {seconds}; {again['count']} repetitions, at most "
            f"{again['largest_spread_s'] * 1e3:.3g} ms apart"
        )
        if _held(cell) > gigabytes * GB:
            print(f"{gigabytes} GB: torch's allocator held more than the budget for greenroom")
        for loss in cell["losses"]:
            print(
                f"{gigabytes} GB: greenroom is worse than {loss['than']} in {loss['in']}: "
                f"{loss['ours']:,.6g} against {loss['theirs']:,.6g}"
            )
    print()


def _of_cells(title: str, cells: dict[int, Any], ways: dict[str, Any]) -> Any:
    from rich.table import Table as Shown

    calls = max((len(cell["calls"]) for cell in cells.values() if cell["fits"]), default=0)
    shown = Shown(title=title)
    headings = ["GB", "bound 1", "bound 2+", *(f"call {i + 1}" for i in range(calls))]
    headings += [f"eff. {i + 1}" for i in range(calls)]
    headings += ["peak GB", "held", "up", "least", "back", "races"]
    for heading in [*headings, "diffusers' best", "call 1", "call 2", "eff. 2", "up", "back"]:
        shown.add_column(heading, justify="right")
    for gigabytes, cell in cells.items():
        if not cell["fits"]:
            shown.add_row(str(gigabytes), "does not fit")
            continue
        last, bounds = cell["calls"][-1], cell["bounds"]
        row = [
            str(gigabytes),
            f"{bounds['first']['seconds']:.2f}",
            f"{bounds['later']['seconds']:.2f}",
            *(f"{call['seconds']:.2f}" for call in cell["calls"]),
            *(f"{efficiency:.1%}" for efficiency in cell["efficiency"]),
            f"{_peak(cell) / GB:.2f}",
            f"{_held(cell) / GB:.2f}",
            f"{last['h2d_bytes'] / GB:.1f}",
            f"{bounds['later']['h2d_nbytes'] / GB:.1f}",
            f"{last['d2h_bytes'] / GB:.1f}",
            str(len(_races(cell))),
        ]
        way = cell["fastest_incumbent"]
        if way is None:
            shown.add_row(*row, "none fits")
            continue
        theirs = ways[way]["calls"]
        shown.add_row(
            *row,
            way,
            f"{theirs[0]['seconds']:.2f}",
            f"{theirs[-1]['seconds']:.2f}",
            f"{cell['incumbents'][way]['efficiency'][-1]:.1%}",
            f"{theirs[-1]['h2d_bytes'] / GB:.1f}",
            f"{theirs[-1]['d2h_bytes'] / GB:.1f}",
        )
    return shown


def _of_incumbents(title: str, ways: dict[str, Any]) -> Any:
    from rich.table import Table as Shown

    shown = Shown(title=title)
    shown.add_column("way")
    for heading in ("enable", "call 1", "call 2", "peak GB", "up", "back", "races"):
        shown.add_column(heading, justify="right")
    for way, row in ways.items():
        if way not in INCUMBENTS:
            continue
        if not row["fits"]:
            shown.add_row(way, "fails" if row.get("fails") else "does not fit")
            continue
        last = row["calls"][-1]
        shown.add_row(
            way,
            f"{row['enable']['seconds']:.2f}",
            f"{row['calls'][0]['seconds']:.2f}",
            f"{last['seconds']:.2f}" if len(row["calls"]) > 1 else "",
            f"{_peak(row) / GB:.2f}",
            f"{last['h2d_bytes'] / GB:.1f}",
            f"{last['d2h_bytes'] / GB:.1f}",
            str(len(_races(row))),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", help="tables whose 'shape on card' has one of these in it: 'flux;sdxl on'"
    )
    parser.add_argument("--ways", help=f"some of {','.join(WAYS)}")
    parser.add_argument("--budgets", help="some of the budgets, in GB: 8,12")
    parser.add_argument("--calls", type=int, default=3, help="of greenroom; diffusers' get two")
    parser.add_argument("--repetitions", type=int, default=1, help="of greenroom's cells")
    parser.add_argument("--out", type=Path, help="default: results/budget.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        dry.answer(measure, options.measure)
        return
    from conditions import RESULTS, chosen, simulated, versions, write

    ways = tuple(options.ways.split(",")) if options.ways else WAYS
    if unknown := set(ways).difference(WAYS):
        parser.error(f"no such way: {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    budgets = {int(gigabytes) for gigabytes in (options.budgets or "").split(",") if gigabytes}
    begun, results = time.monotonic(), []
    tables = {f"{shape} on {profile}": (shape, profile, every) for shape, profile, every in TABLES}
    for name in chosen(tables, options.only):
        shape, profile, every = tables[name]
        gigabytes = tuple(g for g in every if not budgets or g in budgets)
        table = Table(shape, profile, gigabytes, ways, options.calls, options.repetitions)
        found = table.run()
        show(table, found)
        call = {"pipeline": SHAPES[shape].pipeline, "arguments": dict(SHAPES[shape].arguments)}
        results.append({"shape": shape, **call, "machine": simulated(profile), **found})
    result = {
        "benchmark": "budget",
        "time": "virtual seconds: computed from the card's figures, the same under any load",
        "versions": versions(),
        "real_s": time.monotonic() - begun,
        "tables": results,
    }
    # A part of the tables is no result to keep beside the others, unless that is asked for.
    is_part = options.only or options.ways or options.budgets
    out = options.out or (None if is_part else RESULTS / "budget.json")
    if out is not None:
        write(out, merged(json.loads(out.read_text()), result) if out.exists() else result)


def merged(before: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """A result with the tables of another one that it lacks; of the same versions."""

    def key(table: dict[str, Any]) -> tuple[str, str]:
        return table["shape"], table["machine"]["name"]

    if before["versions"] != found["versions"]:
        return found
    new = {key(table) for table in found["tables"]}
    kept = [table for table in before["tables"] if key(table) not in new]
    real_s = before["real_s"] + found["real_s"]
    return {**found, "real_s": real_s, "tables": [*kept, *found["tables"]]}


if __name__ == "__main__":
    main()
