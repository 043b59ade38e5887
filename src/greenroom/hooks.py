"""What hangs on a component: accelerate's hook on its forward, and bells on its inside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.hooks import CpuOffload
from accelerate.utils import send_to_device
from torch import nn

from .device.store import WeightStore
from .device.walk import walk
from .engine import Engine


class Part:
    """Modules of a component that go to the device together, and the bells that call them there.

    While it is home, every module inside has a bell: work that does not come through the
    component's own forward (`vae._encode`, `get_image_features`) rings it. On the device only
    `doors` keep theirs, to bring inputs along.
    """

    def __init__(
        self, engine: Engine, modules: list[nn.Module], name: str, *, in_sequence: bool
    ) -> None:
        self.engine = engine
        self.modules = modules
        self.in_sequence = in_sequence
        self.store = WeightStore(modules, name, engine.backend)
        self.doors: list[nn.Module] = []
        self._bells: list[torch.utils.hooks.RemovableHandle] = []
        self.key = engine.join(self, name, in_sequence=in_sequence)

    def hang_bells(self, inside: list[nn.Module]) -> None:
        """Bells on these modules, and on no other."""
        self.take_down_bells()
        self._bells = [m.register_forward_pre_hook(self._ring, with_kwargs=True) for m in inside]

    def take_down_bells(self) -> None:
        """No bells."""
        for bell in self._bells:
            bell.remove()
        self._bells = []

    def _ring(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        self.engine.need(self.key, enters=False)
        return self.bring(args), self.bring(kwargs)

    def bring(self, inputs: Any) -> Any:
        """The inputs on the device; the very same object if they are there."""
        return send_to_device(inputs, self.engine.device) if self._has_strays(inputs) else inputs

    def _has_strays(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return value.device != self.engine.device
        if isinstance(value, (tuple, list)):
            return any(map(self._has_strays, value))
        if isinstance(value, Mapping):
            return any(map(self._has_strays, value.values()))
        return False

    # ---- what the engine calls

    def go_to_device(self) -> None:
        """Carry out an Onload."""
        self.store.onload()
        self.hang_bells(self.doors)

    def go_home(self) -> int:
        """Carry out an Offload; returns how many bytes were copied."""
        copied = self.store.offload()
        self.at_home()
        return copied

    def at_home(self) -> None:
        """Bells everywhere inside."""
        self.hang_bells([m for root in self.modules for m in root.modules()])


class OffloadHook(CpuOffload):  # type: ignore[misc]
    """Brings its module to the device when it runs.

    A `CpuOffload`, because that is what diffusers looks for when it loads adapters or resets a
    pipeline; nothing of that class's own is used. A decorated method (`vae.decode`) comes through
    `pre_forward` without its arguments: from then on its children bring their inputs along.

    An autoencoder whose encoder and decoder are used at different times has two parts: each goes to
    the device when it is used, not both.
    """

    def __init__(self, engine: Engine, module: nn.Module, name: str, *, in_sequence: bool) -> None:
        super().__init__(execution_device=engine.device)
        self.engine = engine
        self.module = module
        halves = _halves(module)
        if halves is None:
            self.parts = [Part(engine, [module], name, in_sequence=in_sequence)]
        else:
            self.parts = [
                Part(engine, modules, f"{name}.{half}", in_sequence=in_sequence)
                for half, modules in halves.items()
            ]
            for part in self.parts:
                part.doors = part.modules

    # ---- what accelerate, diffusers and transformers call

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Send the module home: `UserCpuOffloadHook.offload()` comes here."""
        self.send_home()
        for part in self.parts:
            part.store.lay_out()
            part.at_home()
        if len(self.parts) == 1:
            # Its own forward comes through pre_forward.
            self.parts[0].hang_bells([m for m in module.modules() if m is not module])
        return module

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Have the weights and the inputs on the device."""
        part = self.parts[0]
        if len(self.parts) > 1:  # their bells will ring
            return part.bring(args), part.bring(kwargs)
        if not args and not kwargs:
            part.doors = list(module.children())
            self.engine.need(part.key, enters=False)
            return args, kwargs
        self.engine.need(part.key, enters=True)
        return part.bring(args), part.bring(kwargs)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """Say that the forward has returned."""
        self.engine.left(self.parts[0].key)
        return output

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Leave the module as it was, at home."""
        for part in self.parts:
            self.engine.leave(part.key)
            part.take_down_bells()
            part.store.unsettle()
        return module

    def send_home(self) -> None:
        """Every part goes home."""
        for part in self.parts:
            self.engine.send_home(part.key)


def _halves(module: nn.Module) -> dict[str, list[nn.Module]] | None:
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
        {held.tensor.untyped_storage().data_ptr() for root in side for held in walk(root)}
        for side in (encodes, decodes)
    ]
    if storages[0] & storages[1]:
        return None
    return {"encoder": encodes, "decoder": decodes}
