"""How much device memory a pipeline is granted, and whether that can work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, TypeAlias

from torch import nn

from .core.trace import Step
from .core.units import format_bytes, parse_bytes
from .device.blocks import nbytes_of, runs_of
from .errors import BudgetTooSmall, UsageError

if TYPE_CHECKING:
    from .device.backend import Backend

#: Of a budget, what is left for digests and for what differs from call to call.
SPARE_PARTS = 128
#: Of a budget, what is left at first for what was never measured, and what room is then made in.
ACTIVATION_PARTS = 8

AUTO: Literal["auto"] = "auto"
#: A budget in bytes, or whatever is free when a call begins.
Budget: TypeAlias = int | Literal["auto"]

_LEAST_MARGIN = 256 * 2**20  # bytes: what libraries take besides tensors, and what lies in pieces
_MARGIN = 0.03  # of the device
_MOST_MARGIN = 0.125


def read_budget(budget: int | str, memory_nbytes: int) -> Budget:
    """A budget in bytes, or `AUTO`; shares are of `memory_nbytes`.

    Raises:
        UsageError: it is none.
    """
    if isinstance(budget, str) and budget.strip().lower() == AUTO:
        return AUTO
    try:
        if isinstance(budget, str) and budget.strip().endswith("%"):
            return int(_share_of(budget.strip()[:-1]) * memory_nbytes)
        granted = parse_bytes(budget)
    except ValueError as error:
        raise UsageError(f"budget={budget!r}: {error}") from error
    if granted == 0:
        raise UsageError("budget=0 leaves no memory to work in; grant some, or leave it out")
    return granted


def _share_of(percent: str) -> float:
    try:
        share = float(percent) / 100
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError("a share is a number above 0 and at most 100 %")
    return share


def free_now(backend: Backend, ours_nbytes: int) -> int:
    """What is free, what torch's allocator keeps unused, and what is ours, but for a margin."""
    memory = backend.memory_bytes()
    margin = min(max(_LEAST_MARGIN, _MARGIN * memory), _MOST_MARGIN * memory)
    return max(1, backend.free_bytes() + ours_nbytes - int(margin))


def refuse_too_small(halves: Mapping[str, Iterable[Sequence[nn.Module]]], budget: int) -> None:
    """Refuse a budget that some component's weights exceed at once, however they are divided.

    Args:
        halves: each component's modules by name; two groups of them for those whose sides are used
            one at a time.
        budget: bytes.

    Raises:
        BudgetTooSmall: with the smallest budget that holds the weights.
    """
    least, name = _least(halves, budget)
    if least <= budget:
        return
    enough = least
    while (more := _least(halves, enough)[0]) > enough:  # a larger one is divided more coarsely
        enough = more
    raise BudgetTooSmall(
        f"{name!r} needs {format_bytes(least)} for its weights alone: its largest block and what "
        f"lies beside its blocks have to be on the device together. The budget is "
        f"{format_bytes(budget)}: raise it to at least {_rounded_up(enough)}, and more for what "
        "the call works on"
    )


def _least(halves: Mapping[str, Iterable[Sequence[nn.Module]]], budget: int) -> tuple[int, str]:
    """The most that any component needs at once within a budget, and its name."""
    most, which = 0, ""
    for name, groups in halves.items():
        for modules in groups:
            whole = sum(map(nbytes_of, modules))
            runs = runs_of(modules[0], budget) if len(modules) == 1 else []
            sizes = [sum(map(nbytes_of, run.modules)) for run in runs]
            needs = whole - sum(sizes) + max(sizes, default=0)
            needs += -(-needs // (SPARE_PARTS - 1))
            if needs > most:
                most, which = needs, name
    return most, which


def largest_step(steps: Iterable[Step], sizes: Mapping[str, int]) -> tuple[int, Step | None]:
    """The most bytes that a step takes, weights and what it works on; and the step."""
    most: tuple[int, Step | None] = (0, None)
    for step in steps:
        takes = sum(sizes.get(name, 0) for name in step.needs) + (step.beside_nbytes or 0)
        if takes > most[0]:
            most = takes, step
    return most


def refuse_if_exceeded(steps: Iterable[Step], sizes: Mapping[str, int], budget: int) -> None:
    """Refuse a call of which a step is known to exceed the budget.

    Raises:
        BudgetTooSmall: with the smallest that would do.
    """
    most, step = largest_step(steps, sizes)
    if step is not None and most > budget:
        raise BudgetTooSmall(
            f"{step.part!r} needs {format_bytes(most)} in a call like this one, of which "
            f"{format_bytes(step.beside_nbytes or 0)} are not weights but what it works on. "
            f"The budget is {format_bytes(budget)}: raise it to at least {smallest_for(most)}, or "
            "make the call smaller (fewer or smaller pictures, a tiled decoder)"
        )


#: Bytes that telling whether a small part has changed takes for a moment. When that is depends on
#: what else is on its way, so a step may take it in one call and not in another.
DIGESTS_NBYTES = 8 * 2**10


def smallest_for(nbytes: int) -> str:
    """The smallest budget whose steps may take so many bytes, as people write it."""
    nbytes += DIGESTS_NBYTES
    return _rounded_up(nbytes + -(-nbytes // (SPARE_PARTS - 1)))


def _rounded_up(nbytes: int) -> str:
    unit = next((u for u in (2**30, 2**20, 2**10) if nbytes >= u), 1)
    name = {2**30: "GiB", 2**20: "MiB", 2**10: "KiB", 1: "B"}[unit]
    return f"{-(-nbytes * 10 // unit) / 10:.1f} {name}" if unit > 1 else f"{nbytes} B"
