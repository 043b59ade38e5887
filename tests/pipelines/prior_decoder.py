"""Pipelines of two stages, alone and combined: Kandinsky 2.2, Stable Cascade. And Kandinsky 3."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import (
    WuerstchenDiffNeXt,
)
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from diffusers.pipelines.kandinsky.text_encoder import MultilingualCLIP
from pipelines import autoencoders, denoisers, encoders, vocabularies
from pipelines.calls import BRIEF, IMAGE_TO_IMAGE, SIZE, TEXT_TO_IMAGE
from pipelines.case import case, joined
from pipelines.pictures import pil
from pipelines.reuse import like, of

from greenroom.zoo.tiny import PROMPT
from greenroom.zoo.tokenizers import clip_tokenizer, t5_tokenizer

__all__ = ["CASES"]


def both(result: Any) -> torch.Tensor:
    """A prior's answer: the embedding and its negative, side by side."""
    return torch.cat([joined(result[0]), joined(result[1])])


def kandinsky_prior_parts() -> dict[str, Any]:
    return {
        "prior": diffusers.PriorTransformer(
            num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=1
        ),
        "image_encoder": encoders.clip_vision(),
        "text_encoder": encoders.clip_text(projected=True),
        "tokenizer": clip_tokenizer(),
        "scheduler": diffusers.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=10.0
        ),
        "image_processor": encoders.clip_image_processor(),
    }


def kandinsky_decoder_parts() -> dict[str, Any]:
    return {
        "unet": denoisers.unet(
            in_channels=4,
            out_channels=8,  # the noise and its variance
            addition_embed_type="image",
            encoder_hid_dim_type="image_proj",
            attention_head_dim=4,
        ),
        "scheduler": diffusers.DDPMScheduler(clip_sample=False, variance_type="learned_range"),
        "movq": autoencoders.movq(),
    }


def kandinsky_prior() -> Any:
    return diffusers.KandinskyV22PriorPipeline(**kandinsky_prior_parts())


def kandinsky() -> Any:
    return diffusers.KandinskyV22Pipeline(**kandinsky_decoder_parts())


def as_prior(parts: dict[str, Any]) -> dict[str, Any]:
    """A prior's components, as a pipeline of both stages names them."""
    return {f"prior_{name}": part for name, part in parts.items()}


def kandinsky_combined() -> Any:
    prior = as_prior(kandinsky_prior_parts())
    return diffusers.KandinskyV22CombinedPipeline(**kandinsky_decoder_parts(), **prior)


def kandinsky21_combined() -> Any:
    components = kandinsky_decoder_parts()
    components["unet"] = like(
        components["unet"],
        addition_embed_type="text_image",
        encoder_hid_dim_type="text_image_proj",
    )
    prior = as_prior(kandinsky_prior_parts())
    return diffusers.KandinskyCombinedPipeline(
        text_encoder=encoders.made(
            MultilingualCLIP,
            transformerDimSize=32,
            imageDimSize=32,
            vocab_size=vocabularies.BYTES,
            **encoders.size(),
        ),
        tokenizer=vocabularies.roberta(model_max_length=77),
        **components,
        **prior,
    )


def kandinsky3() -> Any:
    return diffusers.Kandinsky3Pipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=encoders.t5(),
        unet=diffusers.Kandinsky3UNet(
            time_embedding_dim=4,
            groups=2,
            attention_head_dim=4,
            layers_per_block=3,
            block_out_channels=(32, 64),
            cross_attention_dim=4,
            encoder_hid_dim=32,
        ),
        scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        movq=autoencoders.movq(),
    )


