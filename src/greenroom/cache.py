"""Where greenroom keeps what it makes once and needs again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """``$GREENROOM_CACHE``, else ``greenroom`` in the user's cache folder. It need not be there."""
    if chosen := os.environ.get("GREENROOM_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "greenroom"
