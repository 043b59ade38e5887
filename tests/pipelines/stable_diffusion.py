"""Pipelines around Stable Diffusion's UNet: Stable Diffusion 1 and XL, Kolors, DeepFloyd IF."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines import deepfloyd_if, kolors
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from pipelines import denoisers, vocabularies
from pipelines.calls import CONTROLLED, IMAGE_TO_IMAGE, INPAINTING, TEXT_TO_IMAGE
from pipelines.case import case
from pipelines.encoders import clip_image_processor, clip_vision, made, t5
from pipelines.pictures import SIDE, picture
from pipelines.reuse import like, of, remade

from greenroom.zoo.tiny import tiny
from greenroom.zoo.tokenizers import t5_tokenizer

__all__ = ["CASES", "controlnet"]


def controlnet(unet: Any) -> Any:
    """As a ControlNet is made: a copy of the UNet's encoder."""
    return diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16))


def sd_controlnet() -> Any:
    pipe = tiny("sd")
    kind = diffusers.StableDiffusionControlNetPipeline
    return remade(kind, pipe, controlnet=controlnet(pipe.unet))


def sdxl_ip_adapter() -> Any:
    pipe = remade(
        diffusers.StableDiffusionXLPipeline,
        tiny("sdxl"),
        image_encoder=clip_vision(),
        feature_extractor=clip_image_processor(),
    )
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
    return remade(
        diffusers.StableDiffusionPipeline,
        tiny("sd"),
        safety_checker=safety_checker(StableDiffusionSafetyChecker),
        feature_extractor=clip_image_processor(),
        requires_safety_checker=True,
    )


def safety_checker(kind: Any) -> Any:
    return made(kind, vision_config=clip_vision().config.to_dict(), projection_dim=32)


def kolors_pipeline(kind: Any) -> Any:
    pipe = tiny("sdxl")
    return remade(
        kind,
        pipe,
        # The published UNet widens the text encoder's states, 4096 features, to its own 2048.
        unet=like(
            pipe.unet,
            encoder_hid_dim=32,
            encoder_hid_dim_type="text_proj",
            cross_attention_dim=64,
        ),
        text_encoder=made(
            kolors.ChatGLMModel,
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
        ),
        tokenizer=vocabularies.chatglm(),
        force_zeros_for_empty_prompt=False,
    )


def deepfloyd() -> Any:
    return deepfloyd_if.IFPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        unet=denoisers.unet(
            sample_size=SIDE,
            in_channels=3,
            out_channels=6,  # the noise and its variance
            attention_head_dim=8,
            addition_embed_type="text",
            addition_embed_type_num_heads=2,
            cross_attention_norm="group_norm",
            act_fn="gelu",
        ),
        scheduler=diffusers.DDPMScheduler(
            beta_schedule="squaredcos_cap_v2",
            thresholding=True,
            dynamic_thresholding_ratio=0.95,
            variance_type="learned_range",
        ),
        safety_checker=safety_checker(deepfloyd_if.IFSafetyChecker),
        feature_extractor=clip_image_processor(),
        watermarker=deepfloyd_if.IFWatermarker(),
    )


CASES = (
    case("sd", lambda: tiny("sd"), TEXT_TO_IMAGE),
    case("sd-safety-checker", checked, TEXT_TO_IMAGE),
    case("sd-img2img", of("StableDiffusionImg2ImgPipeline", "sd"), IMAGE_TO_IMAGE),
    case("sd-inpaint", of("StableDiffusionInpaintPipeline", "sd"), INPAINTING),
    case("sd-controlnet", sd_controlnet, CONTROLLED),
    case("sdxl", lambda: tiny("sdxl"), TEXT_TO_IMAGE),
    case("sdxl-img2img", lambda: tiny("sdxl-img2img"), IMAGE_TO_IMAGE),
    case("sdxl-inpaint", of("StableDiffusionXLInpaintPipeline", "sdxl"), INPAINTING),
    case("sdxl-controlnet", lambda: tiny("sdxl-controlnet"), CONTROLLED),
    case("sdxl-ip-adapter", sdxl_ip_adapter, TEXT_TO_IMAGE | {"ip_adapter_image": picture(SIDE)}),
    case("kolors", lambda: kolors_pipeline(kolors.KolorsPipeline), TEXT_TO_IMAGE),
    case("kolors-img2img", lambda: kolors_pipeline(kolors.KolorsImg2ImgPipeline), IMAGE_TO_IMAGE),
    # Only pictures as arrays are shown to the safety checker.
    case("deepfloyd-if", deepfloyd, TEXT_TO_IMAGE | {"clean_caption": False, "output_type": "np"}),
)
