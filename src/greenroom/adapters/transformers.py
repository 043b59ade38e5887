"""What transformers' models are to a pipeline."""

from __future__ import annotations

from torch import nn


def is_encoder(module: nn.Module) -> bool:
    """Whether a component runs once in a call, as those of transformers do: they encode prompts."""
    return type(module).__module__.partition(".")[0] == "transformers"
