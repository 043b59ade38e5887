"""Model offloading for any pipeline: the function, the mixin, and what they leave on the object."""

from __future__ import annotations

import contextlib
import functools
import logging
import warnings
import weakref
from collections.abc import Hashable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .adapters import diffusers as _diffusers
from .adapters import quantised
from .adapters.transformers import is_encoder
from .components import Order, components_of, order_of, unique
from .core.trace import Step
from .device.backend import find_device
from .device.walk import walk, why_valueless
from .engine import Engine
from .errors import NoAcceleratorError, UsageError, WeightsError
from .grant import AUTO, Budget, read_budget, refuse_too_small
from .interrupts import Uninterrupted
from .known_code import runs_known_code
from .second_try import original_of
from .traces import KeptTrace

if TYPE_CHECKING:
    from .hooks import OffloadHook  # needs accelerate, which may be missing or too old
    from .within_budget import WithinBudget

logger = logging.getLogger("greenroom")

_STATE = "_greenroom"


def enable_model_cpu_offload(
    pipe: Any,
    gpu_id: int | None = None,
    device: torch.device | str | None = None,
    *,
    sequence: str | Iterable[str] | None = None,
    budget: int | str | None = None,
) -> None:
    """Keep the pipeline's components in host memory, each on the device only while it is at work.

    >>> greenroom.enable_model_cpu_offload(pipe)
    >>> image = pipe("a red circle").images[0]

    Outputs are those of the same pipeline wholly on the device, bit for bit. Enabling again is
    harmless, and takes in components that were added or replaced since.

    Args:
        pipe: a diffusers pipeline, a mapping of names to modules, or any object whose attributes
            (or whose ``components``) are modules.
        gpu_id: index of the device. An index that the machine does not have is warned of here and
            refused when the pipeline is called.
        device: the device or its type; else the one from before, or the accelerator that torch
            finds. Without an index here or in `gpu_id`, its first.
        sequence: the order in which components run, ``"text_encoder->unet->vae"``; else the
            pipeline's ``model_cpu_offload_seq``.
        budget: device memory for weights and what they work on together: bytes, ``"8GiB"``, or
            ``"80%"`` of what the device has, or ``"auto"`` for what is free when a call begins.
            What fits stays on the device, also between calls, what is needed next is on its way,
            and what is larger streams through block by block. None: one component at a time.

    Raises:
        UsageError (a ValueError): the request cannot be; nothing has been touched.
        BudgetTooSmall (a UsageError): the largest block of some component exceeds the budget.
        NoAcceleratorError (a RuntimeError): there is no such device.
        ImportError: accelerate is older than 0.17.0.
    """
    _require_accelerate()
    before = state_of(pipe)
    target = _target(gpu_id, device, before)
    modules = components_of(pipe)
    if before is not None and sequence is None:
        order = before.order
    else:
        order = order_of(pipe, sequence, modules)
    _diffusers.refuse_conflicts(pipe, modules)
    _refuse_meta(modules)
    if not _is_present(target):
        warnings.warn(f"{_absence(target)}. Calls of this pipeline will fail.", stacklevel=2)
    granted = before.budget if before is not None and budget is None else _granted(budget, target)
    if granted is not None:
        stays = set(getattr(pipe, "_exclude_from_cpu_offload", ())) - set(order.names)
        _refuse_too_small(modules, stays, granted, target)
    if before is not None and (before.engine.device, before.budget) == (target, granted):
        with before.engine.lock, Uninterrupted():  # another thread's call ends first
            before.order = order
            before.refresh(pipe)
        return
    if before is not None:
        with before.engine.lock, Uninterrupted():
            before.disable(pipe)
    engine = Engine.of(target)
    with engine.lock:
        offloading = Offloading(engine, order, granted)
        with Uninterrupted():
            offloading.enable(pipe)
        if offloading.within is not None:
            offloading.within.lock_memory()


