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
from pipelines.case import case, joined, needless_ftfy
from pipelines.pictures import SIDE, pil
from pipelines.reuse import filled, like
from pipelines.video_transformers import (
    TEXT_TO_VIDEO,
    Guardrail,
    cogvideox,
    hunyuan_video,
    ltx,
)

from greenroom.zoo.tiny import tiny
from greenroom.zoo.tokenizers import t5_tokenizer

__all__ = ["CASES"]


def wan_vace() -> Any:
    components = tiny("wan").components
    transformer = diffusers.WanVACETransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=32,
        vace_layers=[0, 1],
        vace_in_channels=2 * 16 + 64,  # what to keep, what to change, and an 8x8 mask
    )
    return needless_ftfy(diffusers.WanVACEPipeline)(**components | {"transformer": transformer})


def wan_v2v() -> Any:
    components = filled(tiny("wan"))
    return needless_ftfy(diffusers.WanVideoToVideoPipeline)(**components)


def skyreels() -> Any:
    components = filled(tiny("wan"))
    components["transformer"] = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=4,
        attention_head_dim=12,
        text_dim=32,
        freq_dim=32,
        ffn_dim=96,
        num_layers=2,
        rope_max_seq_len=32,
    )
    return needless_ftfy(diffusers.SkyReelsV2Pipeline)(**components)


def cogvideox_with(pipeline: str) -> Any:
    components = cogvideox().components
    components["transformer"] = like(components["transformer"], in_channels=2 * 4)
    return getattr(diffusers, pipeline)(**components)


def ltx_i2v() -> Any:
    return diffusers.LTXImageToVideoPipeline(**ltx().components)


def ltx_upsample() -> Any:
    return diffusers.LTXLatentUpsamplePipeline(
        vae=ltx().vae,
        latent_upsampler=LTXLatentUpsamplerModel(
            in_channels=8, mid_channels=32, num_blocks_per_stage=1
        ),
    )


def framepack() -> Any:
    components = hunyuan_video().components
    components["transformer"] = diffusers.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=2,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 4, 8),
        has_image_proj=True,
        image_proj_dim=32,
        has_clean_x_embedder=True,
    )
    return diffusers.HunyuanVideoFramepackPipeline(
        image_encoder=encoders.siglip(),
        feature_extractor=encoders.siglip_image_processor(),
        **components,
    )


def cosmos2() -> Any:
    return diffusers.Cosmos2TextToImagePipeline(
        text_encoder=encoders.t5(),
        tokenizer=t5_tokenizer(),
        transformer=diffusers.CosmosTransformer3DModel(
            in_channels=16,
            out_channels=16,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2,
            text_embed_dim=32,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            extra_pos_embed_type=None,
            # The mask of padding is resized with torchvision, which is not needed otherwise.
            concat_padding_mask=False,
        ),
        vae=autoencoders.wan(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        safety_checker=Guardrail(),
    )


def hunyuan_video_1_5() -> Any:
    return diffusers.HunyuanVideo15Pipeline(
        text_encoder=encoders.qwen_vl().model.language_model,
        tokenizer=vocabularies.qwen(),
        text_encoder_2=encoders.t5(vocab_size=vocabularies.BYTES),
        tokenizer_2=transformers.ByT5Tokenizer(extra_ids=0),
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=2 * 4 + 1,  # noise, the picture's latents, which frames are given
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_refiner_layers=1,
            text_embed_dim=32,
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
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
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
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
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
        transformer=diffusers.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=2,
            caption_channels=32,
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
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


FROM_PICTURE = TEXT_TO_VIDEO | {"image": pil()}
# As many frames as the video that is given, or one.
UNTIMED = {key: value for key, value in TEXT_TO_VIDEO.items() if key != "num_frames"}
UNLIMITED = {key: value for key, value in TEXT_TO_VIDEO.items() if key != "max_sequence_length"}
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
    case("wan-v2v", wan_v2v, UNTIMED | {"video": [pil()] * 5}),
    case("skyreels", skyreels, TEXT_TO_VIDEO),
    case("cogvideox-i2v", lambda: cogvideox_with("CogVideoXImageToVideoPipeline"), FROM_PICTURE),
    case(
        "cogvideox-fun-control",
        lambda: cogvideox_with("CogVideoXFunControlPipeline"),
        UNTIMED | {"control_video": [pil()] * 8},
    ),
    case("ltx-i2v", ltx_i2v, FROM_PICTURE | {"num_frames": 9}),
    case(
        "ltx-upsample",
        ltx_upsample,
        {"video": [pil()] * 9, "height": SIDE, "width": SIDE, "output_type": "pt"},
    ),
    case(
        "hunyuan-framepack",
        framepack,
        FROM_PICTURE
        | {"num_frames": 9, "latent_window_size": 3}
        | {"prompt_template": {"template": "{}", "crop_start": 0}},
    ),
    case("cosmos2", cosmos2, UNTIMED),
    # The second text encoder reads what stands in quotation marks.
    case("hunyuan-video1.5", hunyuan_video_1_5, UNLIMITED | {"prompt": 'it says "red"'}),
    case("ltx2", ltx2, LTX2, picture_and_sound),
    case(
        "sana-video",
        sana_video,
        UNTIMED | {"frames": 5, "use_resolution_binning": False, "complex_human_instruction": None},
    ),
)
