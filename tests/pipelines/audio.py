"""Text-to-audio pipelines."""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from pipelines import autoencoders, encoders, vocabularies
from pipelines.calls import BRIEF
from pipelines.case import case
from pipelines.denoisers import transformer

from greenroom.zoo.tokenizers import t5_tokenizer

__all__ = ["CASES"]


def audioldm2() -> Any:
    return diffusers.AudioLDM2Pipeline(
        vae=autoencoders.kl(in_channels=1, out_channels=1),
        text_encoder=clap(),
        text_encoder_2=encoders.t5(),
        projection_model=diffusers.AudioLDM2ProjectionModel(
            text_encoder_dim=16, text_encoder_1_dim=32, langauge_model_dim=16
        ),
        language_model=gpt2(),
        tokenizer=vocabularies.roberta(model_max_length=77),
        tokenizer_2=t5_tokenizer(max_length=77),
        feature_extractor=transformers.ClapFeatureExtractor(),
        unet=diffusers.AudioLDM2UNet2DConditionModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            # Per block, one attention each to: itself, the language model's states, T5's.
            cross_attention_dim=([None, 16, 32], [None, 16, 32]),
        ),
        scheduler=diffusers.DDIMScheduler(clip_sample=False),
        vocoder=encoders.made(
            transformers.SpeechT5HifiGan,
            model_in_dim=8,
            upsample_initial_channel=16,
            upsample_rates=[2, 2],
            upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
        ),
    )


def clap() -> Any:
    audio = {
        "spec_size": 64,
        "window_size": 4,
        "num_mel_bins": 64,
        "depths": [1, 1],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "patch_embeds_hidden_size": 16,
        "projection_dim": 16,
        "patch_size": 2,
        "patch_stride": 2,
    }
    return encoders.made(
        transformers.ClapModel,
        text_config=encoders.size(16) | {"vocab_size": vocabularies.BYTES, "projection_dim": 16},
        audio_config=audio,
        projection_dim=16,
    )


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16,
        n_head=2,
        n_layer=2,
        vocab_size=vocabularies.BYTES,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
    )
    config.max_new_tokens = 8
    return transformers.GPT2LMHeadModel(config)


def stable_audio() -> Any:
    return diffusers.StableAudioPipeline(
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        text_encoder=encoders.t5(),
        projection_model=diffusers.StableAudioProjectionModel(
            text_encoder_dim=32, conditioning_dim=16, min_value=0, max_value=32
        ),
        tokenizer=t5_tokenizer(max_length=25),
        transformer=transformer(
            diffusers.StableAudioDiTModel,
            sample_size=4,
            attention_head_dim=4,
            num_key_value_attention_heads=2,
            cross_attention_dim=8,
            time_proj_dim=8,
            global_states_input_dim=2 * 16,
            cross_attention_input_dim=16,
        ),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )


CASES = (
    case("audioldm2", audioldm2, BRIEF | {"audio_length_in_s": 0.016}),
    case("stable-audio", stable_audio, BRIEF),
)
