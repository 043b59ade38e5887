"""Tokenizers made on the spot: ``pipe(prompt="a red circle")`` works with no file and no net.

They are of the classes that pipelines expect and split text into characters. What they say means
nothing to random weights; what matters is what the text encoders rely on: the length, the special
tokens and where they stand, identifiers inside the embedding table, the same for the same text.
"""

from __future__ import annotations

import importlib
from typing import Any

__all__ = ["clip_tokenizer", "require", "t5_tokenizer"]

CLIP_MAX_LENGTH = 77

#: Entries of a CLIP vocabulary without merges: 256 bytes, again at the end of a word, start, end.
CLIP_SMALLEST_VOCABULARY = 514

# What a T5 tokenizer can spell; anything else becomes <unk>.
_T5_ALPHABET = "".join(map(chr, range(0x21, 0x7F))) + "▁"


def require(library: str) -> Any:
    """Import diffusers or transformers now, not when greenroom is imported.

    Raises:
        ImportError: it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(library)
    except ImportError as error:
        if error.name != library:
            raise  # installed, but broken: the reason is in the original
        raise ImportError(
            f"greenroom.zoo builds pipelines of diffusers and transformers, and {library} is not "
            f"installed. Install it: pip install 'greenroom[diffusers,transformers]'",
            name=library,
        ) from error


def clip_tokenizer(
    vocabulary: int = CLIP_SMALLEST_VOCABULARY, *, pad_token: str = "<|endoftext|>"
) -> Any:
    """A ``CLIPTokenizer`` of ``vocabulary`` entries and length 77 that spells text byte by byte.

    The order is the published one: bytes first, with "!" at 0, then start and end of text as the
    last two identifiers (49406 and 49407 of 49408). The end of text is therefore the largest, where
    ``CLIPTextModel`` looks for the pooled state when its config has the historical
    ``eos_token_id`` 2. ``pad_token="!"`` is what SDXL's second tokenizer uses.
    """
    if vocabulary < CLIP_SMALLEST_VOCABULARY:
        raise ValueError(
            f"A CLIP vocabulary of {vocabulary} entries cannot spell every byte; "
            f"it takes at least {CLIP_SMALLEST_VOCABULARY}."
        )
    entries = [*_BYTES, *(byte + "</w>" for byte in _BYTES)]
    # In place of the learned merges, names that no text spells.
    entries += [f"<unused-{n}>" for n in range(vocabulary - CLIP_SMALLEST_VOCABULARY)]
    entries += ["<|startoftext|>", "<|endoftext|>"]
    return require("transformers").CLIPTokenizer(
        vocab={entry: n for n, entry in enumerate(entries)},
        merges=[],
        pad_token=pad_token,
        model_max_length=CLIP_MAX_LENGTH,
    )


def t5_tokenizer(vocabulary: int = 128, *, max_length: int = 512) -> Any:
    """A ``T5TokenizerFast`` of ``vocabulary`` entries that spells text letter by letter.

    Identifiers 0, 1, 2 are <pad>, </s>, <unk>, as in T5 and UMT5. With room for them the last 100
    entries are the sentinels ``<extra_id_99>`` to ``<extra_id_0>``.
    """
    special = ["<pad>", "</s>", "<unk>"]
    spare = vocabulary - len(special) - len(_T5_ALPHABET)
    if spare < 0:
        raise ValueError(
            f"A T5 vocabulary of {vocabulary} entries cannot spell ASCII; "
            f"it takes at least {vocabulary - spare}."
        )
    sentinels = 100 if spare >= 100 else 0
    pieces = [(piece, 0.0) for piece in special]
    pieces += [(letter, -2.0) for letter in _T5_ALPHABET]
    pieces += [(f"<unused-{n}>", -100.0) for n in range(spare - sentinels)]
    pieces += [(f"<extra_id_{n}>", 0.0) for n in reversed(range(sentinels))]
    return require("transformers").T5TokenizerFast(
        vocab=pieces, extra_ids=sentinels, model_max_length=max_length
    )


def _bytes_as_letters() -> list[str]:
    """The 256 bytes as printable characters, in the order of byte-level BPE vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]


_BYTES = _bytes_as_letters()
