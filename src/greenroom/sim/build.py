"""Compile the simulator's C++ on first use, and find it again afterwards."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from ..cache import cache_dir

_SOURCES = Path(__file__).parent / "csrc"
_NAME = "greenroom_sim_native"


class SimulatorBuildError(RuntimeError):
    """The simulator could not be compiled on this machine; the text says what to install."""


def load_native() -> Any:
    """The compiled simulator's operators; built first where there are none for this torch.

    Raises:
        SimulatorBuildError: no C++ compiler, no ninja, or the compiler refused.
    """
    folder = cache_dir() / f"sim-{_fingerprint()}"
    library = folder / f"{_NAME}.so"
    if not library.exists():
        # torch needs filelock itself; the lock goes with the process, so that a killed build blocks
        # nobody.
        from filelock import FileLock

        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SimulatorBuildError(
                f"the compiled simulator is kept in {folder.parent}, which cannot be made "
                f"({error.strerror}): name another folder in GREENROOM_CACHE"
            ) from error
        with FileLock(f"{folder}.lock"):
            if not library.exists():
                _build(folder)
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        library.unlink()
        raise SimulatorBuildError(
            f"the compiled simulator {library} could not be loaded ({error}); it has been removed: "
            "try again, and it is compiled anew"
        ) from error
    return torch.ops.greenroom_sim


def _fingerprint() -> str:
    digest = hashlib.sha256(f"{torch.__version__} {sys.platform} {platform.machine()}".encode())
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _build(folder: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX") or "c++")[0]
    if shutil.which(compiler) is None:
        raise SimulatorBuildError(
            "the simulated accelerator is compiled on first use, and there is no C++ compiler "
            f"{compiler!r} here. Install one (Debian, Ubuntu: apt-get install g++; Fedora: "
            "dnf install gcc-c++) or name yours in CXX."
        )
    print(
        "greenroom: compiling the simulated accelerator (once for this torch, about a minute) ...",
        file=sys.stderr,
        flush=True,
    )
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="building-") as scratch:
        # In a process of its own: torch loads what it has built, and this process must load it from
        # its final place.
        result = subprocess.run(
            [sys.executable, "-c", _COMPILE, scratch, *map(str, sorted(_SOURCES.glob("*.cpp")))],
            env={**os.environ, "PATH": _path_with_ninja()},
            capture_output=True,
            text=True,
            check=False,
        )
        built = Path(scratch, f"{_NAME}.so")
        if result.returncode != 0 or not built.exists():
            raise SimulatorBuildError(_why(result.stdout + result.stderr))
        folder.mkdir(exist_ok=True)
        built.replace(folder / built.name)


_COMPILE = f"""
import sys
from torch.utils.cpp_extension import load
folder, *sources = sys.argv[1:]
load({_NAME!r}, sources, extra_cflags=["-O2"], build_directory=folder, is_python_module=False)
"""


def _path_with_ninja() -> str:
    # ninja as a Python package lies beside the interpreter, which need not be on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if shutil.which("ninja", path=path) is None:
        raise SimulatorBuildError(
            "the simulated accelerator is compiled with ninja, which is not installed: "
            "pip install 'greenroom[sim]' (or pip install ninja)"
        )
    return path


def _why(output: str) -> str:
    lines = [line for line in output.splitlines() if "error:" in line][:6]
    return (
        f"the simulated accelerator did not compile against torch {torch.__version__}; "
        "it is written for torch 2.13. The compiler said:\n"
        + "\n".join(lines or output.splitlines()[-12:])
    )
