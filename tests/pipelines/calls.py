"""Arguments that many pipelines' calls share: two steps, small pictures, tensors in return."""

from __future__ import annotations

from pipelines.pictures import SIDE, mask, picture

from greenroom.zoo.tiny import PROMPT

__all__ = [
    "BRIEF",
    "CONTROLLED",
    "IMAGE_TO_IMAGE",
    "INPAINTING",
    "SHORT",
    "SIZE",
    "TEXT_TO_IMAGE",
    "TEXT_TO_VIDEO",
]

BRIEF = {"prompt": PROMPT, "num_inference_steps": 2, "output_type": "pt"}
SIZE = {"height": SIDE, "width": SIDE}
TEXT_TO_IMAGE = BRIEF | SIZE
# The picture brings its own size, and half the steps are noise that the picture skips.
IMAGE_TO_IMAGE = BRIEF | {"image": picture(SIDE), "strength": 0.5, "num_inference_steps": 4}
CONTROLLED = TEXT_TO_IMAGE | {"image": picture(SIDE)}
INPAINTING = CONTROLLED | {"mask_image": mask()}
# Transformers would be shown hundreds of tokens, most of them padding.
SHORT = TEXT_TO_IMAGE | {"max_sequence_length": 32}
TEXT_TO_VIDEO = SHORT | {"num_frames": 5}