def disable_model_cpu_offload(pipe: Any) -> None:
    """Give the pipeline back as it was before offloading was enabled, in host memory.

    A pipeline that is not offloaded is left alone.
    """
    state = state_of(pipe)
    if state is not None:
        with state.engine.lock, Uninterrupted():
            state.disable(pipe)


def offload_now(pipe: Any) -> None:
    """Send every component of the pipeline home at once."""
    state = state_of(pipe)
    if state is not None:
        with state.engine.lock, Uninterrupted():
            state.send_home(pipe)


class OffloadMixin:
    """Gives a pipeline class of your own the methods.

    The class needs modules as attributes (or in ``components``) and ``model_cpu_offload_seq``;
    names in ``_exclude_from_cpu_offload`` go to the device and stay there.
    """

    # Declared, not set: beside a base class that has them they must not hide its own.
    model_cpu_offload_seq: str | None
    _exclude_from_cpu_offload: tuple[str, ...] | list[str]

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None, **options: Any
    ) -> None:
        """See `greenroom.enable_model_cpu_offload`."""
        enable_model_cpu_offload(self, gpu_id, device, **options)

    def disable_model_cpu_offload(self) -> None:
        """See `greenroom.disable_model_cpu_offload`."""
        disable_model_cpu_offload(self)


# ---- one pipeline that is offloaded
# -----------------------------------------------------------------


