"""Pipelines of one's own for the tests of offloading, and how they and tiny ones are called."""

from __future__ import annotations

import dataclasses
from typing import Any

import accelerate
import torch
from torch import nn

import greenroom
from greenroom.zoo.tiny import call_kwargs

__all__ = ["Bag", "Chain", "is_hooked", "result"]


def result(pipe: Any, name: str = "sd") -> torch.Tensor:
    return torch.as_tensor(pipe(**call_kwargs(name)).images).cpu()


def is_hooked(module: nn.Module) -> bool:
    return isinstance(getattr(module, "_hf_hook", None), accelerate.hooks.CpuOffload)


class Chain(greenroom.OffloadMixin):
    """A pipeline of one's own: what is in it runs in the order of its names."""

    model_cpu_offload_seq = "first->second"

    def __init__(self, **parts: nn.Module) -> None:
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.__dict__.update(parts)

    def __call__(self, x: Any) -> Any:
        for part in vars(self).values():
            if isinstance(part, nn.Module):
                x = part(x)
        return x


@dataclasses.dataclass(eq=False)
class Bag:
    """An object with components as fields, and no class of ours."""

    first: nn.Module = dataclasses.field(default_factory=lambda: nn.Linear(8, 8))
    second: nn.Module = dataclasses.field(default_factory=lambda: nn.Linear(8, 8))
    model_cpu_offload_seq = "first->second"

    def __call__(self, x: Any) -> Any:
        return self.second(self.first(x))
