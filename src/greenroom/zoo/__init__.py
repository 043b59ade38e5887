"""Real pipelines of diffusers from nothing: no download, no file, no network.

    from greenroom import zoo

    pipe = zoo.tiny("sdxl")                    # a few MB of random weights, runs in 0.1 s on a CPU
    image = pipe(**zoo.call_kwargs("sdxl")).images

    pipe = zoo.full("wan2.2")                  # 69 GB of parameters as published, none of it memory

    image = zoo.shapes()("a red star on white", guidance_scale=3.0).images[0]  # trained weights

``tiny`` is for tests, ``demo_sdxl`` for copies large enough to be worth looking at, ``shapes`` for
pictures one can recognise, ``full`` for plans and simulations of the published models.
``empty_weights`` is what makes the last one free; it serves modules of any kind.

Needs the extras ``greenroom[diffusers,transformers]`` (transformers 5), but only when called.
"""

from greenroom.zoo.empty import empty_weights
from greenroom.zoo.full import FULL, full, full_call_kwargs
from greenroom.zoo.shapes import shapes
from greenroom.zoo.tiny import TINY, call_kwargs, demo_sdxl, tiny
from greenroom.zoo.tokenizers import clip_tokenizer, t5_tokenizer

__all__ = [
    "FULL",
    "TINY",
    "call_kwargs",
    "clip_tokenizer",
    "demo_sdxl",
    "empty_weights",
    "full",
    "full_call_kwargs",
    "shapes",
    "t5_tokenizer",
    "tiny",
]
