"""Examples in docstrings as code: to Markdown, ``>>>`` would be a quotation in a quotation."""

from __future__ import annotations

from typing import Any

import griffe


def fence(text: str) -> str:
    """The text with each run of doctest lines in a fenced block.

    A run begins with ``>>>`` and ends at an empty line.
    """
    made: list[str] = []
    is_inside = False
    for line in text.splitlines():
        if not is_inside and line.lstrip().startswith(">>>"):
            is_inside = True
            made += ["", "```pycon"]
        elif is_inside and not line.strip():
            is_inside = False
            made.append("```")
        made.append(line)
    return "\n".join([*made, "```"] if is_inside else made)


class Examples(griffe.Extension):
    """Rewrites docstrings when they are loaded."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = fence(obj.docstring.value)
