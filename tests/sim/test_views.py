"""Views, storages, sizes and indices on the simulated device are those of the CPU."""

from __future__ import annotations

import pytest
import torch
from sim.comparing import assert_same


def test_views_share_their_storage() -> None:
    x = torch.arange(24.0, device="sim").reshape(2, 3, 4)
    views = [x[1], x.t() if x.dim() == 2 else x.mT, x.flatten(), x[..., ::2], x.unfold(2, 2, 1)]
    views += [x.diagonal(), x.permute(2, 0, 1), x.unsqueeze(0), x.view(torch.int32), x.detach()]
    views += [x.narrow(1, 1, 2), *x.unbind(), *x.split(1), *x.chunk(2, -1), x.expand(5, 2, 3, 4)]
    storage = x.untyped_storage().data_ptr()
    allocated = torch.sim.memory_allocated()
    for view in views:
        assert view.untyped_storage().data_ptr() == storage
    assert torch.sim.memory_allocated() == allocated == 512
    x.zero_()
    assert all(view.count_nonzero() == 0 for view in views)


def in_place_through_views(x: torch.Tensor) -> torch.Tensor:
    x[1, 2] = 7
    x[0].t().add_(1)
    x.diagonal(dim1=1, dim2=2).mul_(2)
    x[..., ::2].copy_(torch.arange(2.0, device=x.device))
    x.flatten()[3:5].fill_(-1)
    x.view(6, 4)[2:4].neg_()
    x.as_strided((2, 2), (5, 1), 3).zero_()
    x.transpose(0, 2)[1].exp_()
    x[x > 10] = 10
    x[:, [0, 2]] = x[:, [2, 0]]
    x.index_put_((torch.tensor([0], device=x.device),), torch.ones(4, device=x.device), True)
    x.masked_fill_(x == 2, 99)
    x[0, 0].clamp_(max=3)
    return x


def test_in_place_work_through_views() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert_same(in_place_through_views(x.clone()), in_place_through_views(x.to("sim")))


def reshaped_in_place(x: torch.Tensor) -> list[torch.Tensor]:
    facts = [
        x.clone().t_(),
        x.clone().unsqueeze_(0),
        x.clone().squeeze_(),
        x.clone().swapaxes_(0, 1),
    ]
    window = x.flatten()[:3]
    facts += [window.as_strided_((3,), (1,), 2), x.clone().transpose_(0, 1).contiguous()]
    facts += [
        x.expand(4, 2, 3),
        x.expand(4, 2, 3).contiguous(),
        x[:, :0],
        x.sum(),
        x.t().reshape(6),
    ]
    return facts


def test_shapes_changed_in_place() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert_same(reshaped_in_place(x), reshaped_in_place(x.to("sim")))


def test_resize() -> None:
    x = torch.arange(4.0, device="sim")
    tail = x[1:]
    assert x.resize_(2, 3) is x and x.shape == (2, 3)
    assert x.flatten()[:4].tolist() == [0, 1, 2, 3] and x.flatten()[4:].isnan().all()
    tail[0] = 9  # a view follows its storage to where it has grown
    assert x[0, 1] == 9
    address = x.data_ptr()
    assert x.resize_(3).data_ptr() == address and x.resize_(0).numel() == 0
    assert x.resize_(6).data_ptr() == address
    y = torch.empty(0, device="sim").resize_(1, 2, 2, 2, memory_format=torch.channels_last)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.resize_as_(x)
    assert y.shape == (6,)


def test_set() -> None:
    x, y = torch.arange(6.0, device="sim"), torch.empty(0, device="sim")
    y.set_(x.untyped_storage(), 2, (2, 2), (2, 1))
    y.zero_()
    assert x.tolist() == [0, 1, 0, 0, 0, 0]
    y.set_(x)
    assert y.data_ptr() == x.data_ptr() and y.shape == (6,)
    y.set_()
    assert y.numel() == 0


def test_set_grows_the_storage_as_on_the_cpu() -> None:
    for device in ("cpu", "sim"):
        storage = torch.ones(4, device=device).untyped_storage()
        y = torch.empty(0, device=device).set_(storage, 0, (200_000,), (1,))
        assert storage.nbytes() == 800_000 and y[:4].tolist() == [1, 1, 1, 1]
        y.fill_(2)
        assert y.sum() == 400_000


def test_set_refuses_memory_of_another_device() -> None:
    with pytest.raises(RuntimeError, match=r"device \"?sim.* different device \"?cpu"):
        torch.empty(0, device="sim").set_(torch.ones(3).untyped_storage())
    with pytest.raises(RuntimeError, match=r"device \"?sim.* different device \"?cpu"):
        torch.empty(0, device="sim").set_(torch.ones(3))


