"""What hangs on a component: accelerate's hook on its forward, and bells on its inside."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import CpuOffload, ModelHook
from accelerate.utils import send_to_device
from torch import nn

from .device.blocks import runs_of
from .device.store import WeightStore
from .device.walk import is_plain, walk
from .engine import Engine
from .second_try import original_of, with_second_try

if TYPE_CHECKING:
    from .within_budget import WithinBudget


def _hidden_from_compiler(function: Callable[..., Any]) -> Callable[..., Any]:
    """Not traced by torch.compile: weights move between graphs, and one graph serves all calls.

    `torch.compiler.disable` imports the compiler, which takes seconds: only when first called.
    """

    @functools.wraps(function)
    def hidden(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            # A graph ends here; what follows is compiled by itself.
            return torch.compiler.disable(function)(*args, **kwargs)
        return function(*args, **kwargs)

    return hidden


class Part:
    """Modules of a component that go to the device together, and the bells that call them there.

    While it is home, every module inside has a bell: work that does not come through the
    component's own forward (`vae._encode`, `get_image_features`) rings it. On the device only
    `doors` have one, to bring inputs along. `entrances` always have: the part is at work from their
    bell until they return.
    """

    _is_copy = False

    def __init__(
        self,
        engine: Engine,
        modules: Sequence[nn.Module],
        name: str,
        *,
        in_sequence: bool,
        entrances: Sequence[nn.Module] = (),
        within: WithinBudget | None = None,
        beside: Part | None = None,
        but: Collection[nn.Module] = (),
    ) -> None:
        """Of `modules` without those in `but`; `beside` is what a run of blocks needs as well."""
        self.engine = engine
        self.modules = modules
        self.in_sequence = in_sequence
        self.within = within
        self.beside = beside
        self.inside = [m for root in modules for _, m in root.named_modules(memo=set(but))]
        self.store = WeightStore(modules, name, engine.backend, but=but)
        self.held = frozenset(id(held.tensor) for root in modules for held in walk(root, but=but))
        self._is_here = self._is_down = False
        self._unwraps: list[Callable[[], None]] = []
        self.doors: Sequence[nn.Module] = ()
        self.has_entrances = bool(entrances)
        self.kin: tuple[str, ...] = ()  # keys of parts that share weights with it
        #: Whether it may be changed unseen while it is on the device.
        self.is_watched = True
        self._entrances = {id(module) for module in entrances}
        self._bells: list[torch.utils.hooks.RemovableHandle] = []
        self._hung: Sequence[nn.Module] | None = None
        # Threads may come in at any moment, so these bells are never taken down in between.
        self._fixed = [
            *map(self._hang, entrances),
            *(m.register_forward_hook(self._leave, always_call=True) for m in entrances),
        ]
        if within is not None:
            for module in entrances:
                self._wrap(module)
        self.key = engine.join(self, name, in_sequence=in_sequence)

    def _wrap(self, module: nn.Module) -> None:
        """Let a forward that finds no room be tried again."""
        had_own = "forward" in module.__dict__
        ours = module.forward = with_second_try(self, module.forward)

        def unwrap() -> None:
            if module.__dict__.get("forward") is not ours:
                return  # somebody has wrapped it since: it stays inside, and does nothing
            if had_own:
                module.forward = original_of(ours)
            else:
                del module.forward

        self._unwraps.append(unwrap)

    @property
    def within_now(self) -> WithinBudget | None:
        """The budget in which it runs; None also of a copy, and once it was taken down."""
        return None if self._is_copy or self._is_down else self.within

    def _hang(self, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        # First of all hooks: others (weight_norm's) compute with the weights already.
        return module.register_forward_pre_hook(self._ring, prepend=True, with_kwargs=True)

    def hang_bells(self, modules: Sequence[nn.Module]) -> None:
        """Bells on these modules, and on no other but the entrances."""
        if modules is self._hung:
            return
        for bell in self._bells:
            bell.remove()
        self._bells.clear()
        for module in modules:
            if id(module) not in self._entrances:
                self._bells.append(self._hang(module))
        self._hung = modules

    def take_down(self) -> None:
        """No bells any more."""
        self._is_down = True
        self.hang_bells(())
        for handle in self._fixed:
            handle.remove()
        for unwrap in self._unwraps:
            unwrap()

    @_hidden_from_compiler
    def _ring(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if self._is_copy or self._is_down:
            return args, kwargs
        if self._is_left_alone(module):
            return self.bring(args), self.bring(kwargs)
        if self.within is None and not self._is_known(module):
            self.doors = (*self.doors, module)  # it is called by itself: maybe again
        self.engine.need(self.key, enters=id(module) in self._entrances)
        return self.bring(args), self.bring(kwargs)

    def _is_left_alone(self, module: nn.Module) -> bool:
        """Whether it runs in a quiet stay: it is there, and stays until that is over.

        What was given up may be freed under its kernels, unless somebody says that it is needed;
        who comes from another thread has to wait for his turn, and another component's entrance is
        another stay.
        """
        within = self.within
        return (
            within is not None
            and within.quiet_in is not None  # which mostly says no at once
            and self._is_here
            and not self.store.is_checked
            and id(module) not in self._entrances
            and within.quiet_in == threading.get_ident()
        )

    def _is_known(self, module: nn.Module) -> bool:
        return id(module) in self._entrances or any(module is door for door in self.doors)

    @_hidden_from_compiler
    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._is_copy:
            self.engine.left(self.key)

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        """A copy of a component is nobody's: its bells are silent."""
        silent = object.__new__(Part)
        silent._is_copy = True
        return silent

    def bring(self, inputs: Any) -> Any:
        """The inputs on the device; the very same object if they are there."""
        device = self.engine.device
        return send_to_device(inputs, device) if _has_strays(inputs, device) else inputs

    # ---- what the engine calls

    def go_to_device(self) -> None:
        """Carry out an Onload."""
        self.store.onload()
        self._log_sent()
        self.hang_bells(self.doors)

    def send(self, masters: object) -> None:
        """Start the way to the device; for `masters` see `WeightStore.send`."""
        self.store.send(settles=True, masters=masters, is_watched=self.is_watched)
        self._log_sent()

    def _log_sent(self) -> None:
        store = self.store
        self.engine.log.sent(self.key, store.nbytes, store.pinned_nbytes, store.journey)

    def arrive(self) -> None:
        """Have what was sent in use, from now on."""
        self.store.recheck()
        if not self._is_here:
            self.store.arrive()
            self._is_here = True
            self.hang_bells(self.doors)

    def trust(self) -> None:
        """Until `watch` nobody changes unseen what is sent from now on."""
        self.is_watched = False
        self.store.forget_masters()

    def watch(self) -> None:
        """From now on anybody may change it."""
        self.is_watched = True
        self.store.recheck()
        self.store.watch()
        self.store.forget_masters()

    def check(self) -> None:
        """Its use is over: begin to find out what has changed, for `go_home`."""
        if self._is_here:
            self.store.check()

    def go_home(self) -> int:
        """Carry out an Offload; returns how many bytes were copied."""
        began = self.engine.log.leaves(self.key)
        copied = self.store.offload()
        self.engine.log.came_home(self.key, copied, began)
        self._is_here = False
        self.at_home()
        return copied

    def at_home(self) -> None:
        """Bells everywhere inside."""
        self.hang_bells(self.inside)


