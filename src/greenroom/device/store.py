"""A component's weights: masters in host memory, and their copy on the device while it is there.

The host copy is the master. Going to the device copies it; coming home drops the device's copy and
copies nothing, unless something on the device was changed. Changes are found whatever way they were
made:

- another tensor, dtype or shape was put in a parameter's place: seen by address;
- in place (`add_`): seen by the tensor's version;
- through `.data`, which no version counts: seen by sums over the device's copy, taken when it
arrives and
  when it leaves. Sums of rows and of columns of 64-bit words: a change that keeps all of them would
  have to move equal amounts around a rectangle.

Note [Order on the stream]: slabs are allocated, filled, read and freed on the current stream of the
thread that runs the pipeline. So a kernel that runs after onload() finds its weights, and memory
that offload() frees is reused only after the kernels that read it. No wait of the host is needed
for either.
"""

from __future__ import annotations

import bisect
import itertools
import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import WeightsError
from .backend import Backend
from .walk import Held, is_plain, walk

ALIGNMENT = 256  # bytes; kernels choose by it, and CUDA promises no more
SEGMENT_BYTES = 64 * 2**20  # copied, page-locked and checked as one


@dataclass(eq=False)
class Piece:
    """A run of bytes of a host storage that tensors span, and its place in a segment."""

    host: torch.Tensor  # uint8, the master's bytes
    offset: int
    nbytes: int


@dataclass(eq=False)
class Segment:
    """Pieces that travel together. Once settled, its host memory is one page-locked slab."""

    pieces: list[Piece]
    nbytes: int
    slab: torch.Tensor | None = None
    is_pinned: bool = False
    device: torch.Tensor | None = None
    digest: torch.Tensor | None = None  # of the device's bytes, as they arrived


@dataclass(eq=False)
class Resident:
    """A tensor that was moved: its master, and what it looked like on arrival."""

    tensor: torch.Tensor
    master: torch.Tensor
    moved: torch.Tensor
    version: int
    segment: Segment


@dataclass(frozen=True, eq=False)
class Home:
    """Where a tensor's master lies."""

    tensor: weakref.ref[torch.Tensor]
    master: torch.Tensor
    segment: Segment
    piece: Piece


@dataclass(eq=False)
class Layout:
    """The masters of all tensors of a component, and the segments they lie in."""

    segments: list[Segment]
    homes: dict[int, Home]  # by id of the tensor

    def fits(self, tensors: list[torch.Tensor]) -> bool:
        """Whether these tensors are the ones laid out here, each using its master."""
        return len(tensors) == len(self.homes) and all(
            (home := self.homes.get(id(tensor))) is not None
            and home.tensor() is tensor
            and _same_place(tensor, home.master)
            for tensor in tensors
        )


