"""Weights that a quantisation library holds: they travel as bytes, and stay what they are."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import greenroom
import greenroom.sim as sim
from greenroom.device.walk import is_plain, walk
from greenroom.zoo.tiny import call_kwargs, tiny

WIDTH = 256


def quanto(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from optimum.quanto import freeze, qfloat8, qint8, quantize

        module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        quantize(module, weights={"qint8": qint8, "qfloat8": qfloat8}[kind])
        freeze(module)
        return module

    return build


def torchao(config: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        quantization = pytest.importorskip("torchao.quantization")
        module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        quantization.quantize_(module, getattr(quantization, config)())
        return module

    return build


def gguf(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import gguf as library
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        quant_type = library.GGMLQuantizationType[kind]
        layers = []
        for _ in range(2):
            layer = GGUFLinear(WIDTH, WIDTH, bias=True, compute_dtype=torch.float32)
            packed = library.quants.quantize(torch.randn(WIDTH, WIDTH).div_(16).numpy(), quant_type)
            layer.weight = GGUFParameter(torch.from_numpy(packed), quant_type=quant_type)
            layers.append(layer)
        return nn.Sequential(layers[0], nn.GELU(), layers[1])

    return build


class Scales:
    """Kept beside the weight, as bitsandbytes does: the weight's own bytes are of no use alone."""

    def __init__(self, absmax: torch.Tensor, nested: Scales | None = None) -> None:
        self.absmax, self.nested = absmax, nested


class Packed(nn.Parameter):
    """A weight in the manner of bitsandbytes: memory, and an object with tensors."""

    def __new__(cls, data: torch.Tensor, scales: Scales, module: nn.Module) -> Packed:
        self = torch.Tensor._make_subclass(cls, data, False)
        self.scales, self.module = scales, module
        return self


class PackedLinear(nn.Module):
    """Moves its weight's scales to a state of its own when it first runs."""

    def __init__(self) -> None:
        super().__init__()
        weight = torch.randn(WIDTH, WIDTH)
        absmax, outer = weight.abs().amax(1, keepdim=True), torch.tensor(2.0)
        packed = (weight / absmax * 127).round().to(torch.int8)
        self.weight = Packed(packed, Scales(absmax, Scales(outer)), self)
        self.state: Scales | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.weight.scales is not None:
            self.state, self.weight.scales = self.weight.scales, None
        return x @ (self.weight * self.state.absmax * self.state.nested.absmax / 127).t()


def packed() -> nn.Module:
    return nn.Sequential(PackedLinear(), PackedLinear())


class Shell(torch.Tensor):
    """A wrapper around two tensors, one of which may be such a wrapper."""

    def __new__(cls, values: torch.Tensor, scale: torch.Tensor) -> Shell:
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, dtype=torch.float32, device=values.device
        )

    def __init__(self, values: torch.Tensor, scale: torch.Tensor) -> None:
        self.values_, self.scale = values, scale

    def real(self) -> torch.Tensor:
        values = self.values_.real() if isinstance(self.values_, Shell) else self.values_
        return values.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].values_, args[0].scale)
        if func is torch.ops.aten._to_copy.default:
            device = kwargs["device"]
            return cls(args[0].values_.to(device), args[0].scale.to(device))
        args = torch.utils._pytree.tree_map_only(Shell, Shell.real, args)
        return func(*args, **(kwargs or {}))


class TraceableShell(Shell):
    """The same with the protocol that torch.compile asks for."""

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values_", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> TraceableShell:
        return TraceableShell(inner["values_"], inner["scale"])


