"""Rules C1 to C8 of `enable_model_cpu_offload`: what enabling it does, and what it refuses."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import types
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from offload.own import Chain, is_hooked, result
from offload.presence import modules, nbytes, on_device, presence
from pipelines.catalogue import CATALOGUE, run
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.zoo.tiny import tiny

pytestmark = pytest.mark.usefixtures("quick_collections")

enable, disable = greenroom.enable_model_cpu_offload, greenroom.disable_model_cpu_offload


# ---- C1: everything goes home and the cache is cleared, then the hooks are placed


@pytest.mark.parametrize("where", ["at home", "on the device", "in part on another device"])
def test_c1_everything_is_home_and_the_cache_is_empty_before_the_first_hook(
    where: str, monkeypatch: pytest.MonkeyPatch, two_devices: None
) -> None:
    pipe = tiny("sdxl")
    before = {n: (p, p.clone()) for m in modules(pipe).values() for n, p in m.named_parameters()}
    if where == "on the device":
        pipe.to("sim")
    elif where == "in part on another device":
        pipe.unet.to("sim:1")
        pipe.vae.decoder.to("sim:0")
    torch.empty(2**20, device="sim")  # freed at once: what the allocator caches from now on
    assert torch.sim.memory_reserved() >= 4 * 2**20
    found = []
    add_hook_to_module = accelerate.hooks.add_hook_to_module

    def note(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        found.append((on_device(pipe), torch.sim.memory_reserved(), is_hooked(module)))
        return add_hook_to_module(module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks, "add_hook_to_module", note)
    enable(pipe)
    assert found == [([], 0, False)] * 4
    assert all(map(is_hooked, modules(pipe).values()))
    after = {n: p for m in modules(pipe).values() for n, p in m.named_parameters()}
    assert all(after[n] is p and torch.equal(p, value) for n, (p, value) in before.items())


@pytest.mark.parametrize("how", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_c1_what_diffusers_had_offloaded_comes_home_first(how: str) -> None:
    pipe, expected = tiny("sd"), result(tiny("sd"))
    getattr(pipe, how)(device="sim")
    if how == "enable_model_cpu_offload":
        pipe.unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 7, 32))  # leaves the UNet there
        assert on_device(pipe)
    enable(pipe)
    assert on_device(pipe) == []
    assert torch.equal(result(pipe), expected)


# ---- C2: the sequence


def test_c2_the_sequence_gives_the_order() -> None:
    pipe = tiny("sd")
    assert list(modules(pipe)) == ["vae", "text_encoder", "unet"]
    enable(pipe)
    assert [hook.model for hook in pipe._all_hooks] == [pipe.text_encoder, pipe.unet, pipe.vae]
    enable(pipe, sequence=["unet", "vae", "text_encoder"])
    assert [hook.model for hook in pipe._all_hooks] == [pipe.unet, pipe.vae, pipe.text_encoder]


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ("txt_encoder->unet->vae", "'txt_encoder', .*did you mean 'text_encoder'"),
        ("text_encoder->vae-unet", "'vae-unet', .*did you mean 'vae->unet'"),
        ("text_encoder->unet->vae->refiner", "'refiner', which is no component of it. The name is"),
    ],
)
def test_c2_names_that_are_no_component_are_skipped_with_the_near_miss(
    sequence: str, message: str
) -> None:
    pipe, expected = tiny("sd"), result(tiny("sd"))
    with pytest.warns(UserWarning, match=message):
        enable(pipe, sequence=sequence)
    assert all(map(is_hooked, modules(pipe).values()))
    assert torch.equal(result(pipe), expected)


def test_c2_a_shipped_sequence_with_a_misspelt_name_is_told_what_it_means() -> None:
    pipe = CATALOGUE["kolors-img2img"].build()
    with pytest.warns(UserWarning, match="did you mean 'image_encoder->unet'"):
        enable(pipe)


def test_c2_a_component_that_is_not_there_is_no_misspelling(
    recwarn: pytest.WarningsRecorder,
) -> None:
    pipe = tiny("wan")
    assert "transformer_2" in pipe.model_cpu_offload_seq and pipe.transformer_2 is None
    enable(pipe)
    pipe = tiny("sd")
    enable(pipe, sequence="")
    assert [str(warning.message) for warning in recwarn if warning.category is UserWarning] == []
    assert all(map(is_hooked, modules(pipe).values()))


def test_c2_a_pipeline_without_a_sequence_is_told_what_to_do() -> None:
    pipe = tiny("sd")
    pipe.model_cpu_offload_seq = None
    for it in ({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}, pipe):
        names = "->".join(modules(it))
        with pytest.raises(ValueError, match=f"does not say in which order.*sequence='{names}'"):
            enable(it)
        assert not any(map(is_hooked, modules(it).values()))
        enable(it, sequence=names)


# ---- C3: only the component at work is on the device

# ControlNets are not alone: each is called in turn with the UNet, and both stay.
ALONE = ["sd", "sd-img2img", "sdxl", "sdxl-ip-adapter", "stable-video", "sd3", "flux-img2img"]
ALONE += ["wan2.2", "cogvideox-fun-control", "kolors-img2img", "stable-cascade"]


@pytest.mark.parametrize("name", ALONE)
def test_c3_only_the_component_at_work_is_on_the_device(name: str) -> None:
    case, seen = CATALOGUE[name], []
    for place in (lambda pipe: pipe.to("sim"), enable):
        pipe = case.build()
        sizes = {part: nbytes(module) for part, module in modules(pipe).items()}
        gc.collect()
        start = torch.sim.memory_allocated()
        place(pipe)
        with presence(pipe) as found:
            run(case, pipe)
        seen.append({part: used - start for part, used in found.nbytes.items()})
        del pipe
    everything, alone = seen
    assert found.together == {part: set() for part in everything}
    # The same activations: what the components that wait take up is what there is less of.
    for part, used in alone.items():
        assert used <= everything[part] - (sum(sizes.values()) - sizes[part]), part


def test_c3_a_controlnet_is_beside_the_unet_and_nothing_else() -> None:
    case = CATALOGUE["sd-controlnet"]
    pipe = case.build()
    enable(pipe)
    with presence(pipe) as found:
        run(case, pipe)
    assert found.together == {
        "text_encoder": set(),
        "controlnet": {"unet"},
        "unet": {"controlnet"},
        "vae": set(),
    }


# ---- C4: components outside the sequence


def test_c4_what_is_excluded_goes_to_the_device_and_stays() -> None:
    case = CATALOGUE["sd-safety-checker"]
    pipe = case.build()
    expected = run(case, case.build())
    enable(pipe)
    checker = pipe.safety_checker
    assert len(on_device(checker)) == len(list(checker.parameters())) + len(list(checker.buffers()))
    places = [p.data_ptr() for p in checker.parameters()]
    for _ in range(2):
        assert torch.equal(run(case, pipe), expected)
        assert {name.split(".")[0] for name in on_device(pipe)} == {"safety_checker"}
    greenroom.offload_now(pipe)
    enable(pipe)
    assert [p.data_ptr() for p in checker.parameters()] == places
    assert not hasattr(checker, "_hf_hook")
    pipe.safety_checker = case.build().safety_checker  # the new one is kept, the old one is not
    assert torch.equal(run(case, pipe), expected)
    assert on_device(pipe.safety_checker) and on_device(checker) == []
    disable(pipe)
    assert on_device(pipe) == []


def test_c4_what_is_excluded_and_in_the_sequence_is_hooked() -> None:
    pipe = Chain()
    pipe._exclude_from_cpu_offload = ["second"]
    enable(pipe)
    assert is_hooked(pipe.second) and on_device(pipe.second) == []


def test_c4_every_other_component_gets_a_hook_of_its_own() -> None:
    case = CATALOGUE["sd-controlnet"]
    pipe = case.build()
    enable(pipe)
    hooks = [module._hf_hook for module in modules(pipe).values()]
    assert "controlnet" not in pipe.model_cpu_offload_seq and len(set(map(id, hooks))) == 4
    assert {id(hook.hook) for hook in pipe._all_hooks} == set(map(id, hooks))
    x = torch.randn(1, 4, 8, 8)
    pipe.controlnet(x, 1, torch.randn(1, 7, 32), torch.randn(1, 3, 16, 16), return_dict=False)
    assert {name.split(".")[0] for name in on_device(pipe)} == {"controlnet"}
    pipe.maybe_free_model_hooks()
    assert on_device(pipe) == []


# ---- C5: bitsandbytes in 8 bit


def versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    version = importlib.metadata.version

    def pretend(package: str) -> str:
        return installed.get(package) or version(package)

    monkeypatch.setattr(importlib.metadata, "version", pretend)


@pytest.mark.parametrize(
    ("transformers", "bitsandbytes", "moves"),
    [("4.57.6", "0.48.0", False), ("4.58.0", "0.47.0", False), ("4.58.0", "0.48.0", True)],
)
def test_c5_an_8_bit_component_that_cannot_be_moved_is_left_where_it_is(
    transformers: str,
    bitsandbytes: str,
    moves: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    versions(monkeypatch, transformers=transformers, bitsandbytes=bitsandbytes)
    pipe, expected = tiny("sd"), result(tiny("sd"))
    pipe.unet.to("sim").is_loaded_in_8bit = True  # quantised where it was loaded: on the device
    places = [p.data_ptr() for p in pipe.unet.parameters()]
    with caplog.at_level(logging.INFO, "greenroom"):
        enable(pipe)
    said = [message for message in caplog.messages if "unet stays where it is" in message]
    assert is_hooked(pipe.unet) is moves and bool(said) is not moves
    assert all(map(is_hooked, (pipe.vae, pipe.text_encoder)))
    for _ in range(2):
        assert torch.equal(result(pipe), expected)
        assert bool(on_device(pipe.unet)) is not moves
        assert on_device(pipe.vae) == on_device(pipe.text_encoder) == []
    disable(pipe)
    if not moves:
        assert [p.data_ptr() for p in pipe.unet.parameters()] == places
        assert "transformers >= 4.58 and bitsandbytes >= 0.48 can" in said[0]


# ---- C6: what something else places is refused


def group(part: nn.Module, **options: Any) -> None:
    diffusers.hooks.apply_group_offloading(part, onload_device=torch.device("sim"), **options)


CONFLICTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "a device map": (
        lambda pipe: setattr(pipe, "hf_device_map", {"unet": 0, "vae": "cpu"}),
        r"a device map places .*\(unet, vae\): call pipe.reset_device_map\(\) first",
    ),
    "group offload by leaves": (
        lambda pipe: group(pipe.unet, offload_type="leaf_level"),
        "unet is group-offloaded",
    ),
    "group offload by blocks": (
        lambda pipe: group(
            pipe.text_encoder, offload_type="block_level", num_blocks_per_group=1, use_stream=True
        ),
        "text_encoder is group-offloaded",
    ),
    "tensor parallelism": (
        lambda pipe: setattr(
            pipe.unet, "_parallel_config", types.SimpleNamespace(tensor_parallel_config=object())
        ),
        "unet is sharded with tensor parallelism",
    ),
}


@pytest.mark.parametrize("conflict", CONFLICTS)
def test_c6_a_pipeline_that_something_else_places_is_refused_untouched(conflict: str) -> None:
    pipe = tiny("sd")
    place, message = CONFLICTS[conflict]
    place(pipe)
    before = {n: t.data_ptr() for n, t in pipe.vae.named_parameters()}, set(vars(pipe))
    with pytest.raises(ValueError, match=message):
        enable(pipe)
    assert ({n: t.data_ptr() for n, t in pipe.vae.named_parameters()}, set(vars(pipe))) == before
    assert not any(hasattr(module, "_hf_hook") for module in modules(pipe).values())


def test_c6_after_reset_device_map_it_is_offloaded() -> None:
    pipe, expected = tiny("sd"), result(tiny("sd"))
    pipe.hf_device_map = {"unet": 0, "vae": "cpu"}
    pipe.reset_device_map()
    enable(pipe)
    assert torch.equal(result(pipe), expected)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, {}])
def test_c6_a_map_to_one_place_is_none(device_map: Any) -> None:
    pipe = tiny("sd")
    pipe.hf_device_map = device_map
    enable(pipe)
    assert pipe._execution_device == torch.device("sim:0")


# ---- C7: indices and devices


def test_c7_what_cannot_be_meant_is_refused_before_anything_is_touched(two_devices: None) -> None:
    pipe = tiny("sd")
    for error, message, arguments in (
        (ValueError, "gpu_id=1 and device='sim:1' both give an index", (1, "sim:1")),
        (ValueError, "gpu_id=0 and device='sim:0' both give an index", (0, "sim:0")),
        (ValueError, "device='cpu' is no place to offload to", (None, "cpu")),
        (ValueError, "device='cpu' is no place to offload to", (0, torch.device("cpu"))),
        (ValueError, "gpu_id=-1 is no device's index", (-1,)),
        (ValueError, "gpu_id='8GiB' is no device's index, which is a number", ("8GiB",)),
        (RuntimeError, "device='cuda' was asked for, and torch finds no such", (None, "cuda")),
        (RuntimeError, "device='meta' was asked for, and torch finds no such", (None, "meta")),
    ):
        with pytest.raises(error, match=message):
            enable(pipe, *arguments)
        assert not any(hasattr(module, "_hf_hook") for module in modules(pipe).values())
        assert not hasattr(pipe, "_offload_device")


def test_c7_an_explicit_index_is_what_it_says_whatever_was_before(two_devices: None) -> None:
    pipe, expected = tiny("sd"), result(tiny("sd"))
    for gpu_id, device, index in (
        (1, None, 1),
        (0, None, 0),
        (1, "sim", 1),
        (None, "sim:0", 0),
        (None, torch.device("sim", 1), 1),
        (None, None, 1),  # nothing said: the one from before
        (None, "cpu", 1),  # what textual inversion passes by mistake
        (None, "sim", 0),
    ):
        enable(pipe, gpu_id, device)
        assert pipe._execution_device == pipe._offload_device == torch.device("sim", index)
        assert pipe._offload_gpu_id == index
        with sim.measure(index) as cost, sim.measure(1 - index) as other:
            assert torch.equal(result(pipe), expected)
        assert cost.h2d_bytes > nbytes(pipe.unet) and other.h2d_bytes == other.kernels == 0


def test_c7_an_index_that_the_machine_lacks_is_warned_of_and_fails_clearly() -> None:
    pipe, expected = tiny("sd"), result(tiny("sd"))
    with pytest.warns(UserWarning, match="There is no device sim:5: torch finds 1 of type sim"):
        enable(pipe, gpu_id=5)
    pipe.maybe_free_model_hooks()
    assert pipe._offload_gpu_id == 5  # as diffusers' own tests want it, on one device
    with pytest.raises(RuntimeError, match="There is no device sim:5: torch finds 1 of type sim"):
        result(pipe)
    enable(pipe, gpu_id=0)
    assert torch.equal(result(pipe), expected)


# ---- C8: the accelerator is found


@pytest.mark.parametrize(
    "way",
    [
        enable,
        lambda pipe: pipe.enable_model_cpu_offload(),
        lambda pipe: enable(pipe, 0),
        lambda pipe: enable(pipe, None, None),
    ],
)
def test_c8_the_accelerator_is_found_without_being_named(way: Any, installed: None) -> None:
    for pipe in (tiny("sd"), Chain()):
        way(pipe)
        hooks = [module._hf_hook for module in modules(pipe).values()]
        assert {hook.execution_device for hook in hooks} == {torch.device("sim:0")}


def test_c8_without_an_accelerator_there_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **options: None)
    pipe = tiny("sd")
    with pytest.raises(RuntimeError, match="needs an accelerator and torch finds none"):
        enable(pipe)
    assert not any(hasattr(module, "_hf_hook") for module in modules(pipe).values())
