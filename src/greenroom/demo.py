"""The pipeline that comes with greenroom, and the ways to run it that are worth comparing.

The pipeline is a small SDXL with trained weights: of SDXL's own classes, and one can see whether
the picture is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .compare import GREENROOM, TWO_WAYS, Way
from .ways import FINER, INCUMBENTS, RESIDENT, within
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


WITHIN_BUDGET = f"greenroom, {BUDGET // 2**20} MiB"

#: All of it on the device; diffusers' ways; greenroom's.
WAYS: Mapping[str, Way] = {
    RESIDENT: INCUMBENTS[RESIDENT],
    **FINER,
    **TWO_WAYS,
    WITHIN_BUDGET: within(BUDGET),
}

#: What the picture of device memory shows, by title. The ways are greenroom's, which keeps a log.
WATCHED: Mapping[str, str] = {
    GREENROOM: "greenroom, one component at a time",
    WITHIN_BUDGET: f"greenroom, budget {BUDGET // 2**20} MiB",
}

#: Two where the second call differs from the first, or is expected to.
CALLS: Mapping[str, int] = dict.fromkeys([*TWO_WAYS, WITHIN_BUDGET], 2)
