"""Budgets, faults, streams and host memory on a real device; the same on the simulated one."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from offload.small import Blocks
from torch import nn

import greenroom
from greenroom.device.transfer import Transfer

MB = 10**6
WIDE = 2048  # 1.2 GB

on_each = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu), "sim"], indirect=True
)
on_cuda = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)


@pytest.fixture(autouse=True)
def simulator(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["device"] == "sim":
        import greenroom.sim as sim

        sim.configure("rtx-4090")


class Middling(greenroom.OffloadMixin):
    """An encoder, a denoiser, a decoder: 300 MB on a GPU, so that budgets mean something there."""

    model_cpu_offload_seq = "encoder->denoiser->decoder"

    def __init__(self, device: torch.device, width: int | None = None) -> None:
        width = width or (1024 if device.type == "cuda" else 128)
        torch.manual_seed(0)
        with device:  # draws quickly there
            self.encoder, self.denoiser = Blocks(12, width), Blocks(48, width)
            self.decoder = Blocks(12, width, works_on=20)
        for part in self.parts:
            part.cpu()

    @torch.no_grad()
    def __call__(self, rows: int = 64, *, steps: int = 3, each_step: Any = None) -> torch.Tensor:
        x = self.encoder(torch.ones(rows, *self.encoder.scale.shape))
        for step in range(steps):
            x = self.denoiser(x)
            if each_step is not None:
                each_step(step)
        return self.decoder(x)

    @property
    def parts(self) -> tuple[Blocks, ...]:
        return self.encoder, self.denoiser, self.decoder

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for part in self.parts for p in part.parameters())


def result(pipe: Middling, **arguments: Any) -> torch.Tensor:
    torch.manual_seed(1)
    return pipe(**arguments).cpu()


def resident(device: torch.device, width: int | None = None, **arguments: Any) -> torch.Tensor:
    """What the pipeline gives with all weights on the device."""
    pipe = Middling(device, width)
    for part in pipe.parts:
        part.to(device)

    def on_device(module: nn.Module, args: tuple[torch.Tensor, ...]) -> Any:
        return tuple(a.to(device) for a in args)

    pipe.encoder.register_forward_pre_hook(on_device)
    return result(pipe, **arguments)


def within(device: torch.device, share: float, width: int | None = None) -> Middling:
    pipe = Middling(device, width)
    pipe.enable_model_cpu_offload(device=device, budget=int(share * pipe.nbytes))
    return pipe


def statistics(device: torch.device) -> Any:
    return torch.get_device_module(device)


@on_each
@pytest.mark.parametrize("share", [0.3, 0.6, 1.5])
def test_inside_the_budget_the_bits_are_the_same(share: float, device: torch.device) -> None:
    expected = resident(device)
    gc.collect()
    module = statistics(device)
    module.empty_cache()
    pipe = within(device, share)
    budget = int(share * pipe.nbytes)
    before = module.memory_allocated(device), module.memory_reserved(device)
    for _ in range(3):
        module.reset_peak_memory_stats(device)
        assert torch.equal(result(pipe), expected)
        assert module.max_memory_allocated(device) - before[0] <= budget
    greenroom.disable_model_cpu_offload(pipe)


@on_cuda
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_the_allocator_may_be_held_to_the_budget(share: float, device: torch.device) -> None:
    expected = resident(device, WIDE)
    gc.collect()
    torch.cuda.empty_cache()
    pipe = within(device, share, WIDE)
    budget = int(share * pipe.nbytes)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(
        (budget + torch.cuda.memory_reserved(device)) / total, device
    )
    before = torch.cuda.memory_stats(device)["num_ooms"]
    try:
        for _ in range(3):
            assert torch.equal(result(pipe), expected)
        assert torch.cuda.memory_stats(device)["num_ooms"] == before
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@on_cuda
@pytest.mark.parametrize("budget", ["auto", "10GiB"])
def test_less_memory_than_was_granted_is_found_out(budget: str, device: torch.device) -> None:
    expected = resident(device)
    gc.collect()
    torch.cuda.empty_cache()
    pipe = Middling(device)
    pipe.enable_model_cpu_offload(device=device, budget=budget)
    room = pipe.nbytes // 2 + torch.cuda.memory_reserved(device)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(room / total, device)
    try:
        for _ in range(3):
            assert torch.equal(result(pipe), expected)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


@on_each
def test_after_an_exception_the_device_is_empty(device: torch.device) -> None:
    expected = resident(device)
    module = statistics(device)
    gc.collect()
    before = module.memory_allocated(device)
    pipe = within(device, 0.6)

    def fail(step: int) -> None:
        if step == 1:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            result(pipe, each_step=fail)
        assert module.memory_allocated(device) - before <= 2**16
        assert torch.equal(result(pipe), expected)


@on_each
def test_weights_changed_on_the_device_are_kept(device: torch.device) -> None:
    def train(pipe: Middling) -> Callable[[int], None]:
        def change(step: int) -> None:
            with torch.no_grad():
                pipe.denoiser.blocks[5].weight.data.mul_(0.5)  # no version counts this
                pipe.denoiser.blocks[-1].bias.add_(0.25)

        return change

    other, pipe = Middling(device), within(device, 0.6)
    other.enable_model_cpu_offload(device=device)
    for _ in range(2):
        assert torch.equal(
            result(pipe, each_step=train(pipe)), result(other, each_step=train(other))
        )
    for ours in (pipe, other):
        greenroom.disable_model_cpu_offload(ours)
    for mine, theirs in zip(pipe.denoiser.parameters(), other.denoiser.parameters(), strict=True):
        assert mine.device.type == "cpu" and torch.equal(mine, theirs)


@on_each
def test_calls_on_streams_and_threads_of_ones_own(device: torch.device) -> None:
    expected = resident(device)
    module = statistics(device)
    pipe = within(device, 0.6)
    for _ in range(3):
        stream = module.Stream(device=device)
        with module.stream(stream):
            assert torch.equal(result(pipe), expected)
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(result(pipe)))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


@on_cuda
@pytest.mark.parametrize("where", ["copies", "kernels"])
def test_late_copies_and_late_kernels_change_no_bit(
    where: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing relies on how fast the link or the device is: either may lag far behind."""
    expected = resident(device)
    some_ms = 4_000_000  # cycles
    pipe = within(device, 0.4)
    if where == "copies":
        copy = Transfer.copy

        def late(self: Transfer, target: torch.Tensor, source: torch.Tensor) -> None:
            with self._on(self.h2d_stream):
                torch.cuda._sleep(some_ms)
            copy(self, target, source)

        monkeypatch.setattr(Transfer, "copy", late)
    else:
        for part in pipe.parts:
            for block in part.blocks:
                block.register_forward_hook(lambda *_: torch.cuda._sleep(some_ms))
    for _ in range(3):
        assert torch.equal(result(pipe), expected)


