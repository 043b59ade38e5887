"""A folder with a pipeline in it, as diffusers' `save_pretrained` and the Hub lay it out."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .device.walk import walk
from .errors import GreenroomError, UsageError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}

_STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# model.safetensors, model.fp16.safetensors, model.fp16-00001-of-00002.safetensors,
# model-00001-of-00002.fp16.safetensors
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<before>\w+))?(?:-\d+-of-\d+)?"
    r"(?:\.(?P<after>\w+))?\.(?:safetensors|bin)"
)


class LoadError(GreenroomError, RuntimeError):
    """The folder names a pipeline, and it cannot be loaded."""


@dataclass(frozen=True)
class ModelFolder:
    """A pipeline's folder that was looked into, but not loaded.

    pipeline_class: the class of diffusers that ``model_index.json`` names.
    variant: what stands in the names of its weights' files ("fp16"), where a component has no plain
        ones.
    stored_dtype: the dtype of most of the weights' bytes; float32 if the files do not tell.
    """

    path: Path
    pipeline_class: type
    variant: str | None
    stored_dtype: torch.dtype

    def load(self, dtype: torch.dtype) -> Any:
        """The pipeline, in host memory.

        Raises:
            LoadError: diffusers could not make it of what lies there.
        """
        from diffusers import DiffusionPipeline

        try:
            return DiffusionPipeline.from_pretrained(
                str(self.path), torch_dtype=dtype, variant=self.variant, local_files_only=True
            )
        except Exception as error:
            # Of what a folder can lack or hold too much of, each library raises what it likes.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise LoadError(
                f"{self.path} could not be loaded as a {self.pipeline_class.__name__}: {reason}"
            ) from error


def open_folder(path: Path | str) -> ModelFolder:
    """Look into a pipeline's folder.

    Raises:
        UsageError: it is none, or its pipeline is not one of the installed diffusers.
        ImportError: diffusers is not installed, or what it needs for this pipeline.
    """
    path = Path(path)
    index = path / "model_index.json"
    if not path.is_dir():
        raise UsageError(
            f"there is no folder {str(path)!r}. Pipelines are loaded from folders on this machine, "
            "and nothing is downloaded"
        )
    if not index.is_file():
        raise UsageError(
            f"{str(path)!r} is no diffusers pipeline: it has no model_index.json. A pipeline's "
            "folder is what pipe.save_pretrained(folder) writes, or a download of a model's "
            "repository"
        )
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        name = content["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{str(index)!r} does not say what pipeline it is: it should be JSON with a "
            f"_class_name ({error})"
        ) from error
    components = [
        path / name
        for name, entry in content.items()
        if not name.startswith("_") and isinstance(entry, list) and (path / name).is_dir()
    ]
    variant = _variant(components)
    return ModelFolder(path, _class(name), variant, _stored_dtype(components, variant))


def component_sizes(pipe: Any) -> dict[str, int]:
    """The bytes of each component's weights, those it shares with itself once."""
    sizes: dict[str, int] = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            tensors = {held.tensor.data_ptr(): held.tensor.nbytes for held in walk(part)}
            sizes[name] = sum(tensors.values())
    return sizes


def _class(name: Any) -> type:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(
            "a pipeline's folder is loaded with diffusers, which is not installed: "
            "pip install 'greenroom[diffusers,transformers]'"
        ) from error
    found = getattr(diffusers, name, None) if isinstance(name, str) else None
    # Of what it cannot import, diffusers has a stand-in that knows what is missing.
    needed = getattr(found, "_backends", ())
    missing = [library for library in needed if importlib.util.find_spec(library) is None]
    if missing:
        raise ImportError(
            f"{name} needs {' and '.join(missing)}, not installed here: "
            f"pip install {' '.join(missing)}"
        )
    if not (isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline)):
        raise UsageError(
            f"the pipeline's class is {name!r}, and the installed diffusers "
            f"{diffusers.__version__} has no such pipeline. Code of the folder's own is not run"
        )
    return found


def _variant(components: list[Path]) -> str | None:
    """The variant that components without plain weights have in common, "fp16" first."""
    common: set[str] | None = None
    for folder in components:
        variants = {variant for _, variant in _weights(folder)}
        if variants and None not in variants:
            named = {variant for variant in variants if variant is not None}
            common = named if common is None else common & named
    return min(common, key=lambda name: (name != "fp16", name)) if common else None


def _stored_dtype(components: list[Path], variant: str | None) -> torch.dtype:
    nbytes: Counter[torch.dtype] = Counter()
    for folder in components:
        files = list(_weights(folder))
        wanted = variant if any(found == variant for _, found in files) else None
        for file, found in files:
            if found == wanted and file.suffix == ".safetensors":
                for tensor in _header(file).values():
                    if tensor.get("dtype") in _STORED:
                        start, end = tensor["data_offsets"]
                        nbytes[_STORED[tensor["dtype"]]] += end - start
    return nbytes.most_common(1)[0][0] if nbytes else torch.float32


def _weights(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """The files of a component's weights, each with its variant."""
    for file in sorted(folder.iterdir()):
        match = _WEIGHTS.fullmatch(file.name)
        if match is not None:
            yield file, match["before"] or match["after"]


def _header(file: Path) -> Mapping[str, Any]:
    """What a safetensors file says of its tensors; nothing, if it is cut off or is none."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > file.stat().st_size:
                return {}
            header = json.loads(opened.read(length))
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}