def shells(cls: type[Shell]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        for layer, depth in zip(module[::2], (1, 2), strict=True):
            weight: Any = torch.randint(-127, 127, (WIDTH, WIDTH), dtype=torch.int8)
            for _ in range(depth):
                weight = cls(weight, torch.full((WIDTH, 1), 1 / 64))
            layer.weight = nn.Parameter(weight, requires_grad=False)
        return module

    return build


KINDS: dict[str, Callable[[], nn.Module]] = {
    "quanto int8": quanto("qint8"),
    "quanto float8": quanto("qfloat8"),
    "gguf Q8_0": gguf("Q8_0"),
    "gguf Q4_0": gguf("Q4_0"),
    "a weight with scales beside it": packed,
    "a shell": shells(Shell),
    "a traceable shell": shells(TraceableShell),
    "torchao int8": torchao("Int8WeightOnlyConfig"),
    "torchao int8 dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao float8": torchao("Float8WeightOnlyConfig"),
    "torchao intx": torchao("IntxWeightOnlyConfig"),
}


@pytest.fixture(params=KINDS)
def quantised(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return KINDS[request.param]()


@pytest.fixture
def enable() -> Iterator[Callable[..., dict[str, nn.Module]]]:
    """Offload these modules, until the test ends."""
    pipes: list[dict[str, nn.Module]] = []

    def offload(**modules: nn.Module) -> dict[str, nn.Module]:
        greenroom.enable_model_cpu_offload(modules, device="sim", sequence="->".join(modules))
        pipes.append(modules)
        return modules

    yield offload
    for pipe in pipes:
        greenroom.disable_model_cpu_offload(pipe)


def memory(module: nn.Module) -> list[torch.Tensor]:
    """All strided memory of the module, each tensor once."""
    return list({id(h.tensor): h.tensor for h in walk(module) if is_plain(h.tensor)}.values())


def places(module: nn.Module) -> set[str]:
    return {held.tensor.device.type for held in walk(module)}


def test_outputs_are_those_of_the_resident_module(quantised: nn.Module, enable: Any) -> None:
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        expected = quantised(x)
        pipe = enable(module=quantised)
        for _ in range(3):
            found = pipe["module"](x)
            assert found.device.type == "sim" and places(quantised) == {"sim"}
            assert torch.equal(found.cpu(), expected)
            greenroom.offload_now(pipe)
            assert places(quantised) == {"cpu"}
        greenroom.disable_model_cpu_offload(pipe)
        assert torch.equal(quantised(x), expected)


def test_bytes_go_there_and_do_not_come_back(quantised: nn.Module, enable: Any) -> None:
    nbytes = sum(tensor.nbytes for tensor in memory(quantised))
    pipe = enable(module=quantised)
    x = torch.randn(4, WIDTH)
    with torch.no_grad():
        pipe["module"](x)
        greenroom.offload_now(pipe)
        for _ in range(2):
            with sim.measure() as cost:
                pipe["module"](x)
                greenroom.offload_now(pipe)
            assert nbytes <= cost.h2d_bytes <= nbytes + x.nbytes + 64 * 256  # padding
            assert cost.d2h_bytes < 256  # the comparison
    assert cost.races == []


def test_every_object_stays_the_same(quantised: nn.Module, enable: Any) -> None:
    """The weights, what is inside of them, and what their classes know about them."""

    def description(module: nn.Module) -> list[Any]:
        return [
            (id(h.tensor), type(h.tensor), h.tensor.dtype, h.tensor.shape, h.tensor.stride())
            for h in walk(module)
        ]

    x = torch.randn(4, WIDTH)
    pipe = enable(module=quantised)
    with torch.no_grad():
        pipe["module"](x)  # some libraries arrange their weights when they first run
        watched = [weakref.ref(p) for p in quantised.parameters()]
        before = sorted(description(quantised), key=lambda entry: entry[0])
        attributes = [
            {k: v for k, v in vars(p).items() if not isinstance(v, torch.Tensor)}
            for p in quantised.parameters()
        ]
        for _ in range(2):
            greenroom.offload_now(pipe)
            assert sorted(description(quantised), key=lambda entry: entry[0]) == before
            pipe["module"](x)
            assert sorted(description(quantised), key=lambda entry: entry[0]) == before
    assert all(ref() is p for ref, p in zip(watched, quantised.parameters(), strict=True))
    assert attributes == [
        {k: v for k, v in vars(p).items() if not isinstance(v, torch.Tensor)}
        for p in quantised.parameters()
    ]


def test_a_change_on_the_device_comes_home(quantised: nn.Module, enable: Any) -> None:
    x = torch.randn(4, WIDTH)
    pipe = enable(module=quantised)
    with torch.no_grad():
        pipe["module"](x)
        changed = next(t for t in memory(quantised) if t.dtype == torch.float32)
        changed.data.mul_(2)
        expected = changed.detach().cpu().clone()
        again = pipe["module"](x).cpu()
        greenroom.offload_now(pipe)
        assert changed.device.type == "cpu" and torch.equal(changed, expected)
        assert torch.equal(pipe["module"](x).cpu(), again)


def test_nothing_stays_on_the_device_when_it_is_full(quantised: nn.Module, enable: Any) -> None:
    x = torch.randn(4, WIDTH)
    pipe = enable(module=quantised)
    with torch.no_grad():
        expected = pipe["module"](x).cpu()
        greenroom.offload_now(pipe)
        sim.fail("device_alloc")
        with pytest.raises(torch.OutOfMemoryError):
            pipe["module"](x)
        assert places(quantised) == {"cpu"}
        assert torch.equal(pipe["module"](x).cpu(), expected)


def test_modules_can_be_moved_and_cast_by_hand_while_they_are_home(
    quantised: nn.Module, enable: Any
) -> None:
    x = torch.randn(4, WIDTH)
    pipe = enable(module=quantised)
    with torch.no_grad():
        expected = pipe["module"](x).cpu()
        greenroom.offload_now(pipe)
        quantised.to("cpu")  # makes torchao's and quanto's weights anew
        assert torch.equal(pipe["module"](x).cpu(), expected)
        greenroom.offload_now(pipe)
        assert places(quantised) == {"cpu"}


def test_a_pipeline_with_a_quantised_transformer_and_encoder(enable: Any) -> None:
    from optimum.quanto import freeze, qint8, quantize

    def pipeline() -> Any:
        pipe = tiny("flux")
        for part in (pipe.transformer, pipe.text_encoder_2):
            quantize(part, weights=qint8)
            freeze(part)
        return pipe

    expected = pipeline()(**call_kwargs("flux")).images
    pipe = pipeline()
    greenroom.enable_model_cpu_offload(pipe)
    for _ in range(2):
        with sim.measure() as cost:
            found = pipe(**call_kwargs("flux")).images
        assert torch.equal(found.cpu(), expected)
        assert cost.d2h_bytes <= expected.nbytes + 4096 and cost.races == []
    assert places(pipe.transformer) == places(pipe.text_encoder_2) == {"cpu"}
    del pipe
    gc.collect()


def test_an_autoencoder_with_quantised_weights_still_has_two_sides(enable: Any) -> None:
    from optimum.quanto import freeze, qint8, quantize

    vae = tiny("sd").vae
    quantize(vae, weights=qint8)
    freeze(vae)
    z = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(z).sample
        pipe = enable(vae=vae)
        with sim.measure() as cost:
            assert torch.equal(pipe["vae"].decode(z).sample.cpu(), expected)
    assert cost.h2d_bytes < sum(tensor.nbytes for tensor in memory(vae))


def test_a_transformer_that_was_loaded_from_gguf(tmp_path: Any) -> None:
    import gguf as library
    from diffusers import GGUFQuantizationConfig
    from diffusers.quantizers.gguf.gguf_quantizer import GGUFQuantizer
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = library.GGMLQuantizationType.Q8_0

    def pipeline() -> Any:
        pipe = tiny("flux")
        quantizer = GGUFQuantizer(GGUFQuantizationConfig(compute_dtype=torch.float32))
        state = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
        for name, weight in state.items():
            if weight.ndim == 2 and weight.shape[-1] % 32 == 0 and name.endswith(".weight"):
                raw = library.quants.quantize(weight.numpy(), kind)
                state[name] = GGUFParameter(torch.from_numpy(raw), quant_type=kind)
        quantizer._process_model_before_weight_loading(pipe.transformer, None, state_dict=state)
        for name, weight in state.items():
            owner, _, last = name.rpartition(".")
            module = pipe.transformer.get_submodule(owner)
            if isinstance(weight, GGUFParameter):
                assert isinstance(module, GGUFLinear)
                module._parameters[last] = weight
            else:
                module._parameters[last] = nn.Parameter(weight, requires_grad=False)
        return pipe

    expected = pipeline()(**call_kwargs("flux")).images
    pipe = pipeline()
    count = sum(isinstance(p, GGUFParameter) for p in pipe.transformer.parameters())
    assert count > 10
    greenroom.enable_model_cpu_offload(pipe)
    for _ in range(2):
        with sim.measure() as cost:
            found = pipe(**call_kwargs("flux")).images
        assert torch.equal(found.cpu(), expected)
        assert cost.d2h_bytes <= expected.nbytes + 4096
    kinds = [p.quant_type for p in pipe.transformer.parameters() if isinstance(p, GGUFParameter)]
    assert kinds == [kind] * count
