"""Every operator, module and optimizer of torch has the CPU's bits, on torch's own test samples."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from sim.comparing import copied, difference, seed, seeded
from torch.utils._pytree import tree_leaves

import greenroom.sim as sim

# ---- every operator that torch knows -------------------------------------------------------------

# Names of OpInfo, with their variant where only that one is meant.
EXCEPTIONS = {
    **dict.fromkeys(
        [
            "empty",
            "empty_like",
            "empty_permuted",
            "empty_strided",
            "new_empty",
            "new_empty_strided",
        ],
        "returns memory as it finds it; here that is poison",
    ),
    **dict.fromkeys(
        ["sparse.sampled_addmm", "sparse.mm/reduce", "to_sparse"],
        "needs a sparse tensor, and the simulator has none",
    ),
    **dict.fromkeys(
        ["linalg.lstsq", "linalg.lstsq/grad_oriented"],
        "driver 'gelsy' reads pivots that torch leaves uninitialised: two runs on the CPU differ",
    ),
    "tensor_split": "takes its indices from the host alone, on CUDA too",
    **dict.fromkeys(
        [
            "nn.functional.linear_cross_entropy/chunked",
            "nn.functional.linear_cross_entropy/chunked_none",
        ],
        "torch accumulates the chunks of half precision in another order on the CPU",
    ),
}

PARTS = 8
every_part = pytest.mark.parametrize("part", range(PARTS))


def torch_testing(module: str) -> Any:
    """One of torch's own test modules. Importing one freezes torch.backends for the process."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(f"torch.testing._internal.{module}")
    finally:
        setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)


@functools.cache
def operators() -> list[Any]:
    found = [
        op
        for op in torch_testing("common_methods_invocations").op_db
        if not {op.name, full_name(op)} & EXCEPTIONS.keys()
    ]
    assert len(found) > 600
    return found


def full_name(op: Any) -> str:
    return f"{op.name}/{op.variant_test_name}" if op.variant_test_name else str(op.name)


def samples(op: Any, dtype: torch.dtype, most: int, *, grad: bool = False) -> list[Any]:
    found: list[Any] = []
    if dtype not in op.dtypes:
        return found
    seed()
    # Not op.sample_inputs(): it walks the stack for every sample, for error messages.
    made = iter(op.sample_inputs_func(op, "cpu", dtype, grad and op.supports_autograd))
    with contextlib.suppress(Exception):  # a few samples need what this build of torch lacks
        while len(found) < most:
            found.append(next(made))
    return found


