"""Where a pipeline runs and is measured: the machine's accelerator, or the simulated one.

>>> place = find_place()
>>> place.prepare()
>>> with place.measure() as cost:
...     pipe(prompt)
>>> cost.seconds, cost.peak_bytes
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .core.units import format_bytes, parse_bytes
from .errors import UsageError

#: The card that is simulated if none is named.
DEFAULT_PROFILE = "rtx-4060-laptop"

_STEP = 2**16  # of capacities that are computed


@dataclass
class Cost:
    """What a stretch of a program cost. What a real device does not tell is None.

    seconds: virtual on the simulator, else by the clock on the wall.
    peak_bytes: most device memory in use at once.
    races: how many the simulator has found.
    """

    seconds: float = 0.0
    peak_bytes: int | None = None
    h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    races: int | None = None


@dataclass(frozen=True)
class Place:
    """A device to run on. `profile` is the card that is simulated, None on a real one.

    capacity: bytes of device memory; None: as much as the card has.
    """

    device: torch.device
    profile: str | None = None
    capacity: int | None = None

    @property
    def is_simulated(self) -> bool:
        """Whether it is the simulator, where seconds are virtual and bytes are counted."""
        return self.profile is not None

    def __str__(self) -> str:
        if self.profile is None:
            module: Any = torch.get_device_module(self.device)
            name = getattr(module, "get_device_name", lambda _: "")(self.device)
            return f"{self.device} ({name})" if name else str(self.device)
        room = "" if self.capacity is None else f" with {format_bytes(self.capacity)}"
        return f"a simulated {self.profile}{room}"

    def with_capacity(self, capacity: int) -> Place:
        """The same simulated card with another amount of memory."""
        return dataclasses.replace(self, capacity=capacity)

    def prepare(self) -> None:
        """Start anew: caches empty, and on the simulator clock, counters and races at zero.

        Raises:
            ValueError: the simulator knows no such card, or cannot have such a capacity.
        """
        if self.profile is None:
            module: Any = torch.get_device_module(self.device)
            if hasattr(module, "empty_cache"):
                module.empty_cache()
        else:
            from . import sim

            sim.configure(
                self.profile, devices=(self.device.index or 0) + 1, capacity=self.capacity
            )

    @contextlib.contextmanager
    def measure(self) -> Iterator[Cost]:
        """Measure what the ``with`` block costs; the value is filled when it ends."""
        cost = Cost()
        with _measure_simulated(self, cost) if self.is_simulated else _measure_real(self, cost):
            yield cost


@contextlib.contextmanager
def _measure_simulated(place: Place, cost: Cost) -> Iterator[None]:
    from . import sim

    with sim.measure(place.device.index or 0) as measured:
        yield
    cost.seconds = measured.seconds
    cost.peak_bytes = measured.peak_bytes
    cost.h2d_bytes = measured.h2d_bytes
    cost.d2h_bytes = measured.d2h_bytes
    cost.races = len(measured.races)


@contextlib.contextmanager
def _measure_real(place: Place, cost: Cost) -> Iterator[None]:
    module: Any = torch.get_device_module(place.device)
    counts_peaks = hasattr(module, "reset_peak_memory_stats")
    torch.get_device_module(place.device).synchronize(place.device)
    if counts_peaks:
        module.reset_peak_memory_stats(place.device)
    start = time.perf_counter()
    yield
    torch.get_device_module(place.device).synchronize(place.device)
    cost.seconds = time.perf_counter() - start
    if counts_peaks:
        cost.peak_bytes = module.max_memory_allocated(place.device)


def find_place(
    device: str | None = None, profile: str | None = None, capacity: str | None = None
) -> Place:
    """The device that is meant, checked; without one, the machine's accelerator or the simulator.

    Args:
        device: as torch names it, ``"cuda"``, ``"cuda:1"``, ``"sim"``.
        profile: the card to simulate; naming one asks for the simulator.
        capacity: its device memory, ``"8GiB"``; else the card's.

    Raises:
        UsageError: there is no such device, card or capacity, or they contradict.
        RuntimeError: the simulator could not be compiled (SimulatorBuildError) or registered.
    """
    here = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        device = here.type if profile is None and here is not None else "sim"
    if device.partition(":")[0] == "sim":
        return _simulated(device, profile or DEFAULT_PROFILE, capacity)
    found = _parse(device)
    if profile is not None or capacity is not None:
        asked = f"--simulate {profile}" if profile is not None else f"--capacity {capacity}"
        raise UsageError(f"{asked} is for the simulated device, and the device is {found}")
    index = found.index or 0
    if here is None or here.type != found.type or index >= torch.accelerator.device_count():
        raise UsageError(f"there is no accelerator {device!r} here. There are: {_devices()}")
    return Place(torch.device(found.type, index))


def _simulated(device: str, profile: str, capacity: str | None) -> Place:
    from . import sim  # noqa: F401  (only with it is "sim" a device)

    index = _parse(device).index or 0
    try:
        room = None if capacity is None else _room(capacity)
        place = Place(torch.device("sim", index), profile, room)
        place.prepare()
    except ValueError as error:
        raise UsageError(str(error)) from error
    return place


def _room(capacity: str) -> int:
    try:
        return parse_bytes(capacity)
    except ValueError as error:
        raise ValueError(f"capacity={capacity!r}: {error}") from error


def _parse(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise UsageError(f"there is no accelerator {name!r}. There are: {_devices()}") from None


def _devices() -> str:
    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found is not None and found.type != "sim" else 0
    real = [f"{found.type}:{index}" for index in range(count)] if found is not None else []
    return ", ".join([*real, "sim (simulated)"])


def capacities(sizes: Mapping[str, int], most: int) -> Iterator[int]:
    """Device memories too small for a whole pipeline, from one that should do for its parts.

    The first has room for the largest component and for half of the others' bytes, which is left
    to activations; nobody knows how much those need before they have run, so each further one
    has four times that room. The last is at least `most`.

    Args:
        sizes: the components' bytes by name.
        most: what a real card has.
    """
    largest, whole = max(sizes.values()), sum(sizes.values())
    room = max((whole - largest) // 2, _STEP)
    while True:
        capacity = -(-(largest + room) // _STEP) * _STEP
        yield capacity
        if capacity >= max(most, whole):
            return
        room *= 4
