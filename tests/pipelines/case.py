"""One pipeline of the catalogue: how to build it, how to call it, what of its answer to compare."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Case", "case", "joined", "needless_ftfy", "run", "seeded"]


@dataclass(frozen=True)
class Case:
    """A shipped pipeline class, tiny and with random weights.

    ``build`` makes it anew, on the CPU, with the same weights each time; ``inputs`` the arguments
    of one call, with a generator of their own; ``output`` one CPU tensor of what the call returned.
    """

    name: str
    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    output: Callable[[Any], torch.Tensor]
    #: The arguments that must lie where the pipeline computes, because it does not move them.
    on_device: frozenset[str] = frozenset()


def run(case: Case, pipe: Any) -> torch.Tensor:
    """Call ``pipe`` as the case does and give its answer as one CPU tensor."""
    inputs = case.inputs()
    for name in case.on_device:
        inputs[name] = inputs[name].to(pipe._execution_device)
    with torch.random.fork_rng(devices=[]):
        # Some classes draw without the generator that they were given.
        torch.manual_seed(0)
        return case.output(pipe(**inputs))


def case(
    name: str,
    build: Callable[[], Any],
    call: Mapping[str, Any],
    output: Callable[[Any], torch.Tensor] | None = None,
    on_device: Iterable[str] = (),
) -> Case:
    """A case whose call has these arguments and a generator; values are copied for each call.

    A class that takes no generator says so with ``...`` in its place.
    """

    def inputs() -> dict[str, Any]:
        # Some pipelines write into what they are given.
        arguments = copy.deepcopy(dict(call))
        if arguments.setdefault("generator") is ...:
            del arguments["generator"]
        else:
            arguments["generator"] = torch.Generator("cpu").manual_seed(0)
        return arguments

    return Case(name, lambda: seeded(build), inputs, output or first, frozenset(on_device))


def first(result: Any) -> torch.Tensor:
    """The first field of a pipeline's answer: its images, frames, audios."""
    return joined(result[0])


def joined(value: Any) -> torch.Tensor:
    """Tensors and arrays, or lists of them, as one CPU tensor."""
    if isinstance(value, (list, tuple)):
        return torch.stack([joined(part) for part in value])
    return torch.as_tensor(value).detach().cpu()


def seeded(build: Callable[[], Any]) -> Any:
    """Build with the same weights each time; leave the process's random state alone."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Fills what nobody initialises (torch.empty) with NaN instead of what memory held.
        torch.use_deterministic_algorithms(True)
        try:
            pipe = build()
        finally:
            torch.use_deterministic_algorithms(deterministic)
        for component in pipe.components.values():
            if isinstance(component, torch.nn.Module):
                draw_blanks(component.eval())
    if hasattr(pipe, "set_progress_bar_config"):
        pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_blanks(module: torch.nn.Module) -> None:
    """Draw parameters that are left blank, or start at zero and wait for training.

    Behind a zero convolution it would not show whether a component ran at all.
    """
    for parameter in module.parameters():
        if parameter.is_floating_point() and not (parameter.isfinite().all() and parameter.any()):
            torch.nn.init.normal_(parameter, std=0.05)


def needless_ftfy(pipeline: type) -> type:
    """Let a pipeline class, or block, do without ftfy, which mends broken encodings: we have none.

    Some classes' modules use it although its import is optional and did not happen.
    """
    module = sys.modules[pipeline.__module__]
    if not hasattr(module, "ftfy"):
        module.ftfy = types.SimpleNamespace(fix_text=str)
    return pipeline