def cascade_prior_parts() -> dict[str, Any]:
    return {
        "tokenizer": clip_tokenizer(),
        "text_encoder": encoders.clip_text(projected=True),
        "prior": diffusers.StableCascadeUNet(
            conditioning_dim=32,
            block_out_channels=(32, 32),
            num_attention_heads=(2, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            switch_level=(False,),
            clip_image_in_channels=32,
            clip_text_in_channels=32,
            clip_text_pooled_in_channels=32,
        ),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
        "feature_extractor": encoders.clip_image_processor(),
        "image_encoder": encoders.clip_vision(),
    }


def cascade_decoder_parts() -> dict[str, Any]:
    plain = ("SDCascadeResBlock", "SDCascadeTimestepBlock")
    return {
        "decoder": diffusers.StableCascadeUNet(
            in_channels=4,
            out_channels=4,
            conditioning_dim=32,
            block_out_channels=(16, 32),
            num_attention_heads=(-1, 2),
            down_num_layers_per_block=(1, 1),
            up_num_layers_per_block=(1, 1),
            block_types_per_layer=(plain, (*plain, "SDCascadeAttnBlock")),
            clip_text_pooled_in_channels=32,
            effnet_in_channels=16,
            pixel_mapper_in_channels=3,
            patch_size=2,
        ),
        "tokenizer": clip_tokenizer(),
        "text_encoder": encoders.clip_text(projected=True),
        "scheduler": diffusers.DDPMWuerstchenScheduler(),
        "vqgan": PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2, embed_dim=16),
    }


def cascade_prior() -> Any:
    return diffusers.StableCascadePriorPipeline(**cascade_prior_parts())


def cascade_decoder() -> Any:
    return diffusers.StableCascadeDecoderPipeline(**cascade_decoder_parts())


def cascade_combined() -> Any:
    prior = as_prior(cascade_prior_parts())
    return diffusers.StableCascadeCombinedPipeline(**cascade_decoder_parts(), **prior)


def wuerstchen() -> Any:
    components = cascade_decoder_parts()
    components["text_encoder"] = encoders.clip_text()
    components["decoder"] = WuerstchenDiffNeXt(
        c_r=8,
        c_cond=32,
        c_hidden=[16, 32],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        clip_embd=32,
    )
    return diffusers.WuerstchenCombinedPipeline(
        **components,
        prior_tokenizer=clip_tokenizer(),
        prior_text_encoder=encoders.clip_text(),
        prior_prior=WuerstchenPrior(c=32, c_cond=32, c_r=8, depth=1, nhead=2),
        prior_scheduler=diffusers.DDPMWuerstchenScheduler(),
    )


def ramp(*shape: int) -> torch.Tensor:
    """What one stage hands to the other, when called without it."""
    return torch.linspace(-1.0, 1.0, torch.Size(shape).numel()).reshape(shape)


PRIOR = {"prompt": PROMPT, "num_inference_steps": 2}
DECODER = SIZE | {
    "image_embeds": ramp(1, 32),
    "negative_image_embeds": -ramp(1, 32),
    "num_inference_steps": 2,
    "output_type": "pt",
}
CASCADE_PRIOR = PRIOR | {"images": [pil()], "height": 128, "width": 128}
COMBINED = TEXT_TO_IMAGE | {"prior_num_inference_steps": 2}

CASES = (
    case("kandinsky2.2-prior", kandinsky_prior, PRIOR, both),
    case("kandinsky2.2", kandinsky, DECODER),
    case(
        "kandinsky2.2-img2img",
        of("KandinskyV22Img2ImgPipeline", kandinsky),
        DECODER | {"image": IMAGE_TO_IMAGE["image"], "strength": 0.5, "num_inference_steps": 4},
    ),
    case("kandinsky2.2-combined", kandinsky_combined, COMBINED),
    case(
        "kandinsky2.2-img2img-combined",
        of("KandinskyV22Img2ImgCombinedPipeline", kandinsky_combined),
        COMBINED | IMAGE_TO_IMAGE,
    ),
    case("kandinsky2.1-combined", kandinsky21_combined, COMBINED),
    case("kandinsky3", kandinsky3, TEXT_TO_IMAGE),
    case("kandinsky3-img2img", of("Kandinsky3Img2ImgPipeline", kandinsky3), IMAGE_TO_IMAGE),
    case("stable-cascade-prior", cascade_prior, CASCADE_PRIOR),
    case(
        "stable-cascade-decoder",
        cascade_decoder,
        BRIEF | {"image_embeddings": ramp(1, 16, 3, 3), "guidance_scale": 2.0},
        on_device={"image_embeddings"},
    ),
    case("stable-cascade", cascade_combined, COMBINED | CASCADE_PRIOR),
    case("wuerstchen", wuerstchen, COMBINED | {"height": 128, "width": 128}),
)
