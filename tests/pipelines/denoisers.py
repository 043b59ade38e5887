"""Small denoisers with random weights, and the schedule that most of them follow."""

from __future__ import annotations

from typing import Any

import diffusers
from pipelines.reuse import taken

__all__ = ["flow_match", "flux_like", "transformer", "unet"]

#: What most classes call their sizes: four channels, two layers, 32 features wherever they meet.
SIZES = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "hidden_size": 32,
    "caption_channels": 32,
    "caption_projection_dim": 32,
    "cross_attention_dim": 32,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "text_embed_dim": 32,
}

#: Flux's family: text and picture side by side, in patches of 2x2 of the VAE's four channels.
FLUX = SIZES | {
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 1,
    "num_single_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 4, 8),
}


def transformer(kind: Any, **config: Any) -> Any:
    """A model with those of ``SIZES`` that its class takes, but for ``config``."""
    return kind(**(taken(kind, SIZES) | config))


def flux_like(kind: Any, **config: Any) -> Any:
    """A model with those of ``FLUX`` that its class takes, but for ``config``."""
    return kind(**(taken(kind, FLUX) | config))


def unet(**config: Any) -> Any:
    """The kind of Kandinsky 2 and DeepFloyd IF, which Stable Diffusion's UNet is not."""
    settings: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "layers_per_block": 1,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "encoder_hid_dim": 32,
        "cross_attention_dim": 32,
        "resnet_time_scale_shift": "scale_shift",
    }
    return diffusers.UNet2DConditionModel(**(settings | config))


def flow_match(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)
