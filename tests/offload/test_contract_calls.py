"""Rules C9 to C12 of `enable_model_cpu_offload`: what holds while pipelines run, and after."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import pytest
import torch
from offload.own import Bag, Chain, is_hooked, result
from offload.presence import modules, on_device, presence
from pipelines.catalogue import CATALOGUE, run
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.zoo.tiny import tiny

pytestmark = pytest.mark.usefixtures("quick_collections")

enable, disable = greenroom.enable_model_cpu_offload, greenroom.disable_model_cpu_offload


# ---- C9: accelerate's hooks; what diffusers' loaders make of them is in test_touch_points.py


@pytest.mark.parametrize("version", ["0.16.0", "0.15.0.dev0"])
def test_c9_an_older_accelerate_is_an_import_error_that_says_so(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny("sd")
    monkeypatch.setattr(accelerate, "__version__", version)
    with pytest.raises(ImportError, match=f"needs accelerate 0.17.0 or newer, and {version} is"):
        enable(pipe)
    assert not any(hasattr(module, "_hf_hook") for module in modules(pipe).values())
    monkeypatch.setattr(accelerate, "__version__", "0.17.0")
    enable(pipe)


@pytest.mark.parametrize("found", ["__version__ = '0.16.0'", "raise ModuleNotFoundError"])
def test_c9_accelerate_without_what_we_need_is_the_same_import_error(
    found: str, tmp_path: Path
) -> None:
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "__init__.py").write_text(found)
    script = (
        "import greenroom, torch\n"
        "try: greenroom.enable_model_cpu_offload({'a': torch.nn.Linear(2, 2)}, sequence='a')\n"
        "except ImportError as error: print(error)"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(greenroom.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("offloading needs accelerate 0.17.0 or newer")


def test_c9_the_hooks_are_what_accelerate_and_diffusers_look_for() -> None:
    pipe = tiny("sdxl")
    device = torch.device("sim:0")
    enable(pipe, device="sim")
    for name, module in modules(pipe).items():
        hook = module._hf_hook
        assert isinstance(hook, accelerate.hooks.ModelHook), name
        assert isinstance(hook, accelerate.hooks.CpuOffload), name
        assert hook.execution_device == device and not hasattr(hook, "hooks")
        assert module.forward.__wrapped__ == module._old_forward
    assert pipe._execution_device == device and pipe.device.type == "cpu"
    seen = []
    pipe.unet.register_forward_hook(lambda *args: seen.append(pipe._execution_device))
    result(pipe, "sdxl")
    assert seen == [device, device] and pipe._execution_device == device
    assert all(isinstance(h, accelerate.hooks.UserCpuOffloadHook) for h in pipe._all_hooks)
    pipe._all_hooks[2].model(
        torch.randn(1, 4, 8, 8),
        1,
        torch.randn(1, 7, 64),
        added_cond_kwargs={"text_embeds": torch.randn(1, 32), "time_ids": torch.ones(1, 6)},
    )
    assert pipe._all_hooks[2].model is pipe.unet and on_device(pipe.unet)
    pipe._all_hooks[2].offload()
    assert on_device(pipe) == []


def test_c9_decorated_methods_bring_the_component_and_nothing_else() -> None:
    pipe, plain = tiny("sdxl"), tiny("sdxl")
    enable(pipe)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad(), presence(pipe) as found:
        picture = pipe.vae.decode(z.to(pipe._execution_device)).sample
        again = pipe.vae.encode(picture).latent_dist.mode()
        expected = plain.vae.decode(z).sample
    assert torch.equal(picture.cpu(), expected)
    assert torch.equal(again.cpu(), plain.vae.encode(expected).latent_dist.mode())
    assert found.together == {"vae": set()}
    pipe.maybe_free_model_hooks()
    assert on_device(pipe) == []


def test_c9_maybe_free_model_hooks_sends_home_and_keeps_the_hooks() -> None:
    pipe, expected = tiny("sd"), result(tiny("sd"))
    pipe.maybe_free_model_hooks()
    assert not hasattr(pipe, "_all_hooks")  # without offloading it does nothing
    enable(pipe)
    pipe.encode_prompt("a square", pipe._execution_device, 1, True)
    assert {name.split(".")[0] for name in on_device(pipe)} == {"text_encoder"}
    reset = []
    pipe.unet._reset_stateful_cache = lambda: reset.append(True)
    pipe.maybe_free_model_hooks()
    assert on_device(pipe) == [] and reset == [True]
    assert all(map(is_hooked, modules(pipe).values())) and len(pipe._all_hooks) == 3
    assert torch.equal(result(pipe), expected)


def test_c9_remove_all_hooks_ends_offloading() -> None:
    pipe, expected = tiny("sd"), result(tiny("sd"))
    enable(pipe)
    pipe.encode_prompt("a square", pipe._execution_device, 1, True)
    pipe.remove_all_hooks()
    assert on_device(pipe) == [] and pipe._all_hooks == []
    assert not any(hasattr(module, "_hf_hook") for module in modules(pipe).values())
    assert pipe._execution_device == torch.device("cpu")
    with sim.measure() as cost:
        assert torch.equal(result(pipe), expected)
    assert cost.kernels == 0
    enable(pipe)
    assert torch.equal(result(pipe), expected) and pipe._execution_device.type == "sim"


@pytest.mark.parametrize("recurse", [False, True])
def test_c9_a_hook_that_accelerate_removes_is_gone_until_the_next_call(recurse: bool) -> None:
    pipe, expected = tiny("sd"), result(tiny("sd"))
    enable(pipe)
    pipe.unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 7, 32))
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=recurse)
    assert on_device(pipe.unet) == [] and not hasattr(pipe.unet, "_hf_hook")
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())
    assert torch.equal(result(pipe), expected)
    assert is_hooked(pipe.unet) and on_device(pipe) == []


# ---- C10: inputs


Pair = namedtuple("Pair", "left right")


class Sum(nn.Module):
    """Adds up its weight and whatever tensors it finds in its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        flat, total = [args, kwargs], self.weight
        while flat:
            value = flat.pop()
            if isinstance(value, torch.Tensor):
                total = total + value
            elif isinstance(value, dict):
                flat.extend(value.values())
            elif isinstance(value, (list, tuple)):
                flat.extend(value)
        return total


