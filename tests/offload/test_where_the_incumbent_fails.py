"""What diffusers' own `enable_model_cpu_offload` gets wrong, and greenroom does not.

Each check is run on both ways of offloading; that diffusers' fails it is asserted too. Where that
changes one day, the test says so, and a workaround may have become needless.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.hooks import HookRegistry, ModelHook
from offload.own import result
from offload.presence import modules, nbytes, on_device, presence
from pipelines.catalogue import CATALOGUE, run
from pipelines.stable_diffusion import ip_adapter_weights
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.zoo.tiny import tiny

pytestmark = pytest.mark.usefixtures("quick_collections")


def theirs(pipe: Any, gpu_id: int | None = None, device: Any = "sim") -> None:
    diffusers.DiffusionPipeline.enable_model_cpu_offload(pipe, gpu_id, device)


def ours(pipe: Any, gpu_id: int | None = None, device: Any = "sim") -> None:
    greenroom.enable_model_cpu_offload(pipe, gpu_id, device)


def only_ours_passes(
    check: Callable[[Any], None], error: type[BaseException], match: str | None
) -> None:
    """Run the check on both; diffusers' own fails it with this error."""
    with pytest.raises(error, match=match):
        check(theirs)
    gc.collect()  # what it left on the device
    check(ours)


# ---- who is on the device together


def with_a_pooled_prompt(pipe: Any, inputs: dict[str, Any]) -> None:
    """What `text_encoder_2` would make of the prompt is given: nobody calls it."""
    width = pipe.transformer.config.pooled_projection_dim
    inputs["pooled_prompt_embeds"] = torch.zeros(1, width, device=pipe._execution_device)


def with_one_expert(pipe: Any, inputs: dict[str, Any]) -> None:
    pipe.register_to_config(boundary_ratio=0.0)


def as_it_is(pipe: Any, inputs: dict[str, Any]) -> None:
    pass


HELPED = {"controlnet": {"unet"}, "unet": {"controlnet"}}
#: By the flow: the pipeline, what is special about the call, who is beside whom with diffusers' own
#: method, and with greenroom; who is not named is alone.
FLOWS: dict[str, tuple[str, Any, dict[str, set[str]], dict[str, set[str]]]] = {
    "img2img": (
        "sdxl-img2img",
        as_it_is,
        {"vae": {"text_encoder_2"}, "unet": {"vae"}},
        {},
    ),
    "a misspelt sequence": (
        "kolors-img2img",
        as_it_is,
        {"unet": {"vae"}, "vae": {"unet"}},
        {},
    ),
    "a name twice in the sequence": (
        "cogvideox-fun-control",
        as_it_is,
        {"vae": {"transformer"}},
        {},
    ),
    "a controlnet": (
        "sd-controlnet",
        as_it_is,
        {"controlnet": {"text_encoder", "unet"}, "unet": {"controlnet"}, "vae": {"controlnet"}},
        HELPED,
    ),
    "one expert of two": (
        "wan2.2",
        with_one_expert,
        {"vae": {"transformer"}},
        {},
    ),
    "a text encoder that is skipped": (
        "hunyuan-video",
        with_a_pooled_prompt,
        {"transformer": {"text_encoder"}, "vae": {"text_encoder"}},
        {},
    ),
}


@pytest.mark.filterwarnings("ignore:model_cpu_offload_seq of Kolors")
@pytest.mark.parametrize("flow", FLOWS)
def test_who_is_on_the_device_together(flow: str) -> None:
    name, special, beside_in_theirs, beside_in_ours = FLOWS[flow]
    peaks = []
    for enable, beside in ((theirs, beside_in_theirs), (ours, beside_in_ours)):
        gc.collect()
        sim.configure()
        case = CATALOGUE[name]
        pipe, inputs = case.build(), case.inputs()
        enable(pipe)
        special(pipe, inputs)
        with presence(pipe) as found, sim.measure() as cost:
            pipe(**inputs)
        assert found.together == {part: beside.get(part, set()) for part in found.together}
        peaks.append(cost.peak_bytes)
    assert peaks[1] < peaks[0]


