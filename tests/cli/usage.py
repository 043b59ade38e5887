"""What the tests of the command line have in common: how to ask, and what comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: What makes a call of a small pipeline short, and its pictures small.
BRIEF = {
    "sd": ["--steps", "2"],
    "sdxl": ["--steps", "2"],
    "flux": ["--steps", "2", "--size", "32x32", "--set", "max_sequence_length=32"],
    "wan": [
        *["--steps", "2", "--size", "32x32"],
        *["--set", "num_frames=5", "--set", "max_sequence_length=32"],
    ],
}


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


#: ``greenroom ...`` in an empty folder.
Command = Callable[..., Done]

#: The folder of a small pipeline, by its name in the zoo.
Saved = Callable[[str], Path]
