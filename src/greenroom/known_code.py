"""Pipelines whose code is known not to change weights unseen.

A weight that is changed in place has another version afterwards; one that is changed through
`.data` has not, and only reading all of it tells. torch's, diffusers' and transformers' own code
does not do that when it runs, so while nobody else's is called, nothing has to be read.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as _torch_module
from torch.nn.modules.batchnorm import _NormBase

from .components import components_of
from .second_try import is_harmless, original_of

_KNOWN = frozenset({"torch", "diffusers", "transformers"})
#: What their classes are made of besides, which runs nothing of its own in a call.
_PLAIN = frozenset({"abc", "builtins", "huggingface_hub", "typing"})


def runs_known_code(pipe: Any) -> bool:
    """Whether all code that runs in a call of the pipeline is of the libraries named above.

    Subclasses, hooks, attention processors and functions of anybody else's are not: nor are
    adapters of PEFT, which merge into weights. Callbacks are arguments, and not looked at.
    """
    modules = [
        module for component in components_of(pipe).values() for module in component.modules()
    ]
    return (
        not _has_global_hooks()
        and all(map(_is_known_class, {type(pipe), *map(type, modules)}))
        and all(map(_is_known_value, _callables_of(pipe)))
        and all(map(_is_known_module, modules))
    )


def _has_global_hooks() -> bool:
    return bool(_torch_module._global_forward_hooks or _torch_module._global_forward_pre_hooks)


def _is_known_class(cls: Any) -> bool:
    """With all that it inherits from: a parametrised module's class is torch's, made of another.

    Its methods may have been replaced since it was defined.
    """
    return all(
        base.__module__ in _PLAIN
        or base is nn.Module
        or (_is_known_name(base.__module__) and all(map(_is_known_code, _functions_of(base))))
        for base in cls.__mro__
    )


def _functions_of(cls: type) -> Iterator[Any]:
    for value in vars(cls).values():
        if isinstance(value, (staticmethod, classmethod)):
            yield value.__func__
        elif isinstance(value, types.FunctionType):
            yield value


def _is_known_code(function: Any) -> bool:
    """Whether a function was written there, and all that it wraps, whatever it says of itself."""
    while isinstance(function, types.FunctionType):
        name = str(function.__globals__.get("__name__", ""))
        if not _is_known_name(name) and name.partition(".")[0] not in _HELPERS:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


#: Whose decorators are on their methods.
_HELPERS = frozenset({"greenroom", "huggingface_hub", "dataclasses", "functools", "contextlib"})


def _is_known_name(name: str) -> bool:
    return name.partition(".")[0] in _KNOWN


def _callables_of(value: Any) -> Iterator[Any]:
    """What hangs on an object and may be called; its modules are looked at by themselves."""
    attributes: Iterable[Any] = getattr(value, "__dict__", {}).values()
    return (a for a in attributes if callable(a) and not isinstance(a, nn.Module))


def _is_known_value(value: Any) -> bool:
    """Whether what is called is a function, or of a class, of these libraries."""
    if isinstance(value, functools.partial):
        return _is_known_value(value.func)
    if isinstance(value, types.MethodType):
        value = value.__func__
    if isinstance(value, types.FunctionType):
        return _is_known_code(value)
    if isinstance(value, (type, types.BuiltinFunctionType)):
        return _is_known_name(str(value.__module__)) or value.__module__ in _PLAIN
    return _is_known_class(type(value))


def _is_known_module(module: nn.Module) -> bool:
    return (
        not _has_statistics(module)
        and all(map(is_harmless, module._forward_pre_hooks.values()))
        and all(map(is_harmless, module._forward_hooks.values()))
        and _is_known_hook(vars(module).get("_hf_hook"))
        and all(
            _is_own_forward(module, value)
            if name in ("forward", "_old_forward")
            else _is_known_value(value)
            for name, value in vars(module).items()
            if type(value) not in _NEVER_CALLED and callable(value)
        )
    )


#: Most of what a module has; not to ask each of it is most of the time that looking takes.
_NEVER_CALLED = frozenset({bool, dict, float, int, list, OrderedDict, set, str, tuple, type(None)})


def _has_statistics(module: nn.Module) -> bool:
    """Whether kernels write into its buffers when it runs, which no version counts."""
    return isinstance(module, _NormBase) and module.training and module.track_running_stats


def _is_known_hook(hook: Any) -> bool:
    """Whether what accelerate calls around a module's forward is its own, or ours."""
    hooks = getattr(hook, "hooks", (hook,))
    return all(
        h is None or type(h).__module__.partition(".")[0] in ("accelerate", "greenroom")
        for h in hooks
    )


def _is_own_forward(module: nn.Module, forward: Any) -> bool:
    forward = original_of(forward)
    if getattr(getattr(forward, "func", None), "__module__", "") == "accelerate.hooks":
        return True  # what it wraps is the module's `_old_forward`
    return getattr(forward, "__func__", None) is type(module).forward
