"""Sees what an operation is about to take, before it does, while a component runs first.

What a component works on besides its weights is known only when it has run. Instead of keeping
half a budget free for it, which a text encoder does not need and a decoder may exceed, the first
stay in each component is watched: what an operation returns is worked out on meta tensors, which
have shapes and no memory, and if there is no room for it beside the weights, some of those go.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

#: Kernels take memory for themselves, which nothing tells beforehand: as much again as what they
#: return is left for them. Those that work element by element read what they are given as it lies.
#: cuDNN's fastest kernels for a convolution also copy what they read into another layout; where
#: there is no room for that, another one does it without a word, and gives other bits.
_COPY_WHAT_THEY_READ = frozenset({torch.ops.aten.convolution, torch.ops.aten.cudnn_convolution})


class ActivationWatch(TorchDispatchMode):
    """A mode in which device memory is asked for before each operation that may need it.

    Args:
        device: where.
        ask: called with the bytes that are about to be needed; returns how many there are. It is
            not asked again before those may be used up.
    """

    #: Higher-order operators come through as all others do.
    supports_higher_order_operators = True

    def __init__(self, device: torch.device, ask: Callable[[int], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._ask = ask
        self._left = 0
        self._known: dict[Hashable, tuple[int, int]] = {}  # blocks repeat

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled inside is compiled as it would be without the mode."""
        return True

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation when there is room for it."""
        kwargs = kwargs or {}
        if _returns_memory(func):
            alike = func, _shapes_of(args), _shapes_of(tuple(kwargs.items()))
            known = self._known.get(alike)
            if known is None:
                returns = returned_nbytes(func, args, kwargs, self._device)
                known = self._known[alike] = returns, self._works_on_nbytes(func, args, returns)
            returns, works_on = known
            if returns + works_on > self._left:
                self._left = self._ask(returns + works_on)
            self._left -= returns
        return func(*args, **kwargs)

    def _works_on_nbytes(self, func: Any, args: tuple[Any, ...], returns: int) -> int:
        """Bytes that an operation's kernel may take for itself."""
        if torch.Tag.pointwise in func.tags:
            return 0
        if func.overloadpacket not in _COPY_WHAT_THEY_READ or self._device.type != "cuda":
            return returns
        return returns + sum(t.nbytes for t in _tensors_in(args))


@functools.cache
def _returns_memory(func: Any) -> bool:
    """Whether an operator returns tensors that are no views, and none of those it was given."""
    returns = getattr(getattr(func, "_schema", None), "returns", ())
    return any(value.alias_info is None for value in returns)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided and not value.is_nested:  # others have no such bytes
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors_in(item)


def _shapes_of(value: Any) -> Hashable:
    """What tells how much an operator returns for this argument."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_nested:
            return id(value)
        return value.shape, value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple([_shapes_of(item) for item in value])
    return (type(value), value) if isinstance(value, Hashable) else id(value)


def returned_nbytes(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device
) -> int:
    """Bytes of device memory that an operator is going to take for what it returns.

    Where that cannot be known (it depends on values, say) it is taken to be what the operator is
    given there.
    """
    if not _returns_memory(func):
        return 0
    given = [t for t in _tensors_in((args, kwargs)) if t.device == device]
    named = kwargs.get("device")
    target = torch.device(named) if named is not None else None
    if not given if target is None else not _is_there(target, device):
        return 0
    if torch.Tag.pointwise in func.tags and target is None:  # the same, without the millisecond
        shape = torch.broadcast_shapes(*(t.shape for t in given))
        return int(math.prod(shape)) * max(t.element_size() for t in given)
    try:
        with _disable_current_modes():  # others' are for what is really done
            returned = func(
                *tree_map_only(torch.Tensor, _without_memory, args),
                **tree_map_only(torch.Tensor, _without_memory, kwargs)
                | ({} if target is None else {"device": torch.device("meta")}),
            )
    except Exception:  # whatever it was, the operation itself will tell
        return sum(t.nbytes for t in given)
    return sum(t.nbytes for t in _tensors_in(returned))


def _is_there(target: torch.device, device: torch.device) -> bool:
    return target.type == device.type and target.index in (None, device.index)


def _without_memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=torch.device("meta")
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether some of a module was compiled: its operations are not seen one by one."""
    return any(
        getattr(m, "_compiled_call_impl", None) is not None
        or hasattr(m.__dict__.get("forward"), "_torchdynamo_orig_callable")
        or type(m).__name__ == "OptimizedModule"
        for m in module.modules()
    )