@on_cuda
def test_weights_are_page_locked_while_enabled(device: torch.device) -> None:
    pipe = within(device, 0.6)
    result(pipe)
    greenroom.offload_now(pipe)
    pageable = [n for n, p in pipe.denoiser.named_parameters() if not p.is_pinned()]
    assert pageable == []
    assert torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) < MB  # not torch's
    greenroom.disable_model_cpu_offload(pipe)
    gc.collect()
    assert not any(block.weight.is_pinned() for block in pipe.denoiser.blocks)


@on_cuda
def test_a_half_precision_pipeline_with_memory_of_its_own_dtype(device: torch.device) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        plain = Middling(device)
        for part in plain.parts:
            part.to(device, dtype)
        x = torch.ones(64, 1024, device=device, dtype=dtype)

        def run(pipe: Middling, x: torch.Tensor = x) -> torch.Tensor:
            torch.manual_seed(1)
            with torch.no_grad():
                return pipe.decoder(pipe.denoiser(pipe.encoder(x))).cpu()

        expected = run(plain)
        pipe = Middling(device)
        for part in pipe.parts:
            part.to(dtype)
        pipe.enable_model_cpu_offload(device=device, budget=int(0.6 * pipe.nbytes))
        for _ in range(3):
            assert torch.equal(run(pipe), expected)
            greenroom.offload_now(pipe)


@on_cuda
@pytest.mark.slow
def test_compiled_blocks_give_what_compiled_blocks_give(device: torch.device) -> None:
    def compiled(pipe: Middling) -> Middling:
        for block in pipe.denoiser.blocks:
            block.compile()
        return pipe

    plain = compiled(Middling(device))
    for part in plain.parts:
        part.to(device)
    plain.encoder.register_forward_pre_hook(lambda m, args: tuple(a.to(device) for a in args))
    expected = result(plain)
    pipe = compiled(Middling(device))
    pipe.enable_model_cpu_offload(device=device, budget=int(0.6 * pipe.nbytes))
    for _ in range(3):
        assert torch.equal(result(pipe), expected)


@on_cuda
def test_the_report_and_torchs_profiler_tell_of_a_call(
    device: torch.device, tmp_path: Path
) -> None:
    pipe = within(device, 0.6)
    result(pipe)
    with torch.profiler.profile() as profiled:
        result(pipe)
    names = {event.name for event in profiled.events()}
    assert any(name.startswith("greenroom") for name in names), sorted(names)[:40]
    report = greenroom.report(pipe)
    told = json.loads(json.dumps(report.to_dict()))
    assert told and "denoiser" in json.dumps(told)
    assert str(report)
