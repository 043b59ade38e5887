"""How tensors are grouped to travel, and what stays when some are replaced."""

import itertools

import torch

from greenroom.device.layout import ALIGNMENT, SEGMENT_BYTES, Layout


def placed(layout: Layout) -> list[tuple[int, int]]:
    """(begin, end) of each piece in its segment, in order."""
    return [(p.offset, p.offset + p.nbytes) for s in layout.segments for p in s.pieces]


def test_pieces_are_aligned_and_apart() -> None:
    layout = Layout.of([torch.zeros(n) for n in (1, 63, 64, 65, 1000)])
    (segment,) = layout.segments
    spans = sorted(placed(layout))
    assert all(begin % ALIGNMENT == 0 for begin, _ in spans)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert segment.nbytes % ALIGNMENT == 0 and segment.nbytes >= spans[-1][1]


def test_views_of_one_another_travel_once() -> None:
    whole = torch.zeros(10, 10)
    layout = Layout.of([whole, whole.t(), whole[3:], whole.view(-1)])
    assert placed(layout) == [(0, 400)]
    assert len(layout.homes) == 4


def test_what_is_larger_than_a_segment_is_a_segment_of_its_own() -> None:
    large = torch.empty(SEGMENT_BYTES + 4, dtype=torch.uint8)
    sizes = {s.nbytes for s in Layout.of([torch.zeros(1), large, torch.zeros(1)]).segments}
    assert SEGMENT_BYTES + 512 in sizes  # what an allocator takes for it
    assert len(sizes) > 1


def test_segments_whose_tensors_are_in_place_stay() -> None:
    large = [torch.empty(SEGMENT_BYTES, dtype=torch.uint8) for _ in range(3)]
    before = Layout.of(large)
    added = torch.zeros(5)
    after = before.renewed([large[0], large[2], added])
    kept = [s for s in after.segments if any(s is old for old in before.segments)]
    assert len(kept) == 2
    assert after.fits([large[0], large[2], added])
    assert not after.fits(large)


def test_a_new_tie_joins_the_piece_that_it_shares_memory_with() -> None:
    weight = torch.zeros(10, 10)
    before = Layout.of([weight])
    tied = weight.t()
    after = before.renewed([weight, tied])
    assert after.segments == before.segments
    assert after.homes[id(tied)].piece is before.homes[id(weight)].piece


def test_a_tensor_that_outgrows_what_is_there_is_laid_out_anew() -> None:
    whole = torch.zeros(10, 10)
    part = whole[5:]
    before = Layout.of([part])
    after = before.renewed([part, whole])
    assert placed(after) == [(0, 400)]
    assert after.fits([part, whole])


def test_masters_move_with_their_pieces() -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    tied = weight.t()
    layout = Layout.of([weight, tied])
    (segment,) = layout.segments
    slab = torch.zeros(segment.nbytes, dtype=torch.uint8)
    (piece,) = segment.pieces
    slab[: piece.nbytes].copy_(piece.host)
    layout.move({id(piece): slab[: piece.nbytes]})
    assert weight.data_ptr() == tied.data_ptr() == slab.data_ptr()
    assert weight.tolist() == torch.arange(12.0).reshape(3, 4).tolist()
    assert tied.is_set_to(weight.t())
    assert layout.fits([weight, tied])
