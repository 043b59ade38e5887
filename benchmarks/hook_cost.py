"""What a hook on a component that is on the device already costs each call, in microseconds.

The component does nothing but return its input, so that only the hook is left. Every round times
each way once, in turn; a hook's cost is its time less that of no hook in the same round.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from accelerate import cpu_offload_with_hook
from conditions import RESULTS, host, versions, write
from rich.console import Console
from rich.table import Table
from torch import nn

import greenroom
import greenroom.sim as sim

GOAL_US = 10.0
NO_HOOK, DIFFUSERS = "no hook", "diffusers"
GREENROOM, LOCKING = "greenroom", "greenroom, weights not page-locked yet"
BUDGET = "greenroom, within a budget"
#: Where a way needs an engine of its own.
DEVICES = {LOCKING: "sim:1", BUDGET: "sim:2"}


class Component(nn.Module):
    """Returns its input. `is_working` gives the device something to do meanwhile."""

    is_working = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 8))

    def forward(self, sample: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.is_working:
            # 1 GiB in a dry run: a virtual millisecond on the device, nothing on the host.
            torch.empty(2**28, device=sample.device).add_(1)
        return sample


# ---- the ways
# -------------------------------------------------------------------------------------------------


def no_hook() -> Component:
    return Component().to("sim:0")


def diffusers() -> Component:
    """The hook that diffusers' model offloading places: accelerate's, with one component before."""
    before, component = Component(), Component()
    device = torch.device("sim:0")
    _, hook = cpu_offload_with_hook(before, device)
    cpu_offload_with_hook(component, device, prev_module_hook=hook)
    return component


def greenrooms() -> Component:
    component = _offloaded("sim:0")
    # While the device works greenroom page-locks weights; this is how it is once that is done.
    component.is_working = True
    for _ in range(3):
        component(torch.zeros(2))
    component.is_working = False
    torch.sim.synchronize()
    return component


def greenrooms_in_its_first_call() -> Component:
    return _offloaded(DEVICES[LOCKING])  # that device never works, so nothing is locked


def greenrooms_within_a_budget() -> Component:
    return _offloaded(DEVICES[BUDGET], budget="1GiB")


def _offloaded(device: str, **options: Any) -> Component:
    components = {"before": Component(), "component": Component()}
    greenroom.enable_model_cpu_offload(
        components, sequence="before->component", device=device, **options
    )
    return components["component"]


WAYS: dict[str, Callable[[], Component]] = {
    NO_HOOK: no_hook,
    DIFFUSERS: diffusers,
    GREENROOM: greenrooms,
    LOCKING: greenrooms_in_its_first_call,
    BUDGET: greenrooms_within_a_budget,
}


def inputs_on(device: str) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    def tensor() -> torch.Tensor:
        return torch.zeros(2, device=device)

    unet = {
        "encoder_hidden_states": tensor(),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": {"text_embeds": tensor(), "time_ids": tensor()},
        "down_block_additional_residuals": (tensor(), tensor(), tensor()),
        "return_dict": False,
    }
    return {"one tensor": ((tensor(),), {}), "a UNet's, 8 tensors": ((tensor(), tensor()), unet)}


# ---- measuring
# ------------------------------------------------------------------------------------------------


def measure(kind: str, rounds: int, calls: int) -> dict[str, list[float]]:
    """Microseconds of a call, per way and round."""
    components = {way: make() for way, make in WAYS.items()}
    given = {way: inputs_on(DEVICES.get(way, "sim:0"))[kind] for way in WAYS}
    for way, component in components.items():
        _time(component, *given[way], calls)  # weights go to the device, caches get warm
    samples: dict[str, list[float]] = {way: [] for way in WAYS}
    order = list(WAYS)
    before = _copied()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            order.append(order.pop(0))  # nobody always comes behind the same other
            for way in order:
                samples[way].append(_time(components[way], *given[way], calls))
    finally:
        gc.enable()
    assert _copied() == before, "a component was not resident"
    return samples


def _copied() -> list[int]:
    return [sim.counters(device).h2d_bytes for device in range(1 + len(DEVICES))]


def _time(component: Component, args: Any, kwargs: Any, calls: int) -> float:
    """Processor time of this thread: what others do on the machine is not in it."""
    start = time.thread_time_ns()
    for _ in range(calls):
        component(*args, **kwargs)
    return (time.thread_time_ns() - start) / calls / 1e3


def summary(samples: dict[str, list[float]], way: str) -> dict[str, Any]:
    added = [a - b for a, b in zip(samples[way], samples[NO_HOOK], strict=True)]
    return {"call_us": _spread(samples[way]), "hook_us": _spread(added)}


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4)
    spread = {"median": median, "quartile_1": low, "quartile_3": high}
    spread |= {"least": min(values), "most": max(values)}
    return {name: round(value, 3) for name, value in spread.items()}


# ---- for people
# -----------------------------------------------------------------------------------------------


def show(results: dict[str, dict[str, Any]]) -> None:
    table = Table(
        title="microseconds of a call on a resident component",
        caption="processor time; medians, and in brackets the quartiles",
    )
    for heading in ("inputs", "way", "a call", "of it the hook"):
        table.add_column(heading, justify="left" if heading in ("inputs", "way") else "right")
    for kind, ways in results.items():
        for way, result in ways.items():
            call, hook = result["call_us"], result["hook_us"]
            table.add_row(
                kind,
                way,
                f"{call['median']:.2f}",
                ""
                if way == NO_HOOK
                else f"{hook['median']:.2f} ({hook['quartile_1']:.2f} to {hook['quartile_3']:.2f})",
            )
        table.add_section()
    console = Console(width=120)
    console.print(table)
    for kind, ways in results.items():
        for way in (GREENROOM, LOCKING, BUDGET):
            cost = ways[way]["hook_us"]["median"]
            verdict = "within" if cost <= GOAL_US else "above"
            console.print(f"{kind}; {way}: {cost:.1f}, {verdict} the goal of {GOAL_US:.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--calls", type=int, default=100, help="of each way in a round")
    parser.add_argument("--out", type=Path, default=RESULTS / "hook_cost.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sim.configure("rtx-4090", devices=1 + len(DEVICES), dry_above="1MiB")
    machine = host()
    results = {}
    for kind in inputs_on("cpu"):
        samples = measure(kind, options.rounds, options.calls)
        results[kind] = {way: summary(samples, way) for way in WAYS}
    show(results)
    result = {
        "benchmark": "hook_cost",
        "time": "processor time of the calling thread, microseconds",
        "machine": machine,
        "device": "simulated, components resident; its time is not in the figures",
        "versions": versions(),
        "repetitions": {"rounds": options.rounds, "calls": options.calls},
        "goal_us": GOAL_US,
        "inputs": results,
    }
    write(options.out, result)


if __name__ == "__main__":
    main()