class WeightStore:
    """The tensors of some modules, at home or on one device."""

    def __init__(self, modules: list[nn.Module], name: str, backend: Backend) -> None:
        self.modules = modules
        self.name = name
        self.backend = backend
        self._layout = Layout([], {})
        self._earlier: Layout | None = None  # before the last change of dtype
        self._residents: list[Resident] = []
        self._opaque: list[torch.Tensor] = []

    # ---- layout

    @property
    def segments(self) -> list[Segment]:
        """What travels, in the order it travels."""
        return self._layout.segments

    def lay_out(self) -> list[torch.Tensor]:
        """Bring the layout up to date with what the module holds; return its movable tensors."""
        tensors: dict[int, torch.Tensor] = {}
        for held in self._held():
            tensors.setdefault(id(held.tensor), held.tensor)
            if held.tensor.is_meta:
                raise WeightsError(
                    f"{self.name}: {held.path} is on the meta device: it has a shape, but no "
                    "values. Load the component's weights before it runs."
                )
        self._opaque = [t for t in tensors.values() if not is_plain(t)]
        movable = [
            t for t in tensors.values() if is_plain(t) and t.device.type == "cpu" and t.numel() > 0
        ]
        self._take_in_replaced(movable)
        if not self._layout.fits(movable):
            self._earlier = self._layout if self._was_cast(movable) else None
            self._layout = _new_layout(movable)
        return movable

    def _held(self) -> Iterator[Held]:
        return itertools.chain.from_iterable(map(walk, self.modules))

    def _take_in_replaced(self, tensors: list[torch.Tensor]) -> None:
        """Where a tensor of the same kind was put in a master's place, its values go to that place.

        So a page-locked slab stays in use when a component was cast at home, and back.
        """
        for tensor in tensors:
            home = self._layout.homes.get(id(tensor))
            if home is None or home.segment.slab is None or _same_place(tensor, home.master):
                continue
            if _same_kind(tensor, home.master):
                home.master.copy_(tensor)
                tensor.data = home.master

    def _was_cast(self, tensors: list[torch.Tensor]) -> bool:
        """Whether these are the tensors of the present layout, some of them in another dtype."""
        pairs = [(t, self._layout.homes.get(id(t))) for t in tensors]
        return (
            len(tensors) == len(self._layout.homes)
            and all(home is not None and home.master.shape == t.shape for t, home in pairs)
            and any(home is not None and home.master.dtype != t.dtype for t, home in pairs)
        )

    @property
    def nbytes(self) -> int:
        """Bytes on the device when resident."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def is_settled(self) -> bool:
        """Whether every segment's host memory is a slab of its own, as far as it is to stay."""
        return self._earlier is not None or all(
            segment.slab is not None for segment in self.segments
        )

    # ---- to the device

    def onload(self) -> None:
        """Copy every tensor to the device, on the current stream, for the module to use.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the device refused. Nothing of the component is on
            the
                device then, and the module is as it was.
        """
        with torch.inference_mode(False), torch.no_grad():
            tensors = self.lay_out()
            try:
                for segment in self.segments:
                    self._send(segment)
                moved = [self._on_device(tensor) for tensor in tensors]
            except BaseException:
                for segment in self.segments:
                    segment.device = segment.digest = None
                raise
            for tensor, copy in zip(tensors, moved, strict=True):
                master = tensor.data
                tensor.data = copy
                segment = self._layout.homes[id(tensor)].segment
                self._residents.append(
                    Resident(tensor, master, tensor.data, tensor._version, segment)
                )
            for tensor in self._opaque:
                self._move_opaque(tensor, self.backend.device)

    def _send(self, segment: Segment) -> None:
        slab = torch.empty(segment.nbytes, dtype=torch.uint8, device=self.backend.device)
        if segment.slab is not None:
            slab.copy_(segment.slab, non_blocking=segment.is_pinned)
        else:
            for piece in segment.pieces:
                slab[piece.offset : piece.offset + piece.nbytes].copy_(piece.host)
        segment.device = slab
        segment.digest = _digest(slab)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        home = self._layout.homes[id(tensor)]
        assert home.segment.device is not None
        start = home.piece.offset + tensor.data_ptr() - home.piece.host.data_ptr()
        return _view(home.segment.device, start, tensor)

    # ---- home

    def offload(self) -> None:
        """Let the module use the masters again; what changed on the device comes home first."""
        with torch.inference_mode(False), torch.no_grad():
            residents = {id(resident.tensor): resident for resident in self._residents}
            changed = self._changed_segments()
            for segment in changed:
                self._bring_home(segment)
            seen: set[int] = set()
            for held in self._held():
                tensor = held.tensor
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                resident = residents.get(id(tensor))
                if resident is not None and _same_place(tensor, resident.moved):
                    tensor.data = resident.master
                elif is_plain(tensor) and tensor.device.type != "cpu":
                    self._adopt(tensor, resident)
            for resident in self._residents:
                # Tensors that the module no longer holds, but somebody else may: they are ours to
                # bring home.
                if id(resident.tensor) not in seen and _same_place(resident.tensor, resident.moved):
                    resident.tensor.data = resident.master
            for tensor in self._opaque:
                self._move_opaque(tensor, torch.device("cpu"))
            self._residents.clear()
            for segment in self.segments:
                segment.device = segment.digest = None
            self._go_back_to_earlier()
            self.lay_out()

    def _go_back_to_earlier(self) -> None:
        """A component that was cast for its work, and back, is laid out as before it."""
        earlier, self._earlier = self._earlier, None
        if earlier is not None:
            tensors = [t for home in earlier.homes.values() if (t := home.tensor()) is not None]
            if earlier.fits(tensors):
                self._layout = earlier

    def _move_opaque(self, tensor: torch.Tensor, device: torch.device) -> None:
        """Move a tensor that only its library knows how to move; the object stays the same."""
        for held in self._held():
            if held.tensor is tensor and tensor.device.type != device.type:
                _replace(held, device)
                return

    def _changed_segments(self) -> list[Segment]:
        versions = {
            id(r.segment)
            for r in self._residents
            if r.tensor._version != r.version and _same_place(r.tensor, r.moved)
        }
        return [
            segment
            for segment in self.segments
            if segment.device is not None
            and (
                id(segment) in versions or not _same_digest(segment.digest, _digest(segment.device))
            )
        ]

    def _bring_home(self, segment: Segment) -> None:
        assert segment.device is not None
        for piece in segment.pieces:
            piece.host.copy_(segment.device[piece.offset : piece.offset + piece.nbytes])

    def _adopt(self, tensor: torch.Tensor, resident: Resident | None) -> None:
        """A tensor that was put on the device by somebody else: its values become the master's."""
        earlier = self._earlier.homes.get(id(tensor)) if self._earlier is not None else None
        if earlier is not None and _same_values(tensor, earlier.master):
            tensor.data = earlier.master  # cast there and back: what is at home already
            return
        master = resident.master if resident is not None else None
        if master is not None and (master.dtype, master.shape) == (tensor.dtype, tensor.shape):
            master.copy_(tensor.data)
            tensor.data = master
        else:
            tensor.data = tensor.data.to("cpu")

    # ---- host memory

    def settle_one(self) -> bool:
        """Give one more segment a page-locked slab of host memory; False if none is left.

        The tensors' old host memory is let go, piece by piece, so that host memory does not grow by
        more than a segment.
        """
        segment = next((s for s in self.segments if s.slab is None), None)
        if segment is None:
            return False
        with torch.inference_mode(False), torch.no_grad():
            slab = torch.empty(segment.nbytes, dtype=torch.uint8)
            residents = {id(r.tensor): r for r in self._residents}
            for piece in segment.pieces:
                target = slab[piece.offset : piece.offset + piece.nbytes]
                target.copy_(piece.host)
                before = piece.host.data_ptr()
                for key, home in self._layout.homes.items():
                    tensor = home.tensor()
                    if home.piece is not piece or tensor is None:
                        continue
                    moved = _view(slab, piece.offset + home.master.data_ptr() - before, home.master)
                    if key in residents:
                        residents[key].master = moved
                    elif _same_place(tensor, home.master):
                        tensor.data = moved
                    self._layout.homes[key] = Home(home.tensor, moved, segment, piece)
                piece.host = target
            segment.slab = slab
            segment.is_pinned = self.backend.pin(slab)
            if segment.is_pinned:
                weakref.finalize(segment, self.backend.unpin, slab).atexit = False
        return True


