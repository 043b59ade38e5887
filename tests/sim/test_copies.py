"""Copies between devices keep every bit; work across devices is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sim.comparing import assert_same, copied, seeded

import greenroom.sim as sim

MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add": torch.add,
    "matmul": torch.matmul,
    "cat": lambda a, b: torch.cat([a, b]),
    "stack": lambda a, b: torch.stack([a, b]),
    "linear": F.linear,
    "where": lambda a, b: torch.where(a > 0, a, b),
    "add_": lambda a, b: a.add_(b),
    "out": lambda a, b: torch.add(a, a, out=b),
    "index_copy": lambda a, b: a.index_copy_(0, torch.arange(2, device=a.device), b),
    "foreach": lambda a, b: torch._foreach_add([a], [b]),
    "embedding": lambda a, b: F.embedding(b.long(), a),
    "conv": lambda a, b: F.conv1d(a[None], b[None]),
}


@pytest.mark.parametrize("other", ["cpu", "sim:1"])
@pytest.mark.parametrize("name", MIXED)
def test_tensors_of_two_devices_are_refused(name: str, other: str) -> None:
    sim.configure("rtx-4090", devices=2)
    here, there = torch.ones(2, 2, device="sim:0"), torch.ones(2, 2, device=other)
    for pair in ((here, there), (there, here)):
        with pytest.raises(
            RuntimeError,
            match="Expected all tensors to be on the same device, but found at least two devices, "
            f"(sim:0 and {other}|{other} and sim:0)!",
        ):
            MIXED[name](*pair)
    assert here.tolist() == there.tolist() == [[1, 1], [1, 1]]


def test_meta_tensors_are_refused() -> None:
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        torch.ones(3, device="sim") + torch.ones(3, device="meta")
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        torch.ones(3, device="meta").to("sim")
    assert torch.ones(3, device="sim").to("meta").device.type == "meta"


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 3),
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "gaps": lambda x: x[..., ::2],
    "offset": lambda x: x[1:, 1:],
    "expanded": lambda x: x[:1].expand(3, 4, 5, 6),
    "one element": lambda x: x[0, 0, 0, 0],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.int64, torch.complex64], ids=str
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_copies_of_every_layout(layout: str, dtype: torch.dtype) -> None:
    sim.configure("rtx-4090", devices=2)
    x = torch.arange(360.0).reshape(3, 4, 5, 6)
    here, there = LAYOUTS[layout](x), LAYOUTS[layout](x.to("sim"))
    expected = here.to(dtype, copy=True)
    assert_same(expected, here.to("sim", dtype, copy=True))
    for device in ("sim:0", "sim:1"):
        assert_same(expected, there.to(device, dtype, copy=True))
    back = there.to("cpu", dtype)
    assert torch.equal(back, expected) and back.stride() == expected.stride()
    for device in ("cpu", "sim:0", "sim:1"):
        for source in (here, there):
            turned = torch.zeros(here.shape[::-1], dtype=dtype, device=device)
            turned = turned.permute(list(reversed(range(here.dim()))))
            with_gaps = torch.zeros(*here.shape, 2, dtype=dtype, device=device)
            assert torch.equal(turned.copy_(source).cpu(), expected)
            assert torch.equal(with_gaps[..., 1].copy_(source).cpu(), expected)
            assert with_gaps[..., 0].count_nonzero() == 0


def test_copies_between_devices() -> None:
    sim.configure("rtx-4090", devices=2)
    x = torch.tensor([1 + 2j, 3 - 1j], device="sim:0")
    y = x.to("sim:1")
    assert y.device.index == 1 and y.tolist() == x.tolist()
    assert x.conj().to("sim:1").tolist() == [1 - 2j, 3 + 1j]
    assert torch.zeros(3, 2, dtype=y.dtype, device="sim:1").copy_(x).tolist() == [x.tolist()] * 3
    assert x.copy_(y.conj()).tolist() == [1 - 2j, 3 + 1j]
    assert y.to("sim:0", torch.complex128).dtype == torch.complex128
    assert x.to("sim:0") is x and y.sim(0).device.index == 0
    weight = torch.ones(2, device="sim:0", requires_grad=True)
    (weight.to("sim:1") * 3).sum().backward()
    assert weight.grad.device.index == 0 and weight.grad.tolist() == [3, 3]


RARE = """float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2
uint16 uint32 uint64 complex32 bits8 bits16"""


@pytest.mark.parametrize("name", RARE.split())
def test_rare_dtypes_travel(name: str) -> None:
    dtype = getattr(torch, name)
    x = torch.arange(64, dtype=torch.uint8).reshape(8, 8).view(dtype)
    y = x.to("sim")
    assert y.dtype == dtype and y.shape == x.shape
    for back in (y.cpu(), y.clone().cpu(), y[2:].cpu(), torch.empty_like(x).copy_(y)):
        assert torch.equal(back.view(torch.uint8), x[-len(back) :].view(torch.uint8))


def test_float8_values_and_products() -> None:
    x = seeded(torch.randn, 16, 32)
    a, b = x.to(torch.float8_e4m3fn), x.flip(0).to(torch.float8_e4m3fn)
    assert_same(a.float(), x.to("sim").to(torch.float8_e4m3fn).float())
    one = torch.ones(())

    def product(a: torch.Tensor, b: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    assert_same(product(a, b, one), product(*copied([a, b, one], "sim")))


def test_int8_products() -> None:
    a, b = (torch.randint(-128, 128, (16, 16), dtype=torch.int8) for _ in range(2))
    assert_same(torch._int_mm(a, b), torch._int_mm(a.to("sim"), b.to("sim")))
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    scales = torch.rand(16, dtype=torch.bfloat16)
    expected = torch._weight_int8pack_mm(x, b, scales)
    assert_same(expected, torch._weight_int8pack_mm(*copied([x, b, scales], "sim")))


def test_default_device() -> None:
    with torch.device("sim"):
        made = [torch.ones(2), torch.randn(2), torch.tensor(1), torch.nn.Linear(2, 2).weight]
    assert {t.device for t in made} == {torch.device("sim", 0)}
    assert torch.ones(2).device.type == "cpu"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_pins_its_batches(workers: int) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    loader = torch.utils.data.DataLoader(data, 4, pin_memory=True, num_workers=workers)
    batches = [batch for (batch,) in loader]
    assert [batch.is_pinned() for batch in batches] == [True, True]
    assert_same([torch.arange(4.0), torch.arange(4.0, 8)], [b.to("sim") for b in batches])
