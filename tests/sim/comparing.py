"""Whether torch computed on the simulated device the bits that the CPU computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

import greenroom.sim  # noqa: F401  (the device that is compared with the CPU)

__all__ = ["assert_same", "copied", "difference", "seed", "seeded"]


def copied(tree: Any, device: str = "cpu") -> Any:
    """The same values on a device; layouts and `requires_grad` come along."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            return leaf.detach().to(device, copy=True).requires_grad_(leaf.requires_grad)
        if isinstance(leaf, (str, torch.device)) and str(leaf) == "cpu":
            return torch.device(device)
        return leaf

    return tree_map(one, tree)


def difference(expected: Any, found: Any) -> str | None:
    """In what `found`, made on the simulator, is not `expected`, made on the CPU."""
    expected, found = tree_leaves(expected), tree_leaves(found)
    if len(expected) != len(found):
        return f"{len(found)} results instead of {len(expected)}"
    for one, other in zip(expected, found, strict=True):
        if not isinstance(one, torch.Tensor):
            if type(one) is not type(other):
                return f"{other!r} instead of {one!r}"
            continue
        if other.device.type != "sim":
            return f"a result on {other.device}"
        facts = [(t.dtype, t.shape, t.stride(), t.storage_offset()) for t in (one, other)]
        if facts[0] != facts[1]:
            return f"{facts[1]} instead of {facts[0]}"
        if not same_bits(one.detach(), other.detach().cpu()):
            return f"other values ({one.dtype}, {tuple(one.shape)})"
    return None


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, save that every NaN is as good as another."""
    if one.is_complex():
        one, other = (
            torch.view_as_real(one.resolve_conj()),
            torch.view_as_real(other.resolve_conj()),
        )
    if not one.is_floating_point():
        return torch.equal(one, other)
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    same = one.contiguous().view(word) == other.contiguous().view(word)
    if one.element_size() > 1:
        same |= one.isnan() & other.isnan()
    return bool(same.all())


def assert_same(expected: Any, found: Any) -> None:
    assert difference(expected, found) is None, difference(expected, found)


def seed(device: str = "cpu") -> None:
    """Zero for this device's generator; another for the other's, which must not be asked."""
    # torch.manual_seed() is slow: it formats the stack each time.
    torch.default_generator.manual_seed(0 if device == "cpu" else 1)
    torch.sim.manual_seed(0 if device == "sim" else 1)


def seeded(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `work` returns when the generator of its arguments' device starts at zero."""
    leaves = tree_leaves((args, kwargs))
    seed("sim" if any(torch.is_tensor(t) and t.is_sim for t in leaves) else "cpu")
    return work(*args, **kwargs)
