"""Parts of one pipeline for another."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers

from greenroom.zoo.tiny import tiny

__all__ = ["like", "of", "remade", "taken"]


def of(pipeline: str, base: str | Callable[[], Any]) -> Callable[[], Any]:
    """Another pipeline class from what ``base`` builds, or the tiny pipeline of that name."""
    build = (lambda: tiny(base)) if isinstance(base, str) else base
    return lambda: remade(getattr(diffusers, pipeline), build())


def remade(kind: Any, pipe: Any, **parts: Any) -> Any:
    """A pipeline of another class, with the components and options of this one but ``parts``."""
    return kind(**(taken(kind, dict(pipe.config) | pipe.components) | parts))


def like(model: Any, kind: Any = None, **config: Any) -> Any:
    """A model, of another class or not, with the config of this one but for ``config``."""
    settings = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return (kind or type(model)).from_config(settings | config)


def taken(kind: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of the arguments that the class takes."""
    names = inspect.signature(kind).parameters
    return {name: value for name, value in arguments.items() if name in names}