INPUTS: dict[str, Callable[[torch.Tensor], tuple[tuple[Any, ...], dict[str, Any]]]] = {
    "positional": lambda x: ((x,), {}),
    "by keyword": lambda x: ((), {"x": x}),
    "nested": lambda x: (([x, (x, {"a": x})],), {"b": {"c": [x]}}),
    "a named tuple": lambda x: ((Pair(x, None),), {}),
    "a model's output": lambda x: ((), {"o": diffusers.utils.BaseOutput(sample=x)}),
    "beside other things": lambda x: ((1, "a", None, x), {"scale": 2.0, "flag": True}),
}


@pytest.mark.parametrize("shape", INPUTS)
def test_c10_inputs_reach_the_device_on_every_call(shape: str) -> None:
    pipe = {"sum": Sum(), "other": nn.Linear(3, 3)}
    expected = Sum()(*INPUTS[shape](torch.arange(3.0))[0], **INPUTS[shape](torch.arange(3.0))[1])
    enable(pipe, sequence="sum->other")
    for turn in range(4):
        if turn == 2:
            greenroom.offload_now(pipe)
        args, kwargs = INPUTS[shape](torch.arange(3.0, device="sim" if turn == 3 else "cpu"))
        y = pipe["sum"](*args, **kwargs)
        assert y.device == torch.device("sim:0") and torch.equal(y.cpu(), expected)


def test_c10_inputs_that_are_there_are_passed_as_they_are() -> None:
    class Same(nn.Linear):
        def forward(self, x: Any, extra: Any) -> Any:
            return x, extra

    pipe = {"same": Same(2, 2)}
    enable(pipe, sequence="same")
    x, extra = torch.ones(2, device="sim"), {"a": [torch.ones(2, device="sim"), "text"]}
    for _ in range(2):
        assert all(a is b for a, b in zip(pipe["same"](x, extra), (x, extra), strict=True))


@pytest.mark.parametrize("method", ["decode", "encode"])
def test_c10_a_decorated_method_gets_its_inputs_to_the_device_on_every_call(method: str) -> None:
    pipe, plain = tiny("sd"), tiny("sd")
    enable(pipe)
    x = torch.randn(1, 4, 8, 8) if method == "decode" else torch.randn(1, 3, 16, 16)
    expected = getattr(plain.vae, method)(x, return_dict=False)[0]
    for _ in range(3):
        found = getattr(pipe.vae, method)(x, return_dict=False)[0]
        if method == "encode":
            expected, found = (getattr(it, "parameters", it) for it in (expected, found))
        assert found.device.type == "sim" and torch.equal(found.cpu(), expected)


@torch.no_grad()
def test_c10_so_they_do_for_a_layer_that_is_called_by_itself() -> None:
    pipe, plain, ids = tiny("sd"), tiny("sd"), torch.arange(5)[None]
    enable(pipe)
    expected = plain.text_encoder.get_input_embeddings()(ids)
    for _ in range(3):
        found = pipe.text_encoder.get_input_embeddings()(ids)
        assert found.device.type == "sim" and torch.equal(found.cpu(), expected)


@pytest.mark.parametrize(
    ("bare", "width"),
    [
        (nn.Identity(), 8),
        (nn.Upsample(scale_factor=2), 16),
        (nn.Sequential(nn.SiLU(), nn.Flatten()), 8),
        (nn.BatchNorm1d(1, affine=False, track_running_stats=False), 8),
        (nn.BatchNorm1d(1, affine=False).eval(), 8),  # buffers only
    ],
)
def test_c10_a_module_without_parameters_is_no_error(bare: nn.Module, width: int) -> None:
    pipe, x = Chain(first=bare, second=nn.Linear(width, 8)), torch.randn(2, 1, 8)
    expected = pipe(x)
    pipe.enable_model_cpu_offload()
    for _ in range(2):
        assert torch.equal(pipe(x).cpu(), expected)
        assert on_device(pipe) == []
    pipe.disable_model_cpu_offload()  # the parameter outlives the test, with what it has locked


