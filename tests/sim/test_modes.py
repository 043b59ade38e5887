"""Autocast, inference mode and functions of functions do on the simulated device as elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sim.comparing import assert_same, seed, seeded

# ---- autocast ------------------------------------------------------------------------------------

HALF = torch.bfloat16
BOTH_LISTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: x @ x.mT,
    "bmm": lambda x: torch.bmm(x[None], x[None]),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "conv": lambda x: F.conv2d(x[None, None], x[None, None, :3, :3]),
    "attention": lambda x: F.scaled_dot_product_attention(*[x[None, None]] * 3),
    "mse_loss": lambda x: F.mse_loss(x.to(HALF), x.to(HALF)),
    "add": lambda x: x + x.to(HALF),
    "cat": lambda x: torch.cat([x, x.to(HALF)]),
}
FULL_PRECISION: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "sum": lambda x: x.sum(),
    "cumsum": lambda x: x.cumsum(0),
    "exp": lambda x: x.exp(),
    "pow": lambda x: x**2,
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "norm": lambda x: x.norm(),
    "nll_loss": lambda x: F.nll_loss(x, torch.zeros(8, dtype=torch.long, device=x.device)),
}


@pytest.mark.parametrize("name", BOTH_LISTS)
def test_autocast_where_the_cpu_and_accelerators_agree(name: str) -> None:
    x = seeded(torch.randn, 8, 8)
    with torch.autocast("cpu", HALF):
        expected = BOTH_LISTS[name](x)
    with torch.autocast("sim", HALF):
        found = BOTH_LISTS[name](x.to("sim"))
    assert_same(expected, found)


@pytest.mark.parametrize("name", FULL_PRECISION)
def test_autocast_keeps_full_precision_where_cuda_does(name: str) -> None:
    x = seeded(torch.randn, 8, 8).to(HALF)
    with torch.autocast("sim", HALF):
        found = FULL_PRECISION[name](x.to("sim"))
    assert_same(FULL_PRECISION[name](x.float()), found)


def test_autocast_promotes_where_cuda_does() -> None:
    wide, narrow = torch.ones(3, device="sim"), torch.zeros(3, dtype=HALF, device="sim")
    index = torch.tensor([0, 1, 2], device="sim")
    with torch.autocast("sim", HALF):
        assert narrow.scatter_add(0, index, wide).dtype == torch.float32
        assert torch.addcmul(narrow, wide, wide).dtype == torch.float32
        assert torch.stack([narrow, wide]).dtype == torch.float32


def test_autocast_of_a_module_forward_and_backward() -> None:
    seed()
    here = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 4))
    there = copy.deepcopy(here).to("sim")
    x, grads = torch.randn(3, 8), []
    for model, device in ((here, "cpu"), (there, "sim")):
        with torch.autocast(device, HALF):
            loss = model(x.to(device)).float().square().sum()
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert_same(*grads)


def test_autocast_is_off_outside_and_half_is_its_default() -> None:
    assert not torch.is_autocast_enabled("sim")
    assert torch.get_autocast_dtype("sim") == torch.float16
    x = torch.ones(2, 2, device="sim")
    with torch.autocast("sim"):
        assert (x @ x).dtype == torch.float16
        with torch.autocast("sim", enabled=False):
            assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


# ---- modes ---------------------------------------------------------------------------------------


def test_inference_mode() -> None:
    with torch.inference_mode():
        x = torch.arange(6.0, device="sim").reshape(2, 3)
        y = x.t()[1].add_(1)
    assert x.is_inference() and y.is_inference()
    assert x.tolist() == [[0, 2, 2], [3, 5, 5]]
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        x.add_(1)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own, inside jvp
def test_functions_of_functions() -> None:
    x = seeded(torch.randn, 4, 3)

    def f(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * x.exp()).sum()

    assert_same(torch.func.grad(f)(x), torch.func.grad(f)(x.to("sim")))
    assert_same(torch.func.hessian(f)(x), torch.func.hessian(f)(x.to("sim")))
    assert_same(torch.func.vmap(f)(x), torch.func.vmap(f)(x.to("sim")))
    assert_same(torch.func.jvp(f, (x,), (x,)), torch.func.jvp(f, (x.to("sim"),), (x.to("sim"),)))


def test_saved_tensors_are_guarded_against_changes() -> None:
    x = torch.ones(2, device="sim", requires_grad=True)
    y = x * 1
    z = y * y
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()
