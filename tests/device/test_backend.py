"""What differs between accelerators, where it can be told without one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import greenroom.sim as sim
from greenroom.device import backend as module
from greenroom.device.backend import Backend
from greenroom.device.reserve import Reserve
from greenroom.device.transfer import Transfer


class Streams:
    """A device module with a current stream, which counts how often an object is made for it."""

    def __init__(self) -> None:
        self.raw, self.made = 7, 0

    def current_stream(self, device: torch.device) -> Any:
        self.made += 1
        return SimpleNamespace(cuda_stream=self.raw)

    def Event(self) -> None: ...


def test_the_stream_is_asked_for_anew_only_when_it_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = Streams()
    backend = Backend(torch.device("sim", 0))
    monkeypatch.setattr(backend, "_module", streams)
    monkeypatch.setattr(backend, "_raw_stream", lambda index: streams.raw)
    first = backend.current_stream()
    assert backend.current_stream() is first and streams.made == 1
    streams.raw = 9
    assert backend.current_stream().cuda_stream == 9 and streams.made == 2
    assert backend.current_stream().cuda_stream == 9 and streams.made == 2


@pytest.mark.parametrize("name", module._ALLOCATOR_CONFIGS)
def test_an_allocator_that_was_configured_is_left_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", asked.append, raising=False)
    backend = Backend(torch.device("sim", 0))
    backend.let_segments_grow()
    assert asked == []  # it is no CUDA device
    for known in module._ALLOCATOR_CONFIGS:
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setattr(backend, "device", torch.device("cuda", 0))
    backend.let_segments_grow()
    assert asked == ["expandable_segments:True"]
    monkeypatch.setenv(name, "max_split_size_mb:128")
    backend.let_segments_grow()
    assert len(asked) == 1


def test_some_of_a_budget_is_left_for_pages_that_are_partly_empty() -> None:
    backend = Backend(torch.device("sim", 0))
    assert backend.unusable_nbytes(10**10) == 0
    backend.device = torch.device("cuda", 0)
    assert backend.unusable_nbytes(10**10) == 128 * 2**20 + 3 * 10**8


def test_weights_have_what_the_other_pool_leaves() -> None:
    backend: Any = SimpleNamespace(reserved_bytes=lambda: 50)
    reserve = Reserve(backend)
    reserve.note(30)
    assert reserve.room(60) == 40
    reserve.note(50)
    assert reserve.room(60) == 60


@pytest.mark.parametrize("begin_anew", [lambda: sim.configure("rtx-4060-laptop"), sim.reset])
def test_what_a_link_did_is_forgotten_where_the_simulator_begins_anew(
    begin_anew: Callable[[], None],
) -> None:
    transfer = Transfer(torch.device("sim", 0))
    source = torch.empty(16 * 2**20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="sim")

    def measured() -> float | None:
        transfer.begin()
        transfer.copy(target, source)
        torch.get_device_module("sim").synchronize()
        return transfer.bytes_per_s()

    assert transfer.bytes_per_s() is None
    assert measured() == pytest.approx(sim.current_profile().link.h2d_pinned, rel=0.05)
    begin_anew()
    assert transfer.bytes_per_s() is None
    assert measured() == pytest.approx(sim.current_profile().link.h2d_pinned, rel=0.05)