class OffloadHook(CpuOffload):  # type: ignore[misc]
    """Brings its module to the device when it runs.

    A `CpuOffload`, because that is what diffusers looks for when it loads adapters or resets a
    pipeline; nothing of that class's own is used. A decorated method (`vae.decode`) comes through
    `pre_forward` without its arguments: from then on its children bring their inputs along.

    An autoencoder whose encoder and decoder are used at different times has two parts: each goes to
    the device when it is used, not both.
    """

    def __init__(
        self,
        engine: Engine,
        module: nn.Module,
        name: str,
        *,
        in_sequence: bool,
        within: WithinBudget | None = None,
    ) -> None:
        super().__init__(execution_device=engine.device)
        self.engine = engine
        self.module = module
        self.within = within

        def part(modules: Sequence[nn.Module], name: str, **options: Any) -> Part:
            return Part(engine, modules, name, in_sequence=in_sequence, within=within, **options)

        halves = halves_of(module)
        self.is_halved = halves is not None
        if halves is not None:
            self.parts = [
                part(modules, f"{name}.{half}", entrances=modules)
                for half, modules in halves.items()
            ]
            return
        runs = runs_of(module, within.divided_for) if within is not None else []
        whole = part([module], name, but={m for run in runs for m in run.modules})
        whole.inside.remove(module)  # its own forward comes through pre_forward
        if runs:
            whole.doors = whole.inside
        self.parts = [whole]
        embeddings = input_embeddings_of(module) if runs else []
        for run in runs:
            blocks = part(run.modules, f"{name}.{run.name}", beside=whole)
            inside = {id(m) for m in blocks.inside}.difference(map(id, run.modules))
            called_from_outside = [m for m in embeddings if id(m) in inside]
            blocks.doors = blocks.inside = [*run.modules, *called_from_outside]
            self.parts.append(blocks)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelHook:
        """A copy of a component is not offloaded: it has a hook that does nothing."""
        return ModelHook()

    # ---- what accelerate, diffusers and transformers call

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Send the module home: `UserCpuOffloadHook.offload()` comes here."""
        self.send_home()
        forward = getattr(module, "_old_forward", None)
        if self.within is not None and not self.is_halved and forward is not None:
            again: Any = with_second_try(self.parts[0], original_of(forward))
            module._old_forward = again
        for part in self.parts:
            part.store.lay_out()
            part.at_home()
        return module

    @_hidden_from_compiler
    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Have the weights and the inputs on the device."""
        part = self.parts[0]
        if self.is_halved:  # their bells will ring
            return part.bring(args), part.bring(kwargs)
        if not args and not kwargs:
            if len(self.parts) == 1:
                part.doors = list(module.children())
            self.engine.need(part.key, enters=False)
            return args, kwargs
        self.engine.need(part.key, enters=True)
        return part.bring(args), part.bring(kwargs)

    @_hidden_from_compiler
    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Say that the forward has returned."""
        self.engine.left(self.parts[0].key)
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Leave the module as it was, at home."""
        for part in self.parts:
            self.engine.leave(part.key)
            part.take_down()
            part.store.unsettle()
        if hasattr(module, "_old_forward"):
            original: Any = original_of(module._old_forward)
            module._old_forward = original
        return module

    def send_home(self) -> bool:
        """Every part goes home; False if another thread is running one."""
        return all([self.engine.send_home(part.key) for part in self.parts])


