"""Stays in which nothing comes or goes: who calls a part in one that nobody expected there."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from offload.small import Blocks, within_of
from torch import nn

import greenroom
import greenroom.sim as sim

WIDTH = 256
BLOCK_NBYTES = 4 * (WIDTH * WIDTH + WIDTH)


class Large(nn.Module):
    """One part of some blocks' size."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.linear = nn.Linear(WIDTH, blocks * WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x)).view(-1, self.blocks, WIDTH).mean(1)


class Skipping(Blocks):
    """Its last blocks may be skipped, as layer guidance does."""

    def forward(self, x: torch.Tensor, skips: bool = False) -> torch.Tensor:
        for i, block in enumerate(self.blocks):
            if not (skips and i >= 4):
                x = torch.tanh(block(x * self.scale))
        return x


class Skips(greenroom.OffloadMixin):
    model_cpu_offload_seq = "denoiser->large"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.denoiser, self.large = Skipping(8, WIDTH), Large(12)

    @torch.no_grad()
    def __call__(self, skip_from: float, skip_to: float) -> torch.Tensor:
        x = torch.ones(4, WIDTH, device=self.denoiser.scale.device)
        for i in range(8):
            x = self.denoiser(x, skip_from <= i / 8 < skip_to)
        return self.large(x)


def test_what_was_given_up_is_not_freed_under_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("greenroom.pipeline.runs_known_code", lambda pipe: True)
    expected = [Skips()(0.25, to).cpu() for to in (1.0, 0.65)]
    pipe = Skips()
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=int(14.5 * BLOCK_NBYTES))
    for _ in range(3):
        assert torch.equal(pipe(0.25, 1.0).cpu(), expected[0])
    for _ in range(2):  # a call of the same kind that uses in the end what the plan gives up before
        assert torch.equal(pipe(0.25, 0.65).cpu(), expected[1])
    assert sim.races() == []


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(32, 32)
        self.decoder = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(x)


class Decodes(greenroom.OffloadMixin):
    model_cpu_offload_seq = "vae->denoiser->last"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.vae, self.denoiser, self.last = Autoencoder(), Blocks(4, 32), Blocks(12, 32)

    @torch.no_grad()
    def __call__(self) -> torch.Tensor:
        torch.manual_seed(1)
        x = self.vae.decode(torch.ones(4, 32))
        for _ in range(4):
            x = self.denoiser(x)
        return self.last(x)


def test_another_thread_waits_for_the_end_of_the_call_also_in_a_quiet_stay() -> None:
    expected, decoded = Decodes()().cpu(), Decodes().vae.decode(torch.ones(4, 32))
    pipe = Decodes()
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget="200KiB")
    for _ in range(3):
        assert torch.equal(pipe().cpu(), expected)
    in_quiet_stay, is_over = threading.Event(), threading.Event()
    was_over: list[bool] = []
    found: list[Any] = []

    def decode() -> None:
        in_quiet_stay.wait(10)
        with torch.no_grad():
            found.append(pipe.vae.decode(torch.ones(4, 32)).cpu())

    def begin(module: nn.Module, args: Any) -> None:
        if within_of(pipe).quiet_in is not None:
            in_quiet_stay.set()
            thread.join(0.2)  # time enough to do what it must not

    pipe.vae.decoder[3].register_forward_pre_hook(lambda *_: was_over.append(is_over.is_set()))
    pipe.denoiser.blocks[2].register_forward_pre_hook(begin)
    pipe.last.register_forward_hook(lambda *_: is_over.set())
    thread = threading.Thread(target=decode)
    thread.start()
    again = pipe()
    thread.join()
    assert torch.equal(again.cpu(), expected) and torch.equal(found[0], decoded)
    assert was_over[0] is False and was_over[1:] == [True]
    assert sim.races() == []
