"""Rule C9 where diffusers' loaders, casts and other offloading touch an offloaded pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import peft
import pytest
import torch
from offload.own import is_hooked, result
from offload.presence import modules, on_device
from pipelines.catalogue import CATALOGUE, run

import greenroom
import greenroom.sim as sim
from greenroom.zoo.tiny import call_kwargs, tiny

pytestmark = pytest.mark.usefixtures("quick_collections")

enable = greenroom.enable_model_cpu_offload


def settled(pipe: Any, index: int = 0) -> bool:
    """Whether the pipeline is offloaded to that device and at rest."""
    hooked = all(map(is_hooked, modules(pipe).values()))
    devices = {module._hf_hook.execution_device for module in modules(pipe).values()}
    return hooked and on_device(pipe) == [] and devices == {torch.device("sim", index)}


# ---- adapters


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA for the tiny SDXL's UNet, as a folder."""
    folder, pipe = tmp_path_factory.mktemp("lora"), tiny("sdxl")
    pipe.unet.add_adapter(adapter(["to_q", "to_v"]))
    pipe.save_lora_weights(folder, unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet))
    return folder


def adapter(targets: list[str]) -> Any:
    return peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)


STEPS: dict[str, Callable[[Any, Path], Any]] = {
    "load": lambda pipe, lora: pipe.load_lora_weights(lora, adapter_name="style"),
    "fuse": lambda pipe, lora: pipe.fuse_lora(lora_scale=0.7),
    "unfuse": lambda pipe, lora: pipe.unfuse_lora(),
    "scale": lambda pipe, lora: pipe.set_adapters(["style"], [0.5]),
    "unload": lambda pipe, lora: pipe.unload_lora_weights(),
}


def test_c9_a_lora_is_loaded_fused_and_unloaded_as_without_offloading(
    lora: Path, two_devices: None
) -> None:
    plain, pipe = tiny("sdxl"), tiny("sdxl")
    enable(pipe, gpu_id=1)
    pictures = [result(plain, "sdxl")]
    assert torch.equal(result(pipe, "sdxl"), pictures[0])
    for step, change in STEPS.items():
        change(plain, lora), change(pipe, lora)
        assert settled(pipe, 1), step
        pictures.append(result(plain, "sdxl"))
        for _ in range(2):
            assert torch.equal(result(pipe, "sdxl"), pictures[-1]), step
    assert not any(torch.equal(picture, pictures[0]) for picture in pictures[1:4])
    assert sim.races() == []


def test_c9_a_lora_that_was_there_before_is_offloaded_with_its_model(lora: Path) -> None:
    plain, pipe = tiny("sdxl"), tiny("sdxl")
    for it in (plain, pipe):
        it.load_lora_weights(lora)
    enable(pipe)
    assert torch.equal(result(pipe, "sdxl"), result(plain, "sdxl")) and settled(pipe)


def test_c9_an_adapter_that_is_added_to_an_offloaded_model_runs_with_it() -> None:
    plain, pipe, pictures = tiny("sd"), tiny("sd"), []
    enable(pipe)
    first = result(pipe)
    for it in (plain, pipe):
        torch.manual_seed(0)
        it.text_encoder.add_adapter(adapter(["q_proj"]))
        it.unet.add_adapter(adapter(["to_k"]))
        pictures.append([result(it) for _ in range(2)])
    assert all(torch.equal(*pair) for pair in zip(*pictures, strict=True)) and settled(pipe)
    assert not torch.equal(pictures[0][0], first)


def test_c9_a_textual_inversion_keeps_the_device_although_it_names_the_cpu(
    two_devices: None,
) -> None:
    plain, pipe = tiny("sd"), tiny("sd")
    enable(pipe, gpu_id=1)
    result(pipe)
    learned = {"<round>": torch.randn(2, 32)}
    call = {**call_kwargs("sd"), "prompt": "a red <round> circle"}
    pictures = []
    for it in (plain, pipe):
        before = it(**call | {"generator": torch.Generator().manual_seed(0)}).images
        it.load_textual_inversion(learned, token="<round>")
        after = it(**call | {"generator": torch.Generator().manual_seed(0)}).images
        assert not torch.equal(before, after)
        pictures.append(after.cpu())
    assert torch.equal(*pictures) and settled(pipe, 1)
    pipe.unload_textual_inversion(), plain.unload_textual_inversion()
    assert torch.equal(result(pipe), result(plain)) and settled(pipe, 1)


# ---- other pipelines of the same components


def test_c9_pipelines_from_one_pipe_share_its_offloading() -> None:
    pipe, plain = tiny("sdxl"), tiny("sdxl")
    enable(pipe)
    kinds = (
        ("sdxl-img2img", diffusers.StableDiffusionXLImg2ImgPipeline),
        ("sdxl", diffusers.StableDiffusionXLPAGPipeline),
    )
    for name, cls in kinds:
        other, expected = cls.from_pipe(pipe), cls.from_pipe(plain)
        other.set_progress_bar_config(disable=True)
        assert other.unet is pipe.unet and other._execution_device == torch.device("sim:0")
        for _ in range(2):
            assert torch.equal(result(other, name), result(expected, name))
            assert settled(other)
            assert torch.equal(result(pipe, "sdxl"), result(plain, "sdxl"))
        enable(other)
        assert torch.equal(result(other, name), result(expected, name)) and settled(other)
    assert settled(pipe)


def test_c9_from_pipe_may_cast_the_shared_weights() -> None:
    pipe, plain = tiny("sd", dtype=torch.bfloat16), tiny("sd", dtype=torch.bfloat16)
    enable(pipe)
    assert torch.equal(result(pipe), result(plain))
    other, expected = (diffusers.StableDiffusionPAGPipeline.from_pipe(it) for it in (pipe, plain))
    assert pipe.unet.dtype == plain.unet.dtype == torch.float32
    assert torch.equal(result(other), result(expected))
    assert torch.equal(result(pipe), result(plain)) and settled(pipe)


