"""Modules at full size whose weights cost no memory.

How it works. Inside the block a dispatch mode sees every operator that reaches a kernel:

- A *factory* (``empty``, ``zeros``, ``randn``, ``ones_like`` ...) of a large CPU tensor returns an
  anonymous private mapping. The operating system hands out a page of it when somebody writes there.
- A *write in place* (``normal_``, ``fill_``, ``copy_``, ``mul_`` ...) to such a tensor is not done.
  It goes on the tensor's list of promises.
- A *read* (any operator that computes from the tensor's values) first keeps the promises, in order.
  So a rotary table that starts from ``torch.ones`` comes out right, and only weights, whose values
  nobody asks for while a module is being built, stay untouched.
- A buffer's promises are kept when a module registers it: buffers are part of what code computes.
- ``torch.nn.init`` is wrapped as well, because some of its functions read what they have drawn:
  ``trunc_normal_`` rejects outliers, ``orthogonal_`` factorises.

Promises still open when the block ends are dropped. Nobody wrote to the memory, so it reads as
zeros.
"""

from __future__ import annotations

import functools
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.modules.module import register_module_buffer_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

__all__ = ["empty_weights"]

#: Tensors of at most this many bytes are allocated and written as always.
WRITTEN_UP_TO_NBYTES = 64 * 1024

_aten = torch.ops.aten

# What each factory promises about the values: nothing (a fresh mapping is all zeros, which suits
# `zeros` as well as `empty`), or whatever the factory itself would have computed.
_BLANK_FACTORIES = frozenset(
    {
        _aten.empty,
        _aten.empty_like,
        _aten.empty_strided,
        _aten.new_empty,
        _aten.new_empty_strided,
        _aten.new_zeros,
        _aten.zeros,
        _aten.zeros_like,
    }
)
_FILLED_FACTORIES = frozenset(
    {
        _aten.eye,
        _aten.full,
        _aten.full_like,
        _aten.new_full,
        _aten.new_ones,
        _aten.ones,
        _aten.ones_like,
        _aten.rand,
        _aten.rand_like,
        _aten.randn,
        _aten.randn_like,
    }
)


