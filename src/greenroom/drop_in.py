"""greenroom behind diffusers' own method: `pipe.enable_model_cpu_offload()` comes here.

Reversible, and explicit: nothing is changed by importing greenroom.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .pipeline import disable_model_cpu_offload, enable_model_cpu_offload

_ABSENT = object()
_replaced: list[tuple[type, str, Any]] = []


def install() -> None:
    """Put greenroom behind `DiffusionPipeline.enable_model_cpu_offload`, for every pipeline class.

    Classes that override the method are included. Installing twice is harmless; `uninstall` undoes
    it. Pipelines on which offloading was enabled meanwhile stay offloaded.

    Raises:
        ImportError: diffusers is not installed.
    """
    if _replaced:
        return
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError(
            "greenroom.install() needs diffusers: pip install 'greenroom[diffusers]'"
        ) from error
    for cls in [DiffusionPipeline, *_subclasses(DiffusionPipeline)]:
        _replace(cls, is_base=cls is DiffusionPipeline)
    # Pipeline classes are imported when first asked for: what overrides the method is found then.
    original = DiffusionPipeline.__dict__.get("__init_subclass__", _ABSENT)

    @classmethod  # type: ignore[misc]
    def __init_subclass__(cls: type, **kwargs: Any) -> None:
        super(DiffusionPipeline, cls).__init_subclass__(**kwargs)
        _replace(cls, is_base=False)

    DiffusionPipeline.__init_subclass__ = __init_subclass__
    _replaced.append((DiffusionPipeline, "__init_subclass__", original))


def uninstall() -> None:
    """Give diffusers its own methods back."""
    while _replaced:
        cls, name, original = _replaced.pop()
        if original is _ABSENT:
            delattr(cls, name)
        else:
            setattr(cls, name, original)


def _enable(
    self: Any, gpu_id: int | None = None, device: torch.device | str | None = None, **options: Any
) -> None:
    """See `greenroom.enable_model_cpu_offload`."""
    enable_model_cpu_offload(self, gpu_id, device, **options)


def _disable(self: Any) -> None:
    """See `greenroom.disable_model_cpu_offload`."""
    disable_model_cpu_offload(self)


def _replace(cls: type, *, is_base: bool) -> None:
    ours: dict[str, Any] = {"enable_model_cpu_offload": _enable}
    if is_base:
        ours["disable_model_cpu_offload"] = _disable
    for name, function in ours.items():
        original = cls.__dict__.get(name, _ABSENT)
        if original is _ABSENT and not is_base:
            continue  # it inherits ours
        _replaced.append((cls, name, original))
        setattr(cls, name, function)


def _subclasses(cls: type) -> Iterator[type]:
    sub: type
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
