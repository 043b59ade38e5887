"""Text-to-image pipelines around a transformer: from PixArt to Flux 2."""

from __future__ import annotations

from typing import Any

import diffusers
from pipelines import autoencoders, encoders, vocabularies
from pipelines.calls import IMAGE_TO_IMAGE, SHORT, TEXT_TO_IMAGE
from pipelines.case import case
from pipelines.denoisers import flow_match, flux_like, transformer
from pipelines.pictures import SIDE
from pipelines.reuse import of, remade

from greenroom.zoo.tiny import tiny
from greenroom.zoo.tokenizers import clip_tokenizer, t5_tokenizer

__all__ = ["CASES", "FLUX2", "SANA"]


def flux_vae(**config: Any) -> Any:
    return autoencoders.kl(
        shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False, **config
    )


def sd3() -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer(
            diffusers.SD3Transformer2DModel,
            patch_size=1,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            pos_embed_max_size=32,
        ),
        scheduler=flow_match(),
        vae=flux_vae(),
        text_encoder=encoders.clip_text(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=encoders.clip_text(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoders.t5(d_model=64),
        tokenizer_3=t5_tokenizer(),
    )


def chroma() -> Any:
    return diffusers.ChromaPipeline(
        scheduler=flow_match(),
        vae=flux_vae(),
        text_encoder=encoders.t5(),
        tokenizer=t5_tokenizer(),
        transformer=flux_like(
            diffusers.ChromaTransformer2DModel,
            approximator_num_channels=8,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
    )


def hidream() -> Any:
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=flow_match(),
        vae=autoencoders.kl(shift_factor=0.1159),
        text_encoder=encoders.clip_text(projected=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=encoders.clip_text(projected=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=encoders.t5(),
        tokenizer_3=t5_tokenizer(),
        # It is asked for its attention weights, which only this implementation has.
        text_encoder_4=encoders.decoder("LlamaForCausalLM", attn_implementation="eager"),
        tokenizer_4=vocabularies.llama(),
        transformer=transformer(
            diffusers.HiDreamImageTransformer2DModel,
            patch_size=2,
            num_layers=1,
            caption_channels=[32, 32],
            text_emb_dim=64,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=(0, 1),
            # Otherwise it says for each call that it is not being trained.
            force_inference_output=True,
        ),
    )
    pipe.default_sample_size = SIDE // 2  # whatever size is asked for is stretched to this area
    return pipe


def qwen_image() -> Any:
    return diffusers.QwenImagePipeline(
        scheduler=flow_match(),
        vae=autoencoders.wan("AutoencoderKLQwenImage"),
        text_encoder=encoders.qwen_vl(),
        tokenizer=vocabularies.qwen(),
        transformer=flux_like(
            diffusers.QwenImageTransformer2DModel,
            in_channels=64,
            num_layers=2,
            axes_dims_rope=(8, 4, 4),
        ),
    )


def z_image() -> Any:
    return diffusers.ZImagePipeline(
        scheduler=flow_match(),
        vae=flux_vae(),
        text_encoder=encoders.decoder("Qwen3Model"),
        tokenizer=vocabularies.qwen(),
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
    )


def lumina2() -> Any:
    return diffusers.Lumina2Pipeline(
        transformer=transformer(
            diffusers.Lumina2Transformer2DModel,
            sample_size=4,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(8, 4, 4),
            cap_feat_dim=32,
        ),
        scheduler=flow_match(),
        vae=flux_vae(),
        text_encoder=encoders.decoder("Gemma2Model"),
        tokenizer=vocabularies.gemma(),
    )


def sana() -> Any:
    return diffusers.SanaPipeline(
        tokenizer=vocabularies.gemma(),
        text_encoder=encoders.decoder("Gemma2Model"),
        vae=diffusers.AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
        ),
        transformer=transformer(
            diffusers.SanaTransformer2DModel,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
        ),
        scheduler=flow_match(shift=3.0),
    )


def pixart() -> Any:
    return diffusers.PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=encoders.t5(),
        vae=autoencoders.kl(),
        transformer=transformer(
            diffusers.PixArtTransformer2DModel,
            out_channels=8,
            # The size of the picture is a condition of Alpha at 1024 pixels only.
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )


def pixart_sigma() -> Any:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return remade(diffusers.PixArtSigmaPipeline, pixart(), scheduler=scheduler)


def flux2_klein() -> Any:
    return diffusers.Flux2KleinPipeline(
        scheduler=flow_match(),
        vae=flux2_vae(),
        text_encoder=encoders.decoder("Qwen3ForCausalLM", num_hidden_layers=3),
        tokenizer=vocabularies.qwen(),
        transformer=flux2_transformer(guided=False),
    )


def flux2() -> Any:
    return diffusers.Flux2Pipeline(
        scheduler=flow_match(),
        vae=flux2_vae(),
        text_encoder=encoders.mistral3(),
        tokenizer=vocabularies.qwen(),  # of the published processor, only the chat is used
        transformer=flux2_transformer(guided=True),
    )


def flux2_vae() -> Any:
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def flux2_transformer(*, guided: bool) -> Any:
    return flux_like(
        diffusers.Flux2Transformer2DModel,
        joint_attention_dim=3 * 32,  # the states of three layers side by side
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guided,
    )


def longcat() -> Any:
    pipe = diffusers.LongCatImagePipeline(
        scheduler=flow_match(),
        vae=flux_vae(latent_channels=16),
        text_encoder=encoders.qwen_vl(),
        tokenizer=vocabularies.qwen(),
        # Of the page of instructions for a rewriter, the last words, then the prompt.
        text_processor=vocabularies.qwen(
            chat_template=vocabularies.CHAT.replace("part['text']", "part['text'][-64:]")
        ),
        transformer=flux_like(diffusers.LongCatImageTransformer2DModel, in_channels=64),
    )
    pipe.tokenizer_max_length = 8  # also how many tokens a prompt is rewritten to
    return pipe


FLUX2 = SHORT | {"max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3)}
SANA = SHORT | {"use_resolution_binning": False, "complex_human_instruction": None}
PIXART = SHORT | {"use_resolution_binning": False, "clean_caption": False}

CASES = (
    case("sd3", sd3, SHORT),
    case("flux", lambda: tiny("flux"), SHORT),
    case("flux-img2img", of("FluxImg2ImgPipeline", "flux"), SHORT | IMAGE_TO_IMAGE),
    case("flux2", flux2, FLUX2),
    case("flux2-klein", flux2_klein, FLUX2),
    case("chroma", chroma, SHORT),
    case("hidream", hidream, SHORT),
    case("qwen-image", qwen_image, SHORT | {"negative_prompt": "grey"}),
    case("z-image", z_image, SHORT),
    case("lumina2", lumina2, SHORT | {"max_sequence_length": 192}),
    case("sana", sana, SANA),
    case("pixart-alpha", pixart, PIXART),
    case("pixart-sigma", pixart_sigma, PIXART),
    case("longcat", longcat, TEXT_TO_IMAGE),
)
