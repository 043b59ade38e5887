"""Within a budget: weights that components share, streams that change, changes by anybody."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import greenroom
import greenroom.sim as sim

MIB = 2**20
WIDTH = 256


class Net(nn.Module):
    """Sixteen layers of a quarter MiB."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class Pipe(greenroom.OffloadMixin):
    model_cpu_offload_seq = "a->b->c"

    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
        torch.manual_seed(0)
        self.a, self.b, self.c = Net(), Net(), Net()
        self.body = body

    def __call__(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        with torch.no_grad():
            return self.body(self, x)


def in_turn(pipe: Any, x: torch.Tensor) -> torch.Tensor:
    for net in (pipe.a, pipe.b, pipe.c, pipe.a):
        x = net(x)
    return x


def ones() -> torch.Tensor:
    return torch.ones(1, WIDTH)


@pytest.mark.parametrize("budget", [6, 9, 14, 64])
def test_a_weight_that_two_components_share_is_there_for_both(budget: int) -> None:
    pipes = [Pipe(in_turn) for _ in range(2)]
    for pipe in pipes:
        pipe.c.layers[0].weight = pipe.a.layers[0].weight
    expected = pipes[0](ones())
    pipes[1].enable_model_cpu_offload(device="sim", budget=budget * MIB)
    for _ in range(3):
        with sim.measure() as cost:
            assert torch.equal(pipes[1](ones()).cpu(), expected)
        assert cost.peak_bytes <= budget * MIB and cost.races == []


@pytest.mark.parametrize("budget", [9, 64])
def test_another_stream_waits_for_what_is_there(budget: int) -> None:
    pipe = Pipe(in_turn)
    with torch.no_grad():
        expected = pipe.a(ones())
        pipe.enable_model_cpu_offload(device="sim", budget=budget * MIB)
        for stream in [torch.sim.current_stream(), *(torch.sim.Stream() for _ in range(2))] * 2:
            with torch.sim.stream(stream):
                assert torch.equal(pipe.a(ones()).cpu(), expected)
        greenroom.offload_now(pipe)
    assert sim.races() == []


@pytest.mark.parametrize("budget", [5, 7, 10, 64])
def test_what_a_pipelines_own_code_changes_between_forwards_is_kept(budget: int) -> None:
    def body(pipe: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = pipe.b(pipe.a(x))
            for net in (pipe.a, pipe.b, pipe.c):
                for layer in net.layers:
                    layer.weight.data.mul_(1.01)  # no version counts this
            x = pipe.c(x)
        return x

    pipes = [Pipe(body) for _ in range(2)]
    pipes[1].enable_model_cpu_offload(device="sim", budget=budget * MIB)
    for _ in range(3):
        assert torch.equal(pipes[1](ones()).cpu(), pipes[0](ones()))
    greenroom.disable_model_cpu_offload(pipes[1])
    for net in ("a", "b", "c"):
        for mine, theirs in zip(
            getattr(pipes[1], net).parameters(), getattr(pipes[0], net).parameters(), strict=True
        ):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("budget", [5, 10])
def test_a_weight_that_is_replaced_and_restored_on_the_device_is_as_it_was(budget: int) -> None:
    pipe = Pipe(in_turn)
    pipe.enable_model_cpu_offload(device="sim", budget=budget * MIB)
    before = pipe.a.layers[0].weight.detach().clone()
    turns = []

    def change(layer: nn.Module, *_: Any) -> None:
        turns.append(1)
        there = before.to("sim")
        if len(turns) % 2:
            layer.weight.data = there + 1
        else:
            layer.weight.data.copy_(there)

    pipe.a.layers[0].register_forward_hook(change)
    for _ in range(2):
        pipe(ones())
    greenroom.offload_now(pipe)
    assert torch.equal(pipe.a.layers[0].weight, before)


def test_a_seed_makes_no_other_call() -> None:
    pipe = Pipe(in_turn)
    pipe.enable_model_cpu_offload(device="sim", budget=6 * MIB)
    pipe(ones(), seed=0)
    kinds = set()
    for seed in range(3):
        pipe(ones(), seed=seed)
        kinds.add(greenroom.report(pipe).call.is_first)
    assert kinds == {False}
