"""A small pipeline with trained weights, which come with the package: a prompt in, a picture out.

    pipe = shapes()
    image = pipe("a green triangle left of a red square on yellow").images[0]

It is a ``StableDiffusionXLPipeline`` of diffusers' and transformers' own classes that knows six
shapes, eight colours and four relations, 64 x 64 pixels. ``examples/shapes`` in the repository is
where it was trained, and says how well it does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from greenroom.zoo.tokenizers import require

__all__ = ["OUTLINED", "SHAPES", "shapes"]

#: The folder that ``DiffusionPipeline.from_pretrained`` takes.
SHAPES = Path(__file__).parent / "weights" / "shapes"
#: The folder that ``pipe.load_lora_weights`` takes: a line around each shape.
OUTLINED = SHAPES / "outlined"


def shapes(**options: Any) -> Any:
    """Load the pipeline; ``options`` are those of ``DiffusionPipeline.from_pretrained``.

    In float32 unless ``torch_dtype`` says otherwise: kept in float16, the files are half as large.

    Raises:
        ImportError: diffusers or transformers is not installed.
    """
    pipe = require("diffusers").DiffusionPipeline.from_pretrained(SHAPES, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe
