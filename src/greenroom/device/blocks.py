"""Which runs of a component's modules can come and go by themselves.

Little is known about any model: large modules are taken apart along their children, small
neighbours travel together. Neighbours are modules that run one after the other, which is how most
were registered. What is in no run (parameters of the large modules themselves) lies
beside the blocks, and is held as long as the component's forward runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from .layout import extent_of
from .walk import is_plain, walk

_MOST_BYTES = 128 * 2**20  # a link is at its full speed from 16 MB on
_RUNS_IN_A_BUDGET = 32  # so that the room for those on their way is a small share of it


@dataclass(frozen=True, eq=False)
class Run:
    """Neighbouring modules that travel together; each is called by its forward."""

    name: str  # of the first one: "transformer_blocks.3"
    modules: tuple[nn.Module, ...]


def runs_of(component: nn.Module, budget: int) -> list[Run]:
    """The runs of a component, in the order in which they will run; none if it is small."""
    most = min(_MOST_BYTES, budget // _RUNS_IN_A_BUDGET)
    if nbytes_of(component) <= most:
        return []
    units = _without_ties(component, list(_units(component, "", most)))
    runs: list[Run] = []
    names: list[str] = []
    members: list[nn.Module] = []
    nbytes = 0
    for i, (name, module) in enumerate(units):
        names.append(name)
        members.append(module)
        nbytes += nbytes_of(module)
        is_last = i + 1 == len(units) or _family(units[i + 1][0]) != _family(name)
        if nbytes >= most // 2 or is_last:
            if nbytes >= most // 16:  # less is not worth a copy of its own
                runs.append(Run(names[0], tuple(members)))
            names, members, nbytes = [], [], 0
    return runs


def _units(module: nn.Module, name: str, most: int) -> Iterator[tuple[str, nn.Module]]:
    is_called = name != "" and type(module).forward is not nn.Module.forward
    if is_called and (nbytes_of(module) <= most or not _may_be_taken_apart(module)):
        if nbytes_of(module) > 0:
            yield name, module
        return
    for child_name, child in _children_of(module):
        yield from _units(child, f"{name}.{child_name}" if name else child_name, most)


def _children_of(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children in the order in which they run: as registered, but for diffusers' UNets.

    Those run their middle before they go up, and in each block a resnet, an attention and so on in
    turn (`CrossAttnUpBlock2D.forward`), whichever list was registered first.
    """
    children = dict(module.named_children())
    order = list(children)
    if "mid_block" in children and "up_blocks" in children:
        order.remove("up_blocks")
        order.insert(order.index("mid_block") + 1, "up_blocks")
    lists = [name for name in _IN_TURN if isinstance(children.get(name), nn.ModuleList)]
    if len(lists) < 2:
        return [(name, children[name]) for name in order]
    blocks = [
        [(f"{name}.{i}", block) for i, block in children[name].named_children()] for name in lists
    ]
    in_turn = [block for turn in itertools.zip_longest(*blocks) for block in turn if block]
    return [*in_turn, *((name, children[name]) for name in order if name not in lists)]


_IN_TURN = ("resnets", "temp_convs", "attentions", "temp_attentions", "motion_modules")


def _may_be_taken_apart(module: nn.Module) -> bool:
    """Whether its children are called one by one; torch's own layers read children's weights."""
    is_layer_of_torch = type(module).__module__.startswith("torch.nn") and not isinstance(
        module, nn.Sequential
    )
    return not is_layer_of_torch and any(True for _ in module.children())


def _family(name: str) -> str:
    return name.split(".", 1)[0]


def _without_ties(
    component: nn.Module, units: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    """Leave out units that share memory with another one, or with what lies beside them."""
    inside = [module for _, module in units]
    spans = sorted(
        (held.tensor.data_ptr(), held.tensor.data_ptr() + extent_of(held.tensor), which)
        for which, tensors in enumerate([walk(component, but=inside), *map(walk, inside)])
        for held in tensors
        if is_plain(held.tensor)
    )
    # Not by storage: weights that were page-locked together share one, and none of its bytes.
    tied: set[int] = set()
    end, owner = 0, -1  # of the span that reaches furthest so far
    for begin, stop, which in spans:
        if begin < end and which != owner:
            tied |= {which, owner}
        if stop > end:
            end, owner = stop, which
    return [unit for which, unit in enumerate(units, 1) if which not in tied]


def nbytes_of(module: nn.Module) -> int:
    """Bytes of all weights in a module, those that share memory once."""
    sizes = {
        held.tensor.data_ptr(): extent_of(held.tensor)
        for held in walk(module)
        if is_plain(held.tensor) and held.tensor.numel() > 0
    }
    return sum(sizes.values())