# ---- pieces and views
# -------------------------------------------------------------------------------


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Where in its storage a tensor begins, and how many bytes it spans."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    item = tensor.element_size()
    return int(tensor.storage_offset()) * item, (int(last) + 1) * item


def _view(slab: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """`like`'s shape, strides and dtype over the bytes of `slab` from `start` on."""
    _, nbytes = _extent(like)
    flat = slab[start : start + nbytes].view(like.dtype)
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset())


def _pieces(tensors: list[torch.Tensor]) -> list[Piece]:
    """The runs of bytes that tensors span; those that overlap (ties, views) become one."""
    spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t)[1], i) for i, t in enumerate(tensors))
    pieces: list[Piece] = []
    i = 0
    while i < len(spans):
        begin, end, which = spans[i]
        members = [which]
        while i + 1 < len(spans) and spans[i + 1][0] < end:
            i += 1
            end = max(end, spans[i][1])
            members.append(spans[i][2])
        storage = tensors[members[0]].data.untyped_storage()
        start = begin - storage.data_ptr()
        host = torch.empty(0, dtype=torch.uint8).set_(storage, start, (end - begin,), (1,))
        pieces.append(Piece(host, 0, end - begin))
        i += 1
    return pieces


def _new_layout(tensors: list[torch.Tensor]) -> Layout:
    pieces = _pieces(tensors)
    segments = _segments(pieces)
    segment_of = {id(piece): segment for segment in segments for piece in segment.pieces}
    begins = [piece.host.data_ptr() for piece in pieces]
    homes = {}
    for tensor in tensors:
        piece = pieces[bisect.bisect_right(begins, tensor.data_ptr()) - 1]
        homes[id(tensor)] = Home(weakref.ref(tensor), tensor.data, segment_of[id(piece)], piece)
    return Layout(segments, homes)


