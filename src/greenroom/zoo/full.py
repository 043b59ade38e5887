"""The published pipelines at full size, with untouched weights: for plans, simulations, dry runs.

    pipe = full("flux")                        # 33.7 GB of parameters, no memory
    pipe(**full_call_kwargs("flux"))           # meant for the simulated device's dry mode

The configs are those of the models' repositories on the Hugging Face Hub, abridged to what differs
from the defaults of the class. Every component has the parameters it has there, to the last one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from greenroom.zoo.empty import empty_weights
from greenroom.zoo.tiny import cast, picture, unknown_name
from greenroom.zoo.tokenizers import clip_tokenizer, require, t5_tokenizer

__all__ = ["FULL", "Published", "full", "full_call_kwargs"]

PROMPT = "an astronaut riding a green horse"

# stabilityai/stable-diffusion-xl-base-1.0, unet/config.json
_SDXL_UNET: Mapping[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

# diffusers/controlnet-canny-sdxl-1.0, config.json: the encoder of the above
_SDXL_CONTROLNET: Mapping[str, Any] = {
    key: value for key, value in _SDXL_UNET.items() if key not in ("sample_size", "up_block_types")
}

# .../vae/config.json. In float16 the published weights overflow, hence `force_upcast`: the pipeline
# itself turns the VAE to float32 around each encode and decode, and back afterwards.
_SDXL_VAE: Mapping[str, Any] = {
    "latent_channels": 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}

# .../scheduler/scheduler_config.json
_SDXL_SCHEDULER: Mapping[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}

# .../text_encoder/config.json, and FLUX's first encoder too: the text half of OpenAI's CLIP ViT-L.
# The end of text was written down as 2 in both; transformers then takes the largest identifier.
_CLIP_L: Mapping[str, Any] = {
    "vocab_size": 49408,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}

# .../text_encoder_2/config.json: the text half of OpenCLIP ViT-bigG
_CLIP_BIG_G: Mapping[str, Any] = {
    **_CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}

# black-forest-labs/FLUX.1-dev, transformer/config.json; schnell differs in `guidance_embeds` alone
_FLUX_TRANSFORMER: Mapping[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}

# .../vae/config.json
_FLUX_VAE: Mapping[str, Any] = {
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}

# .../scheduler/scheduler_config.json of dev and of schnell
_FLUX_DEV_SCHEDULER: Mapping[str, Any] = {"shift": 3.0, "use_dynamic_shifting": True}
_FLUX_SCHNELL_SCHEDULER: Mapping[str, Any] = {"shift": 1.0, "use_dynamic_shifting": False}

# .../text_encoder_2/config.json: the encoder of google/t5-v1_1-xxl
_T5_XXL: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}

# Wan-AI/Wan2.2-T2V-A14B-Diffusers, text_encoder/config.json: the encoder of google/umt5-xxl
_UMT5_XXL: Mapping[str, Any] = {**_T5_XXL, "vocab_size": 256384}

# .../transformer/config.json and .../transformer_2/config.json: high noise and low noise
_WAN_TRANSFORMER: Mapping[str, Any] = {
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
}

# .../vae/config.json
_WAN_VAE: Mapping[str, Any] = {
    "base_dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "temperal_downsample": [False, True, True],
}

# .../scheduler/scheduler_config.json
_WAN_SCHEDULER: Mapping[str, Any] = {
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}

# Of the published lengths. UMT5's 256,300 entries are left out: 190 MB that no prompt would spell.
_CLIP_VOCABULARY, _T5_VOCABULARY = 49408, 32100


@dataclass(frozen=True)
class Published:
    """A published pipeline: how to build it, in which dtype it is run, and how it is called."""

    build: Callable[[torch.dtype], Any]
    dtype: torch.dtype
    call: Mapping[str, Any]


def full(name: str, dtype: torch.dtype | None = None) -> Any:
    """Build the published pipeline ``name`` (see ``FULL``) with weights that are never written.

    ``dtype`` is what ``from_pretrained(torch_dtype=...)`` takes; None means the one the model is
    run in: float16 for SDXL, bfloat16 for FLUX and Wan. What that call leaves in float32 is in
    float32 here: Wan's VAE, norms and modulation tables, T5's output projections in float16.

    A few seconds and less than 1 GB of memory, whatever the size; see ``empty_weights``.

    Raises:
        ValueError: no such name.
        ImportError: diffusers or transformers is not installed.
    """
    published = _published(name)
    pipe = published.build(dtype or published.dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def full_call_kwargs(name: str, **overrides: Any) -> dict[str, Any]:
    """The arguments of the standard call: full resolution, the model card's steps, VAE included.

        pipe(**full_call_kwargs("wan2.2", height=720, width=1280))

    ``overrides`` replace or add arguments. The generator is new each time, seeded, on the CPU.
    """
    call = {
        "prompt": PROMPT,
        "output_type": "pt",
        "generator": torch.Generator("cpu").manual_seed(0),
        **_published(name).call,
        **overrides,
    }
    if name in ("sdxl-img2img", "sdxl-controlnet") and "image" not in call:
        call["image"] = picture(1024)
    return call


def _published(name: str) -> Published:
    if name not in FULL:
        raise ValueError(unknown_name(name, "full-size pipeline", FULL))
    return FULL[name]


def _sdxl(dtype: torch.dtype) -> Any:
    return require("diffusers").StableDiffusionXLPipeline(**_sdxl_parts(dtype))


def _sdxl_img2img(dtype: torch.dtype) -> Any:
    return require("diffusers").StableDiffusionXLImg2ImgPipeline(**_sdxl_parts(dtype))


def _sdxl_controlnet(dtype: torch.dtype) -> Any:
    diffusers = require("diffusers")
    return diffusers.StableDiffusionXLControlNetPipeline(
        controlnet=_empty(diffusers.ControlNetModel, dtype, **_SDXL_CONTROLNET),
        **_sdxl_parts(dtype),
    )


def _sdxl_parts(dtype: torch.dtype) -> dict[str, Any]:
    diffusers, transformers = require("diffusers"), require("transformers")
    return {
        "text_encoder": _empty_from_config(transformers.CLIPTextModel, dtype, **_CLIP_L),
        "text_encoder_2": _empty_from_config(
            transformers.CLIPTextModelWithProjection, dtype, **_CLIP_BIG_G
        ),
        "tokenizer": clip_tokenizer(_CLIP_VOCABULARY),
        "tokenizer_2": clip_tokenizer(_CLIP_VOCABULARY, pad_token="!"),
        "unet": _empty(diffusers.UNet2DConditionModel, dtype, **_SDXL_UNET),
        "vae": _image_vae(dtype, **_SDXL_VAE),
        "scheduler": diffusers.EulerDiscreteScheduler(**_SDXL_SCHEDULER),
        "add_watermarker": False,
    }


def _flux_dev(dtype: torch.dtype) -> Any:
    return _flux(dtype, _FLUX_DEV_SCHEDULER, guidance_embeds=True)


def _flux_schnell(dtype: torch.dtype) -> Any:
    return _flux(dtype, _FLUX_SCHNELL_SCHEDULER, guidance_embeds=False)


def _flux(dtype: torch.dtype, scheduler: Mapping[str, Any], *, guidance_embeds: bool) -> Any:
    diffusers, transformers = require("diffusers"), require("transformers")
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**scheduler),
        vae=_image_vae(dtype, **_FLUX_VAE),
        text_encoder=_empty_from_config(transformers.CLIPTextModel, dtype, **_CLIP_L),
        tokenizer=clip_tokenizer(_CLIP_VOCABULARY),
        text_encoder_2=_empty_from_config(transformers.T5EncoderModel, dtype, **_T5_XXL),
        tokenizer_2=t5_tokenizer(_T5_VOCABULARY),
        transformer=_empty(
            diffusers.FluxTransformer2DModel,
            dtype,
            guidance_embeds=guidance_embeds,
            **_FLUX_TRANSFORMER,
        ),
    )


def _wan(dtype: torch.dtype) -> Any:
    diffusers, transformers = require("diffusers"), require("transformers")
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(_T5_VOCABULARY),
        text_encoder=_empty_from_config(transformers.UMT5EncoderModel, dtype, **_UMT5_XXL),
        # The model card and diffusers' documentation load it in float32 beside a bfloat16 pipeline.
        vae=_empty(diffusers.AutoencoderKLWan, torch.float32, **_WAN_VAE),
        scheduler=diffusers.UniPCMultistepScheduler(**_WAN_SCHEDULER),
        transformer=_empty(diffusers.WanTransformer3DModel, dtype, **_WAN_TRANSFORMER),
        transformer_2=_empty(diffusers.WanTransformer3DModel, dtype, **_WAN_TRANSFORMER),
        boundary_ratio=0.875,
        expand_timesteps=False,
    )


def _image_vae(dtype: torch.dtype, **config: Any) -> Any:
    return _empty(
        require("diffusers").AutoencoderKL,
        dtype,
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **config,
    )


def _empty_from_config(model: Any, dtype: torch.dtype, **config: Any) -> Any:
    return _empty(model, dtype, model.config_class(**config))


def _empty(model: Any, dtype: torch.dtype, *args: Any, **kwargs: Any) -> Any:
    with empty_weights(dtype):
        made = model(*args, **kwargs)
        cast(made, dtype)
    return made.eval()


_SDXL_CALL: Mapping[str, Any] = {
    "height": 1024,
    "width": 1024,
    "num_inference_steps": 30,
    "guidance_scale": 5.0,
}
_FLUX_CALL: Mapping[str, Any] = {"height": 1024, "width": 1024}

#: The published pipelines by name: what ``full`` takes.
FULL: Mapping[str, Published] = MappingProxyType(
    {
        "flux": Published(
            _flux_dev,
            torch.bfloat16,
            {
                **_FLUX_CALL,
                "num_inference_steps": 28,
                "guidance_scale": 3.5,
                "max_sequence_length": 512,
            },
        ),
        "flux-schnell": Published(
            _flux_schnell,
            torch.bfloat16,
            {
                **_FLUX_CALL,
                "num_inference_steps": 4,
                "guidance_scale": 0.0,
                "max_sequence_length": 256,
            },
        ),
        "sdxl": Published(_sdxl, torch.float16, _SDXL_CALL),
        "sdxl-controlnet": Published(
            _sdxl_controlnet, torch.float16, {**_SDXL_CALL, "controlnet_conditioning_scale": 0.5}
        ),
        # The picture brings its size; 30 steps at this strength are 18.
        "sdxl-img2img": Published(
            _sdxl_img2img,
            torch.float16,
            {"num_inference_steps": 30, "strength": 0.6, "guidance_scale": 5.0},
        ),
        "wan2.2": Published(
            _wan,
            torch.bfloat16,
            {
                "height": 480,
                "width": 832,
                "num_frames": 81,
                "num_inference_steps": 40,
                "guidance_scale": 4.0,
                "guidance_scale_2": 3.0,
            },
        ),
    }
)
