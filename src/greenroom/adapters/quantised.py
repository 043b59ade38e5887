"""Components whose weights a quantisation library holds."""

from __future__ import annotations

from torch import nn


def why_immovable(module: nn.Module) -> str | None:
    """Why a component has to stay where it is, or None.

    bitsandbytes' 8-bit weights can be moved since transformers 4.58 and bitsandbytes 0.48; before
    that they are bound to the device that they were quantised on.
    """
    if not getattr(module, "is_loaded_in_8bit", False):
        return None
    if _is_older("transformers", "4.58.0") or _is_older("bitsandbytes", "0.48.0"):
        return (
            "its 8-bit weights cannot be moved by these versions; transformers >= 4.58 and "
            "bitsandbytes >= 0.48 can"
        )
    return None


def _is_older(package: str, version: str) -> bool:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    from packaging.version import Version

    try:
        return Version(installed(package)) < Version(version)
    except PackageNotFoundError:
        return True
