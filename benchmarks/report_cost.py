"""What the log behind `greenroom.report` costs of a run, and what a report costs that is asked for.

The time that the host spends in the log's methods is held against the whole call. Of a small
pipeline with trained weights, whose kernels the CPU computes, that is the host's own time; it is
also called with the log and without, in turn, which tells the same less sharply. The log is taken
away by putting functions that do nothing in the place of its methods.

Published pipelines are called in dry runs, and the call's virtual seconds are what it takes on a
card. A host that is ahead of its device hides all of the log: its share is the most it can cost.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["GREENROOM_TRACES"] = "off"

import dry
import torch
from conditions import RESULTS, host, simulated, versions, write
from rich.console import Console
from rich.table import Table

import greenroom
import greenroom.sim as sim
from greenroom import zoo
from greenroom.observe.log import Log

CARD = "rtx-4090"
GOAL = 0.01  # of a run
#: Of device memory; the pipeline's weights are 22.4 MiB. In the smallest it streams all the time.
BUDGETS = {"one component at a time": None, "all stays": "64MiB", "streams": "14MiB"}
#: Published pipelines, within bytes in which much of them streams.
PUBLISHED = {"sdxl": 4 * 10**9, "flux": 12 * 10**9}
#: By then a call is learned, planned, and page-locked, and the log has as many as it keeps.
CALLS_BEFORE = 4
#: What the engine calls, and what it is given where there is no log.
METHODS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("begin", "returns", "end", "because", "needs", "runs", "took", "left", "sent", "forget"),
        lambda *_, **__: None,
    ),
    "came_home": lambda *_, **__: None,
    "leaves": lambda *_: None,
    "now": lambda _: None,
}


@contextlib.contextmanager
def without_log() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, nothing in METHODS.items():
            stack.enter_context(mock.patch.object(Log, name, nothing))
        yield


def offloaded(budget: str | None) -> Any:
    pipe = zoo.shapes()
    pipe.set_progress_bar_config(disable=True)
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=budget)
    return pipe


def call(pipe: Any, steps: int) -> tuple[float, float]:
    """Milliseconds of a call: of this thread's processor time, and virtual."""
    seeded = torch.Generator("cpu").manual_seed(0)
    with sim.measure() as cost:
        start = time.thread_time_ns()
        pipe(
            "a red circle",
            num_inference_steps=steps,
            guidance_scale=3.0,
            output_type="pt",
            generator=seeded,
        )
        spent = time.thread_time_ns() - start
    return spent / 1e6, cost.seconds * 1e3


# ---- measuring
# ------------------------------------------------------------------------------------------------


