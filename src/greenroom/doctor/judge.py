"""Decides what is wrong with a machine, from facts alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from packaging.version import InvalidVersion, Version

from ..core.units import format_bytes
from .host import Host

#: What greenroom cannot do without, and from which version on.
REQUIRED = {"torch": "2.6", "accelerate": "0.17.0"}

#: What else is looked at, and what is not there without it.
WANTED = {
    "diffusers": "pipelines of diffusers, `greenroom run` and `greenroom demo`",
    "transformers": "most text encoders, `greenroom run` and `greenroom demo`",
    "peft": "LoRA",
}

#: Less than any slot that a GPU is meant for. PCIe 3.0 x4, of external boxes, does 3e9.
SLOW_LINK_BYTES_PER_S = 2e9
#: Of host memory: less is taken by Python and torch alone.
LITTLE_HOST_BYTES = 2 * 2**30
#: Of device memory: less is taken by a context and a few kernels' workspaces.
LITTLE_DEVICE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Device:
    """An accelerator. Bytes are None where torch does not tell them."""

    device: str
    name: str
    free_bytes: int | None
    total_bytes: int | None


@dataclass(frozen=True)
class Link:
    """The way between host and device. None: could not be measured.

    copied_bytes: the size of each copy.
    """

    copied_bytes: int
    h2d_pinned_bytes_per_s: float | None
    h2d_pageable_bytes_per_s: float | None
    d2h_pinned_bytes_per_s: float | None
    d2h_pageable_bytes_per_s: float | None


@dataclass(frozen=True)
class PageLocking:
    """How fast memory was page-locked where it lies; None: it was refused."""

    locked_bytes: int
    bytes_per_s: float | None


@dataclass(frozen=True)
class Facts:
    """A machine as it was found.

    device: the one that was measured, a name in `devices`; None if there is no accelerator.
    simulated: the card that the simulator stands for; its seconds are virtual.
    versions: by package, None for one that is not installed.
    built_for: the platform that this torch was built for, ``"CUDA 12.8"``; None: the CPU alone.
    driver: the accelerator's driver with its version, whether or not torch can use it.
    failure: what went wrong while the device was measured.
    """

    host: Host
    device: str | None = None
    simulated: str | None = None
    devices: Sequence[Device] = ()
    link: Link | None = None
    page_locking: PageLocking | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    built_for: str | None = None
    driver: str | None = None
    failure: str | None = None


class Level(Enum):
    """How much a finding matters."""

    TROUBLE = "trouble"  # something does not work, or not as it should
    NOTE = "note"  # good to know


@dataclass(frozen=True)
class Finding:
    """What was found, and what to do about it."""

    level: Level
    what: str
    do: str


def judge(facts: Facts) -> list[Finding]:
    """What there is to say about a machine, the troubles first."""
    found = [
        *_versions(facts),
        *_accelerator(facts),
        *_device_memory(facts),
        *_link(facts),
        *_host(facts.host),
    ]
    return sorted(found, key=lambda finding: finding.level is not Level.TROUBLE)


def _versions(facts: Facts) -> Iterator[Finding]:
    for name, least in REQUIRED.items():
        version = facts.versions.get(name)
        if version is None:
            yield Finding(Level.TROUBLE, f"{name} is not installed.", f"pip install {name}")
        elif not _is_at_least(version, least):
            yield Finding(
                Level.TROUBLE,
                f"{name} is {version}, and greenroom needs {least} or newer.",
                f"pip install -U {name}",
            )
    for name, purpose in WANTED.items():
        if facts.versions.get(name) is None:
            yield Finding(
                Level.NOTE,
                f"{name} is not installed. It is for {purpose}.",
                f"If you want that: pip install 'greenroom[{name}]'",
            )


def _is_at_least(version: str, least: str) -> bool:
    try:
        return Version(version) >= Version(least)
    except InvalidVersion:  # a build of somebody's own
        return True


def _accelerator(facts: Facts) -> Iterator[Finding]:
    if facts.device is not None:
        if facts.failure is not None:
            yield Finding(
                Level.TROUBLE,
                f"Measuring {facts.device} failed: {facts.failure}",
                "If other programs use the device, end them and look again. Else see whether plain "
                "torch can copy a tensor there.",
            )
        return
    if not _is_at_least(facts.versions.get("torch") or "0", REQUIRED["torch"]):
        return  # it was not asked
    torch = f"torch {facts.versions.get('torch')}"
    if facts.built_for is None and facts.driver is not None:
        what = f"There is a driver, {facts.driver}, but {torch} is built for the CPU alone."
        do = "Install the build of torch for your accelerator, as pytorch.org tells."
    elif facts.built_for is not None and facts.driver is None:
        what = f"{torch} is built for {facts.built_for}, but there is no driver for it."
        do = "Install the accelerator's driver. In a container: pass the device in (--gpus all)."
    elif facts.built_for is not None:
        what = f"{torch} is built for {facts.built_for} and finds no device, though there is "
        what += f"a driver, {facts.driver}."
        do = "See that the driver is new enough, and that CUDA_VISIBLE_DEVICES hides nothing."
    else:
        what = "There is no accelerator, and no driver of one."
        do = "Try greenroom on a simulated card: greenroom doctor --simulate rtx-4090"
    yield Finding(Level.TROUBLE, what, do)


def _device_memory(facts: Facts) -> Iterator[Finding]:
    for device in facts.devices:
        if device.device != facts.device or device.free_bytes is None or not device.total_bytes:
            continue
        free, total = format_bytes(device.free_bytes), format_bytes(device.total_bytes)
        what = f"Only {free} of {total} on {device.device} are free."
        do = "Other programs have the rest: end them, or give greenroom a budget below that."
        if device.free_bytes < LITTLE_DEVICE_BYTES:
            yield Finding(Level.TROUBLE, what, do)
        elif device.free_bytes < device.total_bytes / 2:
            yield Finding(Level.NOTE, what, do)


def _link(facts: Facts) -> Iterator[Finding]:
    locking = facts.page_locking
    if locking is not None and locking.bytes_per_s is None:
        limit = facts.host.memlock_limit_bytes
        of_user = "" if limit is None else f" `ulimit -l` is {format_bytes(limit)}: raise it."
        yield Finding(
            Level.TROUBLE,
            f"{format_bytes(locking.locked_bytes)} of host memory could not be page-locked. "
            "Weights will be copied from pageable memory, which is slower and holds the program.",
            f"Leave more memory free.{of_user}",
        )
    speed = None if facts.link is None else facts.link.h2d_pinned_bytes_per_s
    if speed is not None and speed < SLOW_LINK_BYTES_PER_S:
        yield Finding(
            Level.NOTE,
            f"The link to {facts.device} is slow: {speed / 1e9:.1f} GB/s from page-locked memory.",
            "See that the card sits in a slot with all its lanes (nvidia-smi -q shows the link's "
            "width and generation under load).",
        )


def _host(host: Host) -> Iterator[Finding]:
    available = format_bytes(host.available_bytes)
    if host.available_bytes < LITTLE_HOST_BYTES:
        yield Finding(
            Level.TROUBLE,
            f"Only {available} of host memory are available, and weights wait there.",
            "End other programs, or run on a machine or in a container with more memory.",
        )
    if host.cgroup_limit_bytes is not None:
        yield Finding(
            Level.NOTE,
            f"A control group limits this process to {format_bytes(host.cgroup_limit_bytes)} of "
            f"the machine's {format_bytes(host.total_bytes)}.",
            f"Count on {available}, and not on what `free` says. A container is given more by its "
            "memory limit (docker run --memory).",
        )
    if host.is_wsl:
        yield Finding(
            Level.NOTE,
            "This is WSL, where Windows limits what may be page-locked.",
            "If page-locking is refused, give WSL more memory: memory= in .wslconfig.",
        )
