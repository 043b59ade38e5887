"""Looks at the machine: devices, versions, drivers; measures the link and page-locking.

Copies are timed by events of the device: on a simulated one they tell virtual time.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..core.units import format_bytes
from ..device.backend import Backend
from ..place import Place, find_place
from .host import Host, read_host
from .judge import REQUIRED, WANTED, Device, Facts, Link, PageLocking

#: Of each copy. Links reach their speed with a few MiB; more makes small disturbances smaller.
_COPIED_BYTES = 256 * 2**20
#: The least that tells anything.
_LEAST_BYTES = 2**20
#: Of each kind. A real link's best is what it can do; virtual time is the same each time.
_REPEATS = 4


def look(device: str | None = None, simulate: str | None = None) -> Facts:
    """The machine as it is.

    Raises:
        UsageError: there is no such device or card.
    """
    host = read_host()
    versions = {name: _version(name) for name in ("greenroom", *REQUIRED, *WANTED)}
    known: dict[str, Any] = {
        "versions": {"python": _python(), **versions},
        "built_for": _built_for(),
        "driver": _driver(),
    }
    if not hasattr(torch, "accelerator"):
        return Facts(host, **known)  # too old a torch, which is all there is to say
    here = torch.accelerator.current_accelerator(check_available=True)
    if device is None and simulate is None and here is None:
        return Facts(host, **known)
    place = find_place(device, simulate)
    devices = [
        _describe(torch.device(place.device.type, index)) for index in range(_device_count(place))
    ]
    known.update(device=str(place.device), simulated=place.profile, devices=devices)
    try:
        nbytes = _room(place, host)
        if nbytes < _LEAST_BYTES:
            raise RuntimeError(f"there is no room for a copy of {format_bytes(_LEAST_BYTES)}")
        return Facts(
            host,
            link=measure_link(place, nbytes),
            page_locking=measure_page_locking(place, nbytes),
            **known,
        )
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Facts(host, failure=lines[0], **known)


# ---- the link


def measure_link(place: Place, nbytes: int) -> Link:
    """The speed of copies of so many bytes, each way, from and to both kinds of host memory."""
    on_device = torch.empty(nbytes, dtype=torch.uint8, device=place.device)
    pageable = torch.empty(nbytes, dtype=torch.uint8).fill_(1)
    on_device.copy_(pageable)  # the first copy of a process takes longer
    speeds: dict[str, float | None] = {}
    for kind, lock in (("pageable", False), ("pinned", True)):
        host = _locked_copy(pageable) if lock else pageable
        for way in ("h2d", "d2h"):
            speeds[f"{way}_{kind}_bytes_per_s"] = None
            if host is not None:
                target, source = (on_device, host) if way == "h2d" else (host, on_device)
                speeds[f"{way}_{kind}_bytes_per_s"] = nbytes / _seconds_to_copy(
                    place, target, source
                )
    return Link(nbytes, **speeds)


def _locked_copy(memory: torch.Tensor) -> torch.Tensor | None:
    try:
        return memory.pin_memory()
    except RuntimeError:
        return None


def _seconds_to_copy(place: Place, target: torch.Tensor, source: torch.Tensor) -> float:
    backend = Backend(place.device)
    taken = []
    for _ in range(1 if place.is_simulated else _REPEATS):
        backend.synchronize()
        if backend.current_stream() is None:  # such a device has no events to time by either
            start = time.perf_counter()
            target.copy_(source)
            backend.synchronize()
            taken.append(time.perf_counter() - start)
            continue
        began = backend.record_time()
        target.copy_(source, non_blocking=True)  # holds the host if one is pageable
        ended = backend.record_time()
        backend.synchronize()
        taken.append(began.elapsed_time(ended) / 1e3)
    return float(min(taken))


def measure_page_locking(place: Place, nbytes: int) -> PageLocking | None:
    """The speed at which memory is page-locked where it lies; None for devices without that."""
    backend = Backend(place.device)
    if not backend.can_pin:
        return None
    clock = _clock(place)
    memory = torch.empty(nbytes, dtype=torch.uint8).fill_(1)  # so that there are pages to lock
    backend.synchronize()
    began = clock()
    is_locked = backend.pin(memory)
    taken = clock() - began
    if is_locked:
        backend.unpin(memory)
    return PageLocking(nbytes, nbytes / taken if is_locked else None)


def _clock(place: Place) -> Callable[[], float]:
    if not place.is_simulated:
        return time.perf_counter
    from .. import sim

    return sim.seconds


def _room(place: Place, host: Host) -> int:
    """How large copies may be without pushing anybody out."""
    free = _describe(place.device).free_bytes
    most = _COPIED_BYTES if free is None else min(_COPIED_BYTES, free // 2)
    if place.is_simulated:
        most = min(most, _COPIED_BYTES // 8)  # virtual time has no noise to drown
    # Three are in host memory at once: pageable, a locked one, and one that is locked where it is.
    return min(most, host.available_bytes // 8)


# ---- devices and software


def _device_count(place: Place) -> int:
    module: Any = torch.get_device_module(place.device)
    return int(module.device_count()) if hasattr(module, "device_count") else 1


def _describe(device: torch.device) -> Device:
    module: Any = torch.get_device_module(device)
    free = total = None
    # One that somebody has for himself alone does not tell; measuring it will say why.
    with contextlib.suppress(RuntimeError):
        if hasattr(module, "mem_get_info"):
            free, total = map(int, module.mem_get_info(device))
    name = module.get_device_name(device) if hasattr(module, "get_device_name") else device.type
    return Device(str(device), str(name), free, total)


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # with what it is built for: 2.13.0+cpu
    if package == "greenroom":
        from .. import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _python() -> str:
    import platform

    return platform.python_version()


def _built_for() -> str | None:
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "XPU" if getattr(torch.version, "xpu", None) is not None else None


def _driver(root: Path = Path("/")) -> str | None:
    for path, parse in (
        ("proc/driver/nvidia/version", parse_nvidia_version),
        ("sys/module/amdgpu/version", lambda text: f"amdgpu {text.strip()}"),
    ):
        try:
            found = parse((root / path).read_text(encoding="utf-8", errors="replace"))
        except OSError:
            continue
        if found is not None:
            return found
    return _ask_nvidia_smi()  # under WSL the driver is that of Windows


def parse_nvidia_version(text: str) -> str | None:
    """``/proc/driver/nvidia/version``: the driver's version.

    >>> parse_nvidia_version("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar 5")
    'NVIDIA 550.54.15'
    """
    match = re.search(r"NVRM version:.*?\s(\d{3,}(?:\.\d+)+)\s", text)
    return None if match is None else f"NVIDIA {match[1]}"


def _ask_nvidia_smi() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split()
    return f"NVIDIA {lines[0]}" if done.returncode == 0 and lines else None
