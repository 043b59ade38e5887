"""Under which conditions a figure was measured: what every file in results/ says of itself."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import greenroom

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "diffusers", "accelerate", "transformers")


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "greenroom": greenroom.__version__,
    }


def simulated(profile: str) -> dict[str, Any]:
    """The card that is simulated, with every rate that virtual seconds come from."""
    import greenroom.sim as sim

    card = dataclasses.asdict(sim.get_profile(profile))
    del card["sources"]  # they stand beside the profile
    return {"simulated": True, **card}


def host() -> dict[str, Any]:
    """The real machine, for figures of real time."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [s for s in cpuinfo.read_text().splitlines() if s.startswith("model name")]
        cpu = named[0].partition(":")[2].strip() if named else cpu
    return {
        "simulated": False,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def chosen(names: Iterable[str], only: str | None) -> list[str]:
    """Those that `--only` picks, all of them without it.

    It has one or several texts, with ";" between them. Each picks the name that it is; or, if it is
    none, those that it is a part of. One that picks nothing ends the program.
    """
    every = list(names)
    if not only:
        return every
    picked: set[str] = set()
    for text in map(str.strip, only.split(";")):
        found = [name for name in every if name == text] or [n for n in every if text in n]
        if not text or not found:
            sys.exit(f"nothing has {text!r} in it; there are: {'; '.join(every)}")
        picked.update(found)
    return [name for name in every if name in picked]


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
