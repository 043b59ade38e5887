"""The components of the pipeline, before training: diffusers' and transformers' own classes, small.

They are put together as in Stable Diffusion XL: two text encoders, of which the second also gives a
pooled state, a UNet that is told the picture's size, a VAE with four latent channels. One latent
pixel is four by four pixels.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import torch
from data import SIZE, WORDS
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

LATENT_CHANNELS = 4
MAX_TOKENS = 20
TEXT_WIDTH = 96
POOLED_WIDTH = 128

# What SDXL's UNet is told of the size: asked for, cut off at the top and left, to be shown.
TIME_IDS = (SIZE, SIZE, 0, 0, SIZE, SIZE)
_SIZE_EMBEDDING = 8


def tokenizer() -> CLIPTokenizer:
    """A byte-pair encoding in which each of ``data.WORDS`` is one token; others are spelled."""
    letters = [chr(code) for code in range(0x21, 0x7F)]
    merges = _merges(WORDS)
    entries = [*letters, *(letter + "</w>" for letter in letters)]
    entries += [first + second for first, second in merges]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={entry: n for n, entry in enumerate(entries)},
        merges=merges,
        model_max_length=MAX_TOKENS,
    )


def _merges(words: tuple[str, ...]) -> list[tuple[str, str]]:
    """Join the commonest pair of neighbours until every word is one piece."""
    spelled = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(pieces) > 1 for pieces in spelled):
        pairs = Counter(pair for pieces in spelled for pair in pairwise(pieces))
        commonest = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(commonest)
        spelled = [_join(pieces, commonest) for pieces in spelled]
    return merges


def _join(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined


def vae() -> AutoencoderKL:
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )
    # Little noise in the latents at first, or the decoder has nothing to learn from for long.
    with torch.no_grad():
        model.quant_conv.bias[LATENT_CHANNELS:] = -6.0
        model.quant_conv.weight[LATENT_CHANNELS:] *= 0.1
    return model


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        attention_head_dim=(1, 1, 2),
        time_embedding_dim=256,
        cross_attention_dim=2 * TEXT_WIDTH,
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_SIZE_EMBEDDING,
        projection_class_embeddings_input_dim=POOLED_WIDTH + len(TIME_IDS) * _SIZE_EMBEDDING,
    )


def text_encoder(words: CLIPTokenizer, *, with_projection: bool) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=3 * TEXT_WIDTH,
        # The pipeline reads the last layer but one.
        num_hidden_layers=3,
        num_attention_heads=3,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=POOLED_WIDTH,
        hidden_act="gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return (CLIPTextModelWithProjection if with_projection else CLIPTextModel)(config)


def scheduler() -> DDIMScheduler:
    """DDIM that predicts v and starts from pure noise.

    A ground of one colour is a picture's mean, which a schedule that ends before pure noise gives
    away in training and lacks in sampling (https://arxiv.org/abs/2305.08891).
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def pipeline(seed: int = 0) -> StableDiffusionXLPipeline:
    """All of it, with random weights drawn from ``seed``."""
    torch.manual_seed(seed)
    words = tokenizer()
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=text_encoder(words, with_projection=False),
        text_encoder_2=text_encoder(words, with_projection=True),
        tokenizer=words,
        tokenizer_2=tokenizer(),
        unet=unet(),
        scheduler=scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