# ---- moved, cast, saved, copied by hand


@pytest.mark.parametrize("device", ["sim", "sim:1", "cpu"])
@pytest.mark.parametrize("runs_before", [False, True])
def test_c9_a_pipeline_moved_by_hand_runs_and_comes_home(
    device: str, runs_before: bool, two_devices: None
) -> None:
    pipe, expected = tiny("sd"), result(tiny("sd"))
    enable(pipe)
    if runs_before:
        result(pipe)
    pipe.to(device)
    assert bool(on_device(pipe)) is (device != "cpu")
    for _ in range(2):
        assert torch.equal(result(pipe), expected)
        assert settled(pipe)
    pipe.to(device)
    greenroom.offload_now(pipe)
    assert settled(pipe)
    pipe.to(device)
    greenroom.disable_model_cpu_offload(pipe)
    assert on_device(pipe) == [] and torch.equal(result(pipe), expected)


def test_c9_a_pipeline_cast_by_hand_runs_in_the_new_type() -> None:
    pipe, plain = tiny("sd"), tiny("sd")
    enable(pipe)
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32):
        pipe.to(dtype), plain.to(dtype)
        for _ in range(2):
            assert torch.equal(result(pipe), result(plain))
            assert settled(pipe) and pipe.dtype == dtype


def test_c9_what_is_saved_is_what_was_loaded(tmp_path: Path) -> None:
    pipe, expected = tiny("sd"), result(tiny("sd"))
    enable(pipe)
    for runs in range(3):
        for where in ("at home", "on the device"):
            if where == "on the device":
                pipe.encode_prompt("a square", pipe._execution_device, 1, True)
                assert on_device(pipe)
            folder = tmp_path / f"{runs} {where}"
            pipe.save_pretrained(folder)
            loaded = diffusers.StableDiffusionPipeline.from_pretrained(folder)
            loaded.set_progress_bar_config(disable=True)
            assert torch.equal(result(loaded), expected)
        assert torch.equal(result(pipe), expected)


@pytest.mark.parametrize("where", ["at home", "on the device"])
def test_c9_a_component_can_be_copied_and_the_copy_used(where: str) -> None:
    pipe, plain = tiny("sd"), tiny("sd")
    inputs = torch.randn(1, 4, 8, 8), 1, torch.randn(1, 7, 32)
    with torch.no_grad():
        expected = plain.unet(*inputs).sample
        enable(pipe)
        if where == "on the device":
            pipe.unet(*inputs)
        unet = copy.deepcopy(pipe.unet)
        assert all(
            p is not q for p, q in zip(unet.parameters(), pipe.unet.parameters(), strict=True)
        )
        x, step, text = inputs  # the copy is nobody's: it runs where it was made
        found = unet(x.to(unet.device), step, text.to(unet.device)).sample
        assert torch.equal(found.cpu(), expected)
        pipe.unet = unet
        for _ in range(2):
            assert torch.equal(result(pipe), result(plain)) and settled(pipe)


# ---- other ways of offloading


def test_c9_sequential_offloading_takes_over_and_gives_back() -> None:
    pipe, expected = tiny("sd"), result(tiny("sd"))
    for _ in range(2):
        enable(pipe)
        assert torch.equal(result(pipe), expected) and settled(pipe)
        pipe.enable_sequential_cpu_offload(device="sim")
        kinds = {type(module._hf_hook) for module in modules(pipe).values()}
        assert accelerate.hooks.CpuOffload not in kinds and not any(
            issubclass(kind, accelerate.hooks.CpuOffload) for kind in kinds
        )
        assert torch.equal(result(pipe), expected)


def test_c9_group_offloading_refuses_what_is_offloaded() -> None:
    pipe = tiny("sd")
    enable(pipe)
    with pytest.raises(ValueError, match="already applying an alternative offloading"):
        pipe.unet.enable_group_offload(onload_device=torch.device("sim"), offload_type="leaf_level")
    assert torch.equal(result(pipe), result(tiny("sd")))


def test_c9_two_components_called_to_the_device_by_hand_can_work_in_turns() -> None:
    pipe, plain = tiny("sd"), tiny("sd")
    enable(pipe)
    z, ids = torch.randn(1, 4, 8, 8), torch.arange(5)[None]
    z_there, ids_there = z.to(pipe._execution_device), ids.to(pipe._execution_device)
    for module in (pipe.text_encoder, pipe.vae):
        module._hf_hook.pre_forward(module)
    with torch.no_grad():
        for _ in range(3):
            embedded = pipe.text_encoder.get_input_embeddings()(ids_there)
            assert torch.equal(embedded.cpu(), plain.text_encoder.get_input_embeddings()(ids))
            decoded = pipe.vae.post_quant_conv(z_there)
            assert torch.equal(decoded.cpu(), plain.vae.post_quant_conv(z))
    for module in (pipe.text_encoder, pipe.vae):
        module._hf_hook.post_forward(module, ())
    pipe.maybe_free_model_hooks()
    assert settled(pipe)


@pytest.mark.parametrize("name", ["modular-sdxl", "modular-flux"])
def test_c9_a_modular_pipeline_is_offloaded_when_told_the_order(name: str) -> None:
    case = CATALOGUE[name]
    expected, pipe = run(case, case.build()), case.build()
    enable(pipe, sequence=list(modules(pipe)))
    assert pipe._execution_device == torch.device("sim:0")
    for _ in range(2):
        assert torch.equal(run(case, pipe), expected) and settled(pipe)
