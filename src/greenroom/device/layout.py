"""Where a component's tensors lie in host memory, and how they are grouped to travel.

A *piece* is a run of bytes that tensors span: tied weights and views of one another are one piece.
A *segment* is a group of pieces that is copied, page-locked and checked as one.
"""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch

ALIGNMENT = 256  # bytes; kernels choose by it, and CUDA promises no more
SEGMENT_BYTES = 64 * 2**20
ALONE_BYTES = 8 * 2**20  # from here on a copy of its own costs a link nothing (10 us against 300)
_BLOCK = 512  # bytes; allocators hand out multiples, so that a segment takes what it says


class Origin:
    """The storage that pieces were found in, before they were given a slab."""


@dataclass(eq=False)
class Piece:
    """A run of bytes of a host storage that tensors span, and its place in a segment."""

    host: torch.Tensor  # uint8, the master's bytes
    origin: Origin
    start: int  # in the storage of its origin
    nbytes: int
    lead: int  # bytes to leave before it, so that everything in it is aligned
    rank: int  # by the first tensor in it
    offset: int = 0

    @property
    def is_alone(self) -> bool:
        """Whether it is large and has its storage for itself: it can be page-locked in place."""
        return (
            self.nbytes >= ALONE_BYTES
            and self.nbytes % 8 == 0
            and self.host.untyped_storage().nbytes() == self.nbytes
        )


@dataclass(eq=False)
class Segment:
    """Pieces that travel together. Once settled, its host memory is one slab.

    A large piece is a segment by itself, and its memory is the slab if it can be page-locked there.
    """

    pieces: list[Piece]
    nbytes: int
    slab: torch.Tensor | None = None
    is_in_place: bool = False  # the slab is where its piece was found
    unpin: weakref.finalize[..., Segment] | None = None  # page-locked until this is called
    device: torch.Tensor | None = None
    digest: torch.Tensor | None = None  # of the device's bytes, as they arrived
    digest_is_of: object = None  # what `WeightStore.send` was told when it was taken

    @property
    def may_stay(self) -> bool:
        """Whether it can be page-locked where it lies."""
        return len(self.pieces) == 1 and self.pieces[0].is_alone

    @property
    def watched(self) -> torch.Tensor:
        """The bytes on the device that a digest is taken of: those that were copied there.

        Of memory that is no slab yet, also what lies between the pieces, which is never written.
        """
        assert self.device is not None
        return self.device if self.slab is None else self.device[: self.slab.nbytes]


@dataclass(frozen=True, eq=False)
class Home:
    """Where a tensor's master lies."""

    tensor: torch.Tensor
    master: torch.Tensor
    segment: Segment
    piece: Piece


@dataclass(eq=False)
class Layout:
    """The masters of all tensors of a component, and the segments they lie in."""

    segments: list[Segment]
    homes: dict[int, Home]  # by id of the tensor

    @classmethod
    def of(cls, tensors: list[torch.Tensor]) -> Layout:
        """The layout of these tensors where they lie now."""
        pieces = _pieces(tensors)
        segments = _segments(pieces)
        segment_of = {id(piece): segment for segment in segments for piece in segment.pieces}
        begins = [piece.host.data_ptr() for piece in pieces]
        homes = {}
        for tensor in tensors:
            piece = pieces[bisect.bisect_right(begins, tensor.data_ptr()) - 1]
            homes[id(tensor)] = Home(tensor, tensor.data, segment_of[id(piece)], piece)
        return cls(segments, homes)

    def renewed(self, tensors: list[torch.Tensor]) -> Layout:
        """The layout of these tensors; segments of this one whose tensors are in place stay."""
        now = {id(tensor): tensor for tensor in tensors}
        stays = {id(segment): segment for segment in self.segments}
        for key, home in self.homes.items():
            tensor = now.get(key)
            if (
                tensor is None
                or tensor is not home.tensor
                or not is_same_place(tensor, home.master)
            ):
                stays.pop(id(home.segment), None)
        homes = {key: home for key, home in self.homes.items() if id(home.segment) in stays}
        added = []
        for tensor in (t for t in tensors if id(t) not in homes):
            begin, end = tensor.data_ptr(), tensor.data_ptr() + extent_of(tensor)
            shares = [
                (segment, piece)
                for segment in stays.values()
                for piece in segment.pieces
                if piece.host.data_ptr() < end and begin < piece.host.data_ptr() + piece.nbytes
            ]
            if not shares:
                added.append(tensor)
                continue
            segment, piece = shares[0]
            start = piece.host.data_ptr()
            if begin < start or end > start + piece.nbytes:  # it outgrows what is there
                return Layout.of(tensors)
            homes[id(tensor)] = Home(tensor, tensor.data, segment, piece)
        fresh = Layout.of(added)
        for key, home in fresh.homes.items():
            before = self.homes.get(key)
            if before is not None and before.piece.host.data_ptr() == home.piece.host.data_ptr():
                home.piece.origin, home.piece.start = before.piece.origin, before.piece.start
        return Layout([*stays.values(), *fresh.segments], {**homes, **fresh.homes})

    def fits(self, tensors: list[torch.Tensor]) -> bool:
        """Whether these tensors are the ones laid out here, each using its master."""
        return self._is_of(tensors, is_same_place)

    def is_of(self, tensors: list[torch.Tensor]) -> bool:
        """Whether these tensors are the ones laid out here, of the same kind, wherever they lie."""
        return self._is_of(tensors, is_same_kind)

    def _is_of(
        self, tensors: list[torch.Tensor], is_same: Callable[[torch.Tensor, torch.Tensor], bool]
    ) -> bool:
        return len(tensors) == len(self.homes) and all(
            (home := self.homes.get(id(tensor))) is not None
            and home.tensor is tensor
            and is_same(tensor, home.master)
            for tensor in tensors
        )

    def has_in_other_dtypes(self, tensors: list[torch.Tensor]) -> bool:
        """Whether these are the tensors laid out here, some of them in another dtype."""
        pairs = [(t, self.homes.get(id(t))) for t in tensors]
        return (
            len(tensors) == len(self.homes)
            and all(home is not None and home.master.shape == t.shape for t, home in pairs)
            and any(home is not None and home.master.dtype != t.dtype for t, home in pairs)
        )

    def move(self, targets: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Let pieces (by id) be other bytes, which hold the same values already.

        Tensors that use their masters use the new ones from then on.

        Returns:
            The new masters, by id of the tensor.
        """
        moved = {}
        for key, home in self.homes.items():
            target = targets.get(id(home.piece))
            if target is None:
                continue
            start = home.master.data_ptr() - home.piece.host.data_ptr()
            moved[key] = view_of(target, start, home.master)
            tensor = home.tensor
            if is_same_place(tensor, home.master):
                tensor.data = moved[key]
            self.homes[key] = Home(home.tensor, moved[key], home.segment, home.piece)
        for segment in self.segments:
            for piece in segment.pieces:
                piece.host = targets.get(id(piece), piece.host)
        return moved


# ---- places and views
# -------------------------------------------------------------------------------


def extent_of(tensor: torch.Tensor) -> int:
    """How many bytes of its storage a tensor spans, gaps between its elements included."""
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (int(last) + 1) * tensor.element_size()


def view_of(slab: torch.Tensor, start: int, like: torch.Tensor) -> torch.Tensor:
    """`like`'s shape, strides and dtype over the bytes of `slab` from `start` on."""
    flat = slab[start : start + extent_of(like)].view(like.dtype)
    if like.is_inference():  # a tensor made in inference mode takes the place of no other kind
        with torch.inference_mode():
            return torch.empty(0, dtype=like.dtype, device=slab.device).set_(
                flat.untyped_storage(), flat.storage_offset(), like.shape, like.stride()
            )
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset())


