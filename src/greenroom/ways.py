"""The ways of running a pipeline that are worth comparing: resident, diffusers', greenroom's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .compare import GREENROOM, MODEL_OFFLOAD, TWO_WAYS, Way
from .pipeline import enable_model_cpu_offload

RESIDENT = "resident"


def _resident(pipe: Any, device: torch.device) -> None:
    pipe.to(device)


def _model_offload(pipe: Any, device: torch.device) -> None:
    pipe.enable_model_cpu_offload(device=device)


def _sequential(pipe: Any, device: torch.device) -> None:
    pipe.enable_sequential_cpu_offload(device=device)


def _blocks(pipe: Any, device: torch.device) -> None:
    _group(pipe, device, offload_type="block_level", num_blocks_per_group=1)


def _leaves(pipe: Any, device: torch.device) -> None:
    _group(pipe, device, offload_type="leaf_level")


def _group(pipe: Any, device: torch.device, **options: Any) -> None:
    # A VAE that the pipeline casts for its work comes back uncast, and fails: it has to stay.
    is_cast = getattr(getattr(pipe, "vae", None), "dtype", None) == torch.float16
    if is_cast:
        options["exclude_modules"] = ["vae"]
    pipe.enable_group_offload(onload_device=device, use_stream=True, **options)


def within(budget: int | str) -> Way:
    """Greenroom's way within a budget of device memory."""

    def enable(pipe: Any, device: torch.device) -> None:
        enable_model_cpu_offload(pipe, device=device, budget=budget)

    return enable


#: diffusers' ways but for the one that greenroom stands in for; group offload with a stream.
FINER: Mapping[str, Way] = {
    "sequential offload": _sequential,
    "group offload, blocks": _blocks,
    "group offload, leaves": _leaves,
}

#: All weights on the device, and diffusers' ways: not every pipeline can run in each.
INCUMBENTS: Mapping[str, Way] = {RESIDENT: _resident, MODEL_OFFLOAD: _model_offload, **FINER}


def side_by_side(budget: str) -> Mapping[str, Way]:
    """Every way, greenroom's within a budget last."""
    return {
        **INCUMBENTS,
        GREENROOM: TWO_WAYS[GREENROOM],
        f"{GREENROOM}, {budget}": within(budget),
    }