class Offloading:
    """What was done to one pipeline, and how to undo it.

    It keeps neither the pipeline nor its components alive.
    """

    def __init__(self, engine: Engine, order: Order, budget: Budget | None = None) -> None:
        self.engine = engine
        self.order = order
        self.budget = budget
        self.within = engine.within(budget) if budget is not None else None
        self._token = object()  # tells its calls from other pipelines', also when it is no more
        if self.within is not None:
            weakref.finalize(self, self.within.known.forget_calls_of, self._token).atexit = False
        # On the device for good, by the pipeline's wish.
        self.kept: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self.immovable: set[str] = set()  # names, each of which has been said once

    def enable(self, pipe: Any) -> None:
        """Send everything home, then hook it."""
        for module in components_of(pipe).values():
            _bring_home(module)
        self.engine.backend.empty_cache()
        _watch_calls(type(pipe))
        _diffusers.bind(pipe)
        self.refresh(pipe)

    def refresh(self, pipe: Any) -> None:
        """Components that came, went or were replaced since are taken in.

        Without a budget, everything goes home first.
        """
        _remember(pipe, self)
        if self.within is None:
            self.send_home(pipe)
        self.take_in(pipe)
        replaced = self.kept - set(components_of(pipe).values())
        for module in replaced:
            module.to("cpu")  # what took its place is kept instead
        self.kept -= replaced

    def take_in(self, pipe: Any) -> None:
        """Hook the components that are not, or put them on the device if they are to stay there."""
        excluded = set(getattr(pipe, "_exclude_from_cpu_offload", ()))
        for name, module in unique(components_of(pipe), self.order.names).items():
            in_sequence = name in self.order.names or name in self.order.misspelt
            reason = quantised.why_immovable(module)
            if reason is not None:
                if name not in self.immovable:
                    self.immovable.add(name)
                    logger.info("%s stays where it is: %s", name, reason)
            elif name in excluded and name not in self.order.names:
                if _is_present(self.engine.device):
                    module.to(self.engine.device)
                    self.kept.add(module)
            else:
                if hook_of(module) is None:
                    _bring_home(module)
                attach(self.engine, module, name, in_sequence=in_sequence, within=self.within)
        _diffusers.publish(pipe, self)

    def send_home(self, pipe: Any) -> None:
        """Every component of this pipeline goes home, also from where others put it."""
        for module in components_of(pipe).values():
            hook = hook_of(module)
            if hook is None:
                continue
            is_home = hook.send_home()
            if is_home and any(
                held.tensor.device.type not in ("cpu", "meta") for held in walk(module)
            ):
                module.to("cpu")  # after a `pipe.to("cuda")` of somebody's, which no hook sees

    def call(
        self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> contextlib.AbstractContextManager[None]:
        """A call of the pipeline with these arguments."""
        if self.within is None:
            return self.engine.call(type(pipe).__name__, self)
        kind = _kind_of(args, kwargs)
        modules = components_of(pipe)
        hooks = {name: hook for name, m in modules.items() if (hook := self._hook_of(m))}
        return self.engine.call_within(
            self.within,
            (self._token, kind),
            self._steps(pipe, kwargs),
            kept=KeptTrace(
                self.engine.backend,
                type(pipe),
                {name: modules[name] for name in hooks},
                {name: hook.parts for name, hook in hooks.items()},
                kind,
            ),
            pipeline=type(pipe).__name__,
            owner=self,
            casts=[
                part.key
                for name, hook in hooks.items()
                if _diffusers.is_cast_for_work(modules[name])
                for part in hook.parts
            ],
            is_watched=not runs_known_code(pipe) or _has_callable([*args, *kwargs.values()]),
        )

    def _hook_of(self, module: nn.Module | None) -> OffloadHook | None:
        """The component's hook, unless another budget has it as yet."""
        hook = hook_of(module)
        return hook if hook is not None and hook.within is self.within else None

    def _steps(self, pipe: Any, kwargs: Mapping[str, Any]) -> list[Step]:
        """What the sequence lets expect: its components one after the other, denoisers in a loop.

        The parts of each as they lie.
        """
        rounds = _diffusers.rounds_of(pipe, kwargs)
        steps: list[Step] = []
        modules = components_of(pipe)
        for name in self.order.names:
            hook = self._hook_of(modules.get(name))
            if hook is None:
                continue
            if hook.is_halved:
                steps.append(Step(hook.parts[-1].key, (hook.parts[-1].key,), opens=True))
                continue
            whole, *runs = (part.key for part in hook.parts)
            stay = [Step(whole, (whole,), opens=True), *(Step(run, (whole,)) for run in runs)]
            steps += stay * (1 if is_encoder(modules[name]) else rounds)
        return steps

    def disable(self, pipe: Any) -> None:
        """Undo it all."""
        self.send_home(pipe)
        for module in components_of(pipe).values():
            detach(module)
        for module in self.kept:
            module.to("cpu")
        _diffusers.unbind(pipe)
        _forget(pipe)


def _bring_home(module: nn.Module) -> None:
    """Take a component that is not ours to host memory, unless it cannot be moved."""
    if hook_of(module) is None:
        _diffusers.strip_foreign_hooks(module)
        if quantised.why_immovable(module) is None:
            module.to("cpu")


def attach(
    engine: Engine,
    module: nn.Module,
    name: str,
    *,
    in_sequence: bool,
    within: WithinBudget | None = None,
) -> None:
    """Hook a component, unless it is hooked for this engine and budget already."""
    from accelerate.hooks import add_hook_to_module

    from .hooks import OffloadHook

    hook = hook_of(module)
    if hook is not None and hook.engine is engine and hook.within is within:
        return
    with engine.lock, Uninterrupted():
        if hook is not None:
            detach(module)
        hook = OffloadHook(engine, module, name, in_sequence=in_sequence, within=within)
        add_hook_to_module(module, hook)


def detach(module: nn.Module) -> None:
    """Unhook a component. What others wrapped around its forward after us stays."""
    from accelerate.hooks import ModelHook, remove_hook_from_module

    hook = hook_of(module)
    if hook is None:
        return
    ours = getattr(module.__dict__.get("forward"), "func", None)
    if ours is not None and ours.__module__ == "accelerate.hooks":
        original = original_of(module._old_forward)
        had_own = getattr(original, "__func__", None) is not type(module).forward
        remove_hook_from_module(module)
        if not had_own:
            # accelerate leaves the bound method on the instance
            module.__dict__.pop("forward", None)
    else:
        hook.detach_hook(module)
        module._hf_hook = ModelHook()  # their wrapper still comes through here


def hook_of(module: Any) -> OffloadHook | None:
    """Our hook on a component, or None."""
    from .hooks import OffloadHook

    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, OffloadHook) else None


