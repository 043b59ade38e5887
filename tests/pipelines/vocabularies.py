"""Tokenizers made on the spot, beside those of ``greenroom.zoo.tokenizers``: text by letters."""

from __future__ import annotations

import string
from typing import Any

import transformers
from tokenizers.pre_tokenizers import ByteLevel

__all__ = ["BYTES", "CHAT", "chatglm", "gemma", "gpt2", "llama", "qwen", "roberta"]

#: No tokenizer here has more entries: what every text encoder's embedding table holds.
BYTES = 384

#: A conversation as text: enough for ``apply_chat_template``.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def qwen(**options: Any) -> Any:
    """The byte-level tokenizer of Qwen 2 and later, with its chat marks as entries 0 to 6."""
    settings = {"additional_special_tokens": list(QWEN_SPECIAL[1:]), "chat_template": CHAT}
    return transformers.Qwen2Tokenizer(
        vocab=entries(*QWEN_SPECIAL), merges=[], **(settings | options)
    )


def gpt2(**options: Any) -> Any:
    return transformers.GPT2Tokenizer(
        vocab=entries("<|endoftext|>"), merges=[], pad_token="<|endoftext|>", **options
    )


def roberta(**options: Any) -> Any:
    special = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
    return transformers.RobertaTokenizer(vocab=entries(*special), merges=[], **options)


def llama(**options: Any) -> Any:
    settings = {"pad_token": "<pad>", "add_bos_token": True, "chat_template": CHAT}
    return transformers.LlamaTokenizer(
        vocab=letters("<unk>", "<s>", "</s>", "<pad>"), merges=[], **(settings | options)
    )


def gemma(**options: Any) -> Any:
    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    settings = {"add_bos_token": True, "chat_template": CHAT}
    return transformers.GemmaTokenizer(vocab=letters(*special), merges=[], **(settings | options))


def chatglm() -> Any:
    """What Kolors asks of its tokenizer: text padded on the left, with position identifiers.

    The shipped class reads a SentencePiece file, which takes a package of its own.
    """
    return PositionedTokenizer(qwen(padding_side="left"))


class PositionedTokenizer:
    """A tokenizer that says where each token stands, counted from the first that is not padding."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        encoded = self.tokenizer(*args, **kwargs)
        encoded["position_ids"] = (encoded["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return encoded


def entries(*special: str) -> dict[str, int]:
    """A byte-level vocabulary: the special entries first, then one for each byte."""
    return {entry: n for n, entry in enumerate([*special, *sorted(ByteLevel.alphabet())])}


def letters(*special: str) -> dict[str, int]:
    """A SentencePiece-like vocabulary: the special entries first, then ASCII's letters."""
    alphabet = "▁\n" + string.ascii_letters + string.digits + string.punctuation
    return {entry: n for n, entry in enumerate([*special, *alphabet])}
