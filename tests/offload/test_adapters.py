"""Adapters, embeddings and components that come, change and go while a pipeline is offloaded.

Each scenario is a list of steps. It is played on a resident pipeline and on one that is offloaded
from the first, the second ... step on; after each step both are called and give the same bits, and
at the end their weights are the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.zoo.tiny import call_kwargs, picture, tiny

Step = Callable[[Any, Path], None]


def modules(pipe: Any) -> dict[str, nn.Module]:
    return {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}


def on_device(pipe: Any) -> list[str]:
    return [
        f"{name}.{path}"
        for name, module in modules(pipe).items()
        for path, tensor in module.state_dict(keep_vars=True).items()
        if tensor.device.type != "cpu"
    ]


def images(pipe: Any, name: str, **call: Any) -> torch.Tensor:
    return pipe(**{**call_kwargs(name), **call}).images.cpu()


def play(name: str, steps: list[Step], enable_at: int, folder: Path, **call: Any) -> None:
    resident, ours = tiny(name).to("sim"), tiny(name)
    for at, step in enumerate([lambda pipe, folder: None, *steps]):
        torch.manual_seed(at)
        step(resident, folder)
        if at == enable_at:
            greenroom.enable_model_cpu_offload(ours, device="sim")
        torch.manual_seed(at)
        step(ours, folder)
        if at < enable_at:
            continue
        expected = images(resident, name, **call)
        with sim.measure() as cost:
            found = images(ours, name, **call)
        assert torch.equal(found, expected), f"after step {at}"
        assert on_device(ours) == [], f"after step {at}"
        # The picture, and what schedulers and comparisons read: no weight comes back.
        assert cost.d2h_bytes <= expected.nbytes + 8192, f"after step {at}"
        assert cost.races == []
    weights = {n: m.state_dict() for n, m in modules(ours).items()}
    for part, module in modules(resident).items():
        state = module.state_dict()
        assert list(weights[part]) == list(state)
        for path, tensor in state.items():
            assert torch.equal(weights[part][path], tensor.cpu()), f"{part}.{path}"
    greenroom.disable_model_cpu_offload(ours)
    assert torch.equal(images(ours, name, **call), images(resident, name, **call))


# ---- LoRA
# -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters for the small Stable Diffusion: "a" and "b" plain, "dora" with magnitudes."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("loras")
    for seed, (name, options) in enumerate({"a": {}, "b": {}, "dora": {"use_dora": True}}.items()):
        pipe = tiny("sd")
        torch.manual_seed(seed)
        layers = {}
        for part, targets in {
            "unet": ["to_q", "to_k", "to_v", "to_out.0"],
            "text_encoder": ["q_proj", "v_proj"],
        }.items():
            module = getattr(pipe, part)
            module.add_adapter(
                LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **options)
            )
            layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
        StableDiffusionPipeline.save_lora_weights(folder / name, **layers)
    return folder


def load(which: str, **options: Any) -> Step:
    def step(pipe: Any, folder: Path) -> None:
        pipe.load_lora_weights(folder / which, adapter_name=which, **options)

    return step


def do(method: str, *args: Any, **kwargs: Any) -> Step:
    return lambda pipe, folder: getattr(pipe, method)(*args, **kwargs)


LORA = {
    "loaded and unloaded": [load("a"), do("unload_lora_weights")],
    "two, weighted, one deleted": [
        load("a"),
        load("b"),
        do("set_adapters", ["a", "b"], [0.5, 0.8]),
        do("delete_adapters", "a"),
    ],
    "switched off and on": [load("a"), do("disable_lora"), do("enable_lora")],
    "fused and unfused": [load("a"), do("fuse_lora", lora_scale=0.7), do("unfuse_lora")],
    "fused for good": [load("a"), do("fuse_lora"), do("unload_lora_weights"), load("b")],
    "with magnitudes": [load("dora"), do("set_adapters", "dora", 0.5), do("unload_lora_weights")],
}


@pytest.mark.parametrize("enable_at", [0, 1, 2])
@pytest.mark.parametrize("scenario", LORA)
def test_lora(scenario: str, enable_at: int, loras: Path) -> None:
    play("sd", LORA[scenario], enable_at, loras)


def test_lora_is_swapped_in_place(loras: Path) -> None:
    def swap(pipe: Any, folder: Path) -> None:
        # Text encoders refuse to be swapped; the UNet is what it is for.
        from safetensors.torch import load_file

        for file in (folder / "b").iterdir():
            state = {k: v for k, v in load_file(file).items() if k.startswith("unet.")}
        pipe.load_lora_weights(state, adapter_name="a", hotswap=True)

    play("sd", [do("enable_lora_hotswap", target_rank=8), load("a"), swap], 0, loras)


def test_lora_is_fused_in_the_middle_of_a_call(loras: Path) -> None:
    def calls(pipe: Any) -> Iterator[torch.Tensor]:
        def fuse(pipe: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
            if step == 0:
                pipe.fuse_lora(components=["unet"])
            return values

        pipe.load_lora_weights(loras / "a")
        yield images(pipe, "sd", callback_on_step_end=fuse)
        yield images(pipe, "sd")
        pipe.unfuse_lora(components=["unet"])
        yield images(pipe, "sd")

    resident, ours = tiny("sd").to("sim"), tiny("sd")
    greenroom.enable_model_cpu_offload(ours, device="sim")
    for found, expected in zip(calls(ours), calls(resident), strict=True):
        assert torch.equal(found, expected)
        assert on_device(ours) == []
    for (path, tensor), other in zip(
        ours.unet.state_dict().items(), resident.unet.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other.cpu()), path


def test_a_lora_that_cannot_be_loaded_leaves_the_pipeline_as_it_was(loras: Path) -> None:
    pipe = tiny("sd")
    greenroom.enable_model_cpu_offload(pipe, device="sim")
    expected = images(pipe, "sd")
    broken = {"unet.down_blocks.9.attentions.0.to_q.lora_A.weight": torch.zeros(4, 4)}
    broken["unet.down_blocks.9.attentions.0.to_q.lora_B.weight"] = torch.zeros(4, 4)
    with pytest.raises(ValueError):
        pipe.load_lora_weights(broken)
    with sim.measure() as cost:
        assert torch.equal(images(pipe, "sd"), expected)
    assert cost.h2d_bytes > 0 and on_device(pipe) == []


# ---- textual inversion, IP-Adapter
# -------------------------------------------------------------------------------


@pytest.mark.parametrize("enable_at", [0, 1])
def test_textual_inversion(enable_at: int, tmp_path: Path) -> None:
    def learn(pipe: Any, folder: Path) -> None:
        pipe.load_textual_inversion({"<cat>": torch.full((32,), 0.5)}, token="<cat>")

    def forget(pipe: Any, folder: Path) -> None:
        pipe.unload_textual_inversion("<cat>")

    play("sd", [learn, forget], enable_at, tmp_path, prompt="a <cat> and a circle")


def test_textual_inversion_does_not_move_the_pipeline_to_another_device(two_devices: None) -> None:
    pipe = tiny("sd")
    greenroom.enable_model_cpu_offload(pipe, device="sim:1")
    images(pipe, "sd")
    before = len(pipe.text_encoder.get_input_embeddings().weight)
    pipe.load_textual_inversion({"<cat>": torch.full((32,), 0.5)}, token="<cat>")
    assert len(pipe.text_encoder.get_input_embeddings().weight) == before + 1
    assert pipe._execution_device == torch.device("sim:1")
    images(pipe, "sd", prompt="a <cat>")
    assert on_device(pipe) == []


@pytest.fixture(scope="module")
def ip_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An IP-Adapter for the small Stable Diffusion, with its image encoder."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("ip_adapter")
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(folder / "image_encoder")
    unet = tiny("sd").unet
    width = unet.config.cross_attention_dim
    tokens = 4
    state: dict[str, dict[str, torch.Tensor]] = {
        "image_proj": {
            "proj.weight": torch.randn(width * tokens, 32) / 6,
            "proj.bias": torch.zeros(width * tokens),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": {},
    }
    for key, name in zip(range(1, 1000, 2), _cross_attentions(unet), strict=False):
        hidden = unet.get_submodule(name.removesuffix(".processor")).to_q.weight.shape[0]
        processor = IPAdapterAttnProcessor2_0(hidden, width, num_tokens=(tokens,))
        for kind in ("k", "v"):
            weight = getattr(processor, f"to_{kind}_ip")[0].weight.detach()
            state["ip_adapter"][f"{key}.to_{kind}_ip.weight"] = torch.randn_like(weight) / 4
    torch.save(state, folder / "weights.bin")
    return folder


def _cross_attentions(unet: Any) -> list[str]:
    return [name for name in unet.attn_processors if not name.endswith("attn1.processor")]


@pytest.mark.parametrize("enable_at", [0, 1])
def test_ip_adapter(enable_at: int, ip_adapter: Path) -> None:
    def run(enable: bool) -> list[torch.Tensor]:
        pipe = tiny("sd")
        found = []
        if not enable:
            pipe.to("sim")
        elif enable_at == 0:
            greenroom.enable_model_cpu_offload(pipe, device="sim")
            found.append(images(pipe, "sd"))
        pipe.load_ip_adapter(ip_adapter, subfolder="", weight_name="weights.bin")
        if enable and enable_at == 1:
            greenroom.enable_model_cpu_offload(pipe, device="sim")
        if not (enable and enable_at == 0):
            found.append(images(tiny("sd"), "sd"))
        for scale in (1.0, 0.3):
            pipe.set_ip_adapter_scale(scale)
            found.append(images(pipe, "sd", ip_adapter_image=picture(32)))
            if enable:
                assert on_device(pipe) == []
                assert pipe.image_encoder.get_parameter("visual_projection.weight").is_cpu
        pipe.unload_ip_adapter()
        found.append(images(pipe, "sd"))
        return found

    found, expected = run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(expected[0], expected[1])


# ---- components that are replaced, added, shared
# -------------------------------------------------------------------------------


def replace(name: str) -> Step:
    def step(pipe: Any, folder: Path) -> None:
        before = getattr(pipe, name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            after = type(before).from_config(before.config)
            for parameter in after.parameters():  # a ControlNet's exits begin as zeros
                nn.init.normal_(parameter, std=0.1)
        setattr(pipe, name, after.eval().to(before.device))

    return step


@pytest.mark.parametrize("enable_at", [0, 1])
@pytest.mark.parametrize(
    ("name", "part"), [("sd", "vae"), ("sdxl", "unet"), ("sdxl-controlnet", "controlnet")]
)
def test_a_component_is_replaced(name: str, part: str, enable_at: int, tmp_path: Path) -> None:
    play(name, [replace(part)], enable_at, tmp_path)


def test_a_component_that_was_replaced_is_at_home_and_free_of_hooks_in_the_end() -> None:
    pipe = tiny("sd")
    greenroom.enable_model_cpu_offload(pipe, device="sim")
    old = pipe.vae
    images(pipe, "sd")
    pipe.vae = copy.deepcopy(tiny("sd").vae)
    images(pipe, "sd")
    greenroom.disable_model_cpu_offload(pipe)
    assert all(p.is_cpu for p in old.parameters())
    assert not hasattr(pipe.vae, "_hf_hook")
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():  # it is still offloaded by itself, or it is not: it works
        old.decode(z)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_pipeline_made_from_another_one_shares_its_components(dtype: Any) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    def run(pipe: Any) -> Iterator[torch.Tensor]:
        yield images(pipe, "sd")
        options = {} if dtype is None else {"torch_dtype": dtype}
        other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, **options)
        if hasattr(pipe, "_greenroom"):
            greenroom.enable_model_cpu_offload(other, device="sim")
        assert other.unet is pipe.unet
        call = {
            "prompt": "a red circle",
            "image": picture(32),
            "strength": 0.5,
            "num_inference_steps": 4,
            "output_type": "pt",
        }
        other.set_progress_bar_config(disable=True)
        for _ in range(2):
            yield other(**call, generator=torch.Generator().manual_seed(1)).images.cpu()
            yield images(pipe, "sd")
        assert {p.dtype for p in pipe.unet.parameters()} == {dtype or torch.float32}

    resident, ours = tiny("sd").to("sim"), tiny("sd")
    greenroom.enable_model_cpu_offload(ours, device="sim")
    for at, (found, expected) in enumerate(zip(run(ours), run(resident), strict=True)):
        assert torch.equal(found, expected), at
        assert on_device(ours) == []


@pytest.mark.parametrize("enable_at", [0, 1])
def test_all_components_are_cast_between_calls(enable_at: int, tmp_path: Path) -> None:
    def cast(dtype: torch.dtype) -> Step:
        def step(pipe: Any, folder: Path) -> None:
            for module in modules(pipe).values():
                module.to(dtype)

        return step

    play("sd", [cast(torch.bfloat16), cast(torch.float32)], enable_at, tmp_path)
