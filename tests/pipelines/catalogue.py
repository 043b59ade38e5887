"""Shipped diffusers pipelines, tiny and offline, by name.

    case = CATALOGUE["sdxl"]
    pipe = case.build()
    picture = run(case, pipe)

Each is of the shipped class, called through its own ``__call__``; only the sizes are not the
published ones, and the weights are random.
"""

from __future__ import annotations

from pipelines import (
    audio,
    image_transformers,
    modular,
    prior_decoder,
    stable_diffusion,
    transformer_variants,
    unet_variants,
    unet_video,
    video_transformers,
    video_variants,
)
from pipelines.case import Case, run

__all__ = ["CATALOGUE", "Case", "run"]

FAMILIES = (
    stable_diffusion,
    unet_variants,
    prior_decoder,
    image_transformers,
    transformer_variants,
    video_transformers,
    video_variants,
    unet_video,
    audio,
    modular,
)

CATALOGUE: dict[str, Case] = {case.name: case for family in FAMILIES for case in family.CASES}
