"""Components are taken apart along their children, in the order in which those run."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import nn

from greenroom.device.blocks import runs_of

TINY = {
    "block_out_channels": (16, 32),
    "norm_num_groups": 4,
    "sample_size": 8,
    "layers_per_block": 2,
}


def a_unet() -> tuple[nn.Module, dict[str, Any]]:
    unet = diffusers.UNet2DConditionModel(
        **TINY,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    text = torch.zeros(1, 3, 8)
    return unet, {"sample": torch.zeros(1, 4, 8, 8), "timestep": 1, "encoder_hidden_states": text}


def a_video_unet() -> tuple[nn.Module, dict[str, Any]]:
    unet = diffusers.UNet3DConditionModel(
        **TINY,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    )
    text = torch.zeros(1, 3, 8)
    sample = torch.zeros(1, 4, 2, 8, 8)
    return unet, {"sample": sample, "timestep": 1, "encoder_hidden_states": text}


def a_decoder() -> tuple[nn.Module, dict[str, Any]]:
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return autoencoder.decoder, {"sample": torch.zeros(1, 4, 8, 8)}


@pytest.mark.parametrize("made", [a_unet, a_video_unet, a_decoder])
def test_runs_are_in_the_order_in_which_they_begin_to_run(made: Any) -> None:
    component, inputs = made()
    runs = [run for run in runs_of(component, 32 * 2**14) if "block" in run.name]
    began: list[str] = []

    def note(name: str) -> Any:
        return lambda *_: None if name in began else began.append(name)

    for run in runs:
        for module in run.modules:
            module.register_forward_pre_hook(note(run.name))
    with torch.no_grad():
        component(**inputs)
    assert len(began) > 10
    assert began == [run.name for run in runs if run.name in began]
