"""Compiled components: what was compiled once serves every call, wherever the weights were."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.zoo.tiny import call_kwargs, tiny


class Counting:
    """A backend that runs graphs as they are, and counts them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(graph)
        return graph.forward

    @property
    def operations(self) -> int:
        return sum(
            node.op in ("call_function", "call_module", "call_method")
            for graph in self.graphs
            for node in graph.graph.nodes
        )


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.first, self.second = (
            nn.LayerNorm(64),
            nn.Linear(64, 128),
            nn.Linear(128, 64),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(nn.functional.gelu(self.first(self.norm(x))))


class Body(nn.Module):
    """Not a Sequential: the compiler skips torch's own containers, and starts further inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(), Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def wrapped(module: nn.Module, backend: Counting) -> nn.Module:
    return torch.compile(module, backend=backend)


def in_place(module: nn.Module, backend: Counting) -> nn.Module:
    module.compile(backend=backend)
    return module


def inside(module: nn.Module, backend: Counting) -> nn.Module:
    for child in module.children():
        child.compile(backend=backend)
    return module


@pytest.mark.parametrize("way", [wrapped, in_place, inside])
@pytest.mark.parametrize("compile_first", [True, False])
def test_going_home_and_coming_back_compiles_nothing_anew(way: Any, compile_first: bool) -> None:
    module, other = Body(), nn.Linear(64, 64)
    x = torch.randn(4, 64)
    backend = Counting()
    with torch.no_grad():
        expected = other(module(x))
        pipe: dict[str, nn.Module] = {"module": module, "other": other}
        if compile_first:
            pipe["module"] = way(module, backend)
        greenroom.enable_model_cpu_offload(pipe, device="sim", sequence="module->other")
        if not compile_first:
            pipe["module"] = way(module, backend)
        graphs = []
        for _ in range(4):
            with sim.measure() as cost:
                assert torch.equal(pipe["other"](pipe["module"](x)).cpu(), expected)
            graphs.append(len(backend.graphs))
            greenroom.offload_now(pipe)
            assert all(p.device.type == "cpu" for p in module.parameters())
    assert graphs[0] > 0 and graphs == graphs[:1] * 4
    assert cost.races == []
    greenroom.disable_model_cpu_offload(pipe)


@pytest.mark.parametrize("way", [wrapped, in_place, inside])
def test_graphs_are_those_of_the_resident_module(way: Any) -> None:
    """The hooks are no part of a graph, and break none."""
    x = torch.randn(4, 64)
    resident, ours = Counting(), Counting()
    with torch.no_grad():
        way(Body().to("sim"), resident)(x.to("sim"))
        torch._dynamo.reset()
        pipe = {"module": way(Body(), ours)}
        greenroom.enable_model_cpu_offload(pipe, device="sim", sequence="module")
        for _ in range(2):
            pipe["module"](x)
            greenroom.offload_now(pipe)
    assert len(ours.graphs) == len(resident.graphs)
    assert ours.operations == resident.operations
    greenroom.disable_model_cpu_offload(pipe)


def test_a_pipeline_with_compiled_blocks() -> None:
    expected = tiny("flux")(**call_kwargs("flux")).images
    pipe = tiny("flux")
    backend = Counting()
    pipe.transformer.compile_repeated_blocks(backend=backend)
    greenroom.enable_model_cpu_offload(pipe, device="sim")
    graphs = []
    for _ in range(3):
        assert torch.equal(pipe(**call_kwargs("flux")).images.cpu(), expected)
        graphs.append(len(backend.graphs))
    assert graphs[0] > 0 and graphs == graphs[:1] * 3
    greenroom.disable_model_cpu_offload(pipe)


def test_a_component_that_is_wrapped_after_enabling_goes_home_with_the_rest() -> None:
    expected = tiny("sd")(**call_kwargs("sd")).images
    pipe = tiny("sd")
    backend = Counting()
    greenroom.enable_model_cpu_offload(pipe, device="sim")
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend=backend)
    graphs = []
    for _ in range(3):
        assert torch.equal(pipe(**call_kwargs("sd")).images.cpu(), expected)
        graphs.append(len(backend.graphs))
        assert all(p.device.type == "cpu" for p in pipe.text_encoder.parameters())
    assert graphs[0] > 0 and graphs == graphs[:1] * 3
    greenroom.disable_model_cpu_offload(pipe)