class Views:
    """Views of what lies in segments on the device, as tensors' masters lie at home."""

    def __init__(self) -> None:
        self._flat: dict[tuple[int, torch.dtype], torch.Tensor] = {}

    def of(self, home: Home) -> torch.Tensor:
        """A master's place there."""
        segment, master = home.segment, home.master
        assert segment.device is not None
        start = home.piece.offset + master.data_ptr() - home.piece.host.data_ptr()
        elements, rest = divmod(start, master.element_size())
        if rest or master.is_inference():
            return view_of(segment.device, start, master)
        key = id(segment), master.dtype
        flat = self._flat.get(key)
        if flat is None:
            flat = self._flat[key] = segment.device.view(master.dtype)
        return flat.as_strided(master.shape, master.stride(), elements)


def is_still_at(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """As `is_same_place` of two that were, if nobody has changed one but by a cast."""
    return tensor.data_ptr() == other.data_ptr() and tensor.dtype == other.dtype


def is_same_kind(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the bytes of both mean the same values."""
    return (tensor.dtype, tensor.shape, tensor.stride()) == (
        other.dtype,
        other.shape,
        other.stride(),
    )


def is_same_place(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether both are the same values in the same memory."""
    return (
        tensor.device == other.device
        and tensor.data_ptr() == other.data_ptr()
        and is_same_kind(tensor, other)
    )


def _pieces(tensors: list[torch.Tensor]) -> list[Piece]:
    """The runs of bytes that tensors span; those that overlap (ties, views) become one."""
    spans = sorted((t.data_ptr(), t.data_ptr() + extent_of(t), i) for i, t in enumerate(tensors))
    pieces: list[Piece] = []
    origins: dict[int, Origin] = {}
    i = 0
    while i < len(spans):
        begin, end, which = spans[i]
        rank = which
        # What else is in it may begin at an address that the first one's dtype would not.
        is_odd = False
        while i + 1 < len(spans) and spans[i + 1][0] < end:
            i += 1
            end = max(end, spans[i][1])
            rank = min(rank, spans[i][2])
            is_odd |= (spans[i][0] - begin) % tensors[spans[i][2]].element_size() != 0
        storage = tensors[which].data.untyped_storage()
        start = begin - storage.data_ptr()
        host = torch.empty(0, dtype=torch.uint8).set_(storage, start, (end - begin,), (1,))
        origin = origins.setdefault(storage.data_ptr(), Origin())
        pieces.append(Piece(host, origin, start, end - begin, begin % 16 if is_odd else 0, rank))
        i += 1
    return pieces


def _segments(pieces: list[Piece]) -> list[Segment]:
    """Large pieces by themselves, others in segments of about SEGMENT_BYTES, in the walk's order.

    The order of the walk is the same in every process; that of addresses is not.
    """
    groups: list[tuple[list[Piece], int]] = []
    open_group: int | None = None
    for piece in sorted(pieces, key=lambda piece: piece.rank):
        room = -(-(piece.lead + piece.nbytes) // ALIGNMENT) * ALIGNMENT
        piece.offset = piece.lead
        if piece.is_alone:
            groups.append(([piece], room))
            continue
        if open_group is None or groups[open_group][1] + room > SEGMENT_BYTES:
            open_group = len(groups)
            groups.append(([], 0))
        members, used = groups[open_group]
        piece.offset += used
        members.append(piece)
        groups[open_group] = (members, used + room)
    return [Segment(members, -(-used // _BLOCK) * _BLOCK) for members, used in groups]
