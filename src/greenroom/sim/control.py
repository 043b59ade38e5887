"""Set the simulated machine up, measure on it, break it on purpose."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from ..core.units import parse_bytes
from . import device as _device
from .profiles import Profile, get_profile

Direction = Literal["h2d", "d2h", "both"]
Fault = Literal["device_alloc", "pinned_alloc", "copy", "kernel"]
_FAULTS = ("device_alloc", "pinned_alloc", "copy", "kernel")
_PICO = 1e-12


@dataclass(frozen=True)
class Race:
    """Two operations that touch the same bytes with nothing that orders them.

    Attributes:
        kind: ``"unordered-read"`` (reads bytes whose write may not have happened),
            ``"unordered-write"`` (overwrites bytes that others may still use),
            ``"unordered-free"`` (frees them), ``"host-write"`` (the host changed a pinned source in
            flight).
        stream: index on the device of the later operation's stream; -1 is the host.
    """

    kind: str
    device: int
    op: str
    stream: int
    other_op: str
    other_stream: int
    nbytes: int

    def __str__(self) -> str:
        def where(stream: int) -> str:
            return "the host" if stream < 0 else f"stream {stream}"

        return (
            f"{self.kind}: '{self.op}' on {where(self.stream)} and '{self.other_op}' on "
            f"{where(self.other_stream)} touch the same {self.nbytes} bytes of "
            f"sim:{self.device}, and nothing orders them"
        )


@dataclass
class Cost:
    """What a stretch of a program cost on one device. Seconds are virtual.

    Attributes:
        peak_bytes: most device memory in use at once, freed blocks that the allocator holds back
            for a recorded stream included.
        peak_reserved_bytes: the same with the allocator's cache.
        busy: seconds that the compute units and each copy engine worked.
    """

    seconds: float = 0.0
    peak_bytes: int = 0
    peak_reserved_bytes: int = 0
    h2d_bytes: int = 0
    d2h_bytes: int = 0
    peer_bytes: int = 0
    h2d_copies: int = 0
    d2h_copies: int = 0
    kernels: int = 0
    syncs: int = 0
    busy: Mapping[str, float] = field(default_factory=dict)
    races: list[Race] = field(default_factory=list)


def configure(
    profile: str | Profile = "rtx-4090",
    *,
    devices: int = 1,
    capacity: int | str | None = None,
    pinned_capacity: int | str | None = None,
    races: Literal["report", "raise", "off"] = "report",
    dry_above: int | str | None = None,
    trace: bool = False,
) -> None:
    """Choose the machine, and start its clock and counters anew.

    Args:
        profile: a name (see `greenroom.sim.PROFILES`) or a `Profile`.
        devices: how many equal devices, ``sim:0`` and up.
        capacity: device memory, in bytes or as ``"8GiB"``; else the profile's.
        pinned_capacity: how much host memory may be locked; else any.
        races: ``"report"`` collects them in `races()`; ``"raise"`` raises RuntimeError at the
            operation, before it is done (a
            race at a free: at the next operation); ``"off"`` looks for none.
        dry_above: storages larger than this are timed and metered, but never touched or computed
            on.
        trace: record every kernel, copy and wait for `trace()`.

    Raises:
        UnknownProfile, ValueError: what was wrong and what is possible. Nothing has changed then.
    """
    chosen = get_profile(profile) if isinstance(profile, str) else profile
    if not isinstance(chosen, Profile):
        raise ValueError(f"profile is a name or a greenroom.sim.Profile, not {profile!r}")
    if isinstance(devices, bool) or not isinstance(devices, int) or not 1 <= devices <= 16:
        raise ValueError(f"devices is a number from 1 to 16, not {devices!r}")
    if races not in ("report", "raise", "off"):
        raise ValueError(f"races is 'report', 'raise' or 'off', not {races!r}")
    if capacity is not None and parse_bytes(capacity) == 0:
        raise ValueError("capacity is what the device can hold, and cannot be 0")
    link = chosen.link
    values = {
        "devices": devices,
        "capacity": chosen.memory_bytes if capacity is None else parse_bytes(capacity),
        "pinned_capacity": -1 if pinned_capacity is None else parse_bytes(pinned_capacity),
        "dry_above": -1 if dry_above is None else parse_bytes(dry_above),
        "memory_bytes_per_s": chosen.memory_bytes_per_s,
        "launch_s": chosen.launch_s,
        "kernel_s": chosen.kernel_s,
        "h2d_pinned": link.h2d_pinned,
        "d2h_pinned": link.d2h_pinned,
        "h2d_pageable": link.h2d_pageable,
        "d2h_pageable": link.d2h_pageable,
        "copy_latency_s": link.latency_s,
        "pin_bytes_per_s": chosen.pin_bytes_per_s,
        "register_bytes_per_s": chosen.register_bytes_per_s,
        "pin_s": chosen.pin_s,
        "inline_copy_bytes": chosen.inline_copy_bytes,
        "host_copy_bytes_per_s": chosen.host_copy_bytes_per_s,
        "trace": bool(trace),
    }
    _device.native.configure(
        {name: float(value) for name, value in values.items()},
        {dtype: float(rate) for dtype, rate in chosen.flops.items()},
        races,
    )
    _device.profile = chosen
    _device.starts += 1


def current_profile() -> Profile:
    """The profile in force."""
    return _device.profile


def reset() -> None:
    """Start anew: clock, counters, peaks, races, faults, trace, caches. Tensors stay."""
    _device.native.reset()
    _device.starts += 1


def seconds() -> float:
    """The host's virtual clock. Work that was issued may end later: synchronise first."""
    return float(_device.native.now_ps() * _PICO)


