"""Video pipelines around a UNet: AnimateDiff, Stable Video Diffusion."""

from __future__ import annotations

from typing import Any

import diffusers
from pipelines import encoders
from pipelines.calls import SIZE
from pipelines.case import case
from pipelines.pictures import pil
from pipelines.reuse import remade

from greenroom.zoo.tiny import PROMPT, tiny

__all__ = ["CASES"]


def animatediff() -> Any:
    adapter = diffusers.MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_norm_num_groups=8,
    )
    return remade(diffusers.AnimateDiffPipeline, tiny("sd"), motion_adapter=adapter)


def stable_video() -> Any:
    return diffusers.StableVideoDiffusionPipeline(
        vae=diffusers.AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
            block_out_channels=(32, 64),
        ),
        # The pipeline shows it a picture of 224 by 224, whatever its config says.
        image_encoder=encoders.clip_vision(side=224, patch_size=32),
        unet=diffusers.UNetSpatioTemporalConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            layers_per_block=1,
            cross_attention_dim=32,
            num_attention_heads=8,
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=3 * 32,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        feature_extractor=encoders.clip_image_processor(),
    )


FRAMES = SIZE | {"num_inference_steps": 2, "num_frames": 2, "output_type": "pt"}

CASES = (
    case("animatediff", animatediff, FRAMES | {"prompt": PROMPT}),
    case("stable-video", stable_video, FRAMES | {"image": pil()}),
)
