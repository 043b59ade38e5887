"""The pipeline that greenroom can always run, and the ways to run it that are worth comparing.

The pipeline is a small SDXL: its own classes with random weights, so the picture is noise, but the
work and the traffic are SDXL's in small. It is built once, saved in the cache folder as any
pipeline is saved, and from then on loaded from there.
"""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .cache import cache_dir
from .compare import TWO_WAYS, Way
from .errors import GreenroomError

PROMPT = "a red circle above a blue square"

#: What a call takes besides the prompt.
SETTINGS: Mapping[str, Any] = {"num_inference_steps": 4, "height": 128, "width": 128}


class CacheError(GreenroomError, RuntimeError):
    """The cache folder cannot take the pipeline."""


def _resident(pipe: Any, device: torch.device) -> None:
    pipe.to(device)


def _sequential(pipe: Any, device: torch.device) -> None:
    pipe.enable_sequential_cpu_offload(device=device)


def _blocks(pipe: Any, device: torch.device) -> None:
    pipe.enable_group_offload(
        onload_device=device, offload_type="block_level", num_blocks_per_group=1, use_stream=True
    )


def _leaves(pipe: Any, device: torch.device) -> None:
    pipe.enable_group_offload(onload_device=device, offload_type="leaf_level", use_stream=True)


#: All of it on the device; diffusers' ways; greenroom's.
WAYS: Mapping[str, Way] = {
    "resident": _resident,
    "sequential offload": _sequential,
    "group offload, blocks": _blocks,
    "group offload, leaves": _leaves,
    **TWO_WAYS,
}


def model_folder() -> Path:
    """The small SDXL's folder in the cache; built and saved if it is not there.

    Raises:
        CacheError: it could not be saved.
        ImportError: diffusers or transformers is not installed.
    """
    folder = cache_dir() / f"demo-sdxl-{_fingerprint()}"
    if folder.is_dir():
        return folder
    from .zoo.tiny import demo_sdxl

    pipe = demo_sdxl()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Under another name until it is complete: whoever is interrupted leaves no half of it.
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix="saving-") as scratch:
            unfinished = Path(scratch, folder.name)
            pipe.save_pretrained(unfinished)
            with contextlib.suppress(FileExistsError):  # another process was faster
                unfinished.rename(folder)
    except OSError as error:
        raise CacheError(
            f"the demo's pipeline (266 MB) is kept in {folder.parent}, which cannot take it "
            f"({error.strerror or error}): name another folder in GREENROOM_CACHE"
        ) from error
    return folder


def _fingerprint() -> str:
    """Of all that the weights and their files depend on."""
    versions = [version(library) for library in ("torch", "diffusers", "transformers")]
    digest = hashlib.sha256(" ".join(versions).encode())
    for name in ("tiny.py", "tokenizers.py"):
        digest.update((Path(__file__).parent / "zoo" / name).read_bytes())
    return digest.hexdigest()[:16]
