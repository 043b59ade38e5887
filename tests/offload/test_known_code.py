"""Only where somebody else's code runs are weights read to tell whether they were changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.device import store
from greenroom.known_code import leaves_weights_alone, runs_known_code
from greenroom.zoo.tiny import call_kwargs, tiny


def build(name: str) -> Any:
    pipe = tiny(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, **changed: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(**{**call_kwargs("flux"), **changed}).images).cpu()


class Processor:
    """Somebody's attention, which scales a weight when it has used it."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, attn: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.original(attn, *args, **kwargs)
        attn.to_q.weight.data.mul_(1.25)
        return result


class Own(nn.Linear):
    pass


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_pre_hook(lambda module, args: None)
    return module


def patched(module: nn.Module) -> nn.Module:
    forward = module.forward
    module.forward = lambda x: forward(x)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("name", ["sdxl", "flux", "wan2.2", "sdxl-controlnet"])
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_published_pipelines_are_known(name: str, is_offloaded: bool) -> None:
    pipe = build(name)
    if is_offloaded:
        greenroom.enable_model_cpu_offload(pipe, device="sim", budget="64MiB")
    assert runs_known_code(pipe)


@pytest.mark.parametrize(
    ("module", "is_known"),
    [
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), True),
        (nn.BatchNorm1d(2).eval(), True),
        (nn.BatchNorm1d(2), False),  # the kernel writes its statistics
        (nn.Sequential(Own(2, 2)), False),
        (hooked(nn.Linear(2, 2)), False),
        (patched(nn.Linear(2, 2)), False),
        (nn.utils.parametrizations.spectral_norm(Own(2, 2)), False),
    ],
)
def test_what_is_known_of_modules(module: nn.Module, is_known: bool) -> None:
    assert leaves_weights_alone(module) is is_known


def test_hooks_on_all_modules_are_somebody_elses_code() -> None:
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    try:
        assert not leaves_weights_alone(nn.Linear(2, 2))
    finally:
        handle.remove()
    assert leaves_weights_alone(nn.Linear(2, 2))


def test_weights_are_read_only_where_they_may_be_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sim.configure("rtx-4090")
    read: list[int] = []
    original = store.digest_of

    def digest_of(slab: torch.Tensor) -> torch.Tensor:
        read.append(slab.nbytes)
        return original(slab)

    monkeypatch.setattr(store, "digest_of", digest_of)
    pipe = build("flux")
    greenroom.enable_model_cpu_offload(pipe, budget=2_200_000)
    for _ in range(2):
        picture(pipe, num_inference_steps=8)
    read.clear()
    with sim.measure() as quiet:
        expected = picture(pipe, num_inference_steps=8)
    # What is there between two calls, and leaves in the next: others may change that.
    assert 0 < sum(read) < quiet.h2d_bytes / 4
    read.clear()
    with sim.measure() as watched:
        found = picture(pipe, num_inference_steps=8, callback_on_step_end=lambda *_: {})
    assert torch.equal(found, expected)
    assert sum(read) > watched.h2d_bytes
    assert quiet.races == watched.races == []


def test_weights_that_somebodys_code_changes_inside_are_kept() -> None:
    pipe, other = build("flux"), build("flux")
    for changed in (pipe, other):
        attention = changed.transformer.transformer_blocks[0].attn
        attention.processor = Processor(attention.processor)
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=2_500_000)
    assert not runs_known_code(pipe)
    for _ in range(3):
        assert torch.equal(picture(pipe), picture(other))
    greenroom.disable_model_cpu_offload(pipe)
    for ours, theirs in zip(
        pipe.transformer.parameters(), other.transformer.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_what_others_change_on_the_device_between_calls_is_kept() -> None:
    pipe, other = build("flux"), build("flux")
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=2_500_000)
    assert torch.equal(picture(pipe), picture(other))
    there = [n for n, p in pipe.transformer.named_parameters() if p.device.type == "sim"]
    there += [n for n, p in pipe.text_encoder_2.named_parameters() if p.device.type == "sim"]
    assert there, "nothing waits on the device for the next call"
    with torch.no_grad():
        for changed in (pipe, other):
            for module in (changed.transformer, changed.text_encoder_2):
                for parameter in module.parameters():
                    parameter.data.mul_(1.0625)  # no version counts this
    for _ in range(2):
        assert torch.equal(picture(pipe), picture(other))
    greenroom.disable_model_cpu_offload(pipe)
    for ours, theirs in zip(
        pipe.transformer.parameters(), other.transformer.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)
