"""Runs a forward that found no room on the device once more, alone on it.

Only where the first try is known to have changed nothing but random generators, which are set back:

- weights and buffers, by what came home changed when everything went home;
- inputs, by their versions, and by what containers hold. Where an input is of another kind (a
  cache, say, or a tensor of inference mode, which has no version) nothing can be known;
- what modules keep to themselves: those whose code sets attributes as it runs, or which somebody
  else has hooked, are not run twice.

There are none of these checks in a compiled forward, which is left as it is.
"""

from __future__ import annotations

import dis
import enum
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import DeviceOutOfMemory
from .interrupts import Uninterrupted

if TYPE_CHECKING:
    from .device.backend import Backend
    from .hooks import Part
    from .within_budget import WithinBudget


def with_second_try(part: Part, original: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that is run by itself if it finds no room beside what else is on the device."""
    return functools.partial(_forward, part, original)


def original_of(forward: Any) -> Any:
    """The forward that `with_second_try` was given; any other as it is."""
    is_ours = isinstance(forward, functools.partial) and forward.func is _forward
    return forward.args[1] if is_ours else forward


def _forward(part: Part, original: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return original(*args, **kwargs)
    within = part.within_now
    if within is None:
        return original(*args, **kwargs)
    try:
        return _tried(part, within, original, args, kwargs)
    except BaseException:
        within.raised(part)
        raise


def _tried(
    part: Part,
    within: WithinBudget,
    original: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    before = Before((args, kwargs), part.engine.backend)
    came_home = within.came_home_nbytes
    try:
        with within.foresee(part):
            return original(*args, **kwargs)
    except DeviceOutOfMemory:
        raise
    except torch.OutOfMemoryError as error:
        with Uninterrupted():
            within.make_room(part)
        if (
            within.came_home_nbytes != came_home
            or not before.is_unchanged()
            or any(map(_keeps_something, _modules_of(original)))
        ):
            raise within.refusal(part.store.name, error) from error
    # Not in the handler: the error's traceback holds what the first try worked on.
    before.restore()
    with Uninterrupted():
        within.need(part, enters=True)
    try:
        result = original(*args, **kwargs)
    except DeviceOutOfMemory:
        raise
    except torch.OutOfMemoryError as error:
        raise within.refusal(part.store.name, error, is_alone=True) from error
    within.went_well(part)
    return result


class Before:
    """What a forward begins with: its inputs, and the state of the random generators."""

    def __init__(self, inputs: Any, backend: Backend) -> None:
        self._inputs = inputs
        self._backend = backend
        self._generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self._marks: list[object] | None = []
        try:
            self._look(inputs, self._marks)
        except _UnknownError:
            self._marks = None
            return
        self._host = torch.get_rng_state()
        self._device = backend.random_state()

    def _look(self, value: Any, marks: list[object]) -> None:
        """What tells whether the inputs are what they were: versions, and what is in containers.

        It runs before every forward.
        """
        if isinstance(value, torch.Tensor):
            if value.is_inference():
                raise _UnknownError
            marks.append((id(value), value._version))
        elif value is None or isinstance(value, _PLAIN):
            marks.append(value)
        elif isinstance(value, (tuple, list)):
            marks.append((id(value), len(value)))
            for item in value:
                self._look(item, marks)
        elif isinstance(value, (dict, Mapping)) and type(value).__module__ in (
            "builtins",
            "collections",
        ):
            marks.append((id(value), tuple(value)))
            for item in value.values():
                self._look(item, marks)
        elif isinstance(value, torch.Generator):
            self._generators.append((value, value.get_state()))
        else:
            raise _UnknownError

    def is_unchanged(self) -> bool:
        """Whether the inputs are known to be what they were."""
        if self._marks is None:
            return False
        generators, self._generators = self._generators, []
        now: list[object] = []
        self._look(self._inputs, now)
        self._generators = generators
        return now == self._marks

    def restore(self) -> None:
        """Set the random generators back."""
        torch.set_rng_state(self._host)
        self._backend.restore_random_state(self._device)
        for generator, state in self._generators:
            generator.set_state(state)


class _UnknownError(Exception):
    pass


_PLAIN_MAPPINGS = ("builtins", "collections")  # whose; others may count who looks
_PLAIN = (bool, int, float, str, bytes, enum.Enum, torch.dtype, torch.device)


def _modules_of(forward: Any) -> Iterator[nn.Module]:
    module = getattr(forward, "__self__", None)
    if isinstance(module, nn.Module):
        yield from module.modules()


def _keeps_something(module: nn.Module) -> bool:
    """Whether a module may keep something of a forward, or somebody else see that it ran."""
    forward = inspect.unwrap(type(module).forward)
    if _sets_attributes(getattr(forward, "__code__", None)):
        return True
    registry = getattr(module, "_diffusers_hook", None)
    if any(getattr(hook, "_is_stateful", True) for hook in getattr(registry, "hooks", {}).values()):
        return True
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return not all(map(is_harmless, hooks))


def is_harmless(hook: Any) -> bool:
    """Whether a forward's hook is ours, or one that keeps nothing beyond the forward."""
    function = getattr(hook, "__func__", hook)
    # transformers collects outputs by hooks, into what each forward of a model makes anew.
    harmless = ("greenroom.", "transformers.utils.output_capturing")
    return str(getattr(function, "__module__", "")).startswith(harmless)


@functools.cache
def _sets_attributes(code: types.CodeType | None) -> bool:
    return code is not None and any(
        instruction.opname == "STORE_ATTR" for instruction in dis.get_instructions(code)
    )


def refusal_without_budget(
    pipeline: str, device: torch.device, error: BaseException
) -> DeviceOutOfMemory:
    """What to tell about a call that found no room, one component at a time."""
    return DeviceOutOfMemory(
        f"a call of {pipeline} found no room on {device}: {_said(error)}. Without a budget a whole "
        "component is there at a time. Give it a budget (budget='8GiB', say, of what is free), "
        "within which weights stream, or make the call smaller"
    )


def _said(error: BaseException) -> str:
    """The beginning of torch's message: how much was asked for."""
    return str(error).partition("\n")[0].partition(". GPU")[0].rstrip(".")


def refusal_of(
    within: WithinBudget, name: str, error: BaseException, *, free_nbytes: int, is_alone: bool
) -> DeviceOutOfMemory:
    """What to tell about a part that found no room."""
    from .core.units import format_bytes

    said = _said(error)
    other = ", also alone on the device" if is_alone else ""
    return DeviceOutOfMemory(
        f"{name!r} found no room on {within.engine.device}{other}: {said}. The budget is "
        f"{format_bytes(within.budget)}; {format_bytes(free_nbytes)} of the device are free now. "
        + (
            "Make the call smaller (fewer or smaller pictures, a tiled decoder), or free memory "
            "that something else has on the device"
            if is_alone
            else "Lower the budget to what the device really has free, call again (the next call "
            "leaves more room), or make the call smaller"
        )
    )