def races() -> list[Race]:
    """What the race detector has found since the last reset, in order."""
    texts, numbers = _device.native.races()
    return [
        Race(kind, device, op, stream, other_op, other_stream, nbytes)
        for (kind, op, other_op), (device, stream, other_stream, nbytes) in zip(
            _rows(texts, 3), _rows(numbers, 4), strict=True
        )
    ]


def _rows(values: list[Any], width: int) -> list[tuple[Any, ...]]:
    return [tuple(values[i : i + width]) for i in range(0, len(values), width)]


def counters(device: int = 0) -> Cost:
    """What one device has cost since the last reset."""
    return _cost({}, _known(device), 0)


@contextlib.contextmanager
def measure(device: int = 0, *, settle: bool = True) -> Iterator[Cost]:
    """Measure what the ``with`` block costs on a device.

    The value is filled when the block ends, also by an exception.

    The device is synchronised before and after. Blocks may nest. Without `settle` it is not: what
    it has still to do when the block ends counts in what comes next, as for a program that calls a
    pipeline again as soon as it has its result.

    >>> with sim.measure() as cost:
    ...     model.to("sim")
    >>> cost.h2d_bytes, cost.seconds
    """
    native, cost = _device.native, Cost()
    _known(device)
    if settle:
        native.settle_device(device)
    before, seen = native.counters(device), len(races())
    native.reset_peak(device)
    try:
        yield cost
    finally:
        if settle:
            native.settle_device(device)
        vars(cost).update(vars(_cost(before, device, seen)))
        native.raise_peak(device, before["peak_bytes"], before["peak_reserved_bytes"])


def _cost(before: Mapping[str, int], device: int, races_seen: int) -> Cost:
    now: dict[str, int] = _device.native.counters(device)
    if before.get("epoch") != now["epoch"]:
        before = {}  # a reset came between
    since = {key: value - before.get(key, 0) for key, value in now.items()}
    return Cost(
        seconds=since["now_ps"] * _PICO,
        peak_bytes=now["peak_bytes"],
        peak_reserved_bytes=now["peak_reserved_bytes"],
        busy={engine: since[f"{engine}_ps"] * _PICO for engine in ("compute", "h2d", "d2h")},
        races=[race for race in races()[races_seen:] if race.device == device],
        **{
            name: since[name]
            for name in (
                "h2d_bytes",
                "d2h_bytes",
                "peer_bytes",
                "h2d_copies",
                "d2h_copies",
                "kernels",
                "syncs",
            )
        },
    )


