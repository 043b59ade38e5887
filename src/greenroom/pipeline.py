"""Model offloading for any pipeline: the function, the mixin, and what they leave on the object."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import logging
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .adapters import diffusers as _diffusers
from .adapters import quantised
from .device.backend import find_device
from .device.walk import walk
from .engine import Engine
from .errors import UsageError, WeightsError
from .hooks import OffloadHook

logger = logging.getLogger("greenroom")

_STATE = "_greenroom"


def enable_model_cpu_offload(
    pipe: Any,
    gpu_id: int | None = None,
    device: torch.device | str | None = None,
    *,
    sequence: str | Iterable[str] | None = None,
    budget: None = None,
) -> None:
    """Keep the pipeline's components in host memory, each on the device only while it is at work.

    >>> greenroom.enable_model_cpu_offload(pipe)
    >>> image = pipe("a red circle").images[0]

    Outputs are those of the same pipeline wholly on the device, bit for bit. Enabling again is
    harmless, and takes in components that were added or replaced since.

    Args:
        pipe: a diffusers pipeline, a mapping of names to modules, or any object whose attributes
            (or whose
            ``components``) are modules.
        gpu_id: index of the device; with none given here or in `device`, the one from before, else
            0.
        device: the device or its type; else the accelerator that torch finds, or the one from
            before.
        sequence: the order in which components run, ``"text_encoder->unet->vae"``; else the
            pipeline's
            ``model_cpu_offload_seq``.
        budget: None, the only choice so far: one component at a time.

    Raises:
        UsageError (a ValueError): the request cannot be; nothing has been touched.
        NoAcceleratorError (a RuntimeError): there is no device.
        ImportError: accelerate is older than 0.17.0.
    """
    _require_accelerate()
    if budget is not None:
        raise UsageError(
            f"budget={budget!r}: this version offloads without a budget only; leave it None"
        )
    before = state_of(pipe)
    target = _target(gpu_id, device, before)
    modules = components_of(pipe)
    names = _sequence(pipe, sequence, modules, before)
    _diffusers.refuse_conflicts(pipe, modules)
    _refuse_meta(modules)
    if before is not None and before.engine.device == target:
        before.sequence = names
        before.refresh()
        return
    if before is not None:
        before.disable()
    Offloading(pipe, Engine.of(target), names).enable()


def disable_model_cpu_offload(pipe: Any) -> None:
    """Give the pipeline back as it was before offloading was enabled, in host memory.

    A pipeline that is not offloaded is left alone.
    """
    state = state_of(pipe)
    if state is not None:
        state.disable()


def offload_now(pipe: Any) -> None:
    """Send every component of the pipeline home at once."""
    state = state_of(pipe)
    if state is not None:
        state.send_home()


class OffloadMixin:
    """Gives a pipeline class of your own the methods.

    The class needs modules as attributes (or in ``components``) and ``model_cpu_offload_seq``;
    names in ``_exclude_from_cpu_offload`` go to the device and stay there.
    """

    model_cpu_offload_seq: str | None = None
    _exclude_from_cpu_offload: tuple[str, ...] | list[str] = ()

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
    """What was done to one pipeline, and how to undo it."""

    def __init__(self, pipe: Any, engine: Engine, sequence: tuple[str, ...]) -> None:
        self.pipe = pipe
        self.engine = engine
        self.sequence = sequence
        self.kept: list[nn.Module] = []

    def enable(self) -> None:
        """Send everything home, then hook it."""
        modules = components_of(self.pipe)
        _diffusers.strip_foreign_hooks(modules.values())
        for module in modules.values():
            if quantised.why_immovable(module) is None and not isinstance(
                _hook(module), OffloadHook
            ):
                module.to("cpu")
        self.engine.backend.empty_cache()
        _remember(self.pipe, self)
        _watch_calls(type(self.pipe))
        _diffusers.bind(self.pipe, self)
        self.refresh()

    def refresh(self) -> None:
        """Everything home; components that came, went or were replaced since are taken in."""
        self.send_home()
        excluded = set(getattr(self.pipe, "_exclude_from_cpu_offload", ()))
        for name, module in _unique(components_of(self.pipe)).items():
            reason = quantised.why_immovable(module)
            if reason is not None:
                logger.info("%s stays where it is: %s", name, reason)
            elif name in excluded and name not in self.sequence:
                if not any(module is kept for kept in self.kept):
                    self.kept.append(module.to(self.engine.device))
            else:
                attach(self.engine, module, name, in_sequence=name in self.sequence)
        _diffusers.publish(self.pipe, self)

    def send_home(self) -> None:
        """Every component of this pipeline goes home."""
        for module in components_of(self.pipe).values():
            hook = _hook(module)
            if isinstance(hook, OffloadHook):
                hook.send_home()

    def disable(self) -> None:
        """Undo it all."""
        for module in components_of(self.pipe).values():
            detach(module)
        for module in self.kept:
            module.to("cpu")
        _diffusers.unbind(self.pipe)
        _forget(self.pipe)


def attach(engine: Engine, module: nn.Module, name: str, *, in_sequence: bool) -> None:
    """Hook a component, unless it is hooked for this engine already."""
    from accelerate.hooks import add_hook_to_module

    hook = _hook(module)
    if isinstance(hook, OffloadHook):
        if hook.engine is engine:
            return
        detach(module)
    add_hook_to_module(module, OffloadHook(engine, module, name, in_sequence=in_sequence))


def detach(module: nn.Module) -> None:
    """Unhook a component. What others wrapped around its forward after us stays."""
    from accelerate.hooks import ModelHook, remove_hook_from_module

    hook = _hook(module)
    if not isinstance(hook, OffloadHook):
        return
    ours = getattr(module.__dict__.get("forward"), "func", None)
    if ours is not None and ours.__module__ == "accelerate.hooks":
        had_own = getattr(module._old_forward, "__func__", None) is not type(module).forward
        remove_hook_from_module(module)
        if not had_own:
            module.__dict__.pop(
                "forward", None
            )  # accelerate leaves the bound method on the instance
    else:
        hook.detach_hook(module)
        module._hf_hook = ModelHook()  # their wrapper still comes through here


def _hook(module: nn.Module) -> Any:
    return getattr(module, "_hf_hook", None)


# ---- pipelines of any kind
# ----------------------------------------------------------------------------

_states: dict[int, Offloading] = {}  # of pipelines that take no attribute: dicts


def state_of(pipe: Any) -> Offloading | None:
    """What was done to the pipeline, or None."""
    found = getattr(pipe, _STATE, None) if hasattr(pipe, "__dict__") else _states.get(id(pipe))
    return found if isinstance(found, Offloading) else None


def _remember(pipe: Any, state: Offloading) -> None:
    if hasattr(pipe, "__dict__"):
        object.__setattr__(pipe, _STATE, state)
    else:
        _states[id(pipe)] = state


def _forget(pipe: Any) -> None:
    if hasattr(pipe, "__dict__"):
        pipe.__dict__.pop(_STATE, None)
    else:
        _states.pop(id(pipe), None)


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's modules by name.

    Raises:
        UsageError: there are none.
    """
    if isinstance(pipe, Mapping):
        named: Mapping[str, Any] = pipe
    elif isinstance(getattr(pipe, "components", None), Mapping):
        named = pipe.components
    elif dataclasses.is_dataclass(pipe):
        named = {f.name: getattr(pipe, f.name) for f in dataclasses.fields(pipe)}
    elif isinstance(pipe, nn.Module):
        named = dict(pipe.named_children())
    else:
        named = vars(pipe)
    modules = {name: part for name, part in named.items() if isinstance(part, nn.Module)}
    if not modules:
        raise UsageError(
            f"{type(pipe).__name__} has no torch modules to offload: a pipeline is a mapping of "
            "names to modules, or an object with modules as attributes or in `components`"
        )
    return modules


