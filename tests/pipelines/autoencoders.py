"""Small autoencoders with random weights, of the kinds that several pipelines share."""

from __future__ import annotations

from typing import Any

import diffusers

__all__ = ["kl", "movq", "wan"]


def kl(*, widths: tuple[int, ...] = (16, 32), **config: Any) -> Any:
    """Stable Diffusion's kind: four latent channels at half the resolution."""
    settings: dict[str, Any] = {"scaling_factor": 0.3611, "sample_size": 32}
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=8,
        **(settings | config),
    )


def wan(kind: str = "AutoencoderKLWan", **config: Any) -> Any:
    """Wan's kind, also QwenImage's: sixteen channels, an eighth of each side, a quarter of time."""
    settings: dict[str, Any] = {
        "base_dim": 8,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True, True],
    }
    return getattr(diffusers, kind)(**(settings | config))


def movq() -> Any:
    """Kandinsky's: quantised, and its decoder's norms look at the latents."""
    return diffusers.VQModel(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=12,
        norm_num_groups=8,
        norm_type="spatial",
    )