def input_embeddings_of(component: nn.Module) -> list[nn.Module]:
    """What models of transformers look tokens up in, which is deep inside another model of theirs.

    A model that understands pictures as well calls it by itself, to put pictures among the tokens.
    """
    found: dict[int, nn.Module] = {}
    for module in component.modules():
        get = getattr(module, "get_input_embeddings", None)
        with contextlib.suppress(Exception):  # it may be somebody else's, and mean something else
            embedding = get() if callable(get) else None
            if isinstance(embedding, nn.Module):
                found[id(embedding)] = embedding
    return list(found.values())


_CONTAINERS = (tuple, list, dict, Mapping)  # an abstract class is slow to ask, so it comes last


def _has_strays(inputs: Any, device: torch.device) -> bool:
    """Whether any tensor in a nested container is elsewhere than on the device.

    It runs before every forward: a call for each container, none for what is in it.
    """
    for value in inputs if isinstance(inputs, (tuple, list)) else inputs.values():
        if isinstance(value, torch.Tensor):
            if value.device != device:
                return True
        elif value is not None and isinstance(value, _CONTAINERS) and _has_strays(value, device):
            return True
    return False


def halves_of(module: nn.Module) -> dict[str, list[nn.Module]] | None:
    """An autoencoder's two sides, if nothing ties them; else None."""
    children = dict(module.named_children())
    is_autoencoder = all(
        name in children and callable(getattr(type(module), method, None))
        for name, method in (("encoder", "encode"), ("decoder", "decode"))
    )
    has_own = next(module.parameters(recurse=False), next(module.buffers(recurse=False), None))
    if not is_autoencoder or has_own is not None:
        return None
    decodes = [m for name, m in children.items() if name in ("decoder", "post_quant_conv")]
    encodes = [m for name, m in children.items() if name not in ("decoder", "post_quant_conv")]
    storages = [
        {
            held.tensor.untyped_storage().data_ptr()
            for root in side
            for held in walk(root)
            if is_plain(held.tensor)
        }
        for side in (encodes, decodes)
    ]
    if storages[0] & storages[1]:
        return None
    return {"encoder": encodes, "decoder": decodes}
