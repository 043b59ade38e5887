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
    "made",
    "mistral3",
    "qwen_vl",
    "siglip",
    "siglip_image_processor",
    "size",
    "t5",
]

#: Entries of ``greenroom.zoo.tokenizers.t5_tokenizer`` by default.
T5_VOCABULARY = 128


def made(model: Any, **config: Any) -> Any:
    """A model of transformers' kind, from what its config is made of."""
    return model(model.config_class(**config))


def size(width: int = 32, *, layers: int = 2) -> dict[str, int]:
    """How most configs say how large a model is."""
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
    }


#: The same for a language model with a decoder only.
LANGUAGE = size() | {
    "vocab_size": BYTES,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
}


def clip_text(*, projected: bool = False) -> Any:
    return made(
        transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel,
        vocab_size=CLIP_SMALLEST_VOCABULARY,
        bos_token_id=CLIP_SMALLEST_VOCABULARY - 2,
        eos_token_id=CLIP_SMALLEST_VOCABULARY - 1,
        pad_token_id=1,
        max_position_embeddings=CLIP_MAX_LENGTH,
        projection_dim=32,
        **size(),
    )


def clip_vision(*, side: int = 32, patch_size: int = 8, projected: bool = True) -> Any:
    return made(
        transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel,
        image_size=side,
        patch_size=patch_size,
        projection_dim=32,
        **size(),
    )


def clip_image_processor() -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)


def siglip() -> Any:
    return made(transformers.SiglipVisionModel, image_size=32, patch_size=8, **size())


def siglip_image_processor() -> Any:
    return transformers.SiglipImageProcessorPil(size={"height": 32, "width": 32})


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
    return made(getattr(transformers, model), **(settings | config))


def decoder(model: str, **config: Any) -> Any:
    """A language model with a decoder only: "LlamaModel", "Qwen3ForCausalLM", "Gemma2Model"."""
    marks = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return made(getattr(transformers, model), **(LANGUAGE | marks | config))


def qwen_vl() -> Any:
    """Qwen's language model that sees; its marks are those of ``vocabularies.qwen``."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return made(
        transformers.Qwen2_5_VLForConditionalGeneration,
        text_config=LANGUAGE | {"bos_token_id": 1, "eos_token_id": 2, "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [1],
        },
        vision_start_token_id=3,
        vision_end_token_id=4,
        image_token_id=5,
        video_token_id=6,
    )


def mistral3() -> Any:
    vision = {"model_type": "pixtral", "head_dim": 16, "image_size": 32, "patch_size": 8}
    return made(
        transformers.Mistral3ForConditionalGeneration,
        text_config=LANGUAGE | {"model_type": "mistral", "num_hidden_layers": 3},
        vision_config=size(layers=1) | vision,
        image_token_index=5,
    )


def gemma3() -> Any:
    return made(
        transformers.Gemma3ForConditionalGeneration,
        text_config=dict(LANGUAGE),
        vision_config=size(layers=1) | {"image_size": 32, "patch_size": 8},
        mm_tokens_per_image=4,
    )
