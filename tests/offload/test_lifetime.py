"""A pipeline that nobody refers to any more is gone, whether or not its offloading was disabled."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.pipeline import state_of
from greenroom.zoo.tiny import call_kwargs, tiny

SEQUENCE = "first->second"


class Attributes(greenroom.OffloadMixin):
    model_cpu_offload_seq = SEQUENCE

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        self.first, self.second = first, second


class Keeping(Attributes):
    _exclude_from_cpu_offload = ("second",)
    model_cpu_offload_seq = "first"


class Model(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second


@dataclass
class Slots:
    """It takes no attribute and no weak reference, as a dict."""

    __slots__ = ("first", "second")
    first: nn.Module
    second: nn.Module


class KeepingSlots(Slots):
    __slots__ = ()
    _exclude_from_cpu_offload = ("second",)


KINDS: dict[str, Callable[..., Any]] = {
    "a dict": dict,
    "attributes": Attributes,
    "attributes, one kept on the device": Keeping,
    "a module": Model,
    "slots": Slots,
    "slots, one kept on the device": KeepingSlots,
}


def books() -> tuple[int, int]:
    """Bytes of live tensors on the device, and of page-locked host memory in use."""
    gc.collect()
    pinned = torch.sim.host_memory_stats()["allocated_bytes.current"]
    return torch.sim.memory_allocated(), pinned


def parts() -> dict[str, nn.Module]:
    return {"first": nn.Linear(64, 64), "second": nn.Linear(64, 64)}


def enable(pipe: Any) -> None:
    order = "first" if hasattr(pipe, "_exclude_from_cpu_offload") else SEQUENCE
    greenroom.enable_model_cpu_offload(pipe, device="sim", sequence=order)


def run(modules: dict[str, nn.Module]) -> None:
    for _ in range(3):  # from the second on, weights are page-locked
        x = torch.ones(2, 64)
        for module in modules.values():
            x = module(x.to("sim"))


@pytest.fixture(autouse=True)
def books_that_balance() -> Iterator[None]:
    before = books()
    yield
    assert books() == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_and_its_components_go_with_the_last_reference(kind: str) -> None:
    modules = parts()
    pipe = KINDS[kind](**modules)
    enable(pipe)
    run(modules)
    gone = [weakref.ref(module) for module in modules.values()]
    del pipe, modules
    gc.collect()
    assert [module() for module in gone] == [None, None]


@pytest.mark.parametrize("kind", KINDS)
def test_components_outlive_their_pipeline_and_go_with_another(kind: str) -> None:
    shared = nn.Linear(64, 64)
    gone: list[weakref.ref[nn.Module]] = []
    for _ in range(3):
        modules = {"first": shared, "second": nn.Linear(64, 64)}
        pipe = KINDS[kind](**modules)
        enable(pipe)
        run(modules)
        gone.append(weakref.ref(modules["second"]))
        del pipe, modules
    gc.collect()
    assert [module() for module in gone] == [None] * 3
    assert shared.weight.device.type in ("cpu", "sim")
    shared(torch.ones(2, 64))


def test_a_dict_is_known_again_when_its_components_were_replaced_one_by_one() -> None:
    pipe = parts()
    enable(pipe)
    for name in pipe:
        pipe[name] = nn.Linear(64, 64)
        greenroom.enable_model_cpu_offload(pipe)  # the device and the order are remembered
    run(pipe)
    greenroom.offload_now(pipe)
    assert {p.device.type for m in pipe.values() for p in m.parameters()} == {"cpu"}
    greenroom.disable_model_cpu_offload(pipe)
    assert not any(hasattr(module, "_hf_hook") for module in pipe.values())
    with pytest.raises(greenroom.UsageError, match="does not say in which order"):
        greenroom.enable_model_cpu_offload(pipe)


def test_dicts_that_share_a_component_are_told_apart() -> None:
    modules = parts()
    one, other = dict(modules), dict(modules)
    enable(one)
    greenroom.disable_model_cpu_offload(other)  # it is not offloaded, and so left alone
    assert all(hasattr(module, "_hf_hook") for module in modules.values())
    with pytest.raises(greenroom.UsageError, match="does not say in which order"):
        greenroom.enable_model_cpu_offload(other)


def test_a_dict_without_modules_is_not_offloaded() -> None:
    pipe = parts()
    enable(pipe)
    pipe.clear()
    greenroom.disable_model_cpu_offload(pipe)
    greenroom.offload_now(pipe)


def test_a_real_pipeline_leaves_nothing() -> None:
    pipe = tiny("sd")
    greenroom.enable_model_cpu_offload(pipe)
    for _ in range(2):
        pipe(**call_kwargs("sd"))
    unet = weakref.ref(pipe.unet)
    assert books()[1] > 0 and sim.races() == []
    del pipe
    gc.collect()
    assert unet() is None


def test_what_was_taken_down_has_no_say_any_more() -> None:
    pipe = tiny("flux")
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget="64MiB")
    within = state_of(pipe).within  # type: ignore[union-attr]
    assert within is not None
    parts = list(within._moves.parts)  # as a debugger, or a cycle that was not collected yet
    greenroom.disable_model_cpu_offload(pipe)
    assert not within._moves.parts
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget="64MiB")
    assert len(within._moves.parts) == len(parts)
    assert not set(parts).intersection(within._moves.parts)