def _segments(pieces: list[Piece]) -> list[Segment]:
    """Group pieces, in address order, into segments of about SEGMENT_BYTES."""
    groups: list[tuple[list[Piece], int]] = []
    for piece in pieces:
        room = -(-piece.nbytes // ALIGNMENT) * ALIGNMENT
        if not groups or groups[-1][1] + room > SEGMENT_BYTES:
            groups.append(([], 0))
        members, used = groups[-1]
        piece.offset = used
        groups[-1] = ([*members, piece], used + room)
    return [Segment(members, used) for members, used in groups]


def _digest(slab: torch.Tensor) -> torch.Tensor:
    """A number that tells whether the slab's bytes have changed: a scalar on the slab's device.

    The sums of the rows and of the columns of its 64-bit words, each weighted by its place, modulo
    2**64.
    """
    words = slab.view(torch.int64)
    # Rows about as long as there are rows; a segment is a whole number of 32 words.
    width = math.gcd(2 ** (words.numel().bit_length() // 2), words.numel())
    table = words.view(-1, width)
    digest = torch.zeros((), dtype=torch.int64, device=slab.device)
    for sums, factor in ((table.sum(0), 0x9E3779B97F4A7C1), (table.sum(1), 0x2545F4914F6CDD1)):
        weights = torch.arange(1, 2 * sums.numel(), 2, dtype=torch.int64, device=slab.device)
        digest += (sums * (weights * factor)).sum()
    return digest


def _same_values(tensor: torch.Tensor, master: torch.Tensor) -> bool:
    """Whether a tensor on the device equals one at home, told by their digests."""
    if (tensor.dtype, tensor.shape, tensor.stride()) != (
        master.dtype,
        master.shape,
        master.stride(),
    ):
        return False
    here, there = (_digest(_bytes(t.data)).item() for t in (tensor, master))
    return bool(here == there)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes, filled up with zeros to whole words."""
    _, nbytes = _extent(tensor)
    flat = tensor.as_strided((nbytes // tensor.element_size(),), (1,)).view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -nbytes % 256)) if nbytes % 256 else flat


def _same_digest(before: torch.Tensor | None, now: torch.Tensor) -> bool:
    return before is not None and bool(torch.equal(before, now))


def _same_kind(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return (tensor.dtype, tensor.shape, tensor.stride()) == (
        other.dtype,
        other.shape,
        other.stride(),
    )


def _same_place(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        tensor.device == other.device
        and tensor.data_ptr() == other.data_ptr()
        and tensor.dtype == other.dtype
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
    )


def _replace(held: Held, device: torch.device) -> None:
    moved = held.tensor.to(device)
    if isinstance(held.tensor, nn.Parameter) and not isinstance(moved, nn.Parameter):
        moved = nn.Parameter(moved, requires_grad=held.tensor.requires_grad)
    torch.utils.swap_tensors(held.tensor, moved)
