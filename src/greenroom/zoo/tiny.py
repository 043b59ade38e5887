"""Small pipelines of diffusers' own classes with random weights: seconds and megabytes, no net.

    pipe = tiny("sdxl")
    image = pipe(**call_kwargs("sdxl")).images

The classes, the order of components and the shape of a call are those of the published models; only
the sizes are not. ``demo_sdxl`` is the same at a size where the copies are worth looking at.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from greenroom.zoo.tokenizers import (
    CLIP_MAX_LENGTH,
    CLIP_SMALLEST_VOCABULARY,
    clip_tokenizer,
    require,
    t5_tokenizer,
)

__all__ = ["TINY", "call_kwargs", "demo_sdxl", "tiny"]

PROMPT = "a red circle"

_T5_VOCABULARY = 128


def tiny(name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Build the small pipeline ``name`` (see ``TINY``) with random weights drawn from ``seed``.

    Same name, dtype and seed: same weights, bit for bit. The process's random state is left alone.
    Parts that a published model keeps in float32 when loaded in half precision are kept so here.

    Raises:
        ValueError: no such name.
        ImportError: diffusers or transformers is not installed.
    """
    if name not in TINY:
        raise ValueError(unknown_name(name, "tiny pipeline", TINY))
    return _seeded(TINY[name], dtype, seed)


