"""What else is made around Stable Diffusion's UNet: adapters, upscalers, variations, depth."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from pipelines import encoders
from pipelines.case import case
from pipelines.pictures import SIDE, picture, pil
from pipelines.prior_decoder import kandinsky_prior_parts
from pipelines.reuse import like
from pipelines.stable_diffusion import IMAGE_TO_IMAGE, TEXT_TO_IMAGE, of, parts

from greenroom.zoo.tiny import PROMPT

__all__ = ["CASES"]


def sd_adapter() -> Any:
    components = parts("sd")
    del components["image_encoder"]
    adapter = diffusers.T2IAdapter(channels=[32, 64], num_res_blocks=1, downscale_factor=2)
    return diffusers.StableDiffusionAdapterPipeline(
        adapter=adapter, **components, requires_safety_checker=False
    )


def sdxl_adapter() -> Any:
    adapter = diffusers.T2IAdapter(
        channels=[32, 64], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl"
    )
    return diffusers.StableDiffusionXLAdapterPipeline(adapter=adapter, **parts("sdxl"))


def pix2pix() -> Any:
    components = parts("sd")
    components["unet"] = like(components["unet"], in_channels=8)
    return diffusers.StableDiffusionInstructPix2PixPipeline(
        **components, requires_safety_checker=False
    )


def upscale() -> Any:
    components = parts("sd")
    components["unet"] = like(components["unet"], in_channels=7, num_class_embeds=1000)
    del components["image_encoder"]
    return diffusers.StableDiffusionUpscalePipeline(
        **components, low_res_scheduler=diffusers.DDPMScheduler(), max_noise_level=350
    )


def depth_to_image() -> Any:
    components = parts("sd")
    estimator = transformers.DPTForDepthEstimation(
        transformers.DPTConfig(
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=64,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 16, 16, 16],
            fusion_hidden_size=16,
            image_size=SIDE,
            patch_size=16,
        )
    )
    return diffusers.StableDiffusionDepth2ImgPipeline(
        vae=components["vae"],
        text_encoder=components["text_encoder"],
        tokenizer=components["tokenizer"],
        unet=like(components["unet"], in_channels=5),
        scheduler=components["scheduler"],
        depth_estimator=estimator,
        feature_extractor=transformers.DPTImageProcessorPil(size={"height": SIDE, "width": SIDE}),
    )


def image_variation() -> Any:
    components = parts("sd")
    return diffusers.StableDiffusionImageVariationPipeline(
        vae=components["vae"],
        image_encoder=encoders.clip_vision(),
        unet=components["unet"],
        scheduler=components["scheduler"],
        safety_checker=None,
        feature_extractor=encoders.clip_image_processor(),
        requires_safety_checker=False,
    )


def unclip_parts() -> dict[str, Any]:
    components = parts("sd")
    return {
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=32),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "tokenizer": components["tokenizer"],
        "text_encoder": components["text_encoder"],
        "unet": like(
            components["unet"],
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * 32,  # the embedding and the noise's level
        ),
        "scheduler": components["scheduler"],
        "vae": components["vae"],
    }


def unclip() -> Any:
    prior = kandinsky_prior_parts()
    return diffusers.StableUnCLIPPipeline(
        prior_tokenizer=prior["tokenizer"],
        prior_text_encoder=prior["text_encoder"],
        prior=prior["prior"],
        prior_scheduler=prior["scheduler"],
        **unclip_parts(),
    )


def unclip_img2img() -> Any:
    return diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=encoders.clip_image_processor(),
        image_encoder=encoders.clip_vision(),
        **unclip_parts(),
    )


def lcm() -> Any:
    components = parts("sd")
    components["unet"] = like(components["unet"], time_cond_proj_dim=32)
    components["scheduler"] = diffusers.LCMScheduler()
    return diffusers.LatentConsistencyModelPipeline(**components, requires_safety_checker=False)


def sdxl_refiner() -> Any:
    components = parts("sdxl")
    components["text_encoder"] = components["tokenizer"] = None
    components["unet"] = like(
        components["unet"],
        cross_attention_dim=32,  # of the second text encoder only
        projection_class_embeddings_input_dim=32 + 5 * 8,  # a score in place of two sizes
    )
    return diffusers.StableDiffusionXLImg2ImgPipeline(**components, requires_aesthetics_score=True)


def two_controlnets() -> Any:
    components = parts("sdxl-controlnet")
    components["controlnet"] = [
        diffusers.ControlNetModel.from_unet(
            components["unet"], conditioning_embedding_out_channels=(8, 16)
        )
        for _ in range(2)
    ]
    return diffusers.StableDiffusionXLControlNetPipeline(**components)


def marigold() -> Any:
    components = parts("sd")
    return diffusers.MarigoldDepthPipeline(
        unet=like(components["unet"], in_channels=8),
        vae=components["vae"],
        scheduler=components["scheduler"],
        text_encoder=components["text_encoder"],
        tokenizer=components["tokenizer"],
        prediction_type="depth",
    )


CONTROLLED = TEXT_TO_IMAGE | {"image": picture(SIDE)}

CASES = (
    case("sd-t2i-adapter", sd_adapter, CONTROLLED),
    case("sdxl-t2i-adapter", sdxl_adapter, CONTROLLED),
    case(
        "sd-pix2pix",
        pix2pix,
        {"prompt": PROMPT, "image": picture(SIDE), "num_inference_steps": 2, "output_type": "pt"},
    ),
    case(
        "sd-upscale",
        upscale,
        {"prompt": PROMPT, "image": picture(16), "num_inference_steps": 2, "output_type": "pt"},
    ),
    case("sd-depth2img", depth_to_image, IMAGE_TO_IMAGE | {"image": pil()}),
    case(
        "sd-image-variation",
        image_variation,
        {"image": pil(), "height": SIDE, "width": SIDE, "num_inference_steps": 2}
        | {"output_type": "pt"},
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
