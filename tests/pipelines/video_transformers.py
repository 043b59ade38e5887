"""Text-to-video and image-to-video pipelines around a transformer: Wan, HunyuanVideo and others."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from pipelines import autoencoders, encoders, vocabularies
from pipelines.calls import TEXT_TO_IMAGE, TEXT_TO_VIDEO
from pipelines.case import case, needless_ftfy
from pipelines.denoisers import flow_match, transformer
from pipelines.pictures import SIDE, pil
from pipelines.reuse import like, remade

from greenroom.zoo.tiny import tiny
from greenroom.zoo.tokenizers import clip_tokenizer, t5_tokenizer

__all__ = ["CASES", "HUNYUAN"]


def wan_i2v() -> Any:
    pipe = tiny("wan")
    return remade(
        needless_ftfy(diffusers.WanImageToVideoPipeline),
        pipe,
        transformer=like(
            pipe.transformer,
            in_channels=16 + 16 + 4,  # noise, the picture's latents, which frames are given
            num_layers=2,
            image_dim=32,
            added_kv_proj_dim=4 * 12,
        ),
        image_encoder=encoders.clip_vision(projected=False),
        image_processor=encoders.clip_image_processor(),
    )


def hunyuan_video() -> Any:
    return diffusers.HunyuanVideoPipeline(
        text_encoder=encoders.decoder("LlamaModel", num_hidden_layers=3),
        tokenizer=vocabularies.llama(),
        text_encoder_2=encoders.clip_text(),
        tokenizer_2=clip_tokenizer(),
        transformer=transformer(
            diffusers.HunyuanVideoTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            patch_size=1,
            rope_axes_dim=(4, 4, 8),
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4
        ),
        scheduler=flow_match(shift=7.0),
    )


def cogvideox() -> Any:
    return diffusers.CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=encoders.t5(),
        vae=diffusers.AutoencoderKLCogVideoX(
            latent_channels=4,
            block_out_channels=(8,) * 4,
            layers_per_block=1,
            norm_num_groups=2,
            sample_height=SIDE,
            sample_width=SIDE,
        ),
        transformer=transformer(
            diffusers.CogVideoXTransformer3DModel,
            time_embed_dim=8,
            sample_width=SIDE // 8,
            sample_height=SIDE // 8,
            sample_frames=5,
            max_text_seq_length=32,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )


def ltx() -> Any:
    return diffusers.LTXPipeline(
        scheduler=flow_match(),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        ),
        text_encoder=encoders.t5(),
        tokenizer=t5_tokenizer(),
        transformer=transformer(
            diffusers.LTXVideoTransformer3DModel, in_channels=8, out_channels=8
        ),
    )


def mochi() -> Any:
    return diffusers.MochiPipeline(
        scheduler=flow_match(),
        vae=diffusers.AutoencoderKLMochi(
            encoder_block_out_channels=(32,) * 4,
            decoder_block_out_channels=(32,) * 4,
            layers_per_block=(1,) * 5,
        ),
        text_encoder=encoders.t5(),
        tokenizer=t5_tokenizer(),
        transformer=transformer(
            diffusers.MochiTransformer3DModel,
            in_channels=12,
            out_channels=12,
            pooled_projection_dim=16,
            time_embed_dim=8,
            max_sequence_length=32,
        ),
    )


class Guardrail(torch.nn.Module):
    """Stands in for the safety checker, whose package is not needed for tests of offloading.

    It is a module outside the sequence, and the pipeline itself moves it to the device and back.
    """

    def __init__(self) -> None:
        super().__init__()
        self.judge = torch.nn.Linear(8, 1)

    @property
    def device(self) -> torch.device:
        return self.judge.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.judge.weight.dtype

    def check_text_safety(self, prompt: str) -> bool:
        return self.is_finite(float(len(prompt)))

    def check_video_safety(self, frames: Any) -> Any:
        assert self.is_finite(float(frames.mean()))
        return frames

    def is_finite(self, value: float) -> bool:
        seen = torch.full((1, 8), value, device=self.device)
        return bool(self.judge(seen).isfinite().all())


def cosmos_transformer(**config: Any) -> Any:
    return transformer(
        diffusers.CosmosTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=16,
        mlp_ratio=2,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        # The mask of padding is resized with torchvision, which is not needed otherwise.
        concat_padding_mask=False,
        **config,
    )


def cosmos() -> Any:
    return diffusers.CosmosTextToWorldPipeline(
        text_encoder=encoders.t5(),
        tokenizer=t5_tokenizer(),
        transformer=cosmos_transformer(),
        vae=diffusers.AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8,) * 4,
            decode_block_out_channels=(8,) * 4,
            attention_resolutions=(8,),
            resolution=64,
            patch_size=4,
        ),
        scheduler=diffusers.EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=80,
            sigma_data=0.5,
            sigma_schedule="karras",
            prediction_type="epsilon",
            rho=7.0,
            final_sigmas_type="sigma_min",
        ),
        safety_checker=Guardrail(),
    )


def latte() -> Any:
    return diffusers.LattePipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=encoders.t5(),
        vae=autoencoders.kl(),
        transformer=transformer(
            diffusers.LatteTransformer3DModel,
            num_layers=1,
            patch_size=2,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )


def allegro() -> Any:
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2
    )
    vae.enable_tiling()  # it decodes in tiles or not at all; here one tile is the whole
    vae.kernel = vae.stride = (8, SIDE, SIDE)
    return diffusers.AllegroPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=encoders.t5(),
        vae=vae,
        transformer=transformer(
            diffusers.AllegroTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            cross_attention_dim=24,
            sample_width=8,
            sample_height=8,
            sample_frames=8,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )


HUNYUAN = TEXT_TO_VIDEO | {"prompt_template": {"template": "{}", "crop_start": 0}}

CASES = (
    case("wan", lambda: tiny("wan"), TEXT_TO_VIDEO),
    case("wan-i2v", wan_i2v, TEXT_TO_VIDEO | {"image": pil()}),
    case("wan2.2", lambda: tiny("wan2.2"), TEXT_TO_VIDEO),
    case("hunyuan-video", hunyuan_video, HUNYUAN),
    case("cogvideox", cogvideox, TEXT_TO_VIDEO),
    case("ltx", ltx, TEXT_TO_VIDEO | {"num_frames": 9}),
    case("mochi", mochi, TEXT_TO_VIDEO | {"num_frames": 7}),
    case("cosmos", cosmos, TEXT_TO_VIDEO | {"num_frames": 9}),
    case("latte", latte, TEXT_TO_IMAGE | {"video_length": 1, "clean_caption": False}),
    case("allegro", allegro, TEXT_TO_VIDEO | {"num_frames": 8, "clean_caption": False}),
)
