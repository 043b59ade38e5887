"""Small text and image encoders with random weights, 32 features wide unless asked otherwise."""

from __future__ import annotations

from typing import Any

import transformers
from pipelines.vocabularies import BYTES

from greenroom.zoo.tokenizers import CLIP_MAX_LENGTH, CLIP_SMALLEST_VOCABULARY

__all__ = [
    "clip_image_processor",
    "clip_text",
    "clip_vision",
    "decoder",
    "gemma3",
    "mistral3",
    "qwen_vl",
    "siglip",
    "siglip_image_processor",
    "t5",
]

#: Entries of ``greenroom.zoo.tokenizers.t5_tokenizer`` by default.
T5_VOCABULARY = 128


def clip_text(width: int = 32, *, layers: int = 2, projected: bool = False, **config: Any) -> Any:
    settings = transformers.CLIPTextConfig(
        vocab_size=CLIP_SMALLEST_VOCABULARY,
        bos_token_id=CLIP_SMALLEST_VOCABULARY - 2,
        eos_token_id=CLIP_SMALLEST_VOCABULARY - 1,
        pad_token_id=1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=CLIP_MAX_LENGTH,
        **{"projection_dim": width, **config},
    )
    if projected:
        return transformers.CLIPTextModelWithProjection(settings)
    return transformers.CLIPTextModel(settings)


def clip_vision(
    width: int = 32, *, layers: int = 2, side: int = 32, projected: bool = True, **config: Any
) -> Any:
    settings = transformers.CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=side,
        **{"projection_dim": width, "patch_size": 8, **config},
    )
    if projected:
        return transformers.CLIPVisionModelWithProjection(settings)
    return transformers.CLIPVisionModel(settings)


def clip_image_processor(side: int = 32) -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)


def siglip_image_processor(side: int = 32) -> Any:
    return transformers.SiglipImageProcessorPil(size={"height": side, "width": side})


def siglip(width: int = 32, *, side: int = 32) -> Any:
    return transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side,
            patch_size=8,
        )
    )


def t5(model: str = "T5EncoderModel", **config: Any) -> Any:
    """T5's encoder, or another class of the family: "UMT5EncoderModel"."""
    settings = {
        "vocab_size": T5_VOCABULARY,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 8,
    }
    family = model.removesuffix("EncoderModel")
    return getattr(transformers, model)(
        getattr(transformers, f"{family}Config")(**(settings | config))
    )


def decoder(model: str, **config: Any) -> Any:
    """A language model with a decoder only: "LlamaModel", "Qwen3ForCausalLM", "Gemma2Model"."""
    settings = {
        "vocab_size": BYTES,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    family = model.removesuffix("Model").removesuffix("ForCausalLM")
    return getattr(transformers, model)(
        getattr(transformers, f"{family}Config")(**(settings | config))
    )


def qwen_vl(model: str = "Qwen2_5_VLForConditionalGeneration") -> Any:
    """Qwen's language model that sees; its marks are those of ``vocabularies.qwen``."""
    family = model.removesuffix("ForConditionalGeneration").removesuffix("Model")
    text = {
        "vocab_size": BYTES,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    }
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    return getattr(transformers, model)(
        getattr(transformers, f"{family}Config")(
            text_config=text,
            vision_config=vision,
            vision_start_token_id=3,
            vision_end_token_id=4,
            image_token_id=5,
            video_token_id=6,
        )
    )


def mistral3() -> Any:
    text = {
        "model_type": "mistral",
        "vocab_size": BYTES,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 32,
        "patch_size": 8,
    }
    return transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=5)
    )


def gemma3() -> Any:
    text = {
        "vocab_size": BYTES,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    )
