"""What a budget costs on a real GPU: greenroom within it, diffusers' ways, and all resident.

The pipelines of `budget.py`, at full size, with random weights in real memory. greenroom is held to
its budget by `torch.cuda.set_per_process_memory_fraction`. Each way runs in a process of its own;
all of them must give the same bits as the resident pipeline.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from budget import GB, GREENROOM, INCUMBENTS, RESIDENT, SHAPES, WAYS, bounds, last_call, ways_on
from dry import DOES_NOT_FIT

#: What is measured unless something else is asked for: shape, budgets in GB.
TABLES = (
    ("sdxl", (4, 6, 8, 12)),
    ("sdxl, 4 steps", (4, 6, 8, 12)),
    ("flux", (8, 12, 16, 24, 32)),
    ("flux, 4 steps", (8, 12, 16, 24, 32)),
    ("wan2.2, 4 steps", (12, 16, 24, 32, 48)),
)
DEVICE = "cuda:0"
#: The first calls take what the libraries need to begin with; the last two show the spread.
CALLS = {GREENROOM: 4}
CALLS_OF_OTHERS = 3

READY = "ready"  # says a process that has imported everything

Job = dict[str, Any]


# ---- in a process of its own
# ------------------------------------------------------------------------------------------------


def answer() -> None:
    """Import what takes long, then do the job that comes in, and print what was found."""
    import warnings

    import diffusers
    import torch
    import transformers  # noqa: F401

    import greenroom.engine  # noqa: F401
    from greenroom import zoo  # noqa: F401

    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    print(READY, flush=True)
    job = json.loads(sys.stdin.readline() or "null")
    if job is None:
        return
    try:
        print(json.dumps(machine() if job["way"] == "machine" else measure(**job)))
    except torch.OutOfMemoryError as error:
        print(error, file=sys.stderr)
        sys.exit(DOES_NOT_FIT)


def machine() -> Job:
    """The GPU and the way there."""
    import torch
    from conditions import host, versions

    from greenroom.doctor.probe import measure_link, measure_page_locking
    from greenroom.place import Place

    asked = "name,driver_version,pcie.link.gen.max,pcie.link.width.max,memory.total,clocks.max.sm"
    said = subprocess.run(
        ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader", "--id=0"],
        capture_output=True,
        text=True,
    )
    place, nbytes = Place(torch.device(DEVICE)), 2**30
    return {
        "gpu": torch.cuda.get_device_name(0),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
        "nvidia-smi": dict(zip(asked.split(","), said.stdout.strip().split(", "), strict=False)),
        "cuda": torch.version.cuda,
        "link": vars(measure_link(place, nbytes)),
        "page_locking": vars(measure_page_locking(place, nbytes)),
        "host": host(),
        "versions": versions(),
    }


def measure(
    shape: str, way: str, calls: int, budget: int | None, link: float, kernels_s: list[float]
) -> Job:
    """Enable one way and call the pipeline a few times; with a budget, the bounds as well.

    Args:
        shape: what to call.
        way: how to run it.
        calls: how often.
        budget: bytes, which the allocator is held to.
        link: bytes per second to the device.
        kernels_s: seconds of the resident pipeline's first and last call, once they are known.
    """
    import torch

    import greenroom
    from greenroom import zoo
    from greenroom.core.simulate import Costs
    from greenroom.traces import keeping_none

    peaks = Peaks()
    asked = SHAPES[shape]
    torch.manual_seed(0)  # for the small weights, which `zoo.full` draws
    pipe = zoo.full(asked.pipeline)
    fill(pipe)
    torch.cuda.init()
    if budget is not None:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(budget / whole)
    begun = time.perf_counter()
    ways_on(DEVICE, budget)[way](pipe)
    torch.cuda.synchronize()
    enable_s = time.perf_counter() - begun
    sys.stdin.readline()  # nobody imports anything beside what is measured
    measured, pictures = [], []
    for _ in range(calls):
        peaks.restart()
        with keeping_none():  # the first call is one each time
            begun = time.perf_counter()
            made = pipe(**zoo.full_call_kwargs(asked.pipeline, **asked.arguments))
            torch.cuda.synchronize()
            seconds = time.perf_counter() - begun
        picture = (made.images if hasattr(made, "images") else made.frames).contiguous().cpu()
        pictures.append(hashlib.sha256(picture.view(torch.uint8).numpy().tobytes()).hexdigest())
        call: Job = {"seconds": seconds, **peaks.read()}
        if way == GREENROOM:
            report = greenroom.report(pipe)
            call["up_bytes"] = report.total.h2d_nbytes
            call["stalled_s"] = report.total.stalled_s
            call["compute_s"] = report.total.compute_s
        measured.append(call)
    found: Job = {
        "enable_s": enable_s,
        "calls": measured,
        "pictures": [picture[:16] for picture in pictures],
        "is_finite": bool(picture.isfinite().all()),
        "varies": float(picture.float().std()),
    }
    if budget is not None:
        costs = Costs(link, copy_s=0.0)
        later = kernels_s[-1] if kernels_s else None
        found["bounds"] = bounds(*last_call(DEVICE, budget), budget, costs, later)
    return found


class Peaks:
    """The most device memory since a restart, whoever restarts torch's own statistics meanwhile.

    greenroom does so in the first call with new arguments, to learn what each step works on.
    """

    def __init__(self) -> None:
        import torch

        self._cuda: Any = torch.cuda
        self._reset = torch.cuda.reset_peak_memory_stats
        self._cuda.reset_peak_memory_stats = self._note_and_reset
        self.restart()

    def restart(self) -> None:
        self._cuda.init()
        self._reset()
        self._most = [0, 0]
        self._ooms = self._cuda.memory_stats()["num_ooms"]

    def read(self) -> Job:
        """In use, held by the allocator, and how often it had to refuse."""
        self._note_and_reset()
        ooms = self._cuda.memory_stats()["num_ooms"] - self._ooms
        return {"peak_bytes": self._most[0], "held_bytes": self._most[1], "ooms": ooms}

    def _note_and_reset(self, device: Any = None) -> None:
        now = self._cuda.max_memory_allocated(), self._cuda.max_memory_reserved()
        self._most = [max(pair) for pair in zip(self._most, now, strict=True)]
        self._reset()


def fill(pipe: Any) -> None:
    """Write random numbers to the weights of `zoo.full`, the same each time, in a few seconds.

    One block of numbers is laid over all of them, from another place in each, of a size that keeps
    what is computed near one.
    """
    import torch
    from torch import nn

    from greenroom.zoo.empty import WRITTEN_UP_TO_NBYTES

    drawn = torch.randn(2**24 + 1, generator=torch.Generator().manual_seed(0))
    blocks = {dtype: drawn.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32)}
    modules = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    weights = {id(p): p for m in modules for p in m.parameters() if p.nbytes > WRITTEN_UP_TO_NBYTES}
    for i, weight in enumerate(weights.values()):
        block = blocks[weight.dtype]
        flat = weight.data.view(-1)
        scale = 1 / math.sqrt(weight.numel() / len(weight)) if weight.dim() > 1 else 0.01
        at = 0
        while at < len(flat):
            begin = (7919 * (i + at)) % (len(block) // 2)
            source = block[begin : begin + len(flat) - at]
            torch.mul(source, scale, out=flat[at : at + len(source)])
            at += len(source)


# ---- outside of it
# ------------------------------------------------------------------------------------------------


class Processes:
    """Runs each job in a fresh process, which has imported everything while another one ran."""

    def __init__(self) -> None:
        self._next = self._begin()
        assert self._next.stdout is not None
        self._next.stdout.readline()

    def run(self, job: Job) -> Job | None:
        """What `answer` prints for a job; None if it does not fit."""
        child, self._next = self._next, self._begin()
        assert child.stdin is not None and self._next.stdout is not None
        child.stdin.write(json.dumps(job) + "\n")
        child.stdin.flush()
        self._next.stdout.readline()  # it is READY
        out, _ = child.communicate("go\n")
        if child.returncode == DOES_NOT_FIT:
            return None
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, [job["way"]])
        found: Job = json.loads(out.splitlines()[-1])
        return found

    def close(self) -> None:
        """End the one that waits."""
        self._next.communicate("")

    def _begin(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, __file__, "--answer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"},
        )


def run(
    shape: str,
    gigabytes: tuple[int, ...],
    ways: list[str],
    processes: Processes,
    link: float,
    resident: Job | None,
) -> Job:
    """Measure one shape: {"ways": by way, "cells": by budget}; `resident` if it was before."""
    found: Job = {"ways": {} if resident is None else {RESIDENT: resident}, "cells": {}}
    kernels_s: list[float] = []

    def one(way: str, budget: int | None = None) -> Job:
        within = "" if budget is None else f" within {budget // GB} GB"
        begun = time.monotonic()
        calls = CALLS.get(way, CALLS_OF_OTHERS)
        job = {"shape": shape, "way": way, "calls": calls, "budget": budget}
        try:
            row = processes.run({**job, "link": link, "kernels_s": kernels_s})
        except subprocess.CalledProcessError:
            row = {"fails": True}
        row = {"does_not_fit": True} if row is None else row
        row["real_s"] = time.monotonic() - begun
        seconds = ", ".join(f"{call['seconds']:.2f}" for call in row.get("calls", ()))
        print(f"{shape}, {way}{within}: {seconds} s [{row['real_s']:.0f}]", flush=True)
        return row

    for way in [way for way in ways if way != GREENROOM]:
        found["ways"][way] = one(way)
        if way == RESIDENT and "calls" in found["ways"][way]:
            kernels_s += [call["seconds"] for call in found["ways"][way]["calls"]]
    if resident is not None:
        kernels_s = [call["seconds"] for call in resident["calls"]]
    for budget in gigabytes if GREENROOM in ways else ():
        found["cells"][str(budget)] = one(GREENROOM, budget * GB)
    judge(found)
    return found


def judge(found: Job) -> None:
    """Add to each row whether its bits are the resident pipeline's, and how near the bound it is.

    The bound of a first call has what libraries take to begin with added, as the resident
    pipeline's first call shows it.
    """
    rows = [*found["ways"].values(), *found["cells"].values()]
    expected = found["ways"].get(RESIDENT, {})
    for row in rows:
        if "calls" not in row:
            continue
        row["is_identical"] = set(row["pictures"]) == set(expected.get("pictures", ()))
        later = [call["seconds"] for call in row["calls"][-2:]]
        row["spread_s"] = max(later) - min(later)
    if "calls" not in expected:
        return
    first, *_, last = [call["seconds"] for call in expected["calls"]]
    for cell in found["cells"].values():
        if "bounds" in cell:
            cell["efficiency"] = [
                (cell["bounds"]["later" if i else "first"]["seconds"] + (0 if i else first - last))
                / call["seconds"]
                for i, call in enumerate(cell["calls"])
            ]


def show(shape: str, gpu: str, found: Job) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=f"{shape}, full size, on {gpu}")
    shown.add_column("way")
    headings = ["enable", *(f"call {i + 1}" for i in range(4)), "bound 1", "bound 2+"]
    headings += [f"eff. {i + 1}" for i in range(4)]
    for heading in [*headings, "peak GB", "held GB", "up GB", "OOMs", "same bits"]:
        shown.add_column(heading, justify="right")
    rows = {
        **found["ways"],
        **{f"greenroom, {budget} GB": cell for budget, cell in found["cells"].items()},
    }
    for way, row in rows.items():
        if "calls" not in row:
            shown.add_row(way, "fails" if row.get("fails") else "does not fit")
            continue
        calls = row["calls"]
        bound = row.get("bounds")
        eff = row.get("efficiency", ())
        shown.add_row(
            way,
            f"{row['enable_s']:.2f}",
            *_padded([f"{call['seconds']:.3f}" for call in calls]),
            *([f"{bound[w]['seconds']:.3f}" for w in ("first", "later")] if bound else ["", ""]),
            *_padded([f"{value:.1%}" for value in eff]),
            f"{max(call['peak_bytes'] for call in calls) / GB:.2f}",
            f"{max(call['held_bytes'] for call in calls) / GB:.2f}",
            f"{calls[-1]['up_bytes'] / GB:.1f}" if "up_bytes" in calls[-1] else "",
            str(sum(call["ooms"] for call in calls)),
            "yes" if row["is_identical"] else "NO",
        )
    Console(width=190).print(shown)


def _padded(texts: list[str]) -> list[str]:
    return [*texts, "", "", "", ""][:4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="some of the shapes: 'sdxl;flux, 4 steps'")
    parser.add_argument("--ways", help=f"some of {','.join(WAYS)}")
    parser.add_argument("--budgets", help="some of the budgets, in GB: 8,12")
    parser.add_argument("--out", type=Path, help="default: results/gpu.json")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.answer:
        answer()
        return
    from conditions import RESULTS, chosen, write

    tables = dict(TABLES)
    shapes = chosen(tables, options.only)
    ways = options.ways.split(",") if options.ways else [RESIDENT, GREENROOM, *INCUMBENTS]
    if unknown := set(ways).difference(WAYS):
        parser.error(f"no such way: {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    wanted = {int(gigabytes) for gigabytes in (options.budgets or "").split(",") if gigabytes}
    out = options.out or RESULTS / "gpu.json"
    processes = Processes()
    about = processes.run({"way": "machine"})
    assert about is not None
    print(json.dumps(about, indent=1))
    result = {"benchmark": "gpu", "time": "seconds of the clock on the wall", "tables": []}
    if out.exists():
        result = json.loads(out.read_text())
    for shape in shapes:
        same = [
            table
            for table in result["tables"]
            if (table["shape"], table["machine"]["gpu"]) == (shape, about["gpu"])
        ]
        before = same[0] if same else {"ways": {}, "cells": {}}
        gigabytes = tuple(g for g in tables[shape] if not wanted or g in wanted)
        resident = None if RESIDENT in ways else before["ways"].get(RESIDENT)
        found = run(shape, gigabytes, ways, processes, _link(about), resident)
        found = {
            "shape": shape,
            "machine": about,
            "ways": {**before["ways"], **found["ways"]},
            "cells": {**before["cells"], **found["cells"]},
        }
        judge(found)
        show(shape, about["gpu"], found)
        result["tables"] = [table for table in result["tables"] if table not in same] + [found]
        write(out, result)
    processes.close()


def _link(about: Job) -> float:
    return float(about["link"]["h2d_pinned_bytes_per_s"])


if __name__ == "__main__":
    main()