# ---- pipelines of any kind
# ----------------------------------------------------------------------------

#: By component, then by id: what was done to pipelines that take no attribute and no weak reference
#: (dicts). An entry goes when its component goes, which it therefore must not keep alive.
_states: weakref.WeakKeyDictionary[nn.Module, dict[int, Offloading]] = weakref.WeakKeyDictionary()


def state_of(pipe: Any) -> Offloading | None:
    """What was done to the pipeline, or None."""
    if hasattr(pipe, "__dict__"):
        found = getattr(pipe, _STATE, None)
        return found if isinstance(found, Offloading) else None
    try:
        modules = components_of(pipe).values()
    except UsageError:  # there are none to which anything could have been done
        return None
    states = (_states.get(module, {}).get(id(pipe)) for module in modules)
    return next((state for state in states if state is not None), None)


def _remember(pipe: Any, state: Offloading) -> None:
    if hasattr(pipe, "__dict__"):
        object.__setattr__(pipe, _STATE, state)
    else:
        for module in components_of(pipe).values():
            _states.setdefault(module, {})[id(pipe)] = state


def _forget(pipe: Any) -> None:
    if hasattr(pipe, "__dict__"):
        pipe.__dict__.pop(_STATE, None)
    else:
        for module in components_of(pipe).values():
            _states.get(module, {}).pop(id(pipe), None)


