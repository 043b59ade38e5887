"""What each way of offloading costs, side by side on the simulated accelerator."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import sim
from .zoo.tiny import call_kwargs, demo_sdxl


@dataclass(frozen=True)
class Row:
    """One way to run the pipeline: seconds are virtual, bytes are of the measured call.

    enable_seconds: what turning it on took, loading onto the device or pinning included.
    same_output: the call's pictures equal the CPU's bit for bit; None if it did not fit.
    """

    way: str
    fits: bool
    enable_seconds: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    races: int = 0
    same_output: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return asdict(self)


def _group(pipe: Any, kind: str) -> None:
    pipe.enable_group_offload(
        onload_device=torch.device("sim:0"),
        offload_type=f"{kind}_level",
        num_blocks_per_group=1 if kind == "block" else None,
        use_stream=True,
    )


WAYS: dict[str, Callable[[Any], Any]] = {
    "resident": lambda pipe: pipe.to("sim"),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="sim"),
    "sequential offload": lambda pipe: pipe.enable_sequential_cpu_offload(device="sim"),
    "group offload, blocks": lambda pipe: _group(pipe, "block"),
    "group offload, leaves": lambda pipe: _group(pipe, "leaf"),
}


def compare(profile: str, capacity: int | str | None = None) -> Iterator[Row]:
    """Run a small SDXL (its own classes, random weights, 266 MB) in every way, row by row.

    Raises:
        UnknownProfile, ValueError: no such machine.
    """
    sim.configure(profile, capacity=capacity)
    expected = _pictures(demo_sdxl())
    for way in WAYS:
        sim.configure(profile, capacity=capacity)
        try:
            row = _measure(way, expected)
        except torch.OutOfMemoryError:
            row = Row(way, fits=False)
        gc.collect()  # a pipeline and its hooks hold each other
        yield row


def _measure(way: str, expected: torch.Tensor) -> Row:
    pipe = demo_sdxl()
    with sim.measure() as enabling:
        WAYS[way](pipe)
    with sim.measure() as call:
        pictures = _pictures(pipe)
    return Row(
        way,
        fits=True,
        enable_seconds=enabling.seconds,
        seconds=call.seconds,
        peak_bytes=call.peak_bytes,
        h2d_bytes=call.h2d_bytes,
        d2h_bytes=call.d2h_bytes,
        races=len(enabling.races) + len(call.races),
        same_output=torch.equal(pictures, expected),
    )


def _pictures(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipe(**call_kwargs("demo-sdxl")).images).cpu()
