"""Modular pipelines: the same components, but the call is put together from blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import diffusers
from diffusers.modular_pipelines.wan.encoders import WanTextEncoderStep
from pipelines.calls import IMAGE_TO_IMAGE, SHORT, TEXT_TO_IMAGE, TEXT_TO_VIDEO
from pipelines.case import Case, case, joined, needless_ftfy
from pipelines.image_transformers import FLUX2, flux2_klein, qwen_image, sd3, z_image

from greenroom.zoo.tiny import tiny

__all__ = ["CASES"]


def modular(blocks: str, pipeline: Callable[[], Any]) -> Callable[[], Any]:
    """A modular pipeline of ``blocks`` with the components of another."""

    def build() -> Any:
        pipe = quiet(getattr(diffusers, blocks)()).init_pipeline()
        parts = pipeline().components
        pipe.update_components(
            **{name: parts[name] for name in pipe.component_names if parts.get(name) is not None}
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


def drawing(name: str, blocks: str, pipeline: Callable[[], Any], call: Mapping[str, Any]) -> Case:
    return case(name, modular(blocks, pipeline), {**call, "output": "images"}, joined)


CASES = (
    drawing("modular-sdxl", "StableDiffusionXLAutoBlocks", lambda: tiny("sdxl"), TEXT_TO_IMAGE),
    drawing(
        "modular-sdxl-img2img",
        "StableDiffusionXLAutoBlocks",
        lambda: tiny("sdxl"),
        IMAGE_TO_IMAGE,
    ),
    drawing("modular-sd3", "StableDiffusion3AutoBlocks", sd3, SHORT),
    drawing("modular-flux", "FluxAutoBlocks", lambda: tiny("flux"), SHORT),
    drawing("modular-flux2-klein", "Flux2KleinAutoBlocks", flux2_klein, FLUX2),
    drawing("modular-qwen-image", "QwenImageAutoBlocks", qwen_image, SHORT),
    drawing("modular-z-image", "ZImageAutoBlocks", z_image, SHORT),
    case("modular-wan", wan, TEXT_TO_VIDEO | {"output": "videos"}, joined),
)
