"""What diffusers' pipelines need: whatever touches offloading there finds what it expects."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UsageError

if TYPE_CHECKING:
    from ..pipeline import Offloading


_USUAL_ROUNDS = 30  # of a denoising loop


def is_pipeline(pipe: Any) -> bool:
    """Whether this is one of diffusers' pipelines."""
    return hasattr(pipe, "maybe_free_model_hooks") and hasattr(pipe, "components")


def is_cast_for_work(module: Any) -> bool:
    """Whether pipelines cast the component to another dtype before they use it, and back.

    They do so with autoencoders that overflow in float16, as SDXL's does.
    """
    config = getattr(module, "config", None)
    is_delicate = bool(getattr(config, "force_upcast", False))
    return is_delicate and getattr(module, "dtype", None) == torch.float16


def component_names(pipe: Any) -> set[str]:
    """Names of components, also of those that are not there (None)."""
    components = getattr(pipe, "components", None)
    return set(components) if isinstance(components, Mapping) else set()


def places_itself(pipe: Any) -> bool:
    """Whether the class has an offloading method of its own, and so may do without a sequence.

    Combined pipelines (Stable Cascade, Wuerstchen) and AudioLDM2 have.
    """
    return is_pipeline(pipe) and any(
        "enable_model_cpu_offload" in vars(cls)
        for cls in type(pipe).__mro__
        if cls.__name__ not in ("DiffusionPipeline", "OffloadMixin")
    )


def rounds_of(pipe: Any, kwargs: Mapping[str, Any]) -> int:
    """How often a denoiser is expected to run in a call with these arguments."""
    rounds = kwargs.get("num_inference_steps")
    if rounds is None:
        parameters = inspect.signature(type(pipe).__call__).parameters if callable(pipe) else {}
        found = parameters.get("num_inference_steps")
        rounds = found.default if found is not None else None
    return rounds if isinstance(rounds, int) and 0 < rounds <= 1000 else _USUAL_ROUNDS


def refuse_conflicts(pipe: Any, modules: Mapping[str, nn.Module]) -> None:
    """Refuse pipelines that something else already places.

    Raises:
        UsageError: a device map, group offloading or tensor parallelism is active.
    """
    device_map = getattr(pipe, "hf_device_map", None)
    if isinstance(device_map, Mapping) and len(device_map) > 1:
        raise UsageError(
            f"a device map places this pipeline's components ({', '.join(device_map)}): call "
            "pipe.reset_device_map() first, then enable offloading"
        )
    for name, module in modules.items():
        registry = getattr(module, "_diffusers_hook", None)
        inner = (
            [getattr(m, "_diffusers_hook", None) for m in module.modules()]
            if registry is None
            else [registry]
        )
        hooks = [hook for r in inner if r is not None for hook in getattr(r, "hooks", {})]
        parallel = getattr(module, "_parallel_config", None)
        if getattr(parallel, "tensor_parallel_config", None) is not None:
            raise UsageError(
                f"{name} is sharded with tensor parallelism, which keeps a shard of each weight on "
                "each device: its weights cannot wait in host memory. Load it without, or leave "
                "model offloading off"
            )
        if "group_offloading" in hooks:
            raise UsageError(
                f"{name} is group-offloaded, which places its weights by itself: build the "
                "pipeline anew without enable_group_offload(), or leave model offloading off"
            )


def strip_foreign_hooks(module: nn.Module) -> None:
    """Remove what accelerate has hooked before us (its own offloading), as diffusers does."""
    from accelerate.hooks import remove_hook_from_module

    if hasattr(module, "_hf_hook"):
        remove_hook_from_module(module, recurse=True)


_BOUND = (
    "enable_model_cpu_offload",
    "disable_model_cpu_offload",
    "maybe_free_model_hooks",
    "remove_all_hooks",
)


def bind(pipe: Any) -> None:
    """Let the pipeline's own methods come to us: loaders call them to turn offloading on again."""
    if not is_pipeline(pipe):
        return
    from ..pipeline import disable_model_cpu_offload, enable_model_cpu_offload

    ours = (
        enable_model_cpu_offload,
        disable_model_cpu_offload,
        free_model_hooks,
        remove_all_hooks,
    )
    for name, function in zip(_BOUND, ours, strict=True):
        setattr(pipe, name, functools.partial(function, pipe))
    _watch_shared_components()
    _watch_device(type(pipe))


def unbind(pipe: Any) -> None:
    """Undo `bind` and `publish`."""
    if is_pipeline(pipe):
        for name in (*_BOUND, "_all_hooks", "_offload_gpu_id", "_offload_device"):
            pipe.__dict__.pop(name, None)


def publish(pipe: Any, state: Offloading) -> None:
    """Leave on the pipeline what diffusers' own method leaves there."""
    if not is_pipeline(pipe):
        return
    from accelerate.hooks import UserCpuOffloadHook

    from ..pipeline import hook_of

    pipe._offload_device = state.engine.device
    pipe._offload_gpu_id = state.engine.device.index
    names = dict.fromkeys([*state.order.names, *pipe.components])
    pipe._all_hooks = [
        UserCpuOffloadHook(module, module._hf_hook)
        for name in names
        if hook_of(module := pipe.components.get(name)) is not None
    ]


def remove_all_hooks(pipe: Any) -> None:
    """What diffusers' method does: from here on the pipeline is not offloaded any more.

    Sequential offloading calls it, and diffusers' own model offloading, before they hook anew.
    """
    from ..pipeline import disable_model_cpu_offload

    disable_model_cpu_offload(pipe)
    type(pipe).remove_all_hooks(pipe)


def free_model_hooks(pipe: Any) -> None:
    """What `maybe_free_model_hooks` does after a call: stateful caches reset, everybody home."""
    for component in pipe.components.values():
        if hasattr(component, "_reset_stateful_cache"):
            component._reset_stateful_cache()
    _end_calls(pipe)


# ---- what has to be seen though nobody calls us: both do nothing where we are not at work


def _watch_shared_components() -> None:
    """Let pipelines that were never enabled, but share offloaded components, end at home too."""
    from diffusers import DiffusionPipeline

    original = DiffusionPipeline.maybe_free_model_hooks
    if getattr(original, "_greenroom_watches", False):
        return

    @functools.wraps(original)
    def maybe_free_model_hooks(self: Any) -> None:
        original(self)
        _end_calls(self)

    maybe_free_model_hooks._greenroom_watches = True  # type: ignore[attr-defined]
    DiffusionPipeline.maybe_free_model_hooks = maybe_free_model_hooks


def _end_calls(pipe: Any) -> None:
    from ..pipeline import hook_of

    hooks = [hook for c in pipe.components.values() if (hook := hook_of(c)) is not None]
    for engine in {hook.engine for hook in hooks}:
        engine.end_call()


def _watch_device(cls: type) -> None:
    """Let `_execution_device` be the device, whatever was swapped in or registered since.

    diffusers reads it off the hooks, and a component without one makes it the cpu. Every method of
    a pipeline asks for it before it uses a component: that is where such a component is taken in.
    """
    from ..pipeline import state_of

    found = getattr(cls, "_execution_device", None)
    if not isinstance(found, property) or getattr(found.fget, "_greenroom_watches", False):
        return
    original: Any = found.fget

    @functools.wraps(original)
    def _execution_device(self: Any) -> Any:
        state = state_of(self)
        if state is None:
            return original(self)
        state.take_in(self)
        return state.engine.device

    _execution_device._greenroom_watches = True  # type: ignore[attr-defined]
    setattr(cls, "_execution_device", property(_execution_device))  # noqa: B010