def test_kandinsky_3_names_its_decoder_twice() -> None:
    # As "a name twice in the sequence", told by the order of instructions alone: its UNet is large.
    pipe = CATALOGUE["kandinsky3-img2img"].build()
    assert pipe.model_cpu_offload_seq.split("->").count("movq") == 2

    def check(enable: Any) -> None:
        enable(pipe)
        parts, z = modules(pipe), torch.randn(1, 4, 4, 4)
        for name in ("text_encoder", "movq", "unet"):  # as a call uses them
            parts[name]._hf_hook.pre_forward(parts[name])
        pipe.movq.decode(z.to(pipe._execution_device), force_not_quantize=True)
        assert on_device(pipe.unet) == []

    only_ours_passes(check, AssertionError, "time_embedding.linear_1.weight")


# ---- interrupted


def interrupted(enable: Any) -> Any:
    pipe = tiny("sd")
    enable(pipe)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = pipe.unet.mid_block.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        result(pipe)
    hook.remove()
    return pipe


def test_an_interrupted_call_frees_the_device() -> None:
    def check(enable: Any) -> None:
        pipe = interrupted(enable)
        assert on_device(pipe.unet) == []

    only_ours_passes(check, AssertionError, "conv_in.weight")


def test_after_an_interrupted_call_the_next_one_has_the_device_for_itself() -> None:
    def check(enable: Any) -> None:
        pipe = interrupted(enable)
        with presence(pipe) as found:
            assert torch.equal(result(pipe), result(tiny("sd")))
        assert found.together["text_encoder"] == set()

    only_ours_passes(check, AssertionError, "unet")


# ---- which device


@pytest.mark.parametrize("then", [{"gpu_id": 0}, {"device": "sim:0"}, {"device": "sim"}])
def test_the_first_device_can_be_had_after_the_second(
    then: dict[str, Any], two_devices: None
) -> None:
    def check(enable: Any) -> None:
        pipe = tiny("sd")
        enable(pipe, gpu_id=1)
        enable(pipe, **then)
        with sim.measure(0) as first, sim.measure(1) as second:
            result(pipe)
        assert pipe._offload_gpu_id == 0
        assert first.kernels > 0 and second.kernels == 0

    only_ours_passes(check, AssertionError, "1 == 0")


# ---- components that come, go and are shared


def test_a_pipeline_made_of_an_offloaded_one_s_components_frees_the_device() -> None:
    def check(enable: Any) -> None:
        pipe = tiny("sd")
        enable(pipe)
        other = diffusers.StableDiffusionImg2ImgPipeline(
            **pipe.components, requires_safety_checker=False
        )
        for _ in range(2):
            run(CATALOGUE["sd-img2img"], other)
            assert on_device(other) == []

    only_ours_passes(check, AssertionError, "vae.encoder.conv_in.weight")


def test_a_component_that_is_swapped_is_offloaded_as_the_one_before() -> None:
    def check(enable: Any) -> None:
        pipe, plain = tiny("sd"), tiny("sd")
        enable(pipe)
        for it in (pipe, plain):
            it.vae = tiny("sd", seed=1).vae
        assert pipe._execution_device == torch.device("sim:0")
        for _ in range(2):
            assert torch.equal(result(pipe), result(plain))
            assert on_device(pipe) == []

    only_ours_passes(check, AssertionError, "cpu")


def test_a_component_that_is_registered_after_enabling_is_taken_in() -> None:
    case = CATALOGUE["sdxl-ip-adapter"]
    donor = case.build()
    torch.manual_seed(0)
    weights = ip_adapter_weights(donor.unet)

    def with_adapter(pipe: Any) -> None:
        pipe.register_modules(
            image_encoder=copy.deepcopy(donor.image_encoder),
            feature_extractor=donor.feature_extractor,
        )
        pipe.load_ip_adapter(weights, subfolder="", weight_name="")

    plain = tiny("sdxl")
    with_adapter(plain)
    expected = run(case, plain)

    def check(enable: Any) -> None:
        pipe = tiny("sdxl")
        enable(pipe)
        result(pipe, "sdxl")
        with_adapter(pipe)
        embeds = pipe.prepare_ip_adapter_image_embeds(  # by hand, before any call
            case.inputs()["ip_adapter_image"], None, pipe._execution_device, 1, True
        )
        assert embeds[0].device.type == "sim"
        for _ in range(2):
            assert torch.equal(run(case, pipe), expected)
            assert on_device(pipe) == []

    only_ours_passes(check, RuntimeError, "on the same device")


