"""What was learned of calls, kept in files, so that the next process need not learn it again.

A file is found by content: the pipeline's class, its components' classes, the names, shapes and
dtypes of their weights, the parts they were divided into, the device, torch's version and what kind
of call it was. What is in it is a hint: if it is wrong, the call is slower, and learned anew. Files
that cannot be read or mean something else are ignored.

``GREENROOM_TRACES`` names another folder than ``traces`` in greenroom's cache; ``off`` keeps none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .cache import cache_dir
from .core.trace import Step
from .device.walk import walk

if TYPE_CHECKING:
    from .device.backend import Backend
    from .hooks import Part

logger = logging.getLogger("greenroom")

_VARIABLE = "GREENROOM_TRACES"
_FORMAT = 1
_MOST_FILES = 256  # of some 10 to 200 KB; the oldest give way


@dataclass(frozen=True)
class Trace:
    """The steps of a call as they were measured, and what the link did (None if not timed).

    sizes: bytes of its parts when they ran, which may be cast for that.
    """

    steps: tuple[Step, ...]
    sizes: Mapping[str, int]
    h2d_bytes_per_s: float | None


class KeptTrace:
    """The file of one kind of call, which need not be there. It costs nothing until it is used.

    Args:
        pipeline: the class.
        components: its modules by name.
        parts: what each of them is divided into, by the same names.
        kind: what calls have in common that take the same steps; its repr is the same everywhere.
    """

    def __init__(
        self,
        backend: Backend,
        pipeline: type,
        components: Mapping[str, nn.Module],
        parts: Mapping[str, Sequence[Part]],
        kind: Hashable,
    ) -> None:
        self._backend = backend
        self._pipeline = pipeline
        self._components = components
        self._parts = parts
        self._kind = kind

    def load(self) -> Trace | None:
        """What is kept, or None."""
        folder = traces_dir()
        if folder is None:
            return None
        path = folder / f"{self._name}.json"
        try:
            found = self._read(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            logger.info("%s is no trace of this call, and ignored: %r", path, error)
            return None
        logger.info("what is known of calls like this one was read from %s", path)
        return found

    def save(self, trace: Trace) -> None:
        """Keep this from now on; where that cannot be, nothing happens."""
        folder = traces_dir()
        labels = {part.key: label for label, part in self._labelled.items()}
        if folder is None or not all(name in labels for s in trace.steps for name in s.needs):
            return  # some other pipeline's components ran as well
        path = folder / f"{self._name}.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, json.dumps(self._written(trace, labels), separators=(",", ":")))
            _thin_out(folder)
        except OSError as error:
            logger.info("what was learned of this call could not be kept in %s: %s", path, error)

    @cached_property
    def _labelled(self) -> dict[str, Part]:
        """The parts, by names that are the same in every process."""
        return {f"{n}/{i}": p for n, parts in self._parts.items() for i, p in enumerate(parts)}

    @cached_property
    def _name(self) -> str:
        digest = hashlib.sha256()

        def take(*values: object) -> None:
            digest.update(repr(values).encode())

        take(_FORMAT, torch.__version__, self._backend.name, self._backend.memory_bytes())
        take(self._pipeline.__module__, self._pipeline.__qualname__, self._kind)
        for name, module in self._components.items():
            take(name, type(module).__module__, type(module).__qualname__)
            for held in walk(module):
                take(held.path, str(held.tensor.dtype), tuple(held.tensor.shape))
        for label, part in self._labelled.items():
            take(label, part.store.nbytes)
        return digest.hexdigest()

    def _written(self, trace: Trace, labels: Mapping[str, str]) -> dict[str, Any]:
        places: dict[tuple[str, tuple[str, ...], bool], int] = {}
        steps = [
            (places.setdefault(step.place, len(places)), step.seconds, step.beside_nbytes)
            for step in trace.steps
        ]
        return {
            "format": _FORMAT,
            "call": self._name,
            "h2d_bytes_per_s": trace.h2d_bytes_per_s,
            "sizes": {labels[n]: nbytes for n, nbytes in trace.sizes.items() if n in labels},
            "places": [
                [labels[part], [labels[name] for name in held], opens]
                for part, held, opens in places
            ],
            "steps": steps,
        }

    def _read(self, found: Any) -> Trace:
        if (found["format"], found["call"]) != (_FORMAT, self._name):
            raise ValueError("it is of another call")
        key = {label: part.key for label, part in self._labelled.items()}
        places = [
            (key[part], tuple(key[name] for name in held), bool(opens))
            for part, held, opens in found["places"]
        ]
        steps = []
        for place, seconds, beside_nbytes in found["steps"]:
            part, held, opens = places[place]
            steps.append(Step(part, held, _positive(seconds), int(_positive(beside_nbytes)), opens))
        if not steps:
            raise ValueError("it has no steps")
        sizes = {key[label]: int(_positive(n)) for label, n in found["sizes"].items()}
        speed = found["h2d_bytes_per_s"]
        return Trace(tuple(steps), sizes, None if speed is None else max(1e6, _positive(speed)))


@contextlib.contextmanager
def keeping_none() -> Iterator[None]:
    """No traces are kept, nor found, by what is done inside: first calls are first calls."""
    before = os.environ.get(_VARIABLE)
    os.environ[_VARIABLE] = "off"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_VARIABLE]
        else:
            os.environ[_VARIABLE] = before


def traces_dir() -> Path | None:
    """Where traces are kept; None if they are not."""
    chosen = os.environ.get(_VARIABLE)
    if chosen is not None and chosen.lower() in ("off", "0", "no", "false", ""):
        return None
    return Path(chosen) if chosen else cache_dir() / "traces"


def _positive(number: Any) -> float:
    if not 0 <= float(number) < 1e15:
        raise ValueError(f"{number!r} is no measurement")
    return float(number)


def _write(path: Path, text: str) -> None:
    """Replace a file at once: another process reads the old one or the new one."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, suffix=".part", delete=False
    ) as file:
        try:
            file.write(text)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(file.name)
            raise


def _thin_out(folder: Path) -> None:
    files = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime)
    for file in files[:-_MOST_FILES]:
        with contextlib.suppress(OSError):
            file.unlink()
