"""Labels in torch's profiler for what greenroom does: nothing at all while none is active."""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import torch.autograd.profiler as _profiler

_NOTHING = contextlib.nullcontext()


def label(verb: Literal["onload", "offload", "wait"], name: str) -> Any:
    """A context: what is done inside is shown as ``greenroom::onload (unet.down_blocks.0)``.

    On a GPU's timeline, the copies that are issued inside stand under the label as well.
    """
    if not _profiler._is_profiler_enabled:
        return _NOTHING
    return _profiler.record_function(f"greenroom::{verb} ({name})")
