"""Tensors that are not strided memory: moved as objects, while what lies inside moves as bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import WeightsError
from .digest import differing, digest_of
from .walk import Held, is_shell


@contextlib.contextmanager
def as_memory() -> Iterator[None]:
    """Tensors are memory in this block, whatever their class or the caller's modes make of them.

    No gradients, no inference mode; no class's own idea of what `.data` or a copy is; and what is
    allocated lies where it is asked to, also within the caller's ``with torch.device("cuda")``.
    """
    with torch.inference_mode(False), torch.no_grad(), torch._C.DisableTorchFunction():
        yield


class Opaque:
    """A tensor that is no strided memory, on its way to the device and back.

    The object stays the same one all the way: optimisers, adapters and compiled code that refer to
    it keep what they have. Making an `Opaque` copies what has to be copied and changes nothing;
    `enter` puts the tensor on the device; `leave` puts it back, and copies values home only if they
    changed.

    - A shell around tensors that the walk yields as well (torchao, quanto): those are moved as
      bytes. All that is left is which device the shell says it is on.
    - The rest (no elements, sparse and quantised layouts, conjugate views): copied by torch;
      changes are seen in the parts they consist of.

    Raises:
        WeightsError: the device cannot take it.
        torch.OutOfMemoryError: there is no room.
    """

    def __init__(self, held: Held, device: torch.device) -> None:
        self.tensor = held.tensor
        self._digests: list[torch.Tensor] = []
        if is_shell(self.tensor):
            self._home = _shell(self.tensor, torch.device("cpu"))
            self._away = _shell(self.tensor, device)
            return
        self._home = self.tensor.data
        try:
            self._away = self._home.to(device)
            self._digests = _digests(self._away)
        except (NotImplementedError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise WeightsError(
                f"{held.path} is a {self.tensor.layout} tensor of {self.tensor.dtype}, which "
                f"{device} cannot take. Make it dense, or leave its component out of offloading"
            ) from error

    def enter(self) -> None:
        """Let the tensor be on the device."""
        _become(self.tensor, self._away)

    def leave(self) -> int:
        """Let the tensor be at home, with the values it has now.

        Returns:
            How many bytes were copied home.
        """
        if self.tensor.device.type == "cpu":
            return 0  # somebody brought it home
        has_changed = not is_shell(self.tensor) and any(self._changes())
        if has_changed:
            self._home = self.tensor.data.to("cpu")
        _become(self.tensor, self._home)
        return self.tensor.nbytes if has_changed else 0

    def _changes(self) -> list[bool]:
        now = _digests(self.tensor.data)
        if len(now) != len(self._digests) or self.tensor.shape != self._home.shape:
            return [True]
        return differing(self._digests, now)


def _shell(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What a shell looks like from outside when it is on that device. It has no memory."""
    return torch.Tensor._make_wrapper_subclass(
        _Outline,
        tensor.shape,
        strides=tensor.stride(),
        storage_offset=tensor.storage_offset(),
        dtype=tensor.dtype,
        layout=tensor.layout,
        device=device,
    )


class _Outline(torch.Tensor):
    """Nothing but a shape, a dtype and a device, for a shell to take over."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's is no class method for mypy
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} on an outline: it has no values")


def _become(tensor: torch.Tensor, other: torch.Tensor) -> None:
    # Setting .data asks first, by an operator, whether the two are of a kind. A shell would send it
    # to its own class, which does not know it.
    with torch._C._DisableTorchDispatch():
        tensor.data = other


def _digests(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Digests of the parts that a tensor of an unusual layout consists of."""
    if tensor.layout == torch.sparse_coo:
        parts = [tensor._indices(), tensor._values()]
    elif tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    elif tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        parts = [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    elif tensor.is_quantized:
        parts = [tensor.int_repr()]
    elif tensor.layout == torch.strided:
        parts = [tensor.resolve_conj().resolve_neg()]
    else:
        parts = [tensor.to_dense()]
    return [digest_of(_words(part)) for part in parts if part.numel() > 0]


def _words(part: torch.Tensor) -> torch.Tensor:
    flat = part.contiguous().view(-1).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
