"""More of the video pipelines around a transformer: from a picture, controlled, with sound."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from pipelines import autoencoders, encoders, vocabularies
from pipelines.calls import SHORT, SIZE, TEXT_TO_IMAGE, TEXT_TO_VIDEO
from pipelines.case import case, joined, needless_ftfy
from pipelines.denoisers import flow_match, transformer
from pipelines.image_transformers import SANA
from pipelines.pictures import SIDE, pil
from pipelines.reuse import like, of, remade
from pipelines.video_transformers import (
    HUNYUAN,
    Guardrail,
    cogvideox,
    cosmos_transformer,
    hunyuan_video,
    ltx,
)

from greenroom.zoo.tiny import tiny
from greenroom.zoo.tokenizers import t5_tokenizer

__all__ = ["CASES"]


def wan_vace() -> Any:
    pipe = tiny("wan")
    controlled = like(
        pipe.transformer,
        diffusers.WanVACETransformer3DModel,
        num_layers=2,
        vace_layers=[0, 1],
        vace_in_channels=2 * 16 + 64,  # what to keep, what to change, and an 8x8 mask
    )
    return remade(needless_ftfy(diffusers.WanVACEPipeline), pipe, transformer=controlled)


def wan_v2v() -> Any:
    return remade(needless_ftfy(diffusers.WanVideoToVideoPipeline), tiny("wan"))


def skyreels() -> Any:
    pipe = tiny("wan")
    forcing = like(pipe.transformer, diffusers.SkyReelsV2Transformer3DModel, num_layers=2)
    return remade(needless_ftfy(diffusers.SkyReelsV2Pipeline), pipe, transformer=forcing)


def cogvideox_i2v() -> Any:
    pipe = cogvideox()
    wide = like(pipe.transformer, in_channels=2 * 4)  # the noise, and the picture's latents
    return remade(diffusers.CogVideoXImageToVideoPipeline, pipe, transformer=wide)


def ltx_upsample() -> Any:
    return diffusers.LTXLatentUpsamplePipeline(
        vae=ltx().vae,
        latent_upsampler=LTXLatentUpsamplerModel(
            in_channels=8, mid_channels=32, num_blocks_per_stage=1
        ),
    )


def framepack() -> Any:
    pipe = hunyuan_video()
    return remade(
        diffusers.HunyuanVideoFramepackPipeline,
        pipe,
        transformer=like(
            pipe.transformer,
            diffusers.HunyuanVideoFramepackTransformer3DModel,
            patch_size=2,
            has_image_proj=True,
            image_proj_dim=32,
            has_clean_x_embedder=True,
        ),
        image_encoder=encoders.siglip(),
        feature_extractor=encoders.siglip_image_processor(),
    )


def cosmos2() -> Any:
    return diffusers.Cosmos2TextToImagePipeline(
        text_encoder=encoders.t5(),
        tokenizer=t5_tokenizer(),
        transformer=cosmos_transformer(in_channels=16, out_channels=16, extra_pos_embed_type=None),
        vae=autoencoders.wan(),
        scheduler=flow_match(use_karras_sigmas=True),
        safety_checker=Guardrail(),
    )


def hunyuan_video_1_5() -> Any:
    return diffusers.HunyuanVideo15Pipeline(
        text_encoder=encoders.qwen_vl().model.language_model,
        tokenizer=vocabularies.qwen(),
        text_encoder_2=encoders.t5(vocab_size=vocabularies.BYTES),
        tokenizer_2=transformers.ByT5Tokenizer(extra_ids=0),
        transformer=transformer(
            diffusers.HunyuanVideo15Transformer3DModel,
            in_channels=2 * 4 + 1,  # noise, the picture's latents, which frames are given
            num_attention_heads=2,
            num_layers=1,
            text_embed_2_dim=32,
            image_embed_dim=12,
            rope_axes_dim=(2, 2, 4),
            target_size=SIDE,
            task_type="t2v",
        ),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        scheduler=flow_match(shift=7.0),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.0),
    )


def ltx2() -> Any:
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(1,),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        decoder_causal=False,
    )
    return diffusers.LTX2Pipeline(
        scheduler=flow_match(),
        vae=vae,
        audio_vae=diffusers.AutoencoderKLLTX2Audio(
            base_channels=4,
            ch_mult=(1,),
            num_res_blocks=1,
            resolution=32,
            latent_channels=2,
            mel_bins=8,
        ),
        text_encoder=encoders.gemma3(),
        tokenizer=vocabularies.gemma(),
        connectors=LTX2TextConnectors(
            caption_channels=32,
            text_proj_in_factor=3,  # the embeddings and the states of two layers
            video_connector_num_attention_heads=4,
            video_connector_attention_head_dim=8,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=4,
            audio_connector_attention_head_dim=8,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
            rope_type="split",
        ),
        transformer=transformer(
            diffusers.LTX2VideoTransformer3DModel,
            num_attention_heads=2,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            rope_type="split",
        ),
        vocoder=LTX2Vocoder(
            in_channels=2 * 8,
            hidden_channels=16,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3]],
        ),
    )


def sana_video() -> Any:
    return needless_ftfy(diffusers.SanaVideoPipeline)(
        tokenizer=vocabularies.gemma(),
        text_encoder=encoders.decoder("Gemma2Model"),
        vae=autoencoders.wan(),
        transformer=diffusers.SanaVideoTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=32,
            sample_size=4,
            rope_max_seq_len=32,
        ),
        scheduler=flow_match(shift=3.0),
    )


FROM_PICTURE = TEXT_TO_VIDEO | {"image": pil()}
LTX2 = TEXT_TO_VIDEO | {
    "guidance_scale": 1.0,
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
    "spatio_temporal_guidance_blocks": None,
    "use_cross_timestep": False,
}


def picture_and_sound(result: Any) -> torch.Tensor:
    return torch.cat([joined(result.frames).flatten(), joined(result.audio).flatten()])


CASES = (
    case("wan-vace", wan_vace, TEXT_TO_VIDEO),
    case("wan-v2v", wan_v2v, SHORT | {"video": [pil()] * 5}),
    case("skyreels", skyreels, TEXT_TO_VIDEO),
    case("cogvideox-i2v", cogvideox_i2v, FROM_PICTURE),
    case(
        "cogvideox-fun-control",
        of("CogVideoXFunControlPipeline", cogvideox_i2v),
        SHORT | {"control_video": [pil()] * 8},
    ),
    case("ltx-i2v", of("LTXImageToVideoPipeline", ltx), FROM_PICTURE | {"num_frames": 9}),
    case("ltx-upsample", ltx_upsample, SIZE | {"video": [pil()] * 9, "output_type": "pt"}),
    case(
        "hunyuan-framepack",
        framepack,
        HUNYUAN | {"image": pil(), "num_frames": 9, "latent_window_size": 3},
    ),
    case("cosmos2", cosmos2, SHORT),
    # The second text encoder reads what stands in quotation marks.
    case(
        "hunyuan-video1.5",
        hunyuan_video_1_5,
        TEXT_TO_IMAGE | {"num_frames": 5, "prompt": 'it says "red"'},
    ),
    case("ltx2", ltx2, LTX2, picture_and_sound),
    case("sana-video", sana_video, SANA | {"frames": 5}),
)