def measure(budget: str | None, rounds: int, steps: int) -> dict[str, Any]:
    """The same pipeline with and without its log, in pairs; then reports of its last call."""
    pipe = offloaded(budget)
    for _ in range(CALLS_BEFORE):
        call(pipe, steps)
    with_log, without, added = [], [], []
    virtual: set[float] = set()
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            one = other = 0.0
            for is_logged in (True, False) if number % 2 else (False, True):
                with contextlib.nullcontext() if is_logged else without_log():
                    spent, seconds = call(pipe, steps)
                virtual.add(round(seconds, 6))
                one, other = (spent, other) if is_logged else (one, spent)
            with_log.append(one)
            without.append(other)
            added.append((one - other) / other)
            gc.collect()
    finally:
        gc.enable()
    in_logs, shares = [], []
    timing_ns = timing(lambda: call(pipe, steps))
    for _ in range(max(5, rounds // 4)):
        with timed_log(timing_ns) as in_log:
            spent, _ = call(pipe, steps)
        in_logs.append(in_log() * 1e3)
        shares.append(in_logs[-1] / spent)
    call(pipe, steps)
    entries = len(greenroom.report(pipe).call.events)
    reports = [_milliseconds(lambda: greenroom.report(pipe)) for _ in range(20)]
    shown = [_milliseconds(lambda: str(greenroom.report(pipe))) for _ in range(5)]
    greenroom.disable_model_cpu_offload(pipe)
    return {
        "steps": steps,
        "events": entries,
        "with_log_ms": _spread(with_log),
        "without_ms": _spread(without),
        "longer_by": _spread(added),
        "in_log_ms": _spread(in_logs),
        "share": _spread(shares),
        "virtual_ms": sorted(virtual),
        "report_ms": _spread(reports),
        "printed_ms": _spread(shown),
    }


def measure_published(name: str, budget: int, calls: int) -> dict[str, Any]:
    """Of the last of some calls: seconds in the log's methods, and of the call on the card."""
    pipe = dry.load(name, CARD)
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=budget)
    shares, spent, seconds, whole = [], [], [], []
    arguments = zoo.full_call_kwargs(name)
    for _ in range(CALLS_BEFORE):
        pipe(**arguments)
    timing_ns = timing(lambda: pipe(**arguments))
    for _ in range(calls):
        start = time.thread_time_ns()
        with timed_log(timing_ns) as in_log, sim.measure() as cost:
            pipe(**arguments)
        whole.append((time.thread_time_ns() - start) / 1e9)
        spent.append(in_log() * 1e3)
        seconds.append(cost.seconds)
        shares.append(in_log() / cost.seconds)
    made = greenroom.report(pipe)
    greenroom.disable_model_cpu_offload(pipe)
    return {
        "budget_bytes": budget,
        "events": len(made.call.events),
        "in_log_ms": _spread(spent),
        "virtual_s": round(statistics.median(seconds), 4),
        "share": _spread(shares),
        "host_s": _spread(whole),
        "share_of_host": _spread([a / 1e3 / b for a, b in zip(spent, whole, strict=True)]),
    }


@contextlib.contextmanager
def timed_log(timing_ns: Mapping[str, float]) -> Iterator[Callable[[], float]]:
    """Seconds spent in the log's methods, less what it takes to time them, as `timing` tells."""
    with _timed({name: getattr(Log, name) for name in METHODS}) as spent:
        yield (
            lambda: (
                sum(sum(found) - len(found) * timing_ns.get(n, 0) for n, found in spent.items())
                / 1e9
            )
        )


def timing(work: Callable[[], object]) -> dict[str, float]:
    """Nanoseconds that it takes to time each method, in the same place, where it does nothing."""
    with without_log(), _timed(METHODS) as spent:
        work()
    return {name: statistics.median(found) for name, found in spent.items()}


@contextlib.contextmanager
def _timed(methods: Mapping[str, Callable[..., Any]]) -> Iterator[dict[str, list[int]]]:
    """Nanoseconds of each call of the log's methods, which are these meanwhile."""
    spent: dict[str, list[int]] = {}
    is_inside = False

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_inside
            if is_inside:  # some call others
                return method(*args, **kwargs)
            is_inside = True
            start = time.thread_time_ns()
            try:
                return method(*args, **kwargs)
            finally:
                spent.setdefault(name, []).append(time.thread_time_ns() - start)
                is_inside = False

        return call

    with contextlib.ExitStack() as stack:
        for name, method in methods.items():
            stack.enter_context(mock.patch.object(Log, name, timed(name, method)))
        yield spent


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    work()
    return (time.thread_time_ns() - start) / 1e6


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    spread = {"median": median, "quartile_1": low, "quartile_3": high}
    spread |= {"least": min(values), "most": max(values)}
    return {name: round(value, 5) for name, value in spread.items()}


# ---- for people
# -----------------------------------------------------------------------------------------------


def show(small: dict[str, dict[str, Any]], published: dict[str, dict[str, Any]]) -> None:
    console = Console(width=130)
    table = Table(
        title="a small pipeline, computed by the CPU",
        caption="processor time; medians, and in brackets the quartiles",
    )
    table.add_column("within")
    for heading in ("events", "a call", "in the log", "with it longer by", "report(pipe)", "shown"):
        table.add_column(heading, justify="right")
    for name, result in small.items():
        table.add_row(
            name,
            str(result["events"]),
            f"{result['with_log_ms']['median']:.0f} ms",
            _percent(result["share"]),
            _percent(result["longer_by"]),
            f"{result['report_ms']['median']:.2f} ms",
            f"{result['printed_ms']['median']:.1f} ms",
        )
    console.print(table)
    table = Table(title=f"published pipelines on a simulated {CARD}: what is noted of a call")
    table.add_column("pipeline")
    for heading in ("budget", "events", "in the log", "a call", "of it", "of the host's time"):
        table.add_column(heading, justify="right")
    for name, result in published.items():
        table.add_row(
            name,
            f"{result['budget_bytes'] / 1e9:.0f} GB",
            str(result["events"]),
            f"{result['in_log_ms']['median']:.1f} ms",
            f"{result['virtual_s']:.2f} s",
            _percent(result["share"]),
            f"{result['share_of_host']['median']:.2%} of {result['host_s']['median']:.1f} s",
        )
    console.print(table)
    for name, result in (*small.items(), *published.items()):
        share = result["share"]["median"]
        verdict = "within" if share <= GOAL else "above"
        console.print(f"{name}: {share:.2%}, {verdict} the goal of {GOAL:.0%}")


def _percent(share: dict[str, float]) -> str:
    return f"{share['median']:.2%} ({share['quartile_1']:.2%} to {share['quartile_3']:.2%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="pairs of calls")
    parser.add_argument("--calls", type=int, default=3, help="of each published pipeline")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps of a call")
    parser.add_argument("--out", type=Path, default=RESULTS / "report_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = host()
    published = {
        name: measure_published(name, budget, options.calls)
        for name, budget in PUBLISHED.items()
        if options.calls
    }
    small = {}
    for name, budget in BUDGETS.items():
        sim.configure(CARD)
        small[name] = measure(budget, options.rounds, options.steps)
    show(small, published)
    result = {
        "benchmark": "report_cost",
        "time": "processor time of the calling thread",
        "machine": machine,
        "device": simulated(CARD),
        "versions": versions(),
        "repetitions": {"rounds": options.rounds, "calls": options.calls, "steps": options.steps},
        "goal": GOAL,
        "small": small,
        "published": published,
    }
    write(options.out, result)


if __name__ == "__main__":
    main()