# ---- C11: home after the call; undone


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.Tensor], str]] = {
    "with the mixin": (Chain, lambda pipe: pipe(torch.ones(1, 8)).cpu(), "second"),
    "an object": (Bag, lambda pipe: pipe(torch.ones(1, 8)).cpu(), "second"),
    "of diffusers": (lambda: tiny("sd"), result, "vae.decoder.conv_out"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_c11_everything_is_home_after_a_call_however_it_ended(
    kind: str, error: type[BaseException]
) -> None:
    build, call, last = KINDS[kind]
    pipe = build()
    expected = call(pipe)
    enable(pipe)
    assert torch.equal(call(pipe), expected)
    assert on_device(pipe) == []

    def fail(*args: Any) -> None:
        assert on_device(pipe)
        raise error("in the middle of a call")

    name, _, path = last.partition(".")
    for module in (getattr(pipe, name).get_submodule(path), modules(pipe)[name]):
        hook = module.register_forward_hook(fail)
        if kind == "of diffusers" and module is modules(pipe)[name]:
            hook.remove()  # nobody calls the forward of a whole autoencoder
            continue
        with pytest.raises(error):
            call(pipe)
        hook.remove()
        gc.collect()
        assert on_device(pipe) == []
        assert torch.equal(call(pipe), expected)
    assert sim.races() == []


def anatomy(module: nn.Module) -> dict[str, Any]:
    """What others can see of a module: its tensors and how they lie, its forwards, its hooks."""
    seen: dict[str, Any] = {}
    storages: dict[int, str] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    full = f"{path}.{key}"
                    seen[full] = tensor if tensor is None else look(tensor, full, storages)
            elif name != "_modules":
                seen[f"{path}.{name}"] = dict(value) if isinstance(value, dict) else value
    return seen


def look(tensor: torch.Tensor, path: str, storages: dict[int, str]) -> tuple[Any, ...]:
    storage = tensor.untyped_storage()
    shared_with = storages.setdefault(storage.data_ptr(), path)
    kind = (tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad)
    return id(tensor), kind, storage.nbytes(), tensor.storage_offset(), shared_with


@pytest.mark.parametrize("runs", [0, 1, 3])
def test_c11_disable_gives_the_pipeline_back_exactly_as_it_was(runs: int) -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    pipe = tiny("sdxl")
    unet, forward, calls = pipe.unet, pipe.unet.forward, []
    unet.forward = lambda *args, **kwargs: [calls.append("theirs"), forward(*args, **kwargs)][1]
    unet.mid_block.register_forward_hook(lambda *args: calls.append("hook"))
    pipe.vae.register_forward_pre_hook(lambda *args: calls.append("pre"))
    HookRegistry.check_if_exists_or_initialize(pipe.text_encoder).register_hook(ModelHook(), "own")
    expected = result(pipe, "sdxl")
    before = {name: anatomy(module) for name, module in modules(pipe).items()}
    places = [p.data_ptr() for module in modules(pipe).values() for p in module.parameters()]
    attributes, alone = set(vars(pipe)), len(calls)
    assert alone == 4
    enable(pipe)
    for _ in range(runs):
        assert torch.equal(result(pipe, "sdxl"), expected)
    with torch.no_grad():
        pipe.vae.decode(torch.randn(1, 4, 8, 8))  # leaves it on the device
    disable(pipe)
    disable(pipe)  # once more does no harm
    for name, module in modules(pipe).items():
        assert anatomy(module) == before[name], name
    if runs == 0:  # nothing has been page-locked, so nothing has been moved
        assert places == [p.data_ptr() for m in modules(pipe).values() for p in m.parameters()]
    assert set(vars(pipe)) == attributes
    assert pipe._execution_device == torch.device("cpu")
    assert torch.equal(result(pipe, "sdxl"), expected) and len(calls) == alone * (runs + 2)
    gc.collect()
    torch.sim.empty_cache()
    assert torch.sim.memory_allocated() == 0


# ---- C12: the same bits


SAME = ["sdxl", "sd-inpaint", "sdxl-controlnet", "flux", "wan2.2", "stable-video", "audioldm2"]
SAME += ["kandinsky2.2-combined", "sdxl-ip-adapter", "cogvideox"]


@pytest.mark.parametrize("name", SAME)
def test_c12_the_bits_are_those_of_the_pipeline_wholly_on_the_device(name: str) -> None:
    case = CATALOGUE[name]
    resident = case.build().to("sim")
    expected = [run(case, resident) for _ in range(2)]
    del resident
    pipe = case.build()
    enable(pipe)
    assert all(torch.equal(run(case, pipe), picture) for picture in expected)
    assert sim.races() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_c12_also_in_half_precision(dtype: torch.dtype) -> None:
    expected = result(tiny("sdxl", dtype=dtype).to("sim"), "sdxl")
    pipe = tiny("sdxl", dtype=dtype)
    enable(pipe)
    assert all(torch.equal(result(pipe, "sdxl"), expected) for _ in range(2))
