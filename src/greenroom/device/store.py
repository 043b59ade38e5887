"""A component's weights: masters in host memory, and their copy on the device while it is there.

The host copy is the master. Going to the device copies it; coming home drops the device's copy and
copies nothing, unless something on the device was changed. Changes are found whatever way they were
made:

- another tensor, dtype or shape was put in a parameter's place: seen by address;
- in place (`add_`): seen by the tensor's version;
- through `.data`, which no version counts: seen by a digest of the device's copy, taken when it
  arrives, or may be changed so from then on, and when it leaves.

Verbs come in pairs, so that the host can do something else in between: `send` and `arrive`, `check`
and `offload`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import WeightsError
from .backend import Backend
from .digest import digest_of, has_same_values, is_cast_of
from .labels import label
from .layout import (
    Home,
    Layout,
    Origin,
    Piece,
    Segment,
    Views,
    is_same_kind,
    is_same_place,
    is_still_at,
)
from .opaque import Opaque, as_memory
from .slabs import host_slab, lock, unlock
from .walk import Held, is_plain, version_of, walk, why_valueless


@dataclass(eq=False)
class Resident:
    """A tensor that was moved: its master, and what it looked like on arrival."""

    tensor: torch.Tensor
    master: torch.Tensor
    moved: torch.Tensor
    version: int
    segment: Segment


class WeightStore:
    """The tensors of some modules, at home or on one device."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        name: str,
        backend: Backend,
        *,
        but: Collection[nn.Module] = (),
    ) -> None:
        """Of `modules`, without those in `but`."""
        self.modules = modules
        self.name = name
        self.backend = backend
        self._but = but
        self._layout = Layout([], {})
        self._earlier: Layout | None = None  # before the last change of dtype
        self._residents: list[Resident] = []
        self._opaque: list[Held] = []
        self._away: list[Opaque] = []
        self._coming: list[tuple[torch.Tensor, int, torch.Tensor]] = []  # sent: version, copy
        self._mark: Any = None
        self._is_watched = True  # it may be changed unseen where it is: what arrives is noted
        # Nobody else's code has run since the module's tensors were looked for, which takes longer
        # than all else; and none but those that came were found when they left.
        self._is_sure = self._is_sure_to_leave = False
        self.is_here = False  # the module uses the device's copy
        # Begun by `check`: the segments it looks at, and which of them differ (on the device); the
        # point at which the device has done with all of them if it looks at none.
        self._check: tuple[list[Segment], torch.Tensor | None, Any] | None = None
        #: The points, on the copies' stream, between which the latest copies lie.
        self.journey: tuple[Any, Any] = (None, None)

    # ---- layout

    @property
    def segments(self) -> list[Segment]:
        """What travels, in the order it travels."""
        return self._layout.segments

    @property
    def nbytes(self) -> int:
        """Bytes on the device when resident."""
        return sum(segment.nbytes for segment in self.segments)

    @property
    def pinned_nbytes(self) -> int:
        """Bytes of `nbytes` whose masters are page-locked."""
        return sum(segment.nbytes for segment in self.segments if segment.unpin is not None)

    def lay_out(self) -> list[torch.Tensor]:
        """Bring the layout up to date with what the module holds; return its movable tensors.

        Raises:
            WeightsError: a tensor has no values; nothing has been touched.
        """
        held_of: dict[int, Held] = {}
        for held in self._held():
            held_of.setdefault(id(held.tensor), held)
            reason = why_valueless(held.tensor)
            if reason is not None:
                raise WeightsError(
                    f"{self.name}: {held.path} {reason}. Load the component's weights before it "
                    "runs."
                )
        self._opaque = [held for held in held_of.values() if not is_plain(held.tensor)]
        movable = [held.tensor for held in held_of.values() if is_plain(held.tensor)]
        for tensor in movable:
            if tensor.device.type != "cpu" and tensor.device != self.backend.device:
                tensor.data = tensor.data.to("cpu")  # somebody put it on another device
        movable = [tensor for tensor in movable if tensor.device.type == "cpu"]
        self._take_in_replaced(movable)
        if not self._layout.fits(movable) and not self._takes_earlier_places(movable):
            if self._layout.has_in_other_dtypes(movable):
                self._earlier, self._layout = self._layout, Layout.of(movable)
            else:
                self._earlier, self._layout = None, self._layout.renewed(movable)
        return movable

    def _held(self) -> Iterator[Held]:
        return itertools.chain.from_iterable(walk(m, but=self._but) for m in self.modules)

    def _take_in_replaced(self, tensors: list[torch.Tensor]) -> None:
        """Where a tensor of the same kind was put in a master's place, its values go to that place.

        So a page-locked slab stays in use when a component was cast at home, and back.
        """
        for tensor in tensors:
            home = self._layout.homes.get(id(tensor))
            if home is None or home.segment.slab is None or is_same_place(tensor, home.master):
                continue
            if is_same_kind(tensor, home.master):
                home.segment.digest_is_of = None
                home.master.copy_(tensor)
                tensor.data = home.master

    def _takes_earlier_places(self, tensors: list[torch.Tensor]) -> bool:
        """What was cast for its work, and back at home, lies where it did; whether that is so."""
        earlier = self._earlier
        if earlier is None or self.is_away or not earlier.is_of(tensors):
            return False
        for tensor in tensors:
            home = earlier.homes[id(tensor)]
            if is_same_place(tensor, home.master):
                continue
            if not has_same_values(tensor, home.master):
                home.segment.digest_is_of = None
                home.master.copy_(tensor)
            tensor.data = home.master
        self._layout, self._earlier = earlier, None
        return True

    # ---- to the device

    def onload(self) -> None:
        """Have every tensor on the device for what the current stream does from now on.

        Raises:
            torch.OutOfMemoryError, RuntimeError: the device refused. Nothing of the component is on
                the device then, and the module is as it was.
        """
        self.send()
        try:
            self.arrive()
        except BaseException:
            self.offload()
            raise

    def send(
        self, *, settles: bool = False, masters: object = None, is_watched: bool = True
    ) -> None:
        """Start the copies to the device. The module goes on using its masters until `arrive`.

        Args:
            settles: whether to copy from page-locked memory, and make it so if it is not.
            masters: the same as last time if masters cannot have been changed since then but by
                what was on the device; their digests are taken once.
            is_watched: whether what was sent may be changed where no version counts it. If not, no
                digests are taken, until `watch`.

        Raises:
            as `onload`.
        """
        with label("onload", self.name), as_memory():
            before = self._layout
            tensors = self._tensors(is_watched)
            if self._layout is before:
                self._earlier = None  # its dtype has changed for good
            while settles and (segment := self.next_to_settle) is not None:
                self.settle(segment)
            transfer = self.backend.transfer
            transfer.begin()
            try:
                for segment in self.segments:
                    segment.device = transfer.allocate(segment.nbytes)
                    self._copy(segment)
                self._is_watched = is_watched
                with transfer.on_arrival():
                    if is_watched:
                        self._take_digests([s for s in self.segments if not _is_known(s, masters)])
                for segment in self.segments if is_watched else ():
                    segment.digest_is_of = masters if segment.slab is not None else None
                self._mark = transfer.mark()
                self.journey = (transfer.began, transfer.now())
                homes = self._layout.homes
                there = Views()
                self._coming = [(t, version_of(t), there.of(homes[id(t)])) for t in tensors]
                self._away = [
                    Opaque(held, self.backend.device)
                    for held in self._opaque
                    if held.tensor.device.type == "cpu"
                ]
            except BaseException:
                self._coming, self._away = [], []
                self._let_go()
                raise

    def _tensors(self, is_watched: bool) -> list[torch.Tensor]:
        """What `lay_out` returns, which is only asked if something else may have come."""
        homes = self._layout.homes.values()
        if (
            self._is_sure
            and not is_watched
            and not self._opaque
            and all(is_still_at(home.tensor, home.master) for home in homes)
        ):
            return [home.tensor for home in homes]
        tensors = self.lay_out()
        self._is_sure = not is_watched
        return tensors

    def arrive(self) -> None:
        """Let the module use what was sent; the current stream waits for it, not the host."""
        is_same = is_still_at if self._is_sure else is_same_place
        if any(not is_same(t, self._layout.homes[id(t)].master) for t, _, _ in self._coming):
            self.offload()  # it was cast, or replaced, meanwhile: what was sent is of no use
            self.send()
        with as_memory():
            with label("wait", self.name):
                self.backend.transfer.wait(self._mark)
            changed: dict[int, Segment] = {}
            for tensor, version, sent in self._coming:
                home = self._layout.homes[id(tensor)]
                if version_of(tensor) != version:  # it was changed at home meanwhile
                    sent.copy_(tensor.data)
                    changed[id(home.segment)] = home.segment
                tensor.data = sent
                self._residents.append(
                    Resident(tensor, home.master, sent, version_of(tensor), home.segment)
                )
                self.backend.resident[id(tensor)] = self
            self._coming = []
            self.is_here = True
            for opaque in self._away:
                opaque.enter()
            for segment in changed.values():
                segment.digest = segment.digest_is_of = None
            if self._is_watched:
                self._take_digests(list(changed.values()))

    def _copy(self, segment: Segment) -> None:
        assert segment.device is not None
        if segment.slab is not None:
            self.backend.transfer.copy(segment.device[: segment.slab.nbytes], segment.slab)
        else:
            for piece in segment.pieces:
                there = segment.device[piece.offset : piece.offset + piece.nbytes]
                self.backend.transfer.copy(there, piece.host)

    def _take_digests(self, segments: list[Segment]) -> None:
        """Note what has arrived.

        The digests are kept in one piece of memory; each by itself would take a block of it.
        """
        there = [segment for segment in segments if segment.device is not None]
        if there:
            digests = torch.stack([digest_of(segment.watched) for segment in there])
            for segment, digest in zip(there, digests.unbind(), strict=True):
                segment.digest = digest

    def check(self) -> None:
        """Begin to find out what was changed since it arrived, beside what the device does next.

        A change after this is not seen: `recheck` if somebody may use it again.
        """
        if self._check is not None:
            return
        if not self._is_watched:
            self._check = [], None, self.backend.record_event()
            return
        watched = [s for s in self.segments if s.device is not None]
        before = [s.digest for s in watched if s.digest is not None]
        if len(before) < len(watched):  # nothing can be told of what was not noted
            return
        differs = None
        if watched:
            try:
                with as_memory(), self.backend.transfer.after_use():
                    after = [digest_of(segment.watched) for segment in watched]
                    differs = torch.stack(before) != torch.stack(after)
            except RuntimeError:  # no room for it
                self.backend.synchronize()  # what was begun still reads what will be freed
                return
        self._check = watched, differs, None

    def watch(self) -> None:
        """From now on what is on the device may be changed there unseen: note what there is."""
        if self._is_watched:
            return
        self._is_watched, self._check = True, None
        try:
            with as_memory():
                self.backend.transfer.wait(self._mark)
                self._take_digests([segment for segment in self.segments if segment.digest is None])
        except RuntimeError:  # no room for it: all of it will come home
            self.backend.synchronize()

    @property
    def is_checked(self) -> bool:
        """Whether `check` has begun: what uses it from now on is not waited for."""
        return self._check is not None

    def recheck(self) -> None:
        """Forget what `check` began."""
        self._check = None

    def forget_masters(self) -> None:
        """From now on masters may be changed by anybody, and the module itself."""
        self._is_sure = self._is_sure_to_leave = False
        for segment in self.segments:
            segment.digest_is_of = None
            if segment.device is None:
                segment.digest = None

    @property
    def is_away(self) -> bool:
        """Whether anything is on the device, or on its way."""
        return self.is_here or any(segment.device is not None for segment in self.segments)

    @property
    def was_cast(self) -> bool:
        """Whether it is at home, and was laid out in another dtype when it last came or went."""
        return self._earlier is not None and not self.is_away

    @property
    def is_as_it_came(self) -> bool:
        """Whether the module uses the very memory that was brought there, if any was."""
        return all(is_same_place(r.tensor, r.moved) for r in self._residents)

    @property
    def has_grown(self) -> bool:
        """Whether the module holds weights at home that came after the others had left."""
        if not self.is_here:
            return False
        there = {id(resident.tensor) for resident in self._residents}
        return any(
            id(held.tensor) not in there
            and held.tensor.device.type == "cpu"
            and is_plain(held.tensor)
            for held in self._held()
        )

    def _on_device(self, home: Home) -> torch.Tensor:
        """A master's copy."""
        return Views().of(home)

    # ---- home

    def offload(self) -> int:
        """Let the module use the masters again; what changed on the device comes home first.

        Returns:
            How many bytes had to be copied home.
        """
        copied = 0
        with label("offload", self.name), as_memory():
            if not self.is_here:  # nobody has used what is on its way
                self._coming, self._away = [], []
            for segment in self._changed_segments():
                copied += segment.nbytes
                self._bring_home(segment)
            if self._is_sure_to_leave and all(
                is_still_at(r.tensor, r.moved) for r in self._residents
            ):
                for left in self._residents:
                    left.tensor.data = left.master
                    self.backend.resident.pop(id(left.tensor), None)
                self._residents.clear()
                self._let_go()
                return copied
            residents = {id(resident.tensor): resident for resident in self._residents}
            seen: set[int] = set()
            for held in self._held():
                tensor = held.tensor
                if id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                resident = residents.get(id(tensor))
                if resident is not None and is_same_place(tensor, resident.moved):
                    tensor.data = resident.master
                elif is_plain(tensor) and tensor.device.type != "cpu" and self._may_take(tensor):
                    copied += self._adopt(tensor, resident)
            self._is_sure_to_leave = (
                self._is_sure
                and bool(residents)
                and seen == residents.keys()
                and copied == 0
                and self._earlier is None
                and not self._away
            )
            for resident in self._residents:
                # Tensors that the module no longer holds, but somebody else may: they are ours to
                # bring home.
                if id(resident.tensor) not in seen and is_same_place(
                    resident.tensor, resident.moved
                ):
                    resident.tensor.data = resident.master
                self.backend.resident.pop(id(resident.tensor), None)
            for opaque in self._away:
                copied += opaque.leave()
            self._away = []
            self._residents.clear()
            self._let_go()
            self._go_back_to_earlier()
            self.lay_out()
        return copied

    def _let_go(self) -> None:
        """Give the device's memory back."""
        if self._check is None:
            self.backend.transfer.settle()
        for segment in self.segments:
            segment.device = None
            if segment.digest_is_of is None:
                segment.digest = None
        self._check = None
        self.is_here = False

    def _go_back_to_earlier(self) -> None:
        """A component that was cast for its work, and back, is laid out as before it."""
        earlier = self._earlier
        if earlier is not None and earlier.fits([home.tensor for home in earlier.homes.values()]):
            self._layout, self._earlier = earlier, None

    def _changed_segments(self) -> list[Segment]:
        """What has to come home. The host waits until the device has done with it."""
        if not self._residents:
            return []
        self.check()
        if self._check is None:  # nothing can be told: what is there comes home, whatever it is
            return [s for s in self.segments if s.device is not None]
        watched, differs, is_over = self._check
        changed = {
            id(r.segment)
            for r in self._residents
            if version_of(r.tensor) != r.version and is_same_place(r.tensor, r.moved)
        }
        if is_over is not None:
            with label("wait", self.name):
                is_over.synchronize()
        if differs is not None:
            with label("wait", self.name), self.backend.transfer.checked():
                found = differs.tolist()
            changed |= {id(s) for s, differ in zip(watched, found, strict=True) if differ}
        return [s for s in self.segments if s.device is not None and id(s) in changed]

    def _bring_home(self, segment: Segment) -> None:
        assert segment.device is not None
        segment.digest_is_of = None
        for piece in segment.pieces:
            piece.host.copy_(segment.device[piece.offset : piece.offset + piece.nbytes])

    def _may_take(self, tensor: torch.Tensor) -> bool:
        """Whether no other component brought it here, which shares it and may be at work."""
        return self.backend.resident.get(id(tensor), self) is self

    def _adopt(self, tensor: torch.Tensor, resident: Resident | None) -> int:
        """A tensor that was put on the device by somebody else: its values become the master's.

        Returns:
            How many bytes were copied.
        """
        earlier = self._earlier.homes.get(id(tensor)) if self._earlier is not None else None
        if earlier is not None and has_same_values(tensor, earlier.master):
            tensor.data = earlier.master  # cast there and back: what is at home already
            return 0
        home = self._layout.homes.get(id(tensor))
        if (
            home is not None
            and home.segment.device is not None
            and (tensor.shape, tensor.stride()) == (home.master.shape, home.master.stride())
            and is_cast_of(tensor.data, self._on_device(home))
        ):
            # It was cast on the device, and maybe back: so is what is at home.
            tensor.data = home.master.to(tensor.dtype)
            return 0
        if home is not None:
            home.segment.digest_is_of = None
        master = resident.master if resident is not None else None
        if master is not None and (master.dtype, master.shape) == (tensor.dtype, tensor.shape):
            master.copy_(tensor.data)
            tensor.data = master
        else:
            tensor.data = tensor.data.to("cpu")
        return tensor.nbytes

    # ---- host memory

    @property
    def next_to_settle(self) -> Segment | None:
        """A segment whose host memory is no slab of its own yet, and should be."""
        if self._earlier is not None:
            return None  # cast for this call only
        return next((segment for segment in self.segments if segment.slab is None), None)

    def settle(self, segment: Segment) -> None:
        """Give a segment one slab of host memory, page-locked if the backend can.

        A large piece stays where it is. Others are gathered, and their old host memory is let go,
        so that host memory does not grow by more than a segment.
        """
        with as_memory():
            if segment.may_stay and lock(segment, segment.pieces[0].host, self.backend):
                segment.is_in_place = True
                return
            slab = host_slab(segment.nbytes)
            self._rehouse({id(p): slab[p.offset : p.offset + p.nbytes] for p in segment.pieces})
            if not lock(segment, slab, self.backend):
                segment.slab = slab

    def settle_all(self) -> None:
        """Settle every segment."""
        with as_memory():
            self.lay_out()
        while (segment := self.next_to_settle) is not None:
            self.settle(segment)

    def unsettle(self) -> None:
        """Give the tensors storages of their own again, as they had before; slabs are let go."""
        with as_memory():
            for segment in self.segments:
                if segment.slab is None:
                    continue
                if segment.is_in_place:
                    unlock(segment)
                    continue
                storages: dict[Origin, list[Piece]] = {}
                for piece in segment.pieces:
                    storages.setdefault(piece.origin, []).append(piece)
                for pieces in storages.values():
                    begin = min(piece.start for piece in pieces)
                    end = max(piece.start + piece.nbytes for piece in pieces)
                    storage = torch.empty(end - begin, dtype=torch.uint8)
                    self._rehouse(
                        {
                            id(p): storage[p.start - begin : p.start - begin + p.nbytes]
                            for p in pieces
                        }
                    )
                unlock(segment)

    def _rehouse(self, targets: dict[int, torch.Tensor]) -> None:
        """Move pieces (by id) of host memory to other bytes."""
        for piece in (p for segment in self.segments for p in segment.pieces):
            if id(piece) in targets:
                targets[id(piece)].copy_(piece.host)
        moved = self._layout.move(targets)
        for resident in self._residents:
            resident.master = moved.get(id(resident.tensor), resident.master)


def _is_known(segment: Segment, masters: object) -> bool:
    """Whether the segment's digest was taken already, of the same masters."""
    return masters is not None and segment.digest_is_of is masters and segment.digest is not None