def _unique(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Each module once, under its first name."""
    seen: set[int] = set()
    return {n: m for n, m in modules.items() if not (id(m) in seen or seen.add(id(m)))}  # type: ignore[func-returns-value]


def _sequence(
    pipe: Any,
    given: str | Iterable[str] | None,
    modules: Mapping[str, nn.Module],
    before: Offloading | None,
) -> tuple[str, ...]:
    if given is None and before is not None:
        return before.sequence
    wanted = given if given is not None else getattr(pipe, "model_cpu_offload_seq", None)
    if wanted is None and _diffusers.places_itself(pipe):
        wanted = tuple(modules)
    if wanted is None:
        raise UsageError(
            f"{type(pipe).__name__} does not say in which order its components run: set its "
            "class attribute model_cpu_offload_seq, or pass sequence='"
            + "->".join(modules)
            + "' (in the right order)"
        )
    names = [n.strip() for n in wanted.split("->")] if isinstance(wanted, str) else list(wanted)
    known = {*modules, *_diffusers.component_names(pipe)}
    for name in names:
        if name and name not in known:
            close = difflib.get_close_matches(name, known, n=1) or [n for n in known if n in name]
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            warnings.warn(
                f"model_cpu_offload_seq of {type(pipe).__name__} names {name!r}, which is no "
                f"component of it{hint}. The name is skipped.",
                stacklevel=4,
            )
    return tuple(dict.fromkeys(name for name in names if name in modules))


def _refuse_meta(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        for held in walk(module):
            if held.tensor.is_meta:
                raise WeightsError(
                    f"{name}: {held.path} is on the meta device: it has a shape, but no values. "
                    "Load the component's weights, then enable offloading"
                )


def _target(gpu_id: int | None, device: Any, before: Offloading | None) -> torch.device:
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
    index = gpu_id if gpu_id is not None else found.index if found.index is not None else 0
    return torch.device(found.type, index)


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


def _watch_calls(cls: type) -> None:
    """Let calls of this class's pipelines end at home, however they end."""
    original = cls.__dict__.get("__call__", getattr(cls, "__call__", None))  # noqa: B004
    if original is None or getattr(original, "_greenroom_watches", False):
        return
    if not cls.__flags__ & 1 << 9:  # Py_TPFLAGS_HEAPTYPE: a dict's class cannot be given a method
        return

    @functools.wraps(original)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if state is None:
            return original(self, *args, **kwargs)
        with state.engine.call():
            state.refresh()
            return original(self, *args, **kwargs)

    __call__._greenroom_watches = True  # type: ignore[attr-defined]
    setattr(cls, "__call__", __call__)  # noqa: B010