def _refuse_meta(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        for held in walk(module):
            # Weights that another hook of accelerate's holds (sequential offloading) come back when
            # that hook is removed.
            reason = why_valueless(held.tensor)
            if reason is not None and (hook_of(held.owner) or not hasattr(held.owner, "_hf_hook")):
                raise WeightsError(
                    f"{name}: {held.path} {reason}. "
                    "Load the component's weights, then enable offloading"
                )


def _target(gpu_id: int | None, device: Any, before: Offloading | None) -> torch.device:
    if isinstance(gpu_id, str):
        raise UsageError(
            f"gpu_id={gpu_id!r} is no device's index, which is a number. For device memory pass "
            f"budget={gpu_id!r}, for a device device={gpu_id!r}"
        )
    is_vague = device is None or torch.device(device).type == "cpu"
    if before is not None and gpu_id is None and is_vague:
        # No device, or the cpu that textual inversion passes by mistake: the one from before.
        return before.engine.device
    found = find_device(
        device if device is not None or before is None else before.engine.device.type
    )
    if found.type == "cpu":
        raise UsageError(
            "device='cpu' is no place to offload to: weights already wait in host memory. Name an "
            "accelerator, or leave `device` out to have it found"
        )
    if gpu_id is not None and found.index is not None:
        raise UsageError(
            f"gpu_id={gpu_id} and device={str(device)!r} both give an index; pass one of them, or "
            f"device={found.type!r}"
        )
    if gpu_id is not None and gpu_id < 0:
        raise UsageError(f"gpu_id={gpu_id} is no device's index: they count from 0")
    if _device_count(found) == 0:
        raise NoAcceleratorError(
            f"device={str(device)!r} was asked for, and torch finds no such device here. Leave "
            "`device` out to have the accelerator found that there is"
        )
    index = gpu_id if gpu_id is not None else found.index if found.index is not None else 0
    return torch.device(found.type, index)


def _device_count(device: torch.device) -> int:
    """How many devices of this one's type the machine has."""
    try:
        module = torch.get_device_module(device)
    except RuntimeError:  # no device at all: "meta"
        return 0
    return int(module.device_count()) if hasattr(module, "device_count") else 1


def _is_present(device: torch.device) -> bool:
    return device.index < _device_count(device)


def _absence(device: torch.device) -> str:
    return f"There is no device {device}: torch finds {_device_count(device)} of type {device.type}"


def _granted(budget: int | str | None, device: torch.device) -> Budget | None:
    """The budget in bytes, or `AUTO`."""
    if budget is None:
        return None
    memory = Engine.of(device).backend.memory_bytes() if _is_present(device) else 0
    return read_budget(budget, memory)


def _refuse_too_small(
    modules: Mapping[str, nn.Module], stays: set[str], budget: Budget, device: torch.device
) -> None:
    """Refuse a budget that cannot hold what has to be there together, before anything moves."""
    from .hooks import halves_of

    refuse_too_small(
        {
            name: list((halves_of(module) or {"": [module]}).values())
            for name, module in modules.items()
            if name not in stays and quantised.why_immovable(module) is None
        },
        Engine.of(device).backend.memory_bytes() if budget == AUTO else budget,
    )


def _require_accelerate() -> None:
    try:
        import accelerate
        from packaging.version import Version
    except ImportError as error:
        raise ImportError(
            "offloading needs accelerate 0.17.0 or newer: pip install accelerate"
        ) from error
    if Version(accelerate.__version__) < Version("0.17.0"):
        raise ImportError(
            f"offloading needs accelerate 0.17.0 or newer, and {accelerate.__version__} is "
            "installed: pip install -U accelerate"
        )


# ---- the boundary of a call
# ---------------------------------------------------------------------------


#: Arguments of diffusers' pipelines that say how many of the steps are done.
_SHARES_OF_STEPS = ("strength", "denoising_start", "denoising_end")


def _has_callable(values: Iterable[Any]) -> bool:
    """Whether any of the values, or of those in lists and mappings among them, can be called."""
    return any(
        callable(value)
        or (isinstance(value, (list, tuple)) and _has_callable(value))
        or (isinstance(value, Mapping) and _has_callable(value.values()))
        for value in values
    )


def _kind_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Hashable:
    """What calls have in common that take the same steps: numbers, shapes, and which are given.

    Its repr is the same in another process.
    """
    found: list[Hashable] = []
    for name, value in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(name, str) and "seed" in name:
            continue  # it changes values, not steps
        if isinstance(value, (bool, int)) or name in _SHARES_OF_STEPS:
            found.append((name, value))
        elif isinstance(value, float):
            found.append((name, value > 1))  # guidance: beyond 1 there are two passes
        elif isinstance(value, (list, tuple)):
            found.append((name, len(value)))
        else:
            shape = getattr(value, "shape", getattr(value, "size", None))
            found.append((name, tuple(shape) if isinstance(shape, (tuple, list)) else None))
    return tuple(found)


def _watch_calls(cls: type) -> None:
    """Let calls of this class's pipelines end at home, however they end."""
    original = cls.__dict__.get("__call__", getattr(cls, "__call__", None))  # noqa: B004
    if original is None or getattr(original, "_greenroom_watches", False):
        return
    if not cls.__flags__ & 1 << 9:  # Py_TPFLAGS_HEAPTYPE: a dict's class cannot be given a method
        return

    def called(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = state_of(self)
        if state is None:
            return original(self, *args, **kwargs)
        if not _is_present(state.engine.device):
            raise NoAcceleratorError(
                f"{_absence(state.engine.device)}. Enable offloading with another gpu_id"
            )
        with state.call(self, args, kwargs):
            if state_of(self) is state:  # else it was disabled while this thread waited
                state.refresh(self)
            return original(self, *args, **kwargs)

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return called(self, args, kwargs)
        except BaseException as error:
            state = state_of(self)
            if not isinstance(error, Exception) and state is not None and state.within is not None:
                state.engine.give_up(state.within)
            raise

    __call__._greenroom_watches = True  # type: ignore[attr-defined]
    setattr(cls, "__call__", __call__)  # noqa: B010
