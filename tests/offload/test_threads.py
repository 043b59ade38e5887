"""Several threads call pipelines: they take turns, and nobody's weights are taken away."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.zoo.tiny import call_kwargs, picture, tiny


def together(functions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run each on a thread of its own, all at once; their results, or the first error."""
    ready = threading.Barrier(len(functions))

    def run(function: Callable[[], Any]) -> Any:
        ready.wait(timeout=60)
        return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result() for future in [pool.submit(run, f) for f in functions]]


def images(pipe: Any, **call: Any) -> torch.Tensor:
    return pipe(**{**call_kwargs("sd"), **call}).images.cpu()


def on_device(pipe: Any) -> list[str]:
    return [
        f"{name}.{path}"
        for name, module in pipe.components.items()
        if isinstance(module, nn.Module)
        for path, tensor in module.state_dict(keep_vars=True).items()
        if tensor.device.type != "cpu"
    ]


def test_threads_that_call_one_pipeline_take_turns() -> None:
    prompts = ["a red circle", "a blue square", "a line"]
    expected = [images(tiny("sd"), prompt=prompt) for prompt in prompts]
    pipe = tiny("sd")
    greenroom.enable_model_cpu_offload(pipe, device="sim")

    def calls(prompt: str) -> Callable[[], list[torch.Tensor]]:
        # A scheduler counts its steps in itself: calls that ran at once would spoil each other's.
        return lambda: [images(pipe, prompt=prompt) for _ in range(2)]

    for found, right in zip(together([calls(p) for p in prompts]), expected, strict=True):
        assert all(torch.equal(made, right) for made in found)
    assert on_device(pipe) == []
    assert sim.races() == []


def test_threads_that_call_pipelines_with_common_components_take_turns() -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe = tiny("sd")
    other = StableDiffusionImg2ImgPipeline(
        **{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)},
        requires_safety_checker=False,
    )
    other.set_progress_bar_config(disable=True)
    call = {
        "prompt": "a circle",
        "image": picture(32),
        "strength": 0.5,
        "num_inference_steps": 4,
        "output_type": "pt",
    }

    def second() -> torch.Tensor:
        return other(**call, generator=torch.Generator().manual_seed(1)).images.cpu()

    expected = images(pipe), second()
    for p in (pipe, other):
        greenroom.enable_model_cpu_offload(p, device="sim")
    found = together(
        [lambda: [images(pipe) for _ in range(3)], lambda: [second() for _ in range(3)]]
    )
    for pictures, right in zip(found, expected, strict=True):
        assert all(torch.equal(made, right) for made in pictures)
    assert on_device(pipe) == [] and on_device(other) == []
    assert sim.races() == []


def test_what_another_thread_asks_for_waits_until_the_call_has_ended() -> None:
    pipe = tiny("sd")
    expected = images(pipe)
    greenroom.enable_model_cpu_offload(pipe, device="sim")

    def ask() -> None:
        for _ in range(6):
            greenroom.offload_now(pipe)
            greenroom.enable_model_cpu_offload(pipe, device="sim")  # as loaders of adapters do

    found, _ = together([lambda: [images(pipe) for _ in range(3)], ask])
    assert all(torch.equal(made, expected) for made in found)
    assert on_device(pipe) == []


def test_threads_that_call_components_by_hand_do_not_take_each_others_weights() -> None:
    """No pipeline's call is around these: each forward has to hold on to its weights by itself."""
    parts: dict[str, nn.Module] = {
        name: nn.Sequential(*[nn.Linear(48, 48) for _ in range(12)]) for name in "abc"
    }
    x = torch.randn(8, 48)
    with torch.no_grad():
        expected = {name: part(x) for name, part in parts.items()}
    greenroom.enable_model_cpu_offload(parts, device="sim", sequence="a->b->c")

    def calls(name: str) -> Callable[[], list[torch.Tensor]]:
        def run() -> list[torch.Tensor]:
            with torch.no_grad():
                return [parts[name](x).cpu() for _ in range(20)]

        return run

    for name, found in zip("abc", together([calls(n) for n in "abc"]), strict=True):
        assert all(torch.equal(y, expected[name]) for y in found)
    greenroom.offload_now(parts)
    assert all(p.is_cpu for part in parts.values() for p in part.parameters())
    greenroom.disable_model_cpu_offload(parts)


def test_a_thread_calls_components_by_hand_while_the_pipeline_is_at_work() -> None:
    pipe = tiny("sd")
    expected = images(pipe)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        right = pipe.vae.decode(z).sample
    greenroom.enable_model_cpu_offload(pipe, device="sim")

    def decode() -> list[torch.Tensor]:
        with torch.no_grad():
            return [pipe.vae.decode(z).sample.cpu() for _ in range(6)]

    pictures, decoded = together([lambda: [images(pipe) for _ in range(3)], decode])
    assert all(torch.equal(made, expected) for made in pictures)
    assert all(torch.equal(made, right) for made in decoded)
    greenroom.offload_now(pipe)
    assert on_device(pipe) == []


def test_a_forward_that_raises_on_one_thread_does_not_hold_up_the_others() -> None:
    parts: dict[str, nn.Module] = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}
    greenroom.enable_model_cpu_offload(parts, device="sim", sequence="a->b")
    x = torch.randn(2, 8)

    def fail() -> int:
        failures = 0
        for _ in range(5):
            try:
                parts["a"](torch.randn(2, 9))
            except RuntimeError:
                failures += 1
        return failures

    def work() -> list[torch.Tensor]:
        with torch.no_grad():
            return [parts["b"](x).cpu() for _ in range(5)]

    failures, found = together([fail, work])
    assert failures == 5 and all(torch.equal(y, found[0]) for y in found)
    greenroom.offload_now(parts)
    assert all(p.is_cpu for part in parts.values() for p in part.parameters())
    greenroom.disable_model_cpu_offload(parts)