def test_weights_that_from_pipe_casts_stay_the_ones_that_run() -> None:
    def check(enable: Any) -> None:
        pipe, plain = tiny("sd", dtype=torch.bfloat16), tiny("sd", dtype=torch.bfloat16)
        enable(pipe)
        assert torch.equal(result(pipe), result(plain))
        for it in (pipe, plain):
            diffusers.StableDiffusionPAGPipeline.from_pipe(it)  # to float32, unless told otherwise
        assert pipe.unet.dtype == torch.float32
        assert torch.equal(result(pipe), result(plain))

    check(theirs)  # it passes: a hazard only for who keeps masters
    check(ours)


# ---- work that does not come through a forward


def encode_part_of_an_autoencoder(pipe: Any, there: torch.device) -> torch.Tensor:
    return pipe.vae._encode(torch.ones(1, 3, 16, 16, device=there))


def ask_for_image_features(pipe: Any, there: torch.device) -> torch.Tensor:
    return pipe.clip.get_image_features(torch.ones(1, 3, 32, 32, device=there)).pooler_output


def ask_for_text_features(pipe: Any, there: torch.device) -> torch.Tensor:
    return pipe.clip.get_text_features(torch.arange(7, device=there)[None]).pooler_output


def embed_tokens(pipe: Any, there: torch.device) -> torch.Tensor:
    return pipe.text_encoder.get_input_embeddings()(torch.arange(7, device=there))


def normalise_a_weighted_prompt(pipe: Any, there: torch.device) -> torch.Tensor:
    return pipe.text_encoder.final_layer_norm(torch.ones(1, 7, 32, device=there))


class Tools(diffusers.DiffusionPipeline):
    model_cpu_offload_seq = "text_encoder->clip->vae"

    def __init__(self, text_encoder: nn.Module, clip: nn.Module, vae: nn.Module) -> None:
        super().__init__()
        self.register_modules(text_encoder=text_encoder, clip=clip, vae=vae)


def tools() -> Tools:
    parts = tiny("sd")
    return Tools(parts.text_encoder, clip(), parts.vae)


