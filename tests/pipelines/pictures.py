"""What goes into image-to-image and video-to-video pipelines: smooth, small, the same each time."""

from __future__ import annotations

import PIL.Image
import torch

from greenroom.zoo.tiny import picture

__all__ = ["SIDE", "mask", "picture", "pil"]

#: Height and width of most pictures that the catalogue makes.
SIDE = 32


def mask(side: int = SIDE) -> torch.Tensor:
    """The right half is to be painted anew: float32, (1, 1, side, side)."""
    painted = torch.zeros(1, 1, side, side)
    painted[..., side // 2 :] = 1.0
    return painted


def pil(side: int = SIDE) -> PIL.Image.Image:
    """``picture`` as those pipelines want it that also show it to a processor of transformers."""
    pixels = (255 * picture(side)[0]).round().byte().permute(1, 2, 0)
    return PIL.Image.fromarray(pixels.numpy())