@contextmanager
def empty_weights(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Build modules whose large weights are never written: address space, but no memory.

        with empty_weights(torch.float16):
            unet = UNet2DConditionModel(**config)  # 5.1 GB of parameters, a few MB resident

    Inside the block the default dtype is ``dtype`` (None: unchanged), as ``from_pretrained`` does
    it. CPU tensors above 64 KiB made by torch's factories are backed by untouched anonymous memory
    and read as zeros; whatever would initialise them (``torch.nn.init``, ``reset_parameters``, the
    ``_init_weights`` of transformers and diffusers) is skipped, and so is a change of dtype. Small
    tensors and all registered buffers get their real values, and ties stay ties.

    Two limits. ``.numpy()`` of a tensor nobody has read sees zeros, because no operator runs. The
    default dtype and ``torch.nn.init`` belong to the process: build in one thread at a time.

    The storages cannot be resized, like those of weights that safetensors maps from a file.
    """
    before = torch.get_default_dtype()
    promises = _Promises()
    registration = register_module_buffer_registration_hook(promises.on_buffer)
    try:
        if dtype is not None:
            torch.set_default_dtype(dtype)
        with _promised_initialisers(promises), promises:
            yield
    finally:
        torch.set_default_dtype(before)
        registration.remove()


class _Promises(TorchDispatchMode):
    """The dispatch mode: which storages are untouched, and what is owed to each, oldest first."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Keyed by the storage's address in C++. `_alive` keeps every such storage until the block
        # ends, so that no address can come to mean another storage.
        self._owed: dict[int, list[Callable[[], object]]] = {}
        self._alive: list[torch.Tensor] = []
        # Who is owed something that will be computed from this storage's present values.
        self._readers: dict[int, list[torch.Tensor]] = {}
        # While promises are kept, every operator does its work.
        self._is_keeping = False

    def promise(self, tensor: torch.Tensor, write: Callable[[], object]) -> bool:
        """Owe ``write`` to the tensor, if it is untouched. False: it is not, so write now."""
        if self._is_keeping:
            return False
        self._serve_readers(tensor)
        owed = self._owed.get(_key(tensor))
        if owed is None:
            return False
        owed.append(write)
        return True

    def on_buffer(self, module: torch.nn.Module, name: str, buffer: torch.Tensor | None) -> None:
        """A module registers a buffer: its values are wanted, these and all later ones."""
        if buffer is not None:
            self._keep(buffer)
            self._owed.pop(_key(buffer), None)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if self._is_keeping:
            return self._run(func, args, kwargs)
        packet = func.overloadpacket
        if func._schema.is_mutable:
            if torch.Tag.inplace_view in func.tags:
                return func(*args, **kwargs)
            written = _written_arguments(func, args, kwargs)
            for leaf in tree_iter(written):
                if isinstance(leaf, torch.Tensor):
                    self._serve_readers(leaf)
            single = len(written) == 1 and isinstance(written[0], torch.Tensor)
            if single and self._write_later(func, written[0], args, kwargs):
                return written[0]
            return self._run(func, args, kwargs)
        if packet in _BLANK_FACTORIES or packet in _FILLED_FACTORIES:
            return self._make(func, args, kwargs)
        if packet is _aten._to_copy or packet is _aten.clone:
            return self._copy(func, args, kwargs)
        if func.is_view:
            return func(*args, **kwargs)
        return self._run(func, args, kwargs)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # The default imports the whole of torch._dynamo at the first operator, about 70 MB.
        return False

    def _make(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        like = args[0] if args and isinstance(args[0], torch.Tensor) else None
        device = kwargs.get("device") or (like.device if like is not None else "cpu")
        if torch.device(device).type != "cpu" or kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        # Shape, strides and dtype are whatever the factory itself makes of its arguments. A meta
        # tensor takes neither a CPU generator nor pinning.
        shaped = {k: v for k, v in kwargs.items() if k not in ("generator", "pin_memory")}
        if kwargs.get("generator") is not None:
            blueprint = _aten.empty.memory_format(*args, **{**shaped, "device": "meta"})
        else:
            blueprint = func(*args, **{**shaped, "device": "meta"})
        if not _is_large(blueprint):
            return func(*args, **kwargs)
        made = self._untouched(blueprint)
        if func.overloadpacket in _FILLED_FACTORIES:
            self.promise(made, lambda: made.copy_(func(*args, **kwargs)))
        return made

    def _copy(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        source: torch.Tensor = args[0]
        device = torch.device(kwargs.get("device") or source.device)
        # Copies of untouched tensors are promised too: this is how `module.to(dtype)` stays free.
        owed = self._owed.get(_key(source))
        on_cpu = device.type == "cpu" and not kwargs.get("pin_memory")
        if owed is None or not _is_large(source) or not on_cpu:
            return self._run(func, args, kwargs)
        made = self._untouched(
            torch.empty_like(
                source,
                dtype=kwargs.get("dtype") or source.dtype,
                device="meta",
                memory_format=kwargs.get("memory_format") or torch.preserve_format,
            )
        )
        if owed:
            self._write_later(_aten.copy_.default, made, (made, source), {})
        return made

    def _write_later(
        self, func: Any, target: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        if _key(target) not in self._owed:
            return False

        def is_source(leaf: Any) -> bool:
            return isinstance(leaf, torch.Tensor) and _key(leaf) != _key(target)

        def freeze(leaf: Any) -> Any:
            if not is_source(leaf) or _is_large(leaf):
                return leaf
            self._keep(leaf)
            return leaf.clone()

        # The values written must be those that the sources have now: small ones are copied, large
        # untouched ones serve this reader before they change. Other sources cost memory already,
        # so the target may as well.
        sources = [leaf for leaf in tree_iter((args, kwargs)) if is_source(leaf)]
        if any(_is_large(source) and _key(source) not in self._owed for source in sources):
            return False
        args, kwargs = tree_map(freeze, (args, kwargs))
        if not self.promise(target, lambda: self._run(func, args, kwargs)):
            return False
        for source in filter(_is_large, sources):
            self._readers.setdefault(_key(source), []).append(target)
        return True

    def _untouched(self, blueprint: torch.Tensor) -> torch.Tensor:
        made = _map_anonymous(blueprint)
        self._owed[_key(made)] = []
        self._alive.append(made)
        return made

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for leaf in tree_iter((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                self._keep(leaf)
        return func(*args, **kwargs)

    def _serve_readers(self, tensor: torch.Tensor) -> None:
        """The tensor is about to change: who was promised its present values comes first."""
        for reader in self._readers.pop(_key(tensor), ()):
            self._keep(reader)

    def _keep(self, tensor: torch.Tensor) -> None:
        if not self._owed.get(_key(tensor)):
            return
        # Off the table first: the writes below are real ones, and so are all that follow.
        owed = self._owed.pop(_key(tensor))
        was_keeping, self._is_keeping = self._is_keeping, True
        try:
            with torch.no_grad():
                for write in owed:
                    write()
        finally:
            self._is_keeping = was_keeping


@contextmanager
def _promised_initialisers(promises: _Promises) -> Iterator[None]:
    """Let every function of ``torch.nn.init`` promise its work to an untouched tensor."""

    def wrap(initialise: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(initialise)
        def promised(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and promises.promise(
                tensor, lambda: initialise(*args, **kwargs)
            ):
                return tensor
            return initialise(*args, **kwargs)

        return promised

    tables: list[dict[str, Any]] = [vars(torch.nn.init)]
    # transformers holds references of its own, taken when it is imported.
    if "transformers.initialization" in sys.modules:
        held = sys.modules["transformers.initialization"]
        tables.append(getattr(held, "TORCH_INIT_FUNCTIONS", {}))
    # `_no_grad_trunc_normal_` and its like are looked up at call time, so wrapping them too catches
    # modules that imported an initialiser by name.
    originals = [
        {name: f for name, f in table.items() if name.endswith("_") and not name.endswith("__")}
        for table in tables
    ]
    try:
        for table, original in zip(tables, originals, strict=True):
            table.update({name: wrap(f) for name, f in original.items()})
        yield
    finally:
        for table, original in zip(tables, originals, strict=True):
            table.update(original)


def _written_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that the operator's schema marks as written, ``out=`` and its like included."""
    return [
        kwargs[argument.name] if argument.name in kwargs else args[position]
        for position, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        if argument.name in kwargs or position < len(args)
    ]


def _key(tensor: torch.Tensor) -> int:
    # A sparse tensor has no storage; it is never ours.
    if tensor.layout is not torch.strided:
        return 0
    return int(tensor.untyped_storage()._cdata)


def _is_large(tensor: torch.Tensor) -> bool:
    nbytes = tensor.numel() * tensor.element_size()
    return tensor.layout is torch.strided and nbytes > WRITTEN_UP_TO_NBYTES


def _map_anonymous(blueprint: torch.Tensor) -> torch.Tensor:
    """A tensor like the blueprint in a mapping of its own, no page of which is touched.

    Not ``torch.empty``: malloc writes a header in front of each block, which costs 2 MiB a tensor
    where transparent huge pages are set to "always", and below its mapping threshold it hands out
    used memory with old values in it.
    """
    last = sum(
        (n - 1) * stride for n, stride in zip(blueprint.shape, blueprint.stride(), strict=True)
    )
    nbytes = (last + 1) * blueprint.element_size()
    if hasattr(mmap, "MAP_PRIVATE"):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        memory = mmap.mmap(-1, nbytes, flags=flags)
    else:  # Windows: backed by the page file, committed but not resident
        memory = mmap.mmap(-1, nbytes)
    # The storage holds the mapping, which goes with the last tensor that looks at it.
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    empty = torch.empty(0, dtype=blueprint.dtype)
    return empty.set_(storage, 0, blueprint.shape, blueprint.stride())
