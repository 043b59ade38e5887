"""What torch reaches as ``torch.sim``: the simulated device with the names of ``torch.cuda``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch
from torch.accelerator import (
    current_device_index as current_device,
)
from torch.accelerator import (
    current_stream,
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_accumulated_memory_stats,
    reset_peak_memory_stats,
    set_stream,
    synchronize,
)
from torch.accelerator import (
    get_memory_info as mem_get_info,
)
from torch.accelerator import (
    set_device_index as set_device,
)

from .profiles import Profile, get_profile

__all__ = [
    "Event",
    "Stream",
    "current_device",
    "current_stream",
    "default_generators",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "get_rng_state_all",
    "host_memory_stats",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "reset_accumulated_memory_stats",
    "reset_peak_memory_stats",
    "seed",
    "set_device",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
]

Device: TypeAlias = "torch.device | int | str | None"

_initialized = True  # torch.utils.checkpoint asks before it keeps the generators' states
native: Any = None  # the compiled simulator, set when greenroom.sim is imported
profile: Profile = get_profile("rtx-4090")  # the machine in force, set by configure()
starts = 0  # how often the machine began anew: what was measured before that is another one's


def _index(device: Device = None) -> int:
    index = device if isinstance(device, int) else None
    if device is not None and not isinstance(device, int):
        named = torch.device(device)
        if named.type != "sim":
            raise ValueError(f"a simulated device is meant here (sim:0 ...), not {named}")
        index = named.index
    if index is None:
        return current_device()
    if not 0 <= index < device_count():
        raise RuntimeError(
            f"sim:{index} does not exist: the simulator is configured with {device_count()} "
            f"device(s). Ask for more with greenroom.sim.configure(..., devices={index + 1})."
        )
    return int(index)


def device_count() -> int:
    """How many simulated devices there are."""
    return int(native.device_count())


def is_available() -> bool:
    """Always: the simulator is part of the process."""
    return True


def is_initialized() -> bool:
    """Always: there is nothing to start."""
    return True


def _is_in_bad_fork() -> bool:
    return False


def _lazy_init() -> None:
    return None


class _Make(type):
    """``torch.sim.Stream(...)`` makes a plain ``torch.Stream``: torch accepts no subclass."""

    base: type

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return cls.make(*args, **kwargs)  # type: ignore[attr-defined]

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.base) and instance.device.type == "sim"  # type: ignore[attr-defined]


class Stream(metaclass=_Make):
    """A stream of the simulated device, as ``torch.cuda.Stream``."""

    base = torch.Stream

    @staticmethod
    def make(device: Device = None, priority: int = 0) -> torch.Stream:
        """A new stream of `device`, else of the current one."""
        return torch.Stream(device=torch.device("sim", _index(device)), priority=priority)


class Event(metaclass=_Make):
    """An event of the simulated device, as ``torch.cuda.Event``; its times are virtual."""

    base = torch.Event

    @staticmethod
    def make(
        enable_timing: bool = False, blocking: bool = False, interprocess: bool = False
    ) -> torch.Event:
        """A new event; the last two arguments mean nothing here."""
        return torch.Event(device="sim", enable_timing=enable_timing)


def stream(stream: torch.Stream | None) -> Any:
    """Run what is inside the ``with`` block on `stream`."""
    return contextlib.nullcontext() if stream is None else stream


def default_stream(device: Device = None) -> torch.Stream:
    """Stream 0 of the device."""
    return torch.Stream(stream_id=0, device_index=_index(device), device_type=_DEVICE_TYPE)


_DEVICE_TYPE = 20  # c10::DeviceType::PrivateUse1


class device:
    """Make another simulated device the current one inside a ``with`` block."""

    def __init__(self, device: Device) -> None:
        self._guard = torch.accelerator.device_index(_index(device))

    def __enter__(self) -> None:
        self._guard.__enter__()

    def __exit__(self, *exc: Any) -> None:
        self._guard.__exit__(*exc)


def get_device_name(device: Device = None) -> str:
    """The profile's name."""
    return f"greenroom simulated {profile.name}"


def get_device_capability(device: Device = None) -> tuple[int, int]:
    """A made-up compute capability, (0, 0): nothing should choose a CUDA kernel by it."""
    return (0, 0)


class _Properties:
    def __init__(self, name: str, total_memory: int) -> None:
        self.name, self.total_memory = name, total_memory
        self.major, self.minor, self.multi_processor_count = 0, 0, 1


def get_device_properties(device: Device = None) -> _Properties:
    """Name and total memory (bytes)."""
    return _Properties(get_device_name(device), mem_get_info(_index(device))[1])


def get_amp_supported_dtype() -> list[torch.dtype]:
    """The dtypes that ``torch.autocast("sim")`` accepts."""
    return [torch.float16, torch.bfloat16]


def is_bf16_supported() -> bool:
    """Yes."""
    return True


def host_memory_stats() -> dict[str, int]:
    """Pinned host bytes: locked now (cached ones included), at most, and cached."""
    current, peak, cached = native.pinned_bytes()
    return {
        "allocated_bytes.current": current,
        "allocated_bytes.peak": peak,
        "cached_bytes.current": cached,
    }


# Random numbers: each device has a generator that gives the numbers of the CPU generator with the
# same seed.


def _generator(device: Device = None) -> torch.Generator:
    return default_generators[_index(device)]


class _Generators:
    def __getitem__(self, index: int) -> torch.Generator:
        made: torch.Generator = native.default_generator(index)
        return made

    def __len__(self) -> int:
        return device_count()


default_generators = _Generators()


def manual_seed(seed: int) -> None:
    """Seed the current device."""
    _generator().manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed every device."""
    for index in range(device_count()):
        default_generators[index].manual_seed(int(seed))


def seed() -> None:
    """Seed the current device with a number from the system."""
    _generator().seed()


def initial_seed() -> int:
    """The seed of the current device."""
    return _generator().initial_seed()


def get_rng_state(device: Device = "sim") -> torch.Tensor:
    """State of a device's generator, a CPU tensor of bytes."""
    return _generator(device).get_state()


def set_rng_state(new_state: torch.Tensor, device: Device = "sim") -> None:
    """Put a device's generator into a state taken before."""
    _generator(device).set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    """States of every device's generator."""
    return [get_rng_state(index) for index in range(device_count())]


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Put every device's generator into its state."""
    for index, state in enumerate(new_states):
        set_rng_state(state, index)
