"""What an offloaded pipeline has measured of its calls."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..core.trace import Step
from ..errors import UsageError
from ..known_code import runs_known_code
from ..pipeline import state_of
from .recording import COARSEST, Card, Cut, Recording

if TYPE_CHECKING:
    from ..within_budget import WithinBudget


def trace_of(pipe: Any) -> Recording:
    """What was measured in a call of a pipeline that is offloaded within a budget.

    >>> greenroom.trace_of(pipe).save("flux-on-4090.json")  # greenroom plan --from-trace ...

    Its parts are cut as its budget has them cut.

    Raises:
        UsageError: it is not offloaded within a budget, or was not called since.
    """
    state = state_of(pipe)
    if state is None or state.within is None:
        raise UsageError(
            f"this {type(pipe).__name__} is not offloaded within a budget, so nothing was "
            "measured: greenroom.enable_model_cpu_offload(pipe, budget=...), and call it"
        )
    within, engine = state.within, state.engine
    with engine.lock:
        plan = within.director.plan if within.director is not None else None
        if plan is None or any(step.seconds is None for step in plan.steps):
            raise UsageError(
                f"no call of this {type(pipe).__name__} was measured yet: call it once, then save "
                "its trace"
            )
        if engine.device.type == "sim":
            from .. import sim
            from .recorder import card_of

            card = card_of(sim.current_profile(), is_watched=not runs_known_code(pipe))
        else:
            module: Any = torch.get_device_module(engine.device)
            name = getattr(module, "get_device_name", str)(engine.device)
            memory = engine.backend.memory_bytes()
            card = Card(str(name), False, memory, plan.costs.h2d_bytes_per_s)
    return Recording(type(pipe).__name__, _dtype_of(pipe), {}, card, None, (cut_of(within),))


def cut_of(within: WithinBudget) -> Cut:
    """The call that was measured last, with names as in a process that has no other pipeline."""
    assert within.director is not None
    plan = within.director.plan
    return _renamed(
        Cut(
            min(within.divided_for, COARSEST),
            plan.sizes,
            plan.steps,
            within.expected,
            cast=within.cast_nbytes,
        )
    )


def _dtype_of(pipe: Any) -> str:
    components = getattr(pipe, "components", {})
    dtypes = [
        str(parameter.dtype).removeprefix("torch.")
        for module in components.values()
        if isinstance(module, nn.Module)
        for parameter in module.parameters()
    ]
    return max(set(dtypes), key=dtypes.count) if dtypes else "unknown"


def _renamed(cut: Cut) -> Cut:
    """With names as in a process that has no other pipeline."""
    short = {name: re.sub(r"#\d+", "", name) for name in cut.sizes}
    if len(set(short.values())) < len(short):
        return cut

    def renamed(steps: tuple[Step, ...]) -> tuple[Step, ...]:
        return tuple(
            dataclasses.replace(
                step, part=short[step.part], held=tuple(short[name] for name in step.held)
            )
            for step in steps
            if step.part in short
        )

    used = {name for step in cut.steps for name in step.needs}
    sizes = {short[name]: size for name, size in cut.sizes.items() if name in used}
    mine = [s for s in cut.expected if set(s.needs) <= used]
    cast = {short[name]: nbytes for name, nbytes in cut.cast.items() if name in used}
    return Cut(cut.cut_to, sizes, renamed(cut.steps), renamed(tuple(mine)), cast=cast)
