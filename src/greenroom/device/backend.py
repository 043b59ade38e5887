"""The few things that differ between accelerators."""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from typing import Any

import torch

from .transfer import Transfer

#: Variables that say how torch's allocator works; the first is the older name.
_ALLOCATOR_CONFIGS = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
)

_RAW_STREAM = "_cuda_getCurrentRawStream"  # as torch's own compiled code asks for it

#: Seen on an H200: 110 MB within 12 GB where nothing streams, 230 MB within 4 GB where all does.
_LAST_PAGES_NBYTES = 128 * 2**20
_AT_EDGES = 0.03


class Backend:
    """One device: the way there, and whether it can page-lock memory where it lies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.transfer = Transfer(device)
        # By the id of a tensor on the device: whose it is. A component that is dropped while it is
        # there goes, and its entries with it.
        self.resident: weakref.WeakValueDictionary[int, object] = weakref.WeakValueDictionary()
        self._newest = 0  # since it was last asked for
        self._highest = self._highest_reserved = 0
        self._seen = 0
        self._module: Any = torch.get_device_module(device)
        # Of CUDA's current stream its number: to have an object made for it takes ten times longer.
        is_cuda = device.type == "cuda" and device.index is not None
        self._raw_stream: Any = getattr(torch._C, _RAW_STREAM, None) if is_cuda else None
        self._stream: Any = None
        self._is_capturing = getattr(self._module, "is_current_stream_capturing", bool)
        #: Whether events of the device tell time.
        self.keeps_time = hasattr(self._module, "Event") and hasattr(self._module, "current_stream")

    @property
    def name(self) -> str:
        """What the device calls itself; its type if it has no name."""
        named = getattr(self._module, "get_device_name", None)
        return self.device.type if named is None else str(named(self.device))

    def empty_cache(self) -> None:
        """Give the allocator's cached memory back to the device."""
        if hasattr(self._module, "empty_cache"):
            self._module.empty_cache()

    def unusable_nbytes(self, budget: int) -> int:
        """Of what the allocator may hold, what no tensor can be in however much is needed.

        A GPU's memory is mapped in pages of 20 MiB, and each stream has its own: each stream's last
        one is partly empty, and so are those at the edges of what has left. The more comes and
        goes, the more edges there are.
        """
        if self.device.type != "cuda":
            return 0
        return _LAST_PAGES_NBYTES + int(_AT_EDGES * budget)

    def let_segments_grow(self) -> None:
        """Have what is free for one size be free for every size, as far as the allocator can.

        A budget counts what the allocator holds. Blocks that were each asked of the device by
        themselves lie in pieces after a while: one that is freed serves only what is smaller. Where
        the user has said how the allocator is to work, that holds.

        See https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-cuda-alloc-conf,
        "expandable_segments".
        """
        if self.device.type != "cuda" or any(name in os.environ for name in _ALLOCATOR_CONFIGS):
            return
        # Not known to every version and on every system.
        with contextlib.suppress(AttributeError, RuntimeError, ValueError):
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")

    def is_busy(self) -> bool:
        """Whether the current stream still has work: the host may do something long meanwhile."""
        with self._module.device(self.device):
            return not self._module.current_stream().query()

    def memory_bytes(self) -> int:
        """All the memory that the device has."""
        return int(self._module.mem_get_info(self.device)[1])

    def allocated_bytes(self) -> int:
        """What tensors take on the device now."""
        return int(self._module.memory_allocated(self.device))

    def reserved_bytes(self) -> int:
        """What torch's allocator holds: what tensors take, and what it keeps to use again."""
        held = getattr(self._module, "memory_reserved", self._module.memory_allocated)
        return int(held(self.device))

    def free_bytes(self) -> int:
        """What could be allocated now: what is free, and what torch's allocator keeps unused."""
        unused = self.reserved_bytes() - self.allocated_bytes()
        return int(self._module.mem_get_info(self.device)[0] + unused)

    def random_state(self) -> torch.Tensor | None:
        """The state of the device's random generator; None where it has none to tell now."""
        if self._is_capturing():
            return None
        module = self._module
        try:  # to ask the module for it costs several times as much, before every forward
            generator = getattr(module, "default_generators", ())[self.device.index]
        except IndexError:  # it tells none, or has not made them yet
            return module.get_rng_state(self.device) if hasattr(module, "get_rng_state") else None
        state: torch.Tensor = generator.get_state()
        return state

    def restore_random_state(self, state: torch.Tensor | None) -> None:
        """Set the device's random generator back."""
        if state is not None:
            self._module.set_rng_state(state, self.device)

    def synchronize(self) -> None:
        """Wait until the device has nothing to do."""
        self._module.synchronize(self.device)

    def record_time(self, stream: Any = None) -> Any:
        """An event on a stream, else the current one, that knows its time."""
        event = self.transfer.new_time()
        event.record(self._module.current_stream(self.device) if stream is None else stream)
        return event

    def record_event(self) -> Any:
        """The point that the current stream has come to."""
        event = self._module.Event()
        event.record(self._module.current_stream(self.device))
        return event

    def record_copies(self) -> Any:
        """The point at which the copies so far are over."""
        return self.transfer.mark() or self.record_event()

    def restart_peak(self) -> int:
        """The peak of allocated bytes since the last restart; counting begins anew."""
        if self.device.type == "sim":
            return self._take_peak()
        peak = int(self._module.max_memory_allocated(self.device))
        self._module.reset_peak_memory_stats(self.device)
        return peak

    def _take_peak(self) -> int:
        """The simulator's, which counts beside torch's statistics."""
        from ..sim.control import take_peak

        taken, reserved = take_peak(self.device.index)
        self._newest = max(self._newest, taken)
        self._highest = max(self._highest, taken)
        self._highest_reserved = max(self._highest_reserved, reserved)
        return taken

    def newest_peak(self) -> int | None:
        """The peak of allocated bytes since this was last asked, if that can be told.

        torch's statistics are the user's, and are left alone: only a new maximum of theirs tells,
        and else the answer is None. The simulator's own peak is put back by `restore_peak`.
        """
        if self.device.type == "sim":
            self._take_peak()
            newest, self._newest = self._newest, 0
            return newest
        if not hasattr(self._module, "max_memory_allocated"):
            return None
        peak, before = int(self._module.max_memory_allocated(self.device)), self._seen
        self._seen = peak
        return peak if peak != before else None

    def restore_peak(self) -> None:
        """Let the device's own statistics tell the true peak again, where that can be done."""
        if self.device.type == "sim":
            from .. import sim

            sim.raise_peak(self._highest, self.device.index, reserved_nbytes=self._highest_reserved)
        self._highest = self._highest_reserved = 0

    def current_stream(self) -> Any:
        """The stream that work goes to now; None where a device has none."""
        stream = self._stream
        if stream is not None and self._raw_stream(self.device.index) == stream.cuda_stream:
            return stream
        if not hasattr(self._module, "current_stream"):
            return None
        stream = self._module.current_stream(self.device)
        if self._raw_stream is not None:
            self._stream = stream
        return stream

    @property
    def can_pin(self) -> bool:
        """Whether `pin` is known for this kind of device at all."""
        return self.device.type in ("cuda", "sim")

    def pin(self, memory: torch.Tensor) -> bool:
        """Page-lock a CPU tensor's memory where it lies; False where that cannot be done."""
        if self.device.type == "cuda":
            portable = 1  # cudaHostRegisterPortable: locked for every device of the process
            with torch.cuda.device(self.device):
                refused = int(
                    torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, portable)
                )
            if refused:
                _clear_cuda_error()
            return not refused
        if self.device.type == "sim":
            from .. import sim

            try:
                sim.host_register(memory)
            except RuntimeError:
                return False
            return True
        return False

    def unpin(self, memory: torch.Tensor) -> None:
        """Undo `pin`; waits for the device first, which may still read the memory."""
        self.synchronize()
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                if int(torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())):
                    _clear_cuda_error()
        elif self.device.type == "sim":
            from .. import sim

            sim.host_unregister(memory)


def _clear_cuda_error() -> None:
    """Read the error that a refusal leaves behind: the next kernel's launch would report it."""
    major = (torch.version.cuda or "").partition(".")[0]
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(f"libcudart.so.{major}").cudaGetLastError()


def find_device(device: torch.device | str | None) -> torch.device:
    """The device that is meant, without an index if none was named.

    None means the machine's accelerator.

    Raises:
        NoAcceleratorError: None was given and torch finds no accelerator.
    """
    from ..errors import NoAcceleratorError

    if device is not None:
        return torch.device(device)
    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None:
        raise NoAcceleratorError(
            "offloading needs an accelerator and torch finds none. Install a torch build for "
            "yours, or `import greenroom.sim` to try it on the simulated one."
        )
    return found