def demo_sdxl(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> Any:
    """SDXL's own pipeline and components at about 270 MB in float32, 190 of them the UNet.

    ``pipe(**call_kwargs("demo-sdxl"))`` takes less than a second on one CPU core. On a CPU, float16
    takes many times longer than float32; bfloat16 is fine where there are instructions for it.
    """
    return _seeded(_demo_sdxl, dtype, seed)


def call_kwargs(name: str) -> dict[str, Any]:
    """The arguments of a small call of ``tiny(name)``, or of ``demo_sdxl`` for "demo-sdxl".

    Two denoising steps (four for the demo) and a generator of their own, seeded and on the CPU:
    each result serves one call, and all calls give the same picture.
    """
    names = {*TINY, "demo-sdxl"}
    if name not in names:
        raise ValueError(unknown_name(name, "tiny pipeline", names))
    side = 128 if name == "demo-sdxl" else 32
    call: dict[str, Any] = {
        "prompt": PROMPT,
        "num_inference_steps": 4 if name == "demo-sdxl" else 2,
        "height": side,
        "width": side,
        "output_type": "pt",
        "generator": torch.Generator("cpu").manual_seed(0),
    }
    if name == "sdxl-img2img":
        # The picture brings its own size, and half the steps are noise that the picture skips.
        del call["height"], call["width"]
        call |= {"image": picture(side), "strength": 0.5, "num_inference_steps": 4}
    elif name == "sdxl-controlnet":
        call |= {"image": picture(side)}
    elif name == "flux":
        call |= {"max_sequence_length": 32}
    elif name in ("wan", "wan2.2"):
        call |= {"num_frames": 5, "max_sequence_length": 32}
    return call


def picture(side: int) -> torch.Tensor:
    """A smooth deterministic picture: float32, (1, 3, side, side), values in [0, 1]."""
    ramp = torch.linspace(0.0, 1.0, side)
    across = ramp.expand(side, side)
    return torch.stack([across, across.T, 1 - across * across.T]).unsqueeze(0)


def unknown_name(name: str, kind: str, names: Mapping[str, Any] | set[str]) -> str:
    """What to say about a name that is none of ``names``."""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"There is no {kind} {name!r}.{hint} There are: {', '.join(sorted(names))}."


def _seeded(build: Callable[[], Any], dtype: torch.dtype, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = build()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
            cast(component, dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cast(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give the module the dtypes that ``from_pretrained(torch_dtype=dtype)`` would.

    Buffers keep theirs, and so do the parameters under a name that the class keeps in float32:
    transformers' T5 its ``wo`` in float16 (https://github.com/huggingface/transformers/issues/20287),
    diffusers' Wan its norms and modulation tables.
    """
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    if isinstance(module, require("transformers").PreTrainedModel) and dtype != torch.float16:
        kept = set()
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point():
            keep = dtype != torch.float64 and not kept.isdisjoint(name.split("."))
            parameter.data = parameter.data.to(torch.float32 if keep else dtype)


def _sd() -> Any:
    diffusers = require("diffusers")
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_clip(32),
        tokenizer=clip_tokenizer(),
        unet=diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            attention_head_dim=8,
            cross_attention_dim=32,
            norm_num_groups=8,
        ),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl() -> Any:
    return require("diffusers").StableDiffusionXLPipeline(**_sdxl_parts())


def _sdxl_img2img() -> Any:
    return require("diffusers").StableDiffusionXLImg2ImgPipeline(**_sdxl_parts())


def _sdxl_controlnet() -> Any:
    diffusers = require("diffusers")
    parts = _sdxl_parts()
    # As a ControlNet is made: a copy of the UNet's encoder, with zero convolutions at its exits.
    # Training would have moved those; at zero the picture would not depend on the ControlNet.
    controlnet = diffusers.ControlNetModel.from_unet(
        parts["unet"], conditioning_embedding_out_channels=(8, 16)
    )
    for parameter in controlnet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return diffusers.StableDiffusionXLControlNetPipeline(controlnet=controlnet, **parts)


def _sdxl_parts() -> dict[str, Any]:
    return {
        "text_encoder": _clip(32),
        "text_encoder_2": _clip(32, projected=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(pad_token="!"),
        "unet": _sdxl_unet(
            widths=(32, 64), depths=(1, 2), head=8, text=32 + 32, pooled=32, times=8, groups=8
        ),
        "vae": _vae(),
        "scheduler": _sdxl_scheduler(),
        "add_watermarker": False,
    }


def _demo_sdxl() -> Any:
    return require("diffusers").StableDiffusionXLPipeline(
        text_encoder=_clip(256, layers=4),
        text_encoder_2=_clip(384, layers=6, projected=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"),
        unet=_sdxl_unet(
            widths=(96, 192, 320),
            depths=(1, 1, 3),
            head=32,
            text=256 + 384,
            pooled=384,
            times=32,
            groups=32,
        ),
        vae=_vae(widths=(32, 64, 128, 128), groups=32),
        scheduler=_sdxl_scheduler(),
        add_watermarker=False,
    )


def _sdxl_unet(
    *,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    head: int,
    text: int,
    pooled: int,
    times: int,
    groups: int,
) -> Any:
    """SDXL's kind of UNet: no attention at full resolution, more transformer layers further down.

    ``text`` is the width of both text encoders' states side by side, ``pooled`` of the second's
    pooled state, which is added to the time embedding with six sizes of ``times`` features each.
    """
    crossed = len(widths) - 1
    return require("diffusers").UNet2DConditionModel(
        sample_size=16,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * crossed),
        up_block_types=(*["CrossAttnUpBlock2D"] * crossed, "UpBlock2D"),
        transformer_layers_per_block=depths,
        layers_per_block=1,
        attention_head_dim=tuple(width // head for width in widths),
        cross_attention_dim=text,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=times,
        projection_class_embeddings_input_dim=pooled + 6 * times,
        norm_num_groups=groups,
    )


def _sdxl_scheduler() -> Any:
    return require("diffusers").EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )


def _flux() -> Any:
    diffusers = require("diffusers")
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=_clip(32),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_t5("T5EncoderModel", "T5Config"),
        tokenizer_2=t5_tokenizer(_T5_VOCABULARY),
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,  # 2x2 patches of the VAE's four channels
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=16,
            num_attention_heads=4,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    )


def _wan(*, experts: int = 1) -> Any:
    diffusers = require("diffusers")
    transformers = [
        diffusers.WanTransformer3DModel(
            num_attention_heads=4,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=32,
            ffn_dim=96,
            num_layers=4,
            rope_max_seq_len=32,
        )
        for _ in range(experts)
    ]
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(_T5_VOCABULARY),
        text_encoder=_t5("UMT5EncoderModel", "UMT5Config"),
        vae=diffusers.AutoencoderKLWan(
            base_dim=8,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformers[0],
        transformer_2=transformers[1] if experts == 2 else None,
        # With two steps, one falls on each side.
        boundary_ratio=0.875 if experts == 2 else None,
    )


def _wan_two_experts() -> Any:
    return _wan(experts=2)


def _clip(width: int, *, layers: int = 2, projected: bool = False) -> Any:
    transformers = require("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=CLIP_SMALLEST_VOCABULARY,
        bos_token_id=CLIP_SMALLEST_VOCABULARY - 2,
        eos_token_id=CLIP_SMALLEST_VOCABULARY - 1,
        pad_token_id=1,
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        max_position_embeddings=CLIP_MAX_LENGTH,
    )
    if projected:
        return transformers.CLIPTextModelWithProjection(config)
    return transformers.CLIPTextModel(config)


def _t5(model: str, config: str) -> Any:
    transformers = require("transformers")
    return getattr(transformers, model)(
        getattr(transformers, config)(
            vocab_size=_T5_VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            relative_attention_num_buckets=8,
        )
    )


def _vae(*, widths: tuple[int, ...] = (16, 32), groups: int = 8, **config: Any) -> Any:
    settings = {"scaling_factor": 0.13025, "sample_size": 32, **config}
    return require("diffusers").AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        norm_num_groups=groups,
        **settings,
    )


#: The builders by name: what ``tiny`` takes.
TINY: Mapping[str, Callable[[], Any]] = MappingProxyType(
    {
        "flux": _flux,
        "sd": _sd,
        "sdxl": _sdxl,
        "sdxl-controlnet": _sdxl_controlnet,
        "sdxl-img2img": _sdxl_img2img,
        "wan": _wan,
        "wan2.2": _wan_two_experts,
    }
)
