"""Forecasts against the engine on the simulated card: the same pipeline, for real, as it were."""

from __future__ import annotations

import functools
import gc
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import greenroom
from greenroom import sim
from greenroom.forecast import Recording, forecast_within
from greenroom.forecast.recorder import Recorder
from greenroom.forecast.within import Within, within
from greenroom.zoo.tokenizers import clip_tokenizer

CARD = "rtx-3060-12gb"
MIB = 2**20


def pipeline() -> Any:
    """SDXL with a fifth of its weights: copies and kernels are long enough to count."""
    with sim.empty_weights(torch.float16):
        text: dict[str, Any] = {
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "projection_dim": 512,
            "vocab_size": 1000,
            "bos_token_id": 998,
            "eos_token_id": 999,
        }
        pipe = StableDiffusionXLPipeline(
            vae=AutoencoderKL(
                block_out_channels=(32, 64, 128, 128),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=1,
                latent_channels=4,
                force_upcast=False,
                sample_size=512,
            ),
            text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**text)),
            tokenizer=clip_tokenizer(1000),
            tokenizer_2=clip_tokenizer(1000),
            unet=UNet2DConditionModel(
                sample_size=64,
                block_out_channels=(160, 320, 640),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 6),
                attention_head_dim=(5, 10, 20),
                cross_attention_dim=1024,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=64,
                projection_class_embeddings_input_dim=6 * 64 + 512,
            ),
            scheduler=EulerDiscreteScheduler(),
            add_watermarker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: Any) -> None:
    pipe("a red circle", height=768, width=768, num_inference_steps=6, output_type="pt")


@functools.cache
def recorded() -> Recording:
    recorder = Recorder(pipeline(), CARD, call)
    for budget in (600 * MIB, 300 * MIB):
        recorder.record(budget)
    return recorder.recording("SDXL", "float16", {"num_inference_steps": 6})


def engine_takes(budget: int) -> list[sim.Cost]:
    """What three calls within the budget take on the simulated card."""
    sim.configure(CARD, races="off", dry_above="1MiB")
    pipe = pipeline()
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget=budget)
    costs = []
    for _ in range(3):
        with sim.measure() as cost:
            call(pipe)
        costs.append(cost)
    greenroom.disable_model_cpu_offload(pipe)
    del pipe
    gc.collect()
    return costs


@pytest.mark.slow
@pytest.mark.parametrize("budget", [300 * MIB, 600 * MIB, 2000 * MIB])
def test_later_calls_take_what_was_predicted(budget: int) -> None:
    predicted = within(recorded(), budget)
    assert predicted.fits
    _, _, last = engine_takes(budget)
    assert predicted.later_s == pytest.approx(last.seconds, rel=0.02)
    assert last.peak_bytes <= budget
    assert predicted.h2d_nbytes == pytest.approx(last.h2d_bytes, rel=0.05, abs=5 * MIB)


@pytest.mark.slow
def test_the_smallest_budget_is_kept_by_the_engine() -> None:
    found = forecast_within(recorded(), "100%")
    costs = engine_takes(found.smallest.budget)
    assert costs[-1].peak_bytes <= found.smallest.budget


@pytest.mark.slow
def test_a_forecast_is_a_value_that_says_the_same_in_every_form() -> None:
    found = forecast_within(recorded(), "500MiB")
    assert found == forecast_within(recorded(), 500 * MIB)
    assert found.fits and found.asked.bound_by in ("compute", "link")
    assert found.smallest.budget <= found.free.budget <= found.resident.budget
    assert found.smallest.later_s >= found.free.later_s
    assert found.free.later_s <= 1.01 * found.resident.later_s
    assert found.resident.h2d_nbytes == 0
    text = str(found)
    assert "SDXL" in text and found.why().split()[0] in text
    plain = found.to_dict()
    assert plain["later_call_s"] == found.asked.later_s
    assert {part["name"] for part in plain["components"]} >= {"text_encoder", "unet", "vae"}
    assert 0 < found.asked.efficiency <= 1


@pytest.mark.slow
def test_less_memory_is_never_faster_by_much() -> None:
    curve: tuple[Within, ...] = forecast_within(recorded(), None).curve
    for smaller, larger in itertools.pairwise(curve):
        assert larger.later_s <= 1.02 * smaller.later_s
        assert smaller.bound_s <= smaller.later_s


@pytest.mark.slow
def test_a_recording_comes_back_from_its_file_as_it_was(tmp_path: Path) -> None:
    mine = recorded()
    mine.save(tmp_path / "trace.json")
    read = Recording.load(tmp_path / "trace.json")
    assert (read.card, read.settings) == (mine.card, mine.settings)
    for cut, other in zip(mine.cuts, read.cuts, strict=True):
        assert (other.cut_to, other.sizes, other.outside_s) == (
            cut.cut_to,
            cut.sizes,
            cut.outside_s,
        )
        assert [step.place for step in other.steps] == [step.place for step in cut.steps]
        assert other.expected == cut.expected
        assert other.least == cut.least and other.whole == cut.whole
    assert (tmp_path / "trace.json").stat().st_size < 200_000


@pytest.mark.slow
def test_what_a_pipeline_has_measured_can_be_planned_with(tmp_path: Path) -> None:
    sim.configure(CARD, races="off", dry_above="1MiB")
    pipe = pipeline()
    with pytest.raises(greenroom.UsageError, match="not offloaded within a budget"):
        greenroom.trace_of(pipe)
    greenroom.enable_model_cpu_offload(pipe, device="sim", budget="600MiB")
    with pytest.raises(greenroom.UsageError, match="call it once"):
        greenroom.trace_of(pipe)
    call(pipe)
    recording = greenroom.trace_of(pipe)
    assert recording.card.name == CARD
    found = forecast_within(recording, "600MiB")
    assert found.fits
    assert found.asked.later_s == pytest.approx(within(recorded(), 600 * MIB).later_s, rel=0.1)
    greenroom.disable_model_cpu_offload(pipe)
