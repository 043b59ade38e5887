"""A pipeline so small that it can be run some thousand times, and what holds between its calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import greenroom
from greenroom.within_budget import WithinBudget

__all__ = ["Blocks", "Small", "assert_sound", "result", "within_of"]

WIDTH = 32
BLOCK_NBYTES = 4 * (WIDTH * WIDTH + WIDTH)


class Blocks(nn.Module):
    """Layers in a row; `works_on` is how many times its input a component takes meanwhile."""

    def __init__(self, count: int, width: int, *, works_on: int = 1) -> None:
        super().__init__()
        self.works_on = works_on
        self.scale = nn.Parameter(torch.rand(width))
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block(x * self.scale))
        if self.works_on > 1:
            x = x.repeat(self.works_on, 1).view(self.works_on, *x.shape).mean(0)
        return x + 0.01 * torch.randn_like(x)


class Small(greenroom.OffloadMixin):
    """An encoder, a denoiser that runs a few times, a decoder; blocks of 4 KiB."""

    model_cpu_offload_seq = "encoder->denoiser->decoder"

    def __init__(self, *, works_on: int = 1, blocks: int = 3, width: int = WIDTH) -> None:
        torch.manual_seed(0)
        self.encoder, self.denoiser = Blocks(1, width), Blocks(blocks, width)
        self.decoder = Blocks(1, width, works_on=works_on)

    @torch.no_grad()
    def __call__(self, rows: int = 4, *, steps: int = 2, each_step: Any = None) -> torch.Tensor:
        x = self.encoder(torch.ones(rows, *self.encoder.scale.shape))
        for step in range(steps):
            x = self.denoiser(x)
            if each_step is not None:
                each_step(self, step)
        return self.decoder(x)

    @property
    def nbytes(self) -> int:
        parts = (self.encoder, self.denoiser, self.decoder)
        return sum(p.nbytes for part in parts for p in part.parameters())


def result(pipe: Small, *args: Any, **kwargs: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return pipe(*args, **kwargs).cpu()


def within_of(pipe: Any) -> WithinBudget:
    within = pipe._greenroom.within
    assert isinstance(within, WithinBudget)
    return within


def assert_sound(pipe: Any) -> None:
    """What is on the device is what it is thought to be, and nothing else is."""
    within = within_of(pipe)
    resident = within.director.resident if within.director is not None else {}
    there = {
        part.key: part.store.nbytes
        for part in within._moves.parts
        if any(segment.device is not None for segment in part.store.segments)
    }
    assert there == {name: resident[name] for name in resident if resident[name]}
    assert sum(there.values()) == (within.director.resident_nbytes if within.director else 0)
    beside = torch.sim.memory_allocated() - sum(there.values())
    assert 0 <= beside <= 512 * 2 * len(there), "digests, and nothing else"
    for part in within._moves.parts:
        is_there = part.key in there
        for _, tensor in [t for m in part.modules for t in m.named_parameters()]:
            if id(tensor) in part.held:
                assert is_there or tensor.device.type == "cpu"