def with_gradients(work: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What `work` returns, and the gradients of all inputs that want one."""
    result = seeded(work, *args, **kwargs)
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    inputs = [t for t in inputs if t.requires_grad]
    outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not inputs or not outputs:
        return result
    ones = [torch.ones_like(t) for t in outputs]
    return result, torch.autograd.grad(outputs, inputs, ones, allow_unused=True)


class Comparison:
    """Does the same thing on both devices again and again, and remembers where they differed."""

    def __init__(self) -> None:
        self.times = 0
        self.wrong: dict[str, str] = {}

    def __call__(self, name: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        ours = copied((args, kwargs), "sim")
        if all(
            one is other
            for one, other in zip(*map(tree_leaves, ((args, kwargs), ours)), strict=True)
        ):
            return  # names neither a tensor nor a device
        args, kwargs = copied((args, kwargs))
        try:
            expected = with_gradients(work, args, kwargs)
        except Exception:
            return  # some samples ask for what the CPU cannot do
        self.times += 1
        try:
            found = with_gradients(work, *ours)
        except Exception as error:
            self.wrong.setdefault(name, f"{type(error).__name__}: {str(error)[:300]}")
            return
        found, expected = (found, ours), (expected, (args, kwargs))  # inputs may have been changed
        if problem := difference(expected, found):
            self.wrong.setdefault(name, problem)

    def finish(self, at_least: int) -> None:
        assert not self.wrong, "\n".join(f"{name}: {why}" for name, why in self.wrong.items())
        assert self.times >= at_least
        assert sim.races() == []
        gc.collect()
        assert torch.sim.memory_allocated() == 0


@pytest.fixture
def compare() -> Iterator[Comparison]:
    sim.configure("h200")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Comparison()


@every_part
def test_every_operator_forward_and_backward(part: int, compare: Comparison) -> None:
    for op in operators()[part::PARTS]:
        for sample in samples(op, torch.float32, 20, grad=True):
            compare(full_name(op), op, sample.input, *sample.args, **sample.kwargs)
    compare.finish(at_least=200)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64], ids=str
)
def test_every_operator_in_other_dtypes(dtype: torch.dtype, compare: Comparison) -> None:
    for op in operators():
        for sample in samples(op, dtype, 4):
            compare(full_name(op), op, sample.input, *sample.args, **sample.kwargs)
    compare.finish(at_least=300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_every_operator_in_place(dtype: torch.dtype, compare: Comparison) -> None:
    for op in operators():
        if op.inplace_variant is None:
            continue
        for sample in samples(op, dtype, 4):
            if isinstance(sample.input, torch.Tensor):
                compare(
                    full_name(op), op.inplace_variant, sample.input, *sample.args, **sample.kwargs
                )
    compare.finish(at_least=15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
def test_every_operator_into_out(dtype: torch.dtype, compare: Comparison) -> None:
    """Into a tensor of the right size, into one that must grow, and into one with gaps."""

    def out_like(result: torch.Tensor, way: str) -> torch.Tensor:
        if way == "grow":
            return torch.empty(0, dtype=result.dtype)
        gaps = 2 if way == "gaps" else 1
        return torch.zeros(*result.shape, gaps, dtype=result.dtype)[..., 0]

    for op in operators():
        if not op.supports_out:
            continue
        for sample in samples(op, dtype, 4):
            try:
                result = seeded(op, *copied((sample.input, *sample.args)), **copied(sample.kwargs))
            except Exception:
                continue
            outs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
            if not all(isinstance(t, torch.Tensor) for t in outs):
                continue
            for way in ("right", "grow", "gaps"):
                out: Any = tuple(out_like(t, way) for t in outs)
                out = out if isinstance(result, (tuple, list)) else out[0]
                name = f"{full_name(op)} into out={way}"
                compare(name, op, sample.input, *sample.args, **sample.kwargs, out=out)
    compare.finish(at_least=60)


def test_every_operator_on_lists(compare: Comparison) -> None:
    tests = torch_testing("common_methods_invocations")
    names = [name for name in dir(tests) if name.startswith("foreach_") and name.endswith("_db")]
    for op in [op for name in names for op in getattr(tests, name)]:
        for sample in samples(op, torch.float32, 40):
            for variant in filter(None, (op.method_variant, op.inplace_variant)):
                compare(op.name, variant, sample.input, *sample.args, **sample.kwargs)
    compare.finish(at_least=10)


# ---- every module and every optimizer that torch has ---------------------------------------------

# Off the CPU, torch's recurrent layers take fused cells and do not multiply all inputs at once.
RECURRENT = ("nn.RNN", "nn.LSTM", "nn.GRU", "nn.LSTMCell", "nn.GRUCell")


@every_part
def test_every_module_forward_and_backward(part: int, compare: Comparison) -> None:
    for info in torch_testing("common_modules").module_db[part::PARTS]:
        if info.name in RECURRENT or "Lazy" in info.name:
            continue
        for training in (True, False):
            seed()
            made = info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=True, training=training
            )
            for sample in made[:20]:
                build, forward = sample.constructor_input, sample.forward_input
                if forward is None:
                    continue

                def run(*args: Any, kind: Any, build: Any, training: bool, **kwargs: Any) -> Any:
                    module = seeded(kind, *build.args, **build.kwargs).train(training)
                    module.to(next(t.device for t in tree_leaves(args) if torch.is_tensor(t)))
                    out = seeded(module, *args, **kwargs)
                    outs = [t for t in tree_leaves(out) if torch.is_tensor(t) and t.requires_grad]
                    state = list(module.parameters())
                    if outs and state:
                        ones = [torch.ones_like(t) for t in outs]
                        grads = {"retain_graph": True, "allow_unused": True}
                        state = list(torch.autograd.grad(outs, state, ones, **grads))
                    return out, state, list(module.buffers())

                options = {"kind": info.module_cls, "build": build, "training": training}
                compare(info.name, run, *forward.args, **forward.kwargs, **options)
    compare.finish(at_least=80)


@pytest.mark.parametrize("way", ["plain", "foreach", "fused"])
def test_every_optimizer(way: str, compare: Comparison) -> None:
    """Named outright: left alone, torch takes `foreach` on accelerators and a loop on the CPU."""
    for info in torch_testing("common_optimizers").optim_db:
        if way != "plain" and way not in info.supported_impls:
            continue
        for sample in info.optim_inputs_func(device="cpu"):
            options = {k: v for k, v in sample.kwargs.items() if k not in ("foreach", "fused")}
            if options.get("capturable"):
                continue
            if "foreach" in info.supported_impls:
                options["foreach"] = way == "foreach"
            if way == "fused":
                options |= {"foreach": False, "fused": True}

            def train(x: torch.Tensor, w: torch.Tensor, kind: Any, options: Any = options) -> Any:
                weight = torch.nn.Parameter(w)
                optimizer = kind([weight], **options)

                def loss() -> Any:
                    optimizer.zero_grad()
                    value = (x @ weight).tanh().pow(2).sum()
                    value.backward()
                    return value

                for _ in range(3):
                    optimizer.step(loss)
                state = [v for v in optimizer.state[weight].values() if torch.is_tensor(v)]
                return weight.detach(), [t for t in state if t.dim() > 0]

            x, w = torch.randn(5, 4), torch.randn(4, 3)
            compare(f"{info.name} {options}", train, x, w, info.optim_cls)
    compare.finish(at_least={"plain": 40, "foreach": 30, "fused": 10}[way])
