"""More pipelines that draw with a transformer: controlled, editing, prompted in other ways."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from pipelines import autoencoders, encoders, vocabularies
from pipelines.calls import CONTROLLED, IMAGE_TO_IMAGE, INPAINTING, SHORT, TEXT_TO_IMAGE
from pipelines.case import case, joined
from pipelines.denoisers import flow_match, flux_like, transformer
from pipelines.image_transformers import (
    SANA,
    chroma,
    flux2_vae,
    flux_vae,
    qwen_image,
    sana,
    sd3,
    z_image,
)
from pipelines.pictures import SIDE, picture, pil
from pipelines.reuse import like, of, remade

from greenroom.zoo.tiny import PROMPT, tiny
from greenroom.zoo.tokenizers import clip_tokenizer, t5_tokenizer

__all__ = ["CASES"]


def flux_controlnet() -> Any:
    pipe = tiny("flux")
    controlnet = like(pipe.transformer, diffusers.FluxControlNetModel, num_layers=1)
    return remade(diffusers.FluxControlNetPipeline, pipe, controlnet=controlnet)


def flux_fill() -> Any:
    pipe = tiny("flux")
    # The noise, the masked picture's latents, and the mask: 2x2 pixels for each of 2x2 latents.
    wide = like(pipe.transformer, in_channels=16 + 16 + 16, out_channels=16)
    return remade(diffusers.FluxFillPipeline, pipe, transformer=wide)


def flux_redux() -> Any:
    return remade(
        diffusers.FluxPriorReduxPipeline,
        tiny("flux"),
        image_encoder=encoders.siglip(),
        feature_extractor=encoders.siglip_image_processor(),
        image_embedder=ReduxImageEncoder(redux_dim=32, txt_in_features=32),
    )


def sd3_controlnet() -> Any:
    pipe = sd3()
    controlnet = like(pipe.transformer, diffusers.SD3ControlNetModel, num_layers=1)
    return remade(diffusers.StableDiffusion3ControlNetPipeline, pipe, controlnet=controlnet)


def sana_sprint() -> Any:
    pipe = sana()
    return remade(
        diffusers.SanaSprintPipeline,
        pipe,
        transformer=like(pipe.transformer, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        scheduler=diffusers.SCMScheduler(),
    )


def auraflow() -> Any:
    return diffusers.AuraFlowPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=encoders.t5("UMT5EncoderModel"),
        vae=autoencoders.kl(),
        transformer=transformer(
            diffusers.AuraFlowTransformer2DModel,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            pos_embed_max_size=64,
        ),
        scheduler=flow_match(),
    )


def cogview4() -> Any:
    return diffusers.CogView4Pipeline(
        tokenizer=vocabularies.qwen(padding_side="left"),
        text_encoder=encoders.decoder("GlmModel"),
        vae=autoencoders.kl(),
        transformer=transformer(
            diffusers.CogView4Transformer2DModel,
            time_embed_dim=8,
            condition_dim=4,
            rope_axes_dim=(8, 8),
        ),
        scheduler=flow_match(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True),
    )


def lumina() -> Any:
    return diffusers.LuminaPipeline(
        transformer=transformer(diffusers.LuminaNextDiT2DModel, num_kv_heads=2, multiple_of=16),
        scheduler=flow_match(),
        vae=autoencoders.kl(),
        text_encoder=encoders.decoder("GemmaModel"),
        tokenizer=vocabularies.gemma(),
    )


def hunyuan_dit() -> Any:
    return diffusers.HunyuanDiTPipeline(
        vae=autoencoders.kl(widths=(8,) * 4),
        text_encoder=encoders.made(
            transformers.BertModel, vocab_size=vocabularies.BYTES, **encoders.size()
        ),
        tokenizer=vocabularies.roberta(model_max_length=77),
        text_encoder_2=encoders.t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=transformer(
            diffusers.HunyuanDiT2DModel,
            patch_size=2,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
        ),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def dit() -> Any:
    return diffusers.DiTPipeline(
        transformer=transformer(
            diffusers.DiTTransformer2DModel,
            num_attention_heads=2,
            out_channels=8,
            num_embeds_ada_norm=1000,
        ),
        vae=autoencoders.kl(),
        scheduler=diffusers.DDIMScheduler(),
    )


def ovis() -> Any:
    return diffusers.OvisImagePipeline(
        scheduler=flow_match(),
        vae=flux_vae(),
        text_encoder=encoders.decoder("Qwen3Model"),
        tokenizer=vocabularies.qwen(),
        transformer=flux_like(diffusers.OvisImageTransformer2DModel, num_single_layers=1),
    )


def ernie() -> Any:
    return diffusers.ErnieImagePipeline(
        transformer=transformer(
            diffusers.ErnieImageTransformer2DModel,
            num_attention_heads=2,
            ffn_hidden_size=64,
            in_channels=16,
            out_channels=16,
            text_in_dim=32,
            rope_axes_dim=(4, 4, 8),
        ),
        vae=flux2_vae(),
        text_encoder=encoders.mistral3().model,
        tokenizer=vocabularies.qwen(),
        scheduler=flow_match(),
        pe=encoders.decoder("Ministral3ForCausalLM"),
        # How many tokens a prompt is rewritten to.
        pe_tokenizer=vocabularies.qwen(model_max_length=8),
    )


def kandinsky5() -> Any:
    pipe = diffusers.Kandinsky5T2IPipeline(
        transformer=diffusers.Kandinsky5Transformer3DModel(
            in_text_dim=32,
            in_text_dim2=32,
            time_dim=32,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        vae=autoencoders.kl(),
        text_encoder=encoders.qwen_vl(),
        tokenizer=vocabularies.qwen(),
        text_encoder_2=encoders.clip_text(),
        tokenizer_2=clip_tokenizer(),
        scheduler=flow_match(),
    )
    pipe.resolutions = [(SIDE, SIDE)]  # other sizes than these are not drawn
    return pipe


REDUX = {"image": pil(), "prompt": PROMPT, "generator": ...}
CASES = (
    case("flux-controlnet", flux_controlnet, SHORT | {"control_image": picture(SIDE)}),
    case("flux-fill", flux_fill, SHORT | INPAINTING),
    case(
        "flux-kontext",
        of("FluxKontextPipeline", "flux"),
        SHORT | CONTROLLED | {"max_area": SIDE * SIDE, "_auto_resize": False},
    ),
    case("flux-redux", flux_redux, REDUX, lambda result: joined(result["prompt_embeds"])),
    case("chroma-img2img", of("ChromaImg2ImgPipeline", chroma), SHORT | IMAGE_TO_IMAGE),
    case("sd3-img2img", of("StableDiffusion3Img2ImgPipeline", sd3), IMAGE_TO_IMAGE),
    case("sd3-controlnet", sd3_controlnet, SHORT | {"control_image": picture(SIDE)}),
    case(
        "qwen-image-img2img",
        of("QwenImageImg2ImgPipeline", qwen_image),
        SHORT | IMAGE_TO_IMAGE | {"negative_prompt": "grey"},
    ),
    case("z-image-img2img", of("ZImageImg2ImgPipeline", z_image), SHORT | IMAGE_TO_IMAGE),
    case("sana-sprint", sana_sprint, SANA),
    case("auraflow", auraflow, SHORT),
    case("cogview4", cogview4, SHORT | {"negative_prompt": "grey"}),
    case("lumina", lumina, SHORT | {"clean_caption": False}),
    case("hunyuan-dit", hunyuan_dit, TEXT_TO_IMAGE | {"use_resolution_binning": False}),
    case("dit", dit, {"class_labels": [1], "num_inference_steps": 2, "output_type": "np"}),
    case("ovis", ovis, SHORT),
    case("ernie", ernie, TEXT_TO_IMAGE),
    case("kandinsky5", kandinsky5, TEXT_TO_IMAGE),
)
