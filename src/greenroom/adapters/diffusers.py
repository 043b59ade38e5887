"""What diffusers' pipelines need: whatever touches offloading there finds what it expects."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import UsageError

if TYPE_CHECKING:
    from ..pipeline import Offloading


def is_pipeline(pipe: Any) -> bool:
    """Whether this is one of diffusers' pipelines."""
    return hasattr(pipe, "maybe_free_model_hooks") and hasattr(pipe, "components")


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
        if "group_offloading" in hooks:
            raise UsageError(
                f"{name} is group-offloaded, which places its weights by itself: build the "
                "pipeline anew without enable_group_offload(), or leave model offloading off"
            )


def strip_foreign_hooks(modules: Iterable[nn.Module]) -> None:
    """Remove what accelerate has hooked before us (its own offloading), as diffusers does."""
    from accelerate.hooks import remove_hook_from_module

    from ..hooks import OffloadHook

    for module in modules:
        hook = getattr(module, "_hf_hook", None)
        if hook is not None and not isinstance(hook, OffloadHook):
            remove_hook_from_module(module, recurse=True)


def bind(pipe: Any, state: Offloading) -> None:
    """Let the pipeline's own methods come to us: loaders call them to turn offloading on again."""
    if not is_pipeline(pipe):
        return
    from ..pipeline import disable_model_cpu_offload, enable_model_cpu_offload

    pipe.enable_model_cpu_offload = functools.partial(enable_model_cpu_offload, pipe)
    pipe.disable_model_cpu_offload = functools.partial(disable_model_cpu_offload, pipe)
    pipe.maybe_free_model_hooks = functools.partial(free_model_hooks, pipe)


def unbind(pipe: Any) -> None:
    """Undo `bind` and `publish`."""
    for name in (
        "enable_model_cpu_offload",
        "disable_model_cpu_offload",
        "maybe_free_model_hooks",
        "_all_hooks",
        "_offload_gpu_id",
        "_offload_device",
    ):
        if is_pipeline(pipe):
            pipe.__dict__.pop(name, None)


def publish(pipe: Any, state: Offloading) -> None:
    """Leave on the pipeline what diffusers' own method leaves there."""
    if not is_pipeline(pipe):
        return
    from accelerate.hooks import UserCpuOffloadHook

    from ..hooks import OffloadHook

    pipe._offload_device = state.engine.device
    pipe._offload_gpu_id = state.engine.device.index
    pipe._all_hooks = [
        UserCpuOffloadHook(module, module._hf_hook)
        for module in pipe.components.values()
        if isinstance(module, nn.Module)
        and isinstance(getattr(module, "_hf_hook", None), OffloadHook)
    ]


def free_model_hooks(pipe: Any) -> None:
    """What `maybe_free_model_hooks` does after a call: stateful caches reset, everybody home."""
    from ..pipeline import state_of

    for component in pipe.components.values():
        if hasattr(component, "_reset_stateful_cache"):
            component._reset_stateful_cache()
    state = state_of(pipe)
    if state is not None:
        state.engine.end_call()
        return
    # A pipeline made from another one's components has their hooks, but was never enabled itself.
    for engine in {
        hook.engine for c in pipe.components.values() if (hook := _our_hook(c)) is not None
    }:
        engine.end_call()


def _our_hook(component: Any) -> Any:
    from ..hooks import OffloadHook

    hook = getattr(component, "_hf_hook", None)
    return hook if isinstance(hook, OffloadHook) else None