def test_storages() -> None:
    x = torch.arange(4, dtype=torch.uint8, device="sim")
    storage = x.untyped_storage()
    assert storage.device == torch.device("sim", 0) and storage.nbytes() == 4
    assert storage.tolist() == [0, 1, 2, 3] == storage.cpu().tolist()
    twin = storage.clone()
    storage.fill_(7)
    assert x.tolist() == [7] * 4 and twin.tolist() == [0, 1, 2, 3]
    storage.copy_(twin.cpu())
    assert x.tolist() == [0, 1, 2, 3]
    before = torch.sim.memory_allocated()
    storage.resize_(0)  # how FSDP lets go of a parameter's memory
    assert torch.sim.memory_allocated() == before - 512 and x.shape == (4,)
    storage.resize_(4)
    assert (x == 255).all()  # fresh memory
    made = torch.UntypedStorage(8, device="sim")
    assert made.device == torch.device("sim", 0)
    assert torch.empty(0, device="sim").set_(made, 0, (2,), (1,)).isnan().all()


def test_swap_tensors() -> None:
    a, b = torch.zeros(2), torch.ones(3, device="sim")
    torch.utils.swap_tensors(a, b)
    assert a.device.type == "sim" and a.tolist() == [1, 1, 1] and b.tolist() == [0, 0]


def test_zero_sizes_and_scalars() -> None:
    empty = torch.empty(0, 3, device="sim")
    assert empty.sum() == 0 and torch.cat([empty, torch.ones(1, 3, device="sim")]).shape == (1, 3)
    assert empty.cpu().shape == (0, 3) and torch.zeros(3, 0).to("sim").shape == (3, 0)
    assert (torch.ones(2, 0, device="sim") @ torch.ones(0, 3, device="sim")).tolist() == [
        [0] * 3
    ] * 2
    assert torch.sim.memory_allocated() == 0
    scalar = torch.tensor(2.5, device="sim")
    assert scalar.dim() == 0 and scalar.item() == 2.5 and float(scalar * 2) == 5.0
    assert bool(scalar > 2) and int(torch.tensor(3, device="sim")) == 3
    assert [10, 11, 12][torch.tensor(1, device="sim")] == 11
    # One number may come from the host, as on CUDA.
    assert_same(torch.tensor([4.5]), torch.ones(1, device="sim") * 2 + torch.tensor(2.5))


def test_indexing() -> None:
    x = torch.arange(12.0).reshape(3, 4)
    y = x.to("sim")
    host_index = torch.tensor([2, 0])
    index, mask = host_index.to("sim"), (x > 4).to("sim")
    assert_same(x[[2, 0]], y[index])
    assert_same(x[[2, 0]], y[host_index])  # indices may lie on the host
    assert_same(x[x > 4], y[mask])
    assert_same(x[x > 4], y[mask.cpu()])
    assert_same(x[1, [2, 0]], y[1, index])
    assert_same(x[..., None, 1::2], y[..., None, 1::2])
    assert_same((x > 4).nonzero(), mask.nonzero())
    assert_same(list((x > 4).nonzero(as_tuple=True)), list(mask.nonzero(as_tuple=True)))
    assert_same(
        x.take_along_dim(x.argsort(descending=True)), y.take_along_dim(y.argsort(descending=True))
    )
    repeated = torch.tensor([3, 1, 3, 2])
    found = repeated.to("sim").unique(return_inverse=True, return_counts=True)
    assert_same(repeated.unique(return_inverse=True, return_counts=True), found)


def test_values_reach_the_host() -> None:
    x = torch.arange(6, dtype=torch.float64, device="sim").reshape(2, 3)
    assert x.tolist() == [[0, 1, 2], [3, 4, 5]] and x[1, 2].item() == 5
    assert x.cpu().numpy().tolist() == x.tolist() == x.numpy(force=True).tolist()
    with pytest.raises(TypeError, match=r"can't convert sim:0 device type tensor to numpy"):
        x.numpy()
    assert list(x[0]) == [0, 1, 2]
    torch.testing.assert_close(x, x.cpu(), check_device=False)


def test_printing() -> None:
    assert repr(torch.tensor([1.0, 2.0], device="sim")) == "tensor([1., 2.], device='sim:0')"
    assert repr(torch.zeros(2, 5000, device="sim")).endswith("device='sim:0')")
    assert repr(torch.tensor(True, device="sim")) == "tensor(True, device='sim:0')"
    parameter = torch.nn.Parameter(torch.zeros(1, device="sim"))
    assert repr(parameter).endswith("tensor([0.], device='sim:0', requires_grad=True)")
    assert torch.zeros(1, device="sim").type() == "torch.sim.FloatTensor"


def test_complex_numbers_and_their_conjugate_views() -> None:
    x = torch.tensor([1 + 2j, 3 - 1j])
    y = x.to("sim")
    for f in (
        lambda z: z.conj(),
        lambda z: z.conj().resolve_conj(),
        lambda z: z.conj() * z,
        lambda z: z.conj().sum(),
        lambda z: z.conj().imag,
        lambda z: z.conj()[1:] + 1,
        lambda z: torch.view_as_real(z),
        lambda z: z.clone().conj_physical_(),
        lambda z: z.mH if z.dim() > 1 else z[None].mH,
        lambda z: torch.zeros_like(z).conj().copy_(z),
        lambda z: torch.linalg.svdvals(z[None]),
    ):
        assert_same(f(x), f(y))
    assert y.conj().cpu().tolist() == x.conj().tolist() == x.conj().to("sim").tolist()
    assert torch.zeros(2, dtype=torch.complex64).conj().copy_(y).tolist() == x.tolist()
    y.imag.fill_(0)
    assert y.tolist() == [1, 3]