def clip() -> Any:
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = transformers.CLIPConfig(
        text_config={**small, "num_hidden_layers": 1, "vocab_size": 64, "eos_token_id": 6},
        vision_config={**small, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    return transformers.CLIPModel(config).eval()


@pytest.mark.parametrize(
    "work",
    [
        encode_part_of_an_autoencoder,
        ask_for_image_features,
        ask_for_text_features,
        embed_tokens,
        normalise_a_weighted_prompt,
    ],
)
@torch.no_grad()
def test_work_that_does_not_come_through_a_forward_runs_on_the_device(work: Any) -> None:
    expected = work(tools(), torch.device("cpu"))

    def check(enable: Any) -> None:
        pipe = tools()
        enable(pipe)
        for _ in range(2):
            found = work(pipe, pipe._execution_device)
            assert found.device.type == "sim" and torch.equal(found.cpu(), expected)
            pipe.maybe_free_model_hooks()
        assert on_device(pipe) == []

    only_ours_passes(check, RuntimeError, "on the same device")


@torch.no_grad()
def test_prompts_that_were_tokenised_beforehand_are_encoded_one_after_the_other() -> None:
    def check(enable: Any) -> None:
        pipe, plain = tiny("sd"), tiny("sd")
        enable(pipe)
        encoder = pipe.text_encoder
        chunks = [torch.arange(start, start + 7, device=encoder.device)[None] for start in (0, 7)]
        for ids in chunks:  # the first call takes the encoder to the device
            found = encoder(ids).last_hidden_state
            assert torch.equal(found.cpu(), plain.text_encoder(ids).last_hidden_state)

    only_ours_passes(check, RuntimeError, "on the same device")


# ---- unusual components


class Part(diffusers.ModelMixin, diffusers.ConfigMixin):
    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Bare(nn.Module):
    """Without parameters, but with what diffusers' `to` asks each component for."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


class Three(diffusers.DiffusionPipeline):
    """Two components that are used three times in turn."""

    model_cpu_offload_seq = "first->second"

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.register_modules(first=first, second=second)

    @torch.no_grad()
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self._execution_device)
        for _ in range(3):
            x = self.second(self.first(x))
        self.maybe_free_model_hooks()
        return x.cpu()


def test_one_module_under_two_names_goes_to_the_device_once() -> None:
    def check(enable: Any) -> None:
        module = Part()
        pipe, x = Three(module, module), torch.ones(1, 64)
        expected = Three(module, module)(x)
        enable(pipe)
        with sim.measure() as cost:
            assert torch.equal(pipe(x), expected)
        assert cost.h2d_bytes <= 1.05 * nbytes(module) + x.nbytes

    only_ours_passes(check, AssertionError, "h2d_bytes")


@pytest.mark.parametrize("place", ["first", "second"])
def test_a_module_without_parameters_is_no_error(place: str) -> None:
    def check(enable: Any) -> None:
        parts = {"first": Part(), "second": Part(), place: Bare()}
        pipe, x = Three(**parts), torch.ones(1, 64)
        expected = Three(**parts)(x)
        enable(pipe)
        for _ in range(2):
            assert torch.equal(pipe(x), expected)

    only_ours_passes(check, StopIteration, None)


def test_a_plain_module_is_a_component_like_others() -> None:
    def check(enable: Any) -> None:
        parts = {"first": Part(), "second": nn.Linear(64, 64)}
        pipe, x = Three(**parts), torch.ones(1, 64)
        expected = parts["second"](parts["first"](x))
        for _ in range(2):
            expected = parts["second"](parts["first"](expected))
        enable(pipe)
        for _ in range(2):
            assert torch.equal(pipe(x), expected)
            assert on_device(pipe) == []

    only_ours_passes(check, AttributeError, "no attribute 'dtype'")


# ---- what others hang on a component after enabling


def test_a_hook_of_diffusers_registry_is_not_gone_after_the_first_call() -> None:
    def check(enable: Any) -> None:
        class Counting(ModelHook):
            calls = 0

            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                Counting.calls += 1
                return args, kwargs

        pipe = tiny("sd")
        enable(pipe)
        HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(Counting(), "counting")
        for turn in (1, 2, 3):
            result(pipe)
            assert Counting.calls == 2 * turn

    only_ours_passes(check, AssertionError, "2 == ")


def test_a_forward_that_was_patched_is_not_gone_after_the_first_call() -> None:
    def check(enable: Any) -> None:
        pipe, calls = tiny("sd"), []
        enable(pipe)
        forward = pipe.unet.forward

        def patched(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return forward(*args, **kwargs)

        pipe.unet.forward = patched
        for turn in (1, 2, 3):
            result(pipe)
            assert len(calls) == 2 * turn
        greenroom.disable_model_cpu_offload(pipe)
        assert pipe.unet.forward is patched  # also when offloading is undone
        assert torch.equal(result(pipe), result(tiny("sd")))

    only_ours_passes(check, AssertionError, "2 == ")


# ---- dtypes and compilers


def test_an_autoencoder_that_is_cast_in_mid_call_comes_home_as_it_left() -> None:
    expected = result(tiny("sdxl", dtype=torch.bfloat16), "sdxl")

    def check(enable: Any) -> None:
        pipe = tiny("sdxl", dtype=torch.bfloat16)
        assert pipe.vae.config.force_upcast
        enable(pipe)
        for _ in range(2):
            assert torch.equal(result(pipe, "sdxl"), expected)
        places = [p.data_ptr() for p in pipe.vae.parameters()]
        with sim.measure() as cost:
            assert torch.equal(result(pipe, "sdxl"), expected)
        assert pipe.vae.dtype == torch.bfloat16 and on_device(pipe) == []
        assert cost.d2h_bytes <= expected.nbytes + 4096  # the picture, and no weight
        assert places == [p.data_ptr() for p in pipe.vae.parameters()]

    only_ours_passes(check, AssertionError, "d2h_bytes")


@pytest.mark.parametrize("how", ["wrapped before", "in place before", "in place after"])
def test_compiled_components_come_and_go_without_new_graphs(how: str) -> None:
    graphs = []

    def backend(graph: Any, example_inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def check(enable: Any) -> None:
        torch._dynamo.reset()
        graphs.clear()
        parts: dict[str, Any] = {"first": Part(), "second": Part()}
        x = torch.ones(1, 64)
        expected = Three(**parts)(x)
        if how == "wrapped before":
            parts = {name: torch.compile(part, backend=backend) for name, part in parts.items()}
        pipe = Three(**parts)
        steps = [lambda: enable(pipe)]
        if how != "wrapped before":
            steps.append(lambda: [part.compile(backend=backend) for part in parts.values()])
        for step in steps if how == "in place after" else reversed(steps):
            step()
        assert torch.equal(pipe(x), expected)
        compiled = len(graphs)
        for _ in range(3):
            assert torch.equal(pipe(x), expected)
            enable(pipe)
        # One for each component, or one for both, which are of the same class.
        assert 1 <= len(graphs) == compiled <= 2

    check(theirs)  # it passes
    check(ours)
