"""Modular pipelines: the same components, but the call is put together from blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.modular_pipelines.wan.encoders import WanTextEncoderStep
from pipelines import image_transformers, video_transformers
from pipelines.case import case, joined, needless_ftfy
from pipelines.reuse import filled
from pipelines.stable_diffusion import IMAGE_TO_IMAGE, TEXT_TO_IMAGE

from greenroom.zoo.tiny import tiny

__all__ = ["CASES"]


def modular(blocks: str, pipeline: Callable[[], Any]) -> Callable[[], Any]:
    """A modular pipeline of ``blocks`` with the components of another."""

    def build() -> Any:
        pipe = quiet(getattr(diffusers, blocks)()).init_pipeline()
        parts = filled(pipeline())
        pipe.update_components(
            **{name: part for name, part in parts.items() if name in pipe.component_names}
        )
        return pipe

    return build


def quiet(block: Any) -> Any:
    """No progress bars: the pipeline's own switch reaches the outermost blocks only."""
    for part in (block, *block.sub_blocks.values()):
        if hasattr(part, "set_progress_bar_config"):
            part.set_progress_bar_config(disable=True)
        if part is not block and part.sub_blocks:
            quiet(part)
    return block


def wan() -> Any:
    needless_ftfy(WanTextEncoderStep)
    return modular("WanBlocks", lambda: tiny("wan"))()


def value(result: Any) -> torch.Tensor:
    """The one output that was asked for."""
    return joined(result)


IMAGES = TEXT_TO_IMAGE | {"output": "images"}
SHORT = image_transformers.SHORT | {"output": "images"}
VIDEOS = video_transformers.TEXT_TO_VIDEO | {"output": "videos"}

CASES = (
    case(
        "modular-sdxl",
        modular("StableDiffusionXLAutoBlocks", lambda: tiny("sdxl")),
        IMAGES,
        value,
    ),
    case(
        "modular-sdxl-img2img",
        modular("StableDiffusionXLAutoBlocks", lambda: tiny("sdxl")),
        IMAGE_TO_IMAGE | {"output": "images"},
        value,
    ),
    case(
        "modular-sd3", modular("StableDiffusion3AutoBlocks", image_transformers.sd3), SHORT, value
    ),
    case("modular-flux", modular("FluxAutoBlocks", lambda: tiny("flux")), SHORT, value),
    case(
        "modular-flux2-klein",
        modular("Flux2KleinAutoBlocks", image_transformers.flux2_klein),
        SHORT | {"max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3)},
        value,
    ),
    case(
        "modular-qwen-image",
        modular("QwenImageAutoBlocks", image_transformers.qwen_image),
        SHORT,
        value,
    ),
    case("modular-z-image", modular("ZImageAutoBlocks", image_transformers.z_image), SHORT, value),
    case("modular-wan", wan, VIDEOS, value),
)