def _known(device: int) -> int:
    if not 0 <= device < _device.device_count():
        raise ValueError(
            f"sim:{device} does not exist: the simulator is configured with "
            f"{_device.device_count()} device(s)"
        )
    return device


def fail(kind: Fault, nth: int = 1) -> None:
    """Let the `nth` allocation, copy or kernel from now on fail, once.

    ``"device_alloc"`` raises torch.OutOfMemoryError, the others RuntimeError, before anything was
    done.
    """
    if kind not in _FAULTS:
        raise ValueError(f"there is no fault {kind!r}; choose one of {', '.join(_FAULTS)}")
    if nth < 1:
        raise ValueError(f"nth counts from 1, not {nth}")
    _device.native.fail(kind, nth)


def slow_link(factor: float, *, direction: Direction = "both", device: int = 0) -> None:
    """Let copies on a device's link take `factor` times as long, until the next reset."""
    if direction not in ("h2d", "d2h", "both"):
        raise ValueError(f"direction is 'h2d', 'd2h' or 'both', not {direction!r}")
    if not 0 < factor < math.inf:
        raise ValueError(f"factor is a positive, finite number, not {factor!r}")
    _device.native.slow_link(_known(device), direction, float(factor))


def raise_peak(nbytes: int, device: int = 0, *, reserved_nbytes: int = 0) -> None:
    """Let the peak of allocated bytes be at least `nbytes`: for who has reset it for a while."""
    _device.native.raise_peak(_known(device), nbytes, reserved_nbytes)


def take_peak(device: int = 0) -> tuple[int, int]:
    """The peaks of bytes in use and of bytes reserved, which begin anew; see `raise_peak`.

    torch's own statistics stay as they are.
    """
    taken: tuple[int, int] = _device.native.take_peak(_known(device))
    return taken


def host_register(tensor: torch.Tensor) -> None:
    """Page-lock a CPU tensor's storage where it lies, as cudaHostRegister does: no second copy.

    Unregister it before its memory is freed.
    """
    storage = _host_storage(tensor)
    _device.native.host_register(storage.data_ptr(), storage.nbytes())


def host_unregister(tensor: torch.Tensor) -> None:
    """Undo `host_register`. Copies in flight from or to the memory make it a race."""
    _device.native.host_unregister(_host_storage(tensor).data_ptr())


def _host_storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        raise ValueError(
            f"only host memory can be page-locked; this tensor is on {tensor.device} and has "
            f"{tensor.numel()} elements"
        )
    return tensor.untyped_storage()


def trace() -> dict[str, Any]:
    """What was recorded, in Chrome's trace format (opens in ui.perfetto.dev).

    A process per device, a lane per stream and engine. Times are virtual
    microseconds. Empty unless ``configure(..., trace=True)``.
    """
    texts, numbers = _device.native.trace()
    rows = [
        (name, device, lane, start, duration, value)
        for (name, lane), (device, start, duration, value) in zip(
            _rows(texts, 2), _rows(numbers, 4), strict=True
        )
    ]
    lanes = sorted({(device, lane) for _, device, lane, *_ in rows if lane != "memory"})
    thread = {key: index for index, key in enumerate(lanes, 1)}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": device, "tid": tid, "args": {"name": lane}}
        for (device, lane), tid in thread.items()
    ]
    events += [
        {"ph": "M", "name": "process_name", "pid": device, "args": {"name": f"sim:{device}"}}
        for device in sorted({device for device, _ in lanes})
    ]
    for name, device, lane, start, duration, value in rows:
        event: dict[str, Any] = {"name": name, "pid": device, "ts": start * 1e-6}
        if lane == "memory":
            event |= {"ph": "C", "name": "memory in use", "args": {"bytes": value}}
        else:
            event |= {"ph": "X", "tid": thread[device, lane], "dur": duration * 1e-6}
            if value:
                event["args"] = {"bytes": value}
        events.append(event)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(path: str | os.PathLike[str]) -> None:
    """Write `trace()` as a JSON file."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(trace(), file)
