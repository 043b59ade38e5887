"""What a first call works on makes room for itself: seen before it is there, one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import greenroom
import greenroom.sim as sim
from greenroom.activations import ActivationWatch, is_compiled, returned_nbytes

MIB = 2**20
SIM = torch.device("sim", 0)


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=SIM)


@pytest.mark.parametrize(
    ("call", "nbytes"),
    [
        (lambda: nothing(64, 32) + 1.0, 64 * 32 * 4),
        (lambda: nothing(64, 1) * nothing(1, 32), 64 * 32 * 4),
        (lambda: nothing(8, 64) @ nothing(64, 512), 8 * 512 * 4),
        (lambda: nn.functional.conv2d(nothing(1, 3, 16, 16), nothing(32, 3, 3, 3)), 32 * 14**2 * 4),
        (lambda: nn.functional.interpolate(nothing(1, 2, 8, 8), scale_factor=4.0), 2 * 32**2 * 4),
        (lambda: nothing(100).half(), 200),
        (lambda: torch.cat([nothing(100), nothing(28)]), 512),
        (lambda: torch.ones(1000).to(SIM), 4000),
        (lambda: torch.zeros(10, dtype=torch.int64, device=SIM), 80),
        (lambda: nothing(100).view(10, 10).transpose(0, 1), 0),
        (lambda: nothing(100).add_(1.0), 0),
        (lambda: torch.ones(1000) + 1.0, 0),  # on the host
    ],
)
def test_what_an_operation_returns_is_known_before_it_runs(call: Any, nbytes: int) -> None:
    found: list[int] = []

    class Foreseen(ActivationWatch):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found.append(returned_nbytes(func, args, kwargs or {}, SIM))
            return func(*args, **(kwargs or {}))

    with Foreseen(SIM, lambda _: 0):
        call()
    # Inputs are made inside as well, each of as many bytes as it has.
    made = [n for n in found if n]
    assert (made[-1] if nbytes else 0) == nbytes or (not nbytes and found[-1] == 0)


def test_where_it_depends_on_values_it_is_what_was_given() -> None:
    x = torch.ones(1000, device=SIM)
    assert returned_nbytes(torch.ops.aten.nonzero.default, (x,), {}, SIM) == 4000


def test_it_asks_only_when_what_there_is_may_be_used_up() -> None:
    asked: list[int] = []

    def ask(nbytes: int) -> int:
        asked.append(nbytes)
        return 100 * 4096

    with torch.no_grad(), ActivationWatch(SIM, ask):
        x = nothing(32, 32)
        for _ in range(250):
            x = x @ x
    assert asked == [2 * 4096] * 3  # what it returns, and as much again for itself


def test_what_works_element_by_element_takes_nothing_for_itself() -> None:
    asked: list[int] = []
    with torch.no_grad():
        x = nothing(1024)
        with ActivationWatch(SIM, lambda nbytes: asked.append(nbytes) or 0):
            torch.nn.functional.silu(x + 1.0)
    assert asked == [4096] * 2


def test_compiled_modules_are_known() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    inside = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    inside[0].compile()
    forward = nn.Linear(2, 2)
    forward.forward = torch.compile(forward.forward)  # type: ignore[method-assign]
    assert not is_compiled(plain)
    assert is_compiled(inside) and is_compiled(forward) and is_compiled(torch.compile(plain))


def test_what_is_alike_is_not_mixed_up() -> None:
    asked: list[int] = []

    def ask(nbytes: int) -> int:
        asked.append(nbytes)
        return 0

    with ActivationWatch(SIM, ask):
        torch.full((1000,), True, device=SIM)
        torch.full((1000,), 1, device=SIM)  # True == 1, but takes eight bytes
    assert asked == [2 * 1000, 2 * 8000]


def test_tensors_without_such_bytes_pass_through() -> None:
    with ActivationWatch(torch.device("cpu"), lambda nbytes: nbytes):
        sparse = torch.eye(4).to_sparse() * 2.0
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]) * 2.0
    assert torch.equal(sparse.to_dense(), torch.eye(4) * 2) and nested.is_nested


def test_modes_of_others_see_only_what_is_really_done() -> None:
    class Others(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            assert not any(isinstance(a, torch.Tensor) and a.is_meta for a in args)
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with torch.no_grad(), Others(), ActivationWatch(SIM, lambda nbytes: nbytes):
        nothing(8, 64) @ nothing(64, 8)
    assert [name for name in seen if "mm" in name] == ["aten.mm.default"]


class Wide(nn.Module):
    """Small weights, and a lot to work on."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.times = times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = self.linear(x).repeat(self.times, 1)
        return (wide * 2.0).sum(0, keepdim=True)


