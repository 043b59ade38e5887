"""The one walk over a module's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor where a module holds it. Tied weights are held more than once."""

    owner: nn.Module
    kind: Literal["parameter", "buffer"]
    name: str
    tensor: torch.Tensor
    path: str  # for people: "down_blocks.0.resnets.1.conv1.weight"


def walk(module: nn.Module) -> Iterator[Held]:
    """Every parameter and buffer that `module` and its submodules hold, each place once."""
    for prefix, owner in module.named_modules():
        dot = f"{prefix}." if prefix else ""
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                yield Held(owner, "parameter", name, parameter, dot + name)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                yield Held(owner, "buffer", name, buffer, dot + name)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is nothing but strided memory, so that its bytes may be moved for it.

    Tensors of quantisation libraries are not: they are subclasses that carry more than their data.
    """
    return (
        type(tensor) in (torch.Tensor, nn.Parameter, nn.Buffer)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
    )
