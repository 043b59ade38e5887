"""Parts of one pipeline for another."""

from __future__ import annotations

from typing import Any

import diffusers

__all__ = ["filled", "like"]


def filled(pipe: Any) -> dict[str, Any]:
    """The components that are there: not every class takes the ones that are not."""
    return {name: part for name, part in pipe.components.items() if part is not None}


def like(model: Any, kind: str | None = None, **config: Any) -> Any:
    """A model, of another class or not, with the config of this one but for ``config``."""
    settings = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return getattr(diffusers, kind or type(model).__name__).from_config(settings | config)
