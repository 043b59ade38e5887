"""What a pipeline answered: compared to the bit, written as files."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from .errors import UsageError

_FRAMES_PER_SECOND = 10  # as diffusers' export_to_gif
_MOVING = (".gif", ".webp")
_PICTURES = ("images", "image", "frames")  # as diffusers' output classes call them

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Answer:
    """The arrays that a pipeline's call returned, by the names that its class gives them."""

    arrays: Mapping[str, Array]

    @classmethod
    def of(cls, output: Any) -> Answer:
        """Take what a call returned: an output object of diffusers, or a plain tuple."""
        named = output.items() if isinstance(output, Mapping) else enumerate(output)
        found = {str(name): _array(value) for name, value in named}
        return cls({name: array for name, array in found.items() if array is not None})

    @property
    def is_finite(self) -> bool:
        """Whether no number in it is infinite or NaN."""
        return all(
            bool(np.isfinite(array).all())
            for array in self.arrays.values()
            if np.issubdtype(array.dtype, np.inexact)
        )

    def is_same(self, other: Answer) -> bool:
        """Whether both are the same to the last bit."""
        return self.arrays.keys() == other.arrays.keys() and all(
            (mine.dtype, mine.shape, mine.tobytes())
            == (other.arrays[name].dtype, other.arrays[name].shape, other.arrays[name].tobytes())
            for name, mine in self.arrays.items()
        )

    @property
    def shown(self) -> list[str]:
        """The arrays that are pictures or films."""
        return [name for name in _PICTURES if _images(self.arrays.get(name))]

    def write(self, path: Path | None = None) -> list[Path]:
        """Write it as files, each whole or not at all; returns which.

        A picture takes the form that the name's ending says; several get numbers. A film becomes a
        moving .gif or .webp, or under another ending one sheet of all its frames. Everything else,
        and what is asked for by the ending .npz, is written as numpy's arrays.

        Args:
            path: else ``picture.png``, ``video.gif`` or ``answer.npz`` in the current folder.

        Raises:
            OSError: it could not be written.
        """
        items = [item for name in self.shown for item in _images(self.arrays[name])]
        if path is None:
            path = Path(
                "answer.npz" if not items else "video.gif" if items[0].ndim == 4 else "picture.png"
            )
        if not items or path.suffix.lower() == ".npz":
            path = path.with_suffix(".npz")
            with _whole(path) as file:
                np.savez(file, allow_pickle=False, **self.arrays)
            return [path]
        written = []
        for number, item in enumerate(items, 1):
            name = path if len(items) == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
            _write_pictures(name, item if item.ndim == 4 else item[None])
            written.append(name)
        return written


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before anything is computed for it.

    Raises:
        UsageError: its ending says no form, or its folder is not there or not to be written to.
    """
    from PIL import Image

    Image.init()
    if path.suffix.lower() != ".npz" and Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise UsageError(
            f"the ending of {str(path)!r} says nothing that can be written: choose .png, .jpg or "
            "the like for pictures, .gif or .webp for films, .npz for arrays"
        )
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        what = path if path.is_dir() else path.parent
        why = "it is a folder" if path.is_dir() else "no folder that can be written to"
        raise UsageError(f"{str(path)!r} cannot be written: {str(what)!r}: {why}")


def _array(value: Any) -> Array | None:
    """Tensors, arrays and pictures, or lists of them, as one array on the host; None of others."""
    if isinstance(value, (list, tuple)):
        arrays = [array for part in value if (array := _array(part)) is not None]
        is_whole = len(arrays) == len(value) > 0 and len({array.shape for array in arrays}) == 1
        return np.stack(arrays) if is_whole else None
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return np.asarray(value.float() if value.dtype == torch.bfloat16 else value)
    if isinstance(value, np.ndarray) or hasattr(value, "__array_interface__"):  # PIL's pictures
        return np.asarray(value)
    return None


def _images(array: Array | None) -> list[Array]:
    """Each picture (height, width, channels) or film (frames, height, width, channels) in it."""
    if array is None or array.ndim not in (4, 5) or array.shape[-1] not in (1, 3, 4):
        return []
    return list(array)


def _write_pictures(path: Path, frames: Array) -> None:
    from PIL import Image

    if np.issubdtype(frames.dtype, np.floating):
        frames = (np.nan_to_num(frames).clip(0, 1) * 255).round().astype(np.uint8)
    if frames.shape[-1] == 1:
        frames = frames[..., 0]
    form = Image.registered_extensions()[path.suffix.lower()]
    with _whole(path) as file:
        if len(frames) > 1 and path.suffix.lower() in _MOVING:
            first, *others = (Image.fromarray(frame) for frame in frames)
            first.save(
                file,
                form,
                save_all=True,
                append_images=others,
                duration=1000 // _FRAMES_PER_SECOND,
                loop=0,
            )
        else:
            Image.fromarray(_sheet(frames)).save(file, form)


def _sheet(frames: Array) -> Array:
    """All frames in one picture, in rows from left to right, about as many down as across."""
    across = math.ceil(math.sqrt(len(frames)))
    blanks = np.zeros_like(frames[:1]).repeat(-len(frames) % across, axis=0)
    padded = np.concatenate([frames, blanks])
    rows = [padded[start : start + across] for start in range(0, len(padded), across)]
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to that takes its name when it is complete, and goes when it fails."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
