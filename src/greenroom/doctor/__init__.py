"""What `greenroom doctor` does: look at the machine, measure its link, say what is wrong.

`probe` looks and measures, `host` reads what the kernel's files say, `judge` decides what is a
trouble and needs no machine for that, `show` prints.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .judge import Facts, Finding, Level, judge
from .probe import look

__all__ = ["Examination", "examine"]


@dataclass(frozen=True)
class Examination:
    """What was found, and what to think of it."""

    facts: Facts
    findings: Sequence[Finding]

    @property
    def is_sound(self) -> bool:
        """Whether nothing keeps greenroom from working here as it should."""
        return all(finding.level is not Level.TROUBLE for finding in self.findings)

    def print(self, *, as_json: bool) -> None:
        """Print it on standard output."""
        if as_json:
            print(json.dumps(self.to_dict(), indent=2))
            return
        from .show import show

        show(self.facts, self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The examination as plain values."""
        findings = [{**asdict(found), "level": found.level.value} for found in self.findings]
        return {"is_sound": self.is_sound, "findings": findings, **asdict(self.facts)}


def examine(device: str | None = None, simulate: str | None = None) -> Examination:
    """Look at the machine. The arguments are those of the command.

    Raises:
        UsageError: there is no such device or card.
        SimulatorBuildError: the simulator was asked for and cannot be compiled.
    """
    facts = look(device, simulate)
    return Examination(facts, judge(facts))
