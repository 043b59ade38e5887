"""A pipeline built from the configs in its folder alone: its weights take no memory.

What `from_pretrained` would load is built from each component's config instead. Tokenizers that
the folder lacks are replaced by ones that give as many tokens.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UsageError
from ..model_folder import ModelFolder
from ..zoo.empty import empty_weights
from ..zoo.tiny import cast
from ..zoo.tokenizers import (
    CLIP_SMALLEST_VOCABULARY,
    clip_tokenizer,
    t5_tokenizer,
)

_CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")
_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_LONGEST_T5 = 32100  # entries; UMT5's 256,300 would be made for nothing


def dtype_of(folder: ModelFolder) -> torch.dtype | None:
    """What the weights are stored in, and without weights what the configs say most often.

    None: neither tells.
    """
    if any(folder.path.glob("*/*.safetensors")):
        return folder.stored_dtype
    said = []
    for file in sorted(folder.path.glob("*/config.json")):
        config = _read(file)
        said.append(_STORED.get(str(config.get("dtype") or config.get("torch_dtype"))))
    known = [dtype for dtype in said if dtype is not None]
    return max(known, key=known.count) if known else None


def build(folder: ModelFolder, dtype: torch.dtype) -> Any:
    """The folder's pipeline, in host memory that nobody has written.

    Raises:
        UsageError: a component has no config, or its class cannot be built from it.
    """
    index = _read(folder.path / "model_index.json")
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if name.startswith("_"):
            continue
        is_component = isinstance(entry, list) and len(entry) == 2
        parts[name] = _component(folder.path / name, entry, dtype) if is_component else entry
    try:
        pipe = folder.pipeline_class(**parts)
    except Exception as error:
        raise UsageError(
            f"{folder.path} cannot be built as a {folder.pipeline_class.__name__}: {_said(error)}"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _component(path: Path, entry: list[Any], dtype: torch.dtype) -> Any:
    library, name = entry
    if library is None or name is None:
        return None
    kind = _class(path, str(library), str(name))
    try:
        if issubclass(kind, nn.Module):
            return _module(path, kind, dtype)
        if "Tokenizer" in kind.__name__ and not _has_vocabulary(path):
            return _tokenizer(path, kind)
        _require_config(path)
        return kind.from_pretrained(str(path), local_files_only=True)
    except UsageError:
        raise
    except Exception as error:
        # Each class raises what it likes about a config that is not its own.
        raise UsageError(
            f"{path.name} cannot be built as a {name} from what lies in {path}: {_said(error)}"
        ) from error


def _class(path: Path, library: str, name: str) -> Any:
    """The class that the index names, as diffusers looks for it."""
    import diffusers

    homes = [getattr(diffusers.pipelines, library, None)]
    if homes == [None]:
        try:
            homes = [importlib.import_module(library)] if library in _LIBRARIES else []
        except ImportError as error:
            raise ImportError(
                f"{path.name} is a {name} of {library}, which is not installed: "
                f"pip install {library}"
            ) from error
    found = next((getattr(home, name) for home in homes if hasattr(home, name)), None)
    if not isinstance(found, type):
        raise UsageError(
            f"{path.name} is a {name} of {library!r}, and there is no such class here: a newer "
            f"{library} may have it, and code of the folder's own is not run"
        )
    return found


_LIBRARIES = ("diffusers", "transformers")  # others' code is not run for a file that names it


def _module(path: Path, kind: Any, dtype: torch.dtype) -> nn.Module:
    _require_config(path)
    config = _read(path / "config.json")
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "unknown")
        raise UsageError(
            f"{path.name} is quantised ({method}), and what its weights take cannot be told from "
            "its config. Plan with a trace that was measured: --from-trace"
        )
    with empty_weights(dtype):
        if hasattr(kind, "load_config"):  # diffusers
            made = kind.from_config(config)
        else:
            made = kind(kind.config_class.from_pretrained(str(path), local_files_only=True))
        cast(made, dtype)
    assert isinstance(made, nn.Module)
    return made.eval()


def _require_config(path: Path) -> None:
    if any((path / name).is_file() for name in _CONFIGS) or _has_vocabulary(path):
        return
    if not path.is_dir():
        raise UsageError(f"there is no folder {path}, though model_index.json names {path.name!r}")
    weights = next(_weights(path), None)
    has = "no config.json" if weights is None else f"{weights.name} and no config.json"
    raise UsageError(
        f"{path} has {has}: a component is built from its config, which lies beside its weights "
        "in the model's repository"
    )


def _weights(path: Path) -> Iterator[Path]:
    return (f for f in sorted(path.iterdir()) if f.suffix in (".safetensors", ".bin", ".gguf"))


def _has_vocabulary(path: Path) -> bool:
    names = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
    return any((path / name).is_file() for name in names)


def _tokenizer(path: Path, kind: type) -> Any:
    """One that gives as many tokens as the folder's would; what they mean is not looked at."""
    config = _read(path / "tokenizer_config.json")
    length = config.get("model_max_length")
    beside = _read(path.with_name(path.name.replace("tokenizer", "text_encoder")) / "config.json")
    entries = int(beside.get("vocab_size", 0))
    if kind.__name__.startswith("CLIP"):
        return clip_tokenizer(max(entries, CLIP_SMALLEST_VOCABULARY))
    if kind.__name__.startswith("T5"):
        longest = length if isinstance(length, int) and length < 10**6 else 512
        return t5_tokenizer(min(entries or 128, _LONGEST_T5), max_length=longest)
    raise UsageError(
        f"{path} has no tokenizer, and there is no stand-in for a {kind.__name__}: add the files "
        "of the model's repository (tokenizer.json, tokenizer_config.json)"
    )


def _read(file: Path) -> Mapping[str, Any]:
    """A JSON object; an empty one if there is no such file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(f"{str(file)!r} is no JSON: {error}") from error
    return content if isinstance(content, Mapping) else {}


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
