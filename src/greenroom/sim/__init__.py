"""A simulated accelerator: a real torch device, ``"sim"``, that tells what a program cost.

>>> import greenroom.sim as sim
>>> sim.configure("rtx-4090", capacity="8GiB")
>>> with sim.measure() as cost:
...     y = model.to("sim")(x.to("sim"))
>>> cost.seconds, cost.peak_bytes, cost.h2d_bytes, cost.races

Importing this module registers the device, and compiles it the first time. See
``docs/simulator.md``.
"""

from __future__ import annotations

import sys

import torch

from ..zoo.empty import empty_weights
from . import device as _device
from .build import SimulatorBuildError, load_native
from .control import (
    Cost,
    Race,
    configure,
    counters,
    current_profile,
    fail,
    host_register,
    host_unregister,
    measure,
    races,
    raise_peak,
    reset,
    seconds,
    slow_link,
    trace,
    write_trace,
)
from .profiles import PROFILES, Link, Profile, UnknownProfile, get_profile

__all__ = [
    "PROFILES",
    "Cost",
    "Link",
    "Profile",
    "Race",
    "SimulatorBuildError",
    "UnknownProfile",
    "configure",
    "counters",
    "current_profile",
    "empty_weights",
    "fail",
    "get_profile",
    "host_register",
    "host_unregister",
    "measure",
    "races",
    "raise_peak",
    "reset",
    "seconds",
    "slow_link",
    "trace",
    "write_trace",
]


def _register() -> None:
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", "sim"):
        raise RuntimeError(
            f"torch has room for one out-of-tree device, and {taken!r} is already registered in "
            "this process: greenroom.sim cannot be imported beside it. Use a process of its own."
        )
    _device.native = load_native()
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", sys.modules[_device.__name__])
    torch.utils.generate_methods_for_privateuse1_backend(for_packed_sequence=False)
    _device.native.register_operators()
    # torch starts its backward threads once, for the devices there are at the first backward pass,
    # and this device may come, or grow, after it. Here backward passes run in the calling thread.
    torch.autograd.set_multithreading_enabled(False)
    configure()


_register()
