"""The one walk over a module's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN_TYPES = (torch.Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor where a module holds it. Tied weights are held more than once."""

    owner: nn.Module
    kind: Literal["parameter", "buffer", "inner"]  # inner: it lies inside another one
    name: str
    tensor: torch.Tensor
    path: str  # for people: "down_blocks.0.resnets.1.conv1.weight"


def walk(module: nn.Module, *, but: Iterable[nn.Module] = ()) -> Iterator[Held]:
    """Every tensor that `module.to()` moves, each place once; not those of the modules in `but`.

    Parameters and their gradients, buffers, and what lies inside of them: the tensors that a
    quantised weight is made of, nested to any depth, and those that its library keeps in an object
    of its own beside the weight. A tensor that holds others comes before them.
    """
    for prefix, owner in module.named_modules(memo=set(but)):
        dot = f"{prefix}." if prefix else ""
        packages: set[str] = set()
        for kind, tensors in (("parameter", owner._parameters), ("buffer", owner._buffers)):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                yield Held(owner, kind, name, tensor, dot + name)  # type: ignore[arg-type]
                if type(tensor) not in _PLAIN_TYPES:
                    packages.add(_package(tensor))
                    yield from _inside(owner, tensor, dot + name)
                if tensor.is_leaf and tensor.grad is not None:
                    yield Held(owner, "inner", "grad", tensor.grad, f"{dot}{name}.grad")
        for name, value in vars(owner).items() if packages else ():
            # bitsandbytes moves a weight's scales into its layer's `state` at the first forward.
            if not isinstance(value, (torch.Tensor, nn.Module)) and _package(value) in packages:
                for path, tensor in _attributes(value, _package(value), set()):
                    yield Held(owner, "inner", name, tensor, f"{dot}{name}.{path}")


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor is strided memory, so that its bytes may be moved for it.

    Subclasses that are memory and a few attributes are (GGUF's, bitsandbytes'); those that are a
    shell around other tensors (torchao's, quanto's) are not, but the walk yields what is inside.
    """
    return (
        tensor.layout == torch.strided
        and tensor.numel() > 0
        and not tensor.is_quantized
        and not (tensor.is_conj() or tensor.is_neg())
        and not is_shell(tensor)
    )


def is_shell(tensor: torch.Tensor) -> bool:
    """Whether the tensor is of a class that computes by itself, and so need not have memory."""
    plain = torch.Tensor.__torch_dispatch__
    return type(tensor) not in _PLAIN_TYPES and type(tensor).__torch_dispatch__ is not plain


def version_of(tensor: torch.Tensor) -> int:
    """How often the tensor was changed in place, as far as torch counts."""
    try:
        return tensor._version
    except RuntimeError:  # it was made in inference mode, where torch does not count
        return 0


def why_valueless(tensor: torch.Tensor) -> str | None:
    """Why there is nothing to move yet, or None."""
    if is_lazy(tensor):
        return "waits for its first input to get a shape"
    if tensor.is_meta:
        return "is on the meta device: it has a shape, but no values"
    return None


# ---- what lies inside a tensor


def _inside(owner: nn.Module, tensor: torch.Tensor, path: str) -> Iterator[Held]:
    if is_traceable_wrapper_subclass(tensor):
        found = [(name, getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]
    else:
        found = list(_attributes(tensor, _package(tensor), set()))
    for name, inner in found:
        yield Held(owner, "inner", name, inner, f"{path}.{name}")
        if type(inner) not in _PLAIN_TYPES:
            yield from _inside(owner, inner, f"{path}.{name}")


def _attributes(value: Any, package: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors among an object's attributes, and those of objects that are of the same package."""
    seen.add(id(value))
    if isinstance(value, Mapping):
        items = list(value.items())
    elif isinstance(value, (list, tuple)):
        items = list(enumerate(value))
    else:
        items = list(getattr(value, "__dict__", {}).items())
    for name, item in items:
        if id(item) in seen or isinstance(item, nn.Module):
            continue
        if isinstance(item, torch.Tensor):
            seen.add(id(item))
            yield str(name), item
        elif isinstance(item, (Mapping, list, tuple)) or _package(item) == package:
            for path, tensor in _attributes(item, package, seen):
                yield f"{name}.{path}", tensor


def _package(value: Any) -> str:
    return type(value).__module__.partition(".")[0]
