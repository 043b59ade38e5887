"""Modules whose code is known not to change weights unseen.

A weight that is changed in place has another version afterwards; one that is changed through
`.data` has not, and only reading all of it tells. torch's, diffusers' and transformers' own modules
do not do that when they run, so while nobody else's code is called, nothing has to be read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules import module as _torch_module
from torch.nn.modules.batchnorm import _NormBase

from .adapters.diffusers import is_of_diffusers
from .components import components_of
from .second_try import is_harmless, original_of

_KNOWN = frozenset({"torch", "diffusers", "transformers"})
_PLAIN = frozenset({"abc", "builtins", "typing"})


def leaves_weights_alone(module: nn.Module) -> bool:
    """Whether all code that runs in a module's forward is of the libraries named above.

    Subclasses, hooks, attention processors and functions of anybody else's are not: nor are
    adapters of PEFT, which merge into weights.
    """
    return not _has_global_hooks() and all(map(_is_known, module.modules()))


def runs_known_code(pipe: Any) -> bool:
    """Whether nothing else runs in a call of the pipeline, callbacks apart."""
    modules = components_of(pipe).values()
    return is_of_diffusers(pipe) and all(map(leaves_weights_alone, modules))


def _has_global_hooks() -> bool:
    return bool(_torch_module._global_forward_hooks or _torch_module._global_forward_pre_hooks)


def _is_known(module: nn.Module) -> bool:
    cls: Any = type(module)
    return (
        _is_known_class(cls)
        and _is_of_known(cls.forward)
        and not _has_statistics(module)
        and all(map(is_harmless, module._forward_pre_hooks.values()))
        and all(map(is_harmless, module._forward_hooks.values()))
        and all(_is_known_attribute(module, k, v) for k, v in vars(module).items() if callable(v))
    )


@functools.cache
def _is_known_class(cls: type) -> bool:
    """With all that it inherits from: a parametrised module's class is torch's, made of another."""
    return all(_is_of_known(base) or base.__module__ in _PLAIN for base in cls.__mro__)


def _has_statistics(module: nn.Module) -> bool:
    """Whether kernels write into its buffers when it runs, which no version counts."""
    return isinstance(module, _NormBase) and module.training and module.track_running_stats


def _is_known_attribute(module: nn.Module, name: str, value: Any) -> bool:
    if name in ("forward", "_old_forward"):
        value = original_of(value)
        if getattr(getattr(value, "func", None), "__module__", "") == "accelerate.hooks":
            return True  # what it wraps is the module's `_old_forward`
        return getattr(value, "__func__", None) is type(module).forward
    if isinstance(value, functools.partial):
        value = value.func
    return _is_of_known(value) or _is_of_known(type(value))


def _is_of_known(code: type | Callable[..., Any]) -> bool:
    return str(getattr(code, "__module__", "")).partition(".")[0] in _KNOWN
