"""diffusers' own ways of offloading run unmodified on the simulated device, with the CPU's bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import greenroom.sim as sim
from greenroom.zoo.tiny import call_kwargs, tiny

PIPELINES = ("sdxl", "flux", "wan")


def group(**options: Any) -> Callable[[Any], None]:
    def enable(pipe: Any) -> None:
        pipe.enable_group_offload(onload_device=torch.device("sim:0"), **options)

    return enable


def blocks(**options: Any) -> Callable[[Any], None]:
    return group(offload_type="block_level", num_blocks_per_group=1, **options)


def leaves(**options: Any) -> Callable[[Any], None]:
    return group(offload_type="leaf_level", **options)


WAYS: dict[str, Callable[[Any], Any]] = {
    "resident": lambda pipe: pipe.to("sim"),
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="sim"),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(device="sim"),
    "blocks": blocks(),
    "blocks-stream": blocks(use_stream=True),
    "blocks-stream-record": blocks(use_stream=True, record_stream=True),
    "leaves": leaves(),
    "leaves-stream": leaves(use_stream=True),
    "leaves-stream-record": leaves(use_stream=True, record_stream=True),
    "leaves-stream-low-memory": leaves(use_stream=True, low_cpu_mem_usage=True),
}


def result(pipe: Any, name: str) -> torch.Tensor:
    output = pipe(**call_kwargs(name))
    pictures = output.images if hasattr(output, "images") else output.frames
    return torch.as_tensor(pictures).cpu()


@pytest.fixture(scope="module", params=PIPELINES)
def case(request: pytest.FixtureRequest) -> tuple[str, torch.Tensor]:
    return request.param, result(tiny(request.param), request.param)


def nbytes(pipe: Any) -> int:
    modules = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    return sum(p.nbytes for module in modules for p in module.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_same_bits_as_the_cpu(case: tuple[str, torch.Tensor], way: str) -> None:
    name, expected = case
    pipe = tiny(name)
    WAYS[way](pipe)
    for _ in range(2):
        assert torch.equal(result(pipe, name), expected)
    assert sim.races() == []


def test_resident_moves_the_weights_once(case: tuple[str, torch.Tensor]) -> None:
    name, _ = case
    pipe = tiny(name)
    size = nbytes(pipe)
    with sim.measure() as load:
        pipe.to("sim")
    with sim.measure() as run:
        result(pipe, name)
    assert size <= load.h2d_bytes < 1.02 * size + 4096
    assert run.h2d_bytes < 0.1 * size and run.peak_bytes >= size


def test_model_offload_copies_every_weight_both_ways(case: tuple[str, torch.Tensor]) -> None:
    name, _ = case
    pipe = tiny(name)
    pipe.enable_model_cpu_offload(device="sim")
    with sim.measure() as cost:
        result(pipe, name)
    size = nbytes(pipe)
    assert cost.h2d_bytes >= size and cost.d2h_bytes >= size


def test_streaming_leaves_needs_less_memory_than_the_model(case: tuple[str, torch.Tensor]) -> None:
    name, _ = case
    peaks = {}
    for way in ("resident", "leaves-stream"):
        pipe = tiny(name)
        WAYS[way](pipe)
        with sim.measure() as cost:
            result(pipe, name)
        peaks[way] = cost.peak_bytes
        del pipe
        torch.sim.empty_cache()
    assert peaks["leaves-stream"] < peaks["resident"]


def test_pinned_streaming_keeps_every_weight_on_the_host(case: tuple[str, torch.Tensor]) -> None:
    # With a stream the pinned copy is the master: no weight comes back over the link.
    name, _ = case
    pipe = tiny(name)
    WAYS["leaves-stream"](pipe)
    with sim.measure() as cost:
        output = result(pipe, name)
    assert cost.h2d_bytes >= nbytes(pipe)
    assert cost.d2h_bytes < output.nbytes * 2 + 4096


@pytest.mark.parametrize("way", ["model", "sequential"])
def test_a_device_too_small_is_out_of_memory_and_usable_after(way: str) -> None:
    pipe = tiny("sdxl")
    sim.configure("rtx-4090", capacity="64KiB")
    WAYS[way](pipe)
    with pytest.raises(torch.OutOfMemoryError):
        result(pipe, "sdxl")
    del pipe
    sim.configure("rtx-4090")
    assert torch.ones(3, device="sim").sum().item() == 3
