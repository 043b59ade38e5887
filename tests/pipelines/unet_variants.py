"""What else is made around Stable Diffusion's UNet: adapters, upscalers, variations, depth."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from pipelines import encoders
from pipelines.calls import BRIEF, CONTROLLED, IMAGE_TO_IMAGE, SIZE, TEXT_TO_IMAGE
from pipelines.case import case
from pipelines.pictures import SIDE, picture, pil
from pipelines.prior_decoder import kandinsky_prior_parts
from pipelines.reuse import like, of, remade
from pipelines.stable_diffusion import controlnet

from greenroom.zoo.tiny import tiny

__all__ = ["CASES"]


def sd_adapter() -> Any:
    adapter = diffusers.T2IAdapter(channels=[32, 64], num_res_blocks=1, downscale_factor=2)
    return remade(diffusers.StableDiffusionAdapterPipeline, tiny("sd"), adapter=adapter)


def sdxl_adapter() -> Any:
    adapter = diffusers.T2IAdapter(
        channels=[32, 64], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
    return remade(diffusers.StableDiffusionXLAdapterPipeline, tiny("sdxl"), adapter=adapter)


def pix2pix() -> Any:
    pipe = tiny("sd")
    kind = diffusers.StableDiffusionInstructPix2PixPipeline
    return remade(kind, pipe, unet=like(pipe.unet, in_channels=8))


def upscale() -> Any:
    pipe = tiny("sd")
    return remade(
        diffusers.StableDiffusionUpscalePipeline,
        pipe,
        unet=like(pipe.unet, in_channels=7, num_class_embeds=1000),
        low_res_scheduler=diffusers.DDPMScheduler(),
    )


def depth_to_image() -> Any:
    pipe = tiny("sd")
    return remade(
        diffusers.StableDiffusionDepth2ImgPipeline,
        pipe,
        depth_estimator=encoders.made(
            transformers.DPTForDepthEstimation,
            **encoders.size(layers=4),
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 16, 16, 16],
            fusion_hidden_size=16,
            image_size=SIDE,
            patch_size=16,
        ),
        unet=like(pipe.unet, in_channels=5),
        feature_extractor=transformers.DPTImageProcessorPil(size=SIZE),
    )


def image_variation() -> Any:
    return remade(
        diffusers.StableDiffusionImageVariationPipeline,
        tiny("sd"),
        image_encoder=encoders.clip_vision(),
        feature_extractor=encoders.clip_image_processor(),
    )


def noising() -> dict[str, Any]:
    """What adds noise to the embedding of a picture, and a UNet that is told how much."""
    return {
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=32),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "unet": like(
            tiny("sd").unet,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * 32,  # the embedding and the noise's level
        ),
    }


def unclip() -> Any:
    prior = kandinsky_prior_parts()
    return remade(
        diffusers.StableUnCLIPPipeline,
        tiny("sd"),
        prior_tokenizer=prior["tokenizer"],
        prior_text_encoder=prior["text_encoder"],
        prior=prior["prior"],
        prior_scheduler=prior["scheduler"],
        **noising(),
    )


def unclip_img2img() -> Any:
    return remade(
        diffusers.StableUnCLIPImg2ImgPipeline,
        tiny("sd"),
        feature_extractor=encoders.clip_image_processor(),
        image_encoder=encoders.clip_vision(),
        **noising(),
    )


def lcm() -> Any:
    pipe = tiny("sd")
    return remade(
        diffusers.LatentConsistencyModelPipeline,
        pipe,
        unet=like(pipe.unet, time_cond_proj_dim=32),
        scheduler=diffusers.LCMScheduler(),
    )


def sdxl_refiner() -> Any:
    pipe = tiny("sdxl")
    return remade(
        diffusers.StableDiffusionXLImg2ImgPipeline,
        pipe,
        text_encoder=None,
        tokenizer=None,
        unet=like(
            pipe.unet,
            cross_attention_dim=32,  # of the second text encoder only
            projection_class_embeddings_input_dim=32 + 5 * 8,  # a score in place of two sizes
        ),
        requires_aesthetics_score=True,
    )


def two_controlnets() -> Any:
    pipe = tiny("sdxl-controlnet")
    return remade(type(pipe), pipe, controlnet=[controlnet(pipe.unet) for _ in range(2)])


def marigold() -> Any:
    pipe = tiny("sd")
    unet = like(pipe.unet, in_channels=8)
    return remade(diffusers.MarigoldDepthPipeline, pipe, unet=unet, prediction_type="depth")


CASES = (
    case("sd-t2i-adapter", sd_adapter, CONTROLLED),
    case("sdxl-t2i-adapter", sdxl_adapter, CONTROLLED),
    case("sd-pix2pix", pix2pix, BRIEF | {"image": picture(SIDE)}),
    case("sd-upscale", upscale, BRIEF | {"image": picture(16)}),
    case("sd-depth2img", depth_to_image, IMAGE_TO_IMAGE | {"image": pil()}),
    case(
        "sd-image-variation",
        image_variation,
        SIZE | {"image": pil(), "num_inference_steps": 2, "output_type": "pt"},
    ),
    case("sd-unclip", unclip, TEXT_TO_IMAGE | {"prior_num_inference_steps": 2}),
    case("sd-unclip-img2img", unclip_img2img, TEXT_TO_IMAGE | {"image": pil()}),
    case("sd-pag", of("StableDiffusionPAGPipeline", "sd"), TEXT_TO_IMAGE),
    case("sdxl-pag", of("StableDiffusionXLPAGPipeline", "sdxl"), TEXT_TO_IMAGE),
    case("lcm", lcm, TEXT_TO_IMAGE),
    case("sdxl-refiner", sdxl_refiner, IMAGE_TO_IMAGE),
    case(
        "sdxl-two-controlnets",
        two_controlnets,
        TEXT_TO_IMAGE | {"image": [picture(SIDE), 1 - picture(SIDE)]},
    ),
    case(
        "marigold",
        marigold,
        {"image": picture(SIDE), "num_inference_steps": 1, "processing_resolution": 0}
        | {"output_type": "pt"},
    ),
)
