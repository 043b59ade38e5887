"""A digest sees every change."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from greenroom.device.digest import differing, digest_of


def weights(nbytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@given(words=st.integers(1, 20_000), where=st.integers(0, 10**9), change=st.integers(1, 255))
def test_any_byte_that_changes_is_seen(words: int, where: int, change: int) -> None:
    slab = weights(8 * words)
    before = digest_of(slab)
    slab[where % slab.numel()] ^= change
    assert not torch.equal(before, digest_of(slab))


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([torch.float16, torch.float32]))
def test_rows_and_columns_that_change_places_are_seen(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    shape = (2**rows, 2 ** min(columns, 22 - rows))
    slab = weights(max(8, shape[0] * shape[1] * dtype.itemsize))
    table = slab[: shape[0] * shape[1] * dtype.itemsize].view(dtype).view(shape)
    before, values = digest_of(slab), table.clone().view(torch.uint8)
    for changed in (table.flip(0), table.flip(1), table.roll(1, 0), table.roll(1, 1)):
        kept = table.clone()
        table.copy_(changed)
        if not torch.equal(table.view(torch.uint8).reshape(-1), values.reshape(-1)):
            assert not torch.equal(before, digest_of(slab))
        table.copy_(kept)
    assert torch.equal(before, digest_of(slab))


def test_the_differing_ones_are_told_apart() -> None:
    slabs = [weights(n) for n in (8, 80, 80_000)]
    before = [digest_of(slab) for slab in slabs]
    slabs[1][3] ^= 1
    assert differing(before, [digest_of(slab) for slab in slabs]) == [False, True, False]
    assert differing([], []) == []
