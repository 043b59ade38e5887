"""Only where somebody else's code runs are weights read to tell whether they were changed."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import FluxPipeline
from offload.own import Chain
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.device import store
from greenroom.known_code import runs_known_code
from greenroom.zoo.tiny import call_kwargs, tiny


def build(name: str) -> Any:
    pipe = tiny(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe: Any, **changed: Any) -> torch.Tensor:
    return torch.as_tensor(pipe(**{**call_kwargs("flux"), **changed}).images).cpu()


def assert_same_weights(module: nn.Module, other: nn.Module) -> None:
    for ours, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


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


class OwnPipeline(FluxPipeline):  # type: ignore[misc]
    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        self.text_encoder.text_model.final_layer_norm.weight.data.mul_(1.25)
        return super().encode_prompt(*args, **kwargs)


def around(function: Callable[..., Any]) -> Callable[..., Any]:
    """The usual way to patch: it says that it is what it wraps."""

    @functools.wraps(function)
    def patched(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return patched


class Hook(ModelHook):  # type: ignore[misc]
    pass


def own_class(pipe: Any) -> None:
    pipe.transformer.proj_out.__class__ = Own


def own_pipeline(pipe: Any) -> None:
    pipe.__class__ = OwnPipeline


def own_forward(pipe: Any) -> None:
    pipe.transformer.proj_out.forward = around(pipe.transformer.proj_out.forward)


def own_method(pipe: Any) -> None:
    pipe.vae.decode = around(pipe.vae.decode)


def own_hook(pipe: Any) -> None:
    pipe.transformer.proj_out.register_forward_pre_hook(lambda module, args: None)


def own_accelerate_hook(pipe: Any) -> None:
    add_hook_to_module(pipe.transformer.proj_out, Hook())


def own_processor(pipe: Any) -> None:
    attention = pipe.transformer.transformer_blocks[0].attn
    attention.processor = Processor(attention.processor)


def parametrised(pipe: Any) -> None:
    pipe.transformer.proj_out.__class__ = Own
    nn.utils.parametrizations.spectral_norm(pipe.transformer.proj_out)


def statistics(pipe: Any) -> None:
    pipe.transformer.norm = nn.BatchNorm1d(2)  # in training its kernel writes them


def quiet_statistics(pipe: Any) -> None:
    pipe.transformer.norm = nn.BatchNorm1d(2).eval()


@pytest.mark.parametrize("name", ["sdxl", "flux", "wan2.2", "sdxl-controlnet"])
@pytest.mark.parametrize("is_offloaded", [False, True])
def test_published_pipelines_are_known(name: str, is_offloaded: bool) -> None:
    pipe = build(name)
    if is_offloaded:
        greenroom.enable_model_cpu_offload(pipe, device="sim", budget="64MiB")
    assert runs_known_code(pipe)


@pytest.mark.parametrize(
    "change",
    [
        own_class,
        own_pipeline,
        own_forward,
        own_method,
        own_hook,
        own_accelerate_hook,
        own_processor,
        parametrised,
        statistics,
    ],
)
def test_what_somebody_else_has_put_in_is_not_known(change: Callable[[Any], None]) -> None:
    pipe = build("flux")
    quiet_statistics(pipe)
    assert runs_known_code(pipe)
    change(pipe)
    assert not runs_known_code(pipe)


def test_methods_that_were_replaced_in_a_class_are_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = build("flux")
    block = type(pipe.transformer.transformer_blocks[0])
    monkeypatch.setattr(block, "forward", around(block.forward))
    assert not runs_known_code(pipe)


def test_hooks_on_all_modules_are_somebody_elses_code() -> None:
    pipe = build("flux")
    handle = nn.modules.module.register_module_forward_pre_hook(lambda module, args: None)
    try:
        assert not runs_known_code(pipe)
    finally:
        handle.remove()
    assert runs_known_code(pipe)


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
    assert_same_weights(pipe.transformer, other.transformer)


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
    assert_same_weights(pipe.transformer, other.transformer)


def changed(pipe: Any, other: Any, name: str = "transformer") -> None:
    for each in (pipe, other):
        for parameter in getattr(each, name).parameters():
            parameter.data.mul_(1.0625)


@pytest.mark.parametrize("budget", [1_200_000, 2_500_000])
@pytest.mark.parametrize("name", ["transformer", "text_encoder_2"])
def test_what_is_changed_after_a_call_that_went_otherwise_is_used(budget: int, name: str) -> None:
    pipe, other = build("flux"), build("flux")
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=budget)
    for _ in range(2):
        assert torch.equal(picture(pipe), picture(other))
    original = type(pipe)
    interrupted = type("Interrupted", (original,), {"interrupt": property(lambda self: True)})
    pipe.__class__ = interrupted
    picture(pipe)
    pipe.__class__ = original
    changed(pipe, other, name)
    for _ in range(3):
        assert torch.equal(picture(pipe), picture(other))


def test_what_is_changed_after_a_component_was_called_by_itself_is_kept() -> None:
    pipe, other = build("flux"), build("flux")
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=2_500_000)
    with torch.no_grad():
        pipe.text_encoder(torch.zeros(1, 8, dtype=torch.int64))
    changed(pipe, other, "text_encoder")
    greenroom.offload_now(pipe)
    assert_same_weights(pipe.text_encoder, other.text_encoder)


def test_what_is_changed_between_components_called_by_themselves_is_used_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("greenroom.pipeline.runs_known_code", lambda _: True)
    names = ("first", "second", "third", "fourth", "fifth")
    pipe = Chain(**{name: nn.Linear(1024, 1024, bias=False) for name in names})
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget="13MiB")  # three at a time
    x = torch.ones(4, 1024)
    with torch.no_grad():
        for _ in range(3):
            pipe(x)
        for name, other in itertools.product(names, names):
            getattr(pipe, name)(x)  # the next one may be on its way by now
            layer = getattr(pipe, other)
            layer.weight.data.mul_(-1)
            expected = nn.functional.linear(x, layer.weight.cpu())
            assert torch.allclose(layer(x).cpu(), expected, atol=1e-4)


def test_a_result_is_not_lost_because_there_is_no_room_to_look_at_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe, other = build("flux"), build("flux")
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=2_500_000)
    original = store.WeightStore._take_digests

    def refused(self: Any, segments: Any) -> None:
        if segments:
            raise torch.OutOfMemoryError("no room")
        original(self, segments)

    monkeypatch.setattr(store.WeightStore, "_take_digests", refused)
    assert torch.equal(picture(pipe), picture(other))
    monkeypatch.undo()
    changed(pipe, other)
    assert torch.equal(picture(pipe), picture(other))


def test_a_layer_that_was_added_between_two_calls_comes_along() -> None:
    pipe, other = build("flux"), build("flux")
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget="64MiB")
    assert torch.equal(picture(pipe), picture(other))
    for each in (pipe, other):
        torch.manual_seed(0)
        out = each.transformer.proj_out
        each.transformer.proj_out = nn.Sequential(
            out, nn.Linear(out.out_features, out.out_features)
        )
    for _ in range(2):
        assert torch.equal(picture(pipe), picture(other))