class Pipeline:
    """Large weights, that then have to make room."""

    model_cpu_offload_seq = "large->wide"

    def __init__(self, times: int) -> None:
        torch.manual_seed(0)
        self.large = nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))  # 8 MiB
        self.wide = Wide(times)
        self.components = {"large": self.large, "wide": self.wide}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.wide(self.large(x)[:, :64]).cpu()


class Rows(Wide):
    """Returns a lot."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = self.linear(x).repeat(self.times, 1)
        return rows


class WideResult(Pipeline):
    """Its result stays where it was made."""

    def __init__(self, times: int) -> None:
        super().__init__(times)
        self.wide = self.components["wide"] = Rows(times)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            result: torch.Tensor = self.wide(self.large(x)[:, :64])
            return result


@pytest.mark.parametrize("times", [1000, 12_000])
def test_weights_make_room_for_what_a_later_component_works_on(times: int) -> None:
    x = torch.randn(1, 512)
    expected = Pipeline(times)(x)
    sim.configure("rtx-4090", capacity="1GiB")
    pipe, budget = Pipeline(times), 12 * MIB
    greenroom.enable_model_cpu_offload(pipe, budget=budget)
    for call in range(2):
        with sim.measure() as cost:
            assert torch.equal(pipe(x), expected)
        assert cost.races == [] and cost.peak_bytes <= budget
        if call == 0:
            # Nothing was sent twice, and what there is room for beside it has stayed.
            assert cost.h2d_bytes < 1.02 * sum(
                p.nbytes for module in pipe.components.values() for p in module.parameters()
            ) + x.nbytes + (6 * MIB if times > 1000 else 0)


def test_the_memory_of_a_result_that_is_gone_is_left_to_the_next_calls_weights() -> None:
    x = torch.randn(1, 512)
    expected = WideResult(12_000)(x)  # 3 MB
    sim.configure("rtx-4090")
    pipe, budget = WideResult(12_000), 9 * MIB  # the weights alone take 8.4 MB
    greenroom.enable_model_cpu_offload(pipe, budget=budget)
    for _ in range(3):
        with sim.measure() as cost:
            assert torch.equal(pipe(x).cpu(), expected)
        assert cost.races == [] and cost.peak_reserved_bytes <= budget


def test_a_forward_that_found_no_room_is_alone_the_second_time() -> None:
    x = torch.randn(1, 512)
    expected = Pipeline(24_000)(x)
    sim.configure("rtx-4090", capacity="13MiB")  # less than is granted
    pipe = Pipeline(24_000)
    greenroom.enable_model_cpu_offload(pipe, budget=22 * MIB)
    for _ in range(2):
        assert torch.equal(pipe(x), expected)


class Outer(nn.Module):
    """Returns a thousand times what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        row = self.linear(x)
        return (row.T * row).sum(0, keepdim=True)


def test_a_small_input_may_give_a_large_result() -> None:
    def build() -> Pipeline:
        pipe = Pipeline(1)
        torch.manual_seed(1)
        pipe.wide = pipe.components["wide"] = Outer()  # type: ignore[assignment]
        return pipe

    x = torch.randn(1, 512)
    expected = build()(x)
    sim.configure("rtx-4090", capacity="1GiB")
    pipe, budget = build(), 14 * MIB
    greenroom.enable_model_cpu_offload(pipe, budget=budget)
    with sim.measure() as cost:
        assert torch.equal(pipe(x), expected)
    assert cost.peak_bytes <= budget


class Growing:
    """A loop that keeps some of what each of its turns returns."""

    model_cpu_offload_seq = "denoiser"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.denoiser = nn.Sequential(*(nn.Linear(512, 512) for _ in range(10)))  # 10 MiB
        self.components = {"denoiser": self.denoiser}

    def __call__(self, x: torch.Tensor, num_inference_steps: int) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        with torch.no_grad():
            for _ in range(num_inference_steps):
                x = self.denoiser(x)
                kept.append(x[:64].clone())
            return torch.cat([turn.cpu() for turn in kept])


@pytest.mark.parametrize("megabytes", [8, 10, 12])
def test_what_grows_from_turn_to_turn_gets_more_room(megabytes: int) -> None:
    # A turn works on 1.5 MiB, and leaves an eighth: in the end it is three times as much.
    x, steps = torch.randn(256, 512), 24
    expected = Growing()(x, num_inference_steps=steps)
    sim.configure("rtx-4090", capacity="1GiB")
    pipe, budget = Growing(), megabytes * MIB
    greenroom.enable_model_cpu_offload(pipe, budget=budget)
    for _ in range(2):
        with sim.measure() as cost:
            assert torch.equal(pipe(x, num_inference_steps=steps), expected)
        assert cost.races == [] and cost.peak_bytes <= budget
