"""The pipeline that comes with greenroom, and the ways to run it that are worth comparing.

The pipeline is a small SDXL with trained weights: of SDXL's own classes, and one can see whether
the picture is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .compare import GREENROOM, TWO_WAYS, Way
from .pipeline import enable_model_cpu_offload
from .zoo.shapes import SHAPES

PROMPT = "a green triangle left of a red square"

#: The pipeline's folder.
MODEL = SHAPES

#: What a call takes besides the prompt: what the weights were evaluated with.
SETTINGS: Mapping[str, Any] = {"num_inference_steps": 20, "guidance_scale": 3.0}

#: Of the simulated card if nobody says otherwise. All weights, and what they work on, take 24.1 MiB
#: at their peak; one component at a time takes 18.5 MiB.
CAPACITY = 20 * 2**20

#: Less than the largest component, and about 60 per cent of what everything would take.
BUDGET = 14 * 2**20


def _resident(pipe: Any, device: torch.device) -> None:
    pipe.to(device)


def _sequential(pipe: Any, device: torch.device) -> None:
    pipe.enable_sequential_cpu_offload(device=device)


def _blocks(pipe: Any, device: torch.device) -> None:
    pipe.enable_group_offload(
        onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=True
    )


def _leaves(pipe: Any, device: torch.device) -> None:
    pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)


def _within_budget(pipe: Any, device: torch.device) -> None:
    enable_model_cpu_offload(pipe, device=device, budget=BUDGET)


WITHIN_BUDGET = f"greenroom, {BUDGET // 2**20} MiB"

#: All of it on the device; diffusers' ways; greenroom's.
WAYS: Mapping[str, Way] = {
    "resident": _resident,
    "sequential offload": _sequential,
    "group offload, blocks": _blocks,
    "group offload, leaves": _leaves,
    **TWO_WAYS,
    WITHIN_BUDGET: _within_budget,
}

#: What the picture of device memory shows, by title. The ways are greenroom's, which keeps a log.
WATCHED: Mapping[str, str] = {
    GREENROOM: "greenroom, one component at a time",
    WITHIN_BUDGET: f"greenroom, budget {BUDGET // 2**20} MiB",
}

#: Two where the second call differs from the first, or is expected to.
CALLS: Mapping[str, int] = dict.fromkeys([*TWO_WAYS, WITHIN_BUDGET], 2)
