"""What a pipeline is made of, and in which order it runs."""

from __future__ import annotations

import dataclasses
import difflib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .adapters import diffusers as _diffusers
from .errors import UsageError


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's modules by name.

    Raises:
        UsageError: there are none.
    """
    if isinstance(pipe, Mapping):
        named: Mapping[str, Any] = pipe
    elif isinstance(getattr(pipe, "components", None), Mapping):
        named = pipe.components
    elif dataclasses.is_dataclass(pipe):
        named = {f.name: getattr(pipe, f.name) for f in dataclasses.fields(pipe)}
    elif isinstance(pipe, nn.Module):
        named = dict(pipe.named_children())
    else:
        named = getattr(pipe, "__dict__", {})
    modules = {name: part for name, part in named.items() if isinstance(part, nn.Module)}
    if not modules:
        raise UsageError(
            f"{type(pipe).__name__} has no torch modules to offload: a pipeline is a mapping of "
            "names to modules, or an object with modules as attributes or in `components`"
        )
    return modules


def unique(modules: Mapping[str, nn.Module], first: Iterable[str]) -> dict[str, nn.Module]:
    """Each module once, under the first of its names, those in `first` before the others."""
    seen: set[int] = set()
    result: dict[str, nn.Module] = {}
    for name in [*(n for n in first if n in modules), *modules]:
        if id(modules[name]) not in seen:
            seen.add(id(modules[name]))
            result[name] = modules[name]
    return result


@dataclasses.dataclass(frozen=True)
class Order:
    """In which order components run, by name."""

    names: tuple[str, ...]
    #: Components that the sequence seems to mean by names that it misspells. They have no place in
    #: the order, but they are not what is left out of it on purpose, as a ControlNet is.
    misspelt: frozenset[str] = frozenset()


def order_of(
    pipe: Any, given: str | Iterable[str] | None, modules: Mapping[str, nn.Module]
) -> Order:
    """The order that is given, or else the pipeline's own.

    Raises:
        UsageError: there is neither.
    """
    wanted = given if given is not None else getattr(pipe, "model_cpu_offload_seq", None)
    if wanted is None and _diffusers.places_itself(pipe):
        wanted = tuple(modules)
    if wanted is None:
        raise UsageError(
            f"{type(pipe).__name__} does not say in which order its components run: set its "
            "class attribute model_cpu_offload_seq, or pass sequence='"
            + "->".join(modules)
            + "' (in the right order)"
        )
    names = [n.strip() for n in wanted.split("->")] if isinstance(wanted, str) else list(wanted)
    known = {*modules, *_diffusers.component_names(pipe)}
    misspelt: set[str] = set()
    for name in names:
        if name and name not in known:
            meant = _near_misses(name, known)
            hint = f" (did you mean {'->'.join(meant)!r}?)" if meant else ""
            warnings.warn(
                f"model_cpu_offload_seq of {type(pipe).__name__} names {name!r}, which is no "
                f"component of it{hint}. The name is skipped.",
                stacklevel=3,
            )
            misspelt.update(meant)
    return Order(
        tuple(dict.fromkeys(name for name in names if name in modules)), frozenset(misspelt)
    )


def _near_misses(name: str, known: Iterable[str]) -> list[str]:
    """The names that a misspelt one may stand for: those it is made of, else the most alike."""
    within = {n: at for n in known if (at := name.find(n)) >= 0}
    # "text_encoder" is within "text_encoder_2", but is not what "text_encoder_2-unet" is made of.
    made_of = [n for n in within if not any(n != other and n in other for other in within)]
    return sorted(made_of, key=within.__getitem__) or difflib.get_close_matches(name, known, n=1)
