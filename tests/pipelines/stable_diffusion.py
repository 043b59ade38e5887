"""Pipelines around Stable Diffusion's UNet: Stable Diffusion 1 and XL, Kolors, DeepFloyd IF."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines import deepfloyd_if, kolors
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from pipelines import vocabularies
from pipelines.case import case
from pipelines.encoders import clip_image_processor, clip_vision, t5
from pipelines.pictures import SIDE, mask, picture
from pipelines.reuse import like

from greenroom.zoo.tiny import PROMPT, tiny
from greenroom.zoo.tokenizers import t5_tokenizer

__all__ = ["CASES", "IMAGE_TO_IMAGE", "TEXT_TO_IMAGE"]

TEXT_TO_IMAGE = {
    "prompt": PROMPT,
    "num_inference_steps": 2,
    "height": SIDE,
    "width": SIDE,
    "output_type": "pt",
}
# The picture brings its own size, and half the steps are noise that the picture skips.
IMAGE_TO_IMAGE = {
    "prompt": PROMPT,
    "image": picture(SIDE),
    "strength": 0.5,
    "num_inference_steps": 4,
    "output_type": "pt",
}


def parts(name: str) -> dict[str, Any]:
    return dict(tiny(name).components)


def of(pipeline: str, base: str) -> Callable[[], Any]:
    """Another pipeline class from the components of the tiny pipeline ``base``."""

    def build() -> Any:
        options = {"requires_safety_checker": False} if base == "sd" else {}
        return getattr(diffusers, pipeline)(**parts(base), **options)

    return build


def controlled(pipeline: str, base: str) -> Callable[[], Any]:
    """The same with a ControlNet beside: a copy of the UNet's encoder."""

    def build() -> Any:
        components = parts(base)
        controlnet = diffusers.ControlNetModel.from_unet(
            components["unet"], conditioning_embedding_out_channels=(8, 16)
        )
        options = {"requires_safety_checker": False} if base == "sd" else {}
        return getattr(diffusers, pipeline)(controlnet=controlnet, **components, **options)

    return build


def sdxl_ip_adapter() -> Any:
    components = parts("sdxl")
    components["image_encoder"] = clip_vision()
    components["feature_extractor"] = clip_image_processor()
    pipe = diffusers.StableDiffusionXLPipeline(**components)
    pipe.load_ip_adapter(ip_adapter_weights(pipe.unet), subfolder="", weight_name="")
    return pipe


def ip_adapter_weights(unet: Any, *, tokens: int = 4, image_width: int = 32) -> dict[str, Any]:
    """An IP-Adapter's file: the image's projection, and a key and a value per cross-attention."""
    width = unet.config.cross_attention_dim
    layers: dict[str, torch.Tensor] = {}
    # The file numbers the UNet's attentions in order, self and cross in turn, from 0.
    crossed = [name for name in unet.attn_processors if "attn2" in name]
    for number, name in enumerate(crossed):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        hidden = attention.to_q.out_features
        for kind in ("to_k_ip", "to_v_ip"):
            layers[f"{2 * number + 1}.{kind}.weight"] = 0.1 * torch.randn(hidden, width)
    projection = {
        "proj.weight": 0.1 * torch.randn(tokens * width, image_width),
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": layers}


def checked() -> Any:
    components = parts("sd")
    components["safety_checker"] = StableDiffusionSafetyChecker(safety_config())
    components["feature_extractor"] = clip_image_processor()
    return diffusers.StableDiffusionPipeline(**components)


def safety_config() -> Any:
    vision = clip_vision().config.to_dict()
    return transformers.CLIPConfig(vision_config=vision, projection_dim=32)


def kolors_pipeline(pipeline: str) -> Any:
    # The published UNet widens the text encoder's states, 4096 features, to its own 2048.
    components = parts("sdxl")
    unet = like(
        components["unet"],
        encoder_hid_dim=32,
        encoder_hid_dim_type="text_proj",
        cross_attention_dim=64,
    )
    text_encoder = kolors.ChatGLMModel(
        kolors.text_encoder.ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=vocabularies.BYTES,
            hidden_size=32,
            ffn_hidden_size=64,
            kv_channels=8,
            num_attention_heads=4,
            seq_length=256,
            multi_query_attention=True,
            multi_query_group_num=2,
            add_qkv_bias=True,
            original_rope=True,
        )
    )
    return getattr(kolors, pipeline)(
        vae=components["vae"],
        text_encoder=text_encoder,
        tokenizer=vocabularies.chatglm(),
        unet=unet,
        scheduler=components["scheduler"],
    )


def deepfloyd() -> Any:
    return deepfloyd_if.IFPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        unet=diffusers.UNet2DConditionModel(
            sample_size=SIDE,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
            mid_block_type="UNetMidBlock2DSimpleCrossAttn",
            up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
            in_channels=3,
            out_channels=6,
            cross_attention_dim=32,
            encoder_hid_dim=32,
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            resnet_time_scale_shift="scale_shift",
            act_fn="gelu",
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            variance_type="learned_range",
        ),
        safety_checker=deepfloyd_if.IFSafetyChecker(safety_config()),
        feature_extractor=clip_image_processor(),
        watermarker=deepfloyd_if.IFWatermarker(),
    )


CASES = (
    case("sd", lambda: tiny("sd"), TEXT_TO_IMAGE),
    case("sd-safety-checker", checked, TEXT_TO_IMAGE),
    case("sd-img2img", of("StableDiffusionImg2ImgPipeline", "sd"), IMAGE_TO_IMAGE),
    case(
        "sd-inpaint",
        of("StableDiffusionInpaintPipeline", "sd"),
        TEXT_TO_IMAGE | {"image": picture(SIDE), "mask_image": mask()},
    ),
    case(
        "sd-controlnet",
        controlled("StableDiffusionControlNetPipeline", "sd"),
        TEXT_TO_IMAGE | {"image": picture(SIDE)},
    ),
    case("sdxl", lambda: tiny("sdxl"), TEXT_TO_IMAGE),
    case("sdxl-img2img", lambda: tiny("sdxl-img2img"), IMAGE_TO_IMAGE),
    case(
        "sdxl-inpaint",
        of("StableDiffusionXLInpaintPipeline", "sdxl"),
        TEXT_TO_IMAGE | {"image": picture(SIDE), "mask_image": mask()},
    ),
    case(
        "sdxl-controlnet",
        lambda: tiny("sdxl-controlnet"),
        TEXT_TO_IMAGE | {"image": picture(SIDE)},
    ),
    case("sdxl-ip-adapter", sdxl_ip_adapter, TEXT_TO_IMAGE | {"ip_adapter_image": picture(SIDE)}),
    case("kolors", lambda: kolors_pipeline("KolorsPipeline"), TEXT_TO_IMAGE),
    case("kolors-img2img", lambda: kolors_pipeline("KolorsImg2ImgPipeline"), IMAGE_TO_IMAGE),
    # Only pictures as arrays are shown to the safety checker.
    case("deepfloyd-if", deepfloyd, TEXT_TO_IMAGE | {"clean_caption": False, "output_type": "np"}),
)
