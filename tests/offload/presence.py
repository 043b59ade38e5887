"""Which components are on the device together, seen from inside every forward."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

__all__ = ["Presence", "modules", "nbytes", "on_device", "presence"]


def modules(pipe: Any) -> dict[str, nn.Module]:
    """A pipeline's modules by name, be it of diffusers, a mapping or an object with attributes."""
    parts = pipe if isinstance(pipe, dict) else getattr(pipe, "components", None) or vars(pipe)
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def held(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from itertools.chain(module.named_parameters(), module.named_buffers())


def nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for _, tensor in held(module))


def on_device(pipe: Any) -> list[str]:
    """The weights of a pipeline, or of a module, that are not in host memory."""
    if isinstance(pipe, nn.Module):
        return [name for name, tensor in held(pipe) if tensor.device.type != "cpu"]
    found = ((part, on_device(module)) for part, module in modules(pipe).items())
    return [f"{part}.{name}" for part, names in found for name in names]


@dataclass
class Presence:
    """What was seen while a pipeline ran."""

    #: Who was at work and who was on the device meanwhile, in the order in which that changed.
    seen: list[tuple[str, frozenset[str]]] = field(default_factory=list)
    #: The most device memory in use while each component was at work.
    nbytes: dict[str, int] = field(default_factory=dict)

    @property
    def at_work(self) -> list[str]:
        """The components that ran, in order."""
        return [name for name, _ in itertools.groupby(self.seen, key=lambda seen: seen[0])]

    @property
    def together(self) -> dict[str, set[str]]:
        """For each component that ran, whatever else was on the device meanwhile."""
        result: dict[str, set[str]] = {name: set() for name, _ in self.seen}
        for name, there in self.seen:
            result[name] |= there - {name}
        return result


@contextlib.contextmanager
def presence(pipe: Any) -> Iterator[Presence]:
    """Look around inside every component's forward.

    From hooks behind the forwards of the modules that hold weights: there, whatever brings weights
    has brought them. Work that does not come through a component's forward is seen as well.
    """
    parts = modules(pipe)
    # Listed once: a walk at every look would take longer than the pipelines themselves.
    weights = {name: [tensor for _, tensor in held(part)] for name, part in parts.items()}
    result = Presence()

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            there = frozenset(n for n, own in weights.items() if not all(t.is_cpu for t in own))
            if not result.seen or result.seen[-1] != (name, there):
                result.seen.append((name, there))
            used = torch.sim.memory_allocated()
            result.nbytes[name] = max(result.nbytes.get(name, 0), used)

        return hook

    hooks = [
        module.register_forward_hook(look(name))
        for name, part in parts.items()
        for module in part.modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        yield result
    finally:
        for hook in hooks:
            hook.remove()
