"""A component that is cast for its work has its old place at home again when it is cast back."""

from __future__ import annotations

import torch
from torch import nn

import greenroom.sim as sim
from greenroom.device.backend import Backend
from greenroom.device.store import WeightStore


def a_store() -> tuple[nn.Module, WeightStore]:
    sim.configure("rtx-4090", capacity="1GiB")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    store = WeightStore([module], "autoencoder", Backend(torch.device("sim", 0)))
    store.lay_out()
    store.settle_all()
    return module, store


def test_it_went_home_while_it_was_cast_and_is_cast_back_there() -> None:
    module, store = a_store()
    before = [p.detach().clone() for p in module.parameters()]
    places = [p.data_ptr() for p in module.parameters()]
    nbytes = store.nbytes
    for _ in range(3):
        store.send(settles=True)
        store.arrive()
        module.to(torch.float32)
        assert store.offload() == 0
        assert store.was_cast and store.nbytes > nbytes
        module.to(torch.float16)
        store.lay_out()
        assert not store.was_cast and store.nbytes == store.pinned_nbytes == nbytes
        assert [p.data_ptr() for p in module.parameters()] == places
        assert all(map(torch.equal, module.parameters(), before))


def test_what_was_changed_meanwhile_is_kept() -> None:
    module, store = a_store()
    store.send(settles=True)
    store.arrive()
    module.to(torch.float32)
    store.offload()
    with torch.no_grad():
        module[0].bias.add_(1.0)
    expected = [p.detach().half() for p in module.parameters()]
    module.to(torch.float16)
    store.send(settles=True)
    store.arrive()
    assert all(torch.equal(p.cpu(), e) for p, e in zip(module.parameters(), expected, strict=True))
    store.offload()
    assert all(map(torch.equal, module.parameters(), expected))


def test_what_stays_cast_is_laid_out_so_for_good() -> None:
    module, store = a_store()
    module.to(torch.float32)
    for _ in range(2):
        store.send(settles=True)
        store.arrive()
        store.offload()
    assert not store.was_cast and store.pinned_nbytes == store.nbytes
