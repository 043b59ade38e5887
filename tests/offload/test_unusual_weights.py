"""Weights of every shape, dtype, place and kinship that a module can hold."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.errors import WeightsError

DTYPES = [
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.complex64,
    torch.complex128,
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int64,
    torch.uint32,
]


def offload(sequence: str = "", **modules: nn.Module) -> dict[str, nn.Module]:
    """A pipeline of these modules, offloaded to the simulated device."""
    order = sequence or "->".join(modules)
    greenroom.enable_model_cpu_offload(modules, device="sim", sequence=order)
    _offloaded.append(modules)
    return modules


_offloaded: list[dict[str, nn.Module]] = []


@pytest.fixture(autouse=True)
def disabled_afterwards() -> Iterator[None]:
    """Pipelines end with their test, so that the next one begins with an empty device."""
    yield
    while _offloaded:
        greenroom.disable_model_cpu_offload(_offloaded.pop())


@pytest.fixture
def left_on_device() -> Callable[[], list[int]]:
    """How many bytes each device holds that were not there when the test began."""

    def allocated() -> list[int]:
        gc.collect()
        return [
            torch.accelerator.memory_allocated(i) for i in range(torch.accelerator.device_count())
        ]

    before = allocated()
    return lambda: [now - then for now, then in zip(allocated(), [*before, 0], strict=False)]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes, so that NaN equals itself and every dtype can be compared."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


class Holding(nn.Module):
    """Holds what it is given, and runs a function of itself on the device."""

    def __init__(self, run: Callable[[Any, torch.Tensor], Any] | None = None, **held: Any) -> None:
        super().__init__()
        self.run = run
        for name, value in held.items():
            if isinstance(value, (nn.Parameter, nn.Module)):
                setattr(self, name, value)
            else:
                self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x) if self.run is not None else x


# ---- kinship: ties and views
# -------------------------------------------------------------------------------


def test_a_tied_weight_travels_once_and_is_one_on_the_device() -> None:
    embed, head = nn.Embedding(50, 16), nn.Linear(16, 50, bias=False)
    head.weight = embed.weight
    seen: list[bool] = []

    def run(self: Any, ids: torch.Tensor) -> torch.Tensor:
        seen.append(self.head.weight is self.embed.weight and self.head.weight.device.type == "sim")
        return self.head(self.embed(ids))

    tied = Holding(run, embed=embed, head=head)
    ids = torch.arange(7)
    expected = head(embed(ids))
    pipe = offload(tied=tied)
    with sim.measure() as cost:
        assert torch.equal(pipe["tied"](ids).cpu(), expected)
    assert seen == [True]
    assert embed.weight.nbytes <= cost.h2d_bytes < 2 * embed.weight.nbytes


def test_parameters_that_are_views_of_one_storage_still_are_on_the_device() -> None:
    qkv = torch.randn(3 * 32, 32)
    q, k, v = (nn.Parameter(part) for part in qkv.view(3, 32, 32))
    seen: list[list[int]] = []

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        seen.append([p.data_ptr() - self.whole.data_ptr() for p in (self.q, self.k, self.v)])
        return x @ self.q @ self.k + x @ self.whole[64:]

    x = torch.randn(4, 32)
    module = Holding(run, q=q, k=k, v=v, whole=qkv)
    expected = run(module, x)
    seen.clear()
    pipe = offload(module=module)
    with sim.measure() as cost:
        assert torch.equal(pipe["module"](x).cpu(), expected)
    assert seen == [[0, 4096, 8192]]
    assert cost.h2d_bytes < 2 * qkv.nbytes
    greenroom.offload_now(pipe)
    assert [p.data_ptr() - module.whole.data_ptr() for p in (q, k, v)] == [0, 4096, 8192]


def test_a_change_through_one_of_two_tied_views_reaches_both_at_home() -> None:
    base = torch.zeros(8, 8)

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.whole.add_(1)
        return x

    module = Holding(run, whole=base, row=base[3])
    pipe = offload(module=module)
    for times in (1, 2, 3):
        pipe["module"](torch.zeros(1))
        greenroom.offload_now(pipe)
        assert module.row.tolist() == [times] * 8
        assert module.whole.sum() == times * 64


@pytest.mark.parametrize("order", ["first->second", "second->first"])
def test_components_that_share_a_weight_run_in_turn(order: str) -> None:
    first, second = nn.Linear(16, 16), nn.Linear(16, 16)
    second.weight = first.weight
    x = torch.randn(2, 16)
    expected = second(first(x))
    pipe = offload(order, first=first, second=second)
    for _ in range(2):
        assert torch.equal(pipe["second"](pipe["first"](x)).cpu(), expected)
        assert first.weight is second.weight
    greenroom.offload_now(pipe)
    assert first.weight.device.type == "cpu"


def test_a_weight_shared_with_a_component_that_goes_home_stays_with_the_one_at_work() -> None:
    outer, inner, other = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
    inner.weight = outer.weight
    pipe: dict[str, nn.Module] = {}

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = pipe["other"](pipe["inner"](x))  # the inner one makes room for the other one
        return nn.functional.linear(y, self.outer.weight, self.outer.bias)

    whole = Holding(run, outer=outer)
    x = torch.randn(2, 16)
    pipe |= {"inner": inner, "other": other}
    expected = run(whole, x)
    offloaded = offload(whole=whole, inner=inner, other=other)
    pipe |= offloaded
    with sim.measure() as cost:
        for _ in range(2):
            assert torch.equal(pipe["whole"](x).cpu(), expected)
    assert cost.d2h_bytes < 1024  # the two results, and what the comparisons read
    greenroom.offload_now(offloaded)
    assert outer.weight is inner.weight and outer.weight.device.type == "cpu"


# ---- shape and strides
# -------------------------------------------------------------------------------


def channels_last() -> torch.Tensor:
    return torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)


LAYOUTS = {
    "transposed": lambda: torch.randn(12, 20).t(),
    "channels_last": channels_last,
    "every second row": lambda: torch.randn(40, 6)[::2],
    "every third column": lambda: torch.randn(6, 30)[:, ::3],
    "expanded": lambda: torch.randn(5, 1).expand(5, 7),
    "from the middle of a storage": lambda: torch.randn(100)[37:61],
    "0-d": lambda: torch.tensor(2.5),
    "no elements": lambda: torch.empty(0, 6),
    "no elements in the middle": lambda: torch.empty(3, 0, 2),
    "one element": lambda: torch.ones(1, 1, 1, 1),
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("held_as", ["parameter", "buffer"])
def test_strides_and_values_are_the_same_on_the_device_and_after(kind: str, held_as: str) -> None:
    tensor = LAYOUTS[kind]()
    held: Any = nn.Parameter(tensor) if held_as == "parameter" else tensor
    seen: list[Any] = []

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        there = self.held
        seen.append((there.device.type, there.shape, there.stride(), there.dtype))
        return there.detach() * x.sum()

    module = Holding(run, held=held)
    x = torch.randn(3)
    expected, strides = run(module, x), tensor.stride()
    pipe = offload(module=module)
    for _ in range(2):
        seen.clear()
        assert torch.equal(pipe["module"](x).cpu(), expected)
        assert seen == [("sim", tensor.shape, strides, tensor.dtype)]
        greenroom.offload_now(pipe)
        assert module.held is held
        assert module.held.device.type == "cpu" and module.held.stride() == strides
        assert torch.equal(module.held.detach(), tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_of_every_dtype_survive_the_way_there_and_back(dtype: torch.dtype) -> None:
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (320,), dtype=torch.uint8)
    tensor = raw.view(dtype).clone()
    on_device: list[torch.Tensor] = []

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        on_device.append(self.held.cpu())
        return x

    pipe = offload(module=Holding(run, held=tensor))
    with sim.measure() as cost:
        pipe["module"](torch.zeros(1))
        greenroom.offload_now(pipe)
    held = pipe["module"].held
    assert held is tensor and held.dtype == dtype
    assert torch.equal(bits(on_device[0]), raw) and torch.equal(bits(held), raw)
    assert cost.d2h_bytes <= raw.nbytes + 64  # what `run` reads, and no weight


def test_conjugate_and_negative_views_keep_their_meaning() -> None:
    values = torch.randn(6, dtype=torch.complex64)
    held = {"conjugate": values.conj(), "negative": values.conj().imag}
    assert held["conjugate"].is_conj() and held["negative"].is_neg()

    def run(self: Any, x: torch.Tensor) -> torch.Tensor:
        assert self.conjugate.device == self.negative.device == x.device
        return self.conjugate * x + self.negative

    module = Holding(run, **held)
    x = torch.randn(6)
    expected = values.conj() * x - values.imag
    pipe = offload(module=module)
    for _ in range(2):
        assert torch.equal(pipe["module"](x).cpu(), expected)
        greenroom.offload_now(pipe)
        assert torch.equal(module.conjugate, values.conj())
        assert torch.equal(module.negative, -values.imag)


def test_views_in_several_dtypes_of_one_storage_are_no_problem() -> None:
    base = torch.randint(0, 255, (64,), dtype=torch.uint8)
    base[4:].view(torch.float32).copy_(torch.randn(15))
    module = Holding(
        lambda self, x: self.numbers.sum() * x + self.raw.sum(),
        raw=base[1:],
        numbers=base[4:].view(torch.float32),
    )
    x = torch.randn(3)
    expected = module(x)
    pipe = offload(module=module)
    assert torch.equal(pipe["module"](x).cpu(), expected)


# ---- identity
# -------------------------------------------------------------------------------


def test_parameters_keep_identity_attributes_hooks_and_whether_they_need_gradients() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    module[0].weight.requires_grad_(False)
    module[1].weight.tag = "mine"  # type: ignore[assignment]
    module[1].weight.register_hook(lambda grad: grad)
    parameters = list(module.parameters())
    alive = [weakref.ref(p) for p in parameters]
    needs = [p.requires_grad for p in parameters]
    pipe = offload(module=module)
    for _ in range(3):
        pipe["module"](torch.randn(2, 8))
        assert all(p.device.type == "sim" for p in module.parameters())
        greenroom.offload_now(pipe)
    assert all(p is q() for p, q in zip(module.parameters(), alive, strict=True))
    assert [p.requires_grad for p in module.parameters()] == needs
    assert module[1].weight.tag == "mine" and module[1].weight._backward_hooks  # type: ignore[comparison-overlap]


def test_an_optimiser_steps_the_weights_that_the_component_uses(left_on_device: Any) -> None:
    def train(module: nn.Module, call: Any, between: Any) -> list[torch.Tensor]:
        optimiser = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            call(torch.full((2, 8), float(step + 1))).square().mean().backward()
            between()
            optimiser.step()
            if step:  # a gradient that is left travels with its weight
                optimiser.zero_grad()
        return [p.detach() for p in module.parameters()]

    torch.manual_seed(0)
    plain, ours = nn.Linear(8, 8), nn.Linear(8, 8)
    ours.load_state_dict(plain.state_dict())
    expected = train(plain, plain, lambda: None)
    pipe = offload(module=ours)
    found = train(ours, pipe["module"], lambda: greenroom.offload_now(pipe))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    ours.zero_grad()
    gc.collect()
    assert not any(left_on_device())


def test_a_component_named_twice_is_one_component() -> None:
    shared, other = nn.Linear(32, 32), nn.Linear(32, 32)
    x = torch.randn(2, 32)
    expected = other(shared(shared(x)))
    pipe = {"one": shared, "two": shared, "other": other}
    greenroom.enable_model_cpu_offload(pipe, device="sim", sequence="one->two->other")
    with sim.measure() as cost:
        found = pipe["other"](pipe["two"](pipe["one"](x)))
    assert torch.equal(found.cpu(), expected)
    nbytes = sum(p.nbytes for m in (shared, other) for p in m.parameters())
    assert cost.h2d_bytes <= nbytes + x.nbytes + 1024
    greenroom.disable_model_cpu_offload(pipe)
    assert not hasattr(shared, "_hf_hook")


def test_layers_named_twice_inside_a_component_travel_once() -> None:
    layer = nn.Linear(64, 64)
    pipe = offload(module=nn.Sequential(layer, nn.ReLU(), layer))
    with sim.measure() as cost:
        pipe["module"](torch.randn(1, 64))
    assert cost.h2d_bytes < 1.2 * layer.weight.nbytes


def test_components_without_weights_run_on_the_device() -> None:
    pipe = offload(nothing=nn.ReLU(), something=nn.Linear(4, 4))
    x = torch.randn(2, 4)
    found = pipe["nothing"](pipe["something"](pipe["nothing"](x)))
    assert found.device.type == "sim"
    assert torch.equal(found.cpu(), pipe["something"](x.relu()).relu().cpu())


def test_weights_made_in_inference_mode_can_be_offloaded() -> None:
    with torch.inference_mode():
        module = nn.Linear(16, 16)
    assert module.weight.is_inference()
    x = torch.randn(2, 16)
    expected = module(x)
    pipe = offload(module=module)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(pipe["module"](x).cpu(), expected)
        greenroom.offload_now(pipe)
        assert module.weight.device.type == "cpu"
    with torch.inference_mode():
        module.weight.mul_(2)
        assert torch.equal(
            pipe["module"](x).cpu(), nn.functional.linear(x, module.weight.cpu(), module.bias.cpu())
        )


@pytest.mark.parametrize("enter", [True, False])
def test_a_default_device_of_the_caller_changes_nothing(enter: bool, left_on_device: Any) -> None:
    module, other = nn.Linear(256, 256), nn.Linear(256, 256)
    x = torch.randn(64, 256)
    expected = other(module(x))
    pipe = offload(module=module, other=other)
    if enter:
        context: Any = torch.device("sim")
    else:
        torch.set_default_device("sim")
        context = torch.no_grad()
    try:
        with context:
            for _ in range(4):
                assert torch.equal(pipe["other"](pipe["module"](x)).cpu(), expected)
            greenroom.offload_now(pipe)
    finally:
        torch.set_default_device(None)
    assert all(p.device.type == "cpu" for m in (module, other) for p in m.parameters())
    gc.collect()
    assert not any(left_on_device())


def test_conversion_by_swapping_tensors_works_at_home() -> None:
    module = nn.Linear(8, 8)
    x = torch.randn(2, 8)
    pipe = offload(module=module)
    pipe["module"](x)
    greenroom.offload_now(pipe)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.to(torch.float64)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(
        pipe["module"](x.double()).cpu(),
        nn.functional.linear(x.double(), module.weight.cpu(), module.bias.cpu()),
    )


def test_a_weight_that_is_computed_before_each_forward_is_computed_on_the_device() -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = torch.nn.utils.weight_norm(nn.Linear(16, 16))
    parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    x = torch.randn(2, 16)
    with torch.no_grad():
        expected = parametrized(layer(x))
        pipe = offload(module=nn.Sequential(layer, parametrized))
        assert torch.equal(pipe["module"](x).cpu(), expected)
        greenroom.offload_now(pipe)
        assert torch.equal(parametrized(layer(x)).cpu(), expected)  # not through the whole


# ---- where weights are when offloading is enabled
# -------------------------------------------------------------------------------


def test_weights_on_the_meta_device_are_refused_before_anything_is_touched() -> None:
    first = nn.Linear(4, 4)
    second = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    pipe = {"first": first, "second": second}
    with (
        sim.measure() as cost,
        pytest.raises(WeightsError, match=r"second: 1\.weight is on the meta device"),
    ):
        greenroom.enable_model_cpu_offload(pipe, device="sim", sequence="first->second")
    assert not hasattr(first, "_hf_hook") and not hasattr(second, "_hf_hook")
    assert (cost.h2d_bytes, cost.kernels) == (0, 0)


def test_weights_without_a_shape_yet_are_refused_before_anything_is_touched() -> None:
    first, second = nn.Linear(4, 4), nn.LazyLinear(4)
    with pytest.raises(WeightsError, match=r"second: weight .*first input"):
        offload(first=first, second=second)
    assert not hasattr(first, "_hf_hook") and not hasattr(second, "_hf_hook")


def test_a_layer_that_loses_its_values_later_is_named_and_nothing_stays_behind(
    left_on_device: Any,
) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pipe = offload(module=module)
    pipe["module"](torch.zeros(1, 4))
    greenroom.offload_now(pipe)
    module[1].to("meta")
    with pytest.raises(WeightsError, match=r"module: 1\.weight is on the meta device"):
        pipe["module"](torch.zeros(1, 4))
    assert module[0].weight.device.type == "cpu"
    assert not any(left_on_device())


@pytest.mark.parametrize("device", ["sim:0", "sim:1"])
def test_weights_that_are_on_a_device_when_offloading_is_enabled_go_home(
    device: str, two_devices: None, left_on_device: Any
) -> None:
    torch.manual_seed(0)
    module, other = nn.Linear(16, 16), nn.Linear(16, 16)
    x = torch.randn(2, 16)
    expected = other(module(x))
    module.to(device)
    weight = module.weight
    pipe = offload(module=module, other=other)
    assert module.weight is weight and weight.device.type == "cpu"
    assert not any(left_on_device())
    assert torch.equal(pipe["other"](pipe["module"](x)).cpu(), expected)
    greenroom.offload_now(pipe)
    assert not any(left_on_device())


def test_a_layer_that_was_put_on_another_device_by_hand_comes_home_with_the_rest(
    two_devices: None, left_on_device: Any
) -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    x = torch.randn(2, 16)
    expected = module(x)
    pipe = offload(module=module)
    pipe["module"](x)
    greenroom.offload_now(pipe)
    module[1].to("sim:1")
    assert torch.equal(pipe["module"](x).cpu(), expected)
    greenroom.offload_now(pipe)
    assert all(p.device.type == "cpu" for p in module.parameters())
    assert not any(left_on_device())


def test_a_layout_that_the_device_cannot_take_is_named_and_nothing_stays_behind(
    left_on_device: Any,
) -> None:
    module = Holding(dense=torch.randn(64, 64), mask=torch.eye(8).to_sparse())
    pipe = offload(module=module)
    with pytest.raises(WeightsError, match=r"mask is a torch\.sparse_coo tensor of torch\.float32"):
        pipe["module"](torch.zeros(1))
    assert module.dense.device.type == "cpu"
    assert not any(left_on_device())


# ---- and when it is disabled
# -------------------------------------------------------------------------------


def test_after_disable_weights_own_their_storages_again() -> None:
    card = sim.get_profile("rtx-4090")
    sim.configure(dataclasses.replace(card, memory_bytes_per_s=card.memory_bytes_per_s / 1000))
    module = nn.Sequential(*[nn.Linear(256, 256) for _ in range(4)])
    tied = nn.Linear(256, 256)
    tied.weight = module[0].weight
    module.append(tied)
    sizes = [p.untyped_storage().nbytes() for p in module.parameters()]
    values = [p.detach().clone() for p in module.parameters()]
    pipe = offload(module=module)
    x = torch.randn(64, 256)
    for _ in range(5):  # while the device works, the host moves the weights into slabs
        pipe["module"](x)
        greenroom.offload_now(pipe)
    slabs = {p.untyped_storage().data_ptr() for p in module.parameters()}
    assert len(slabs) < len(sizes), (
        "the weights were never moved into slabs: the test tests nothing"
    )
    greenroom.disable_model_cpu_offload(pipe)
    assert [p.untyped_storage().nbytes() for p in module.parameters()] == sizes
    assert all(torch.equal(p, v) for p, v in zip(module.parameters(), values, strict=True))
    assert tied.weight is module[0].weight
    assert not any(p.is_pinned() for p in module.parameters())
