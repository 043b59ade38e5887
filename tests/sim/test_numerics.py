"""Whatever torch computes on the simulated device has the bits that the CPU computes."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import importlib
import io
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves, tree_map

import greenroom.sim as sim

# ---- comparing -----------------------------------------------------------------------------------


def copied(tree: Any, device: str = "cpu") -> Any:
    """The same values on a device; layouts and `requires_grad` come along."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided:
            return leaf.detach().to(device, copy=True).requires_grad_(leaf.requires_grad)
        if isinstance(leaf, (str, torch.device)) and str(leaf) == "cpu":
            return torch.device(device)
        return leaf

    return tree_map(one, tree)


def difference(expected: Any, found: Any) -> str | None:
    """In what `found`, made on the simulator, is not `expected`, made on the CPU."""
    expected, found = tree_leaves(expected), tree_leaves(found)
    if len(expected) != len(found):
        return f"{len(found)} results instead of {len(expected)}"
    for one, other in zip(expected, found, strict=True):
        if not isinstance(one, torch.Tensor):
            if type(one) is not type(other):
                return f"{other!r} instead of {one!r}"
            continue
        if other.device.type != "sim":
            return f"a result on {other.device}"
        facts = [(t.dtype, t.shape, t.stride(), t.storage_offset()) for t in (one, other)]
        if facts[0] != facts[1]:
            return f"{facts[1]} instead of {facts[0]}"
        if not same_bits(one.detach(), other.detach().cpu()):
            return f"other values ({one.dtype}, {tuple(one.shape)})"
    return None


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Bit for bit, save that every NaN is as good as another."""
    if one.is_complex():
        one, other = (
            torch.view_as_real(one.resolve_conj()),
            torch.view_as_real(other.resolve_conj()),
        )
    if not one.is_floating_point():
        return torch.equal(one, other)
    word = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    same = one.contiguous().view(word) == other.contiguous().view(word)
    if one.element_size() > 1:
        same |= one.isnan() & other.isnan()
    return bool(same.all())


def assert_same(expected: Any, found: Any) -> None:
    assert difference(expected, found) is None, difference(expected, found)


def seed(device: str = "cpu") -> None:
    """Zero for this device's generator; another for the other's, which must not be asked."""
    # torch.manual_seed() is slow: it formats the stack each time.
    torch.default_generator.manual_seed(0 if device == "cpu" else 1)
    torch.sim.manual_seed(0 if device == "sim" else 1)


def seeded(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `work` returns when the generator of its arguments' device starts at zero."""
    leaves = tree_leaves((args, kwargs))
    seed("sim" if any(torch.is_tensor(t) and t.is_sim for t in leaves) else "cpu")
    return work(*args, **kwargs)


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


# ---- layers by hand: sizes that reach the CPU's fast kernels -------------------------------------


def run_both(module: torch.nn.Module, *inputs: torch.Tensor, **kwargs: Any) -> torch.nn.Module:
    """Forward and backward on both devices; returns the module on the simulator."""
    there = copy.deepcopy(module).to("sim")
    results = []
    for model, device in ((module, "cpu"), (there, "sim")):
        args = copied(inputs, device)
        out = seeded(model, *args, **copied(kwargs, device))
        first = next(t for t in tree_leaves(out) if torch.is_tensor(t))
        first.square().mean().backward()
        results.append((out, [t.grad for t in args], [p.grad for p in model.parameters()]))
    assert_same(*results)
    assert_same(list(module.buffers()), list(there.buffers()))
    assert sim.races() == []
    return there


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("options", [{}, {"groups": 4}, {"stride": 2, "padding": 1}], ids=str)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose"])
def test_convolutions(kind: str, dimensions: int, options: dict[str, int]) -> None:
    conv = seeded(getattr(torch.nn, f"{kind}{dimensions}d"), 8, 16, 3, **options)
    run_both(conv, leaf(2, 8, *[9] * dimensions))


def test_convolution_keeps_channels_last() -> None:
    conv = seeded(torch.nn.Conv2d, 8, 16, 3).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
    there = run_both(conv, x.requires_grad_())
    assert there(x.detach().to("sim")).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "norm",
    [
        torch.nn.LayerNorm([16, 9]),
        torch.nn.GroupNorm(4, 16),
        torch.nn.BatchNorm1d(16),
        torch.nn.InstanceNorm1d(16, affine=True),
        torch.nn.RMSNorm([16, 9]),
    ],
    ids=lambda norm: type(norm).__name__,
)
@pytest.mark.parametrize("training", [True, False])
def test_norms(norm: torch.nn.Module, training: bool) -> None:
    run_both(copy.deepcopy(norm).train(training), leaf(4, 16, 9))


def test_batch_norm_updates_its_buffers() -> None:
    there = run_both(torch.nn.BatchNorm2d(4).train(), leaf(3, 4, 5, 5))
    assert there.num_batches_tracked.item() == 1
    assert there.running_mean.device.type == "sim" and there.running_mean.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"attn_mask": torch.ones(7, 7).tril().bool()},
        {"attn_mask": torch.linspace(-1, 1, 49).reshape(7, 7)},
        {"enable_gqa": True},
        {"scale": 0.3},
        {"dropout_p": 0.5},
    ],
    ids=lambda options: "-".join(map(str, options)) or "plain",
)
def test_attention(options: dict[str, Any], dtype: torch.dtype) -> None:
    class Attention(torch.nn.Module):
        def forward(self, *qkv: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            return F.scaled_dot_product_attention(*qkv, **kwargs)

    mask = options.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        options = {"attn_mask": mask.to(dtype)}
    seed()
    heads = 2 if "enable_gqa" in options else 4
    q, k, v = (leaf(2, h, 7, 16, dtype=dtype) for h in (4, heads, heads))
    run_both(Attention(), q, k, v, **options)


def test_attention_with_a_learned_mask() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    seed()
    run_both(Attention(), leaf(2, 4, 7, 16), leaf(7, 7))


@pytest.mark.parametrize("kind", [torch.nn.RNN])
def test_recurrent_layers(kind: Any) -> None:
    """Close, not equal: see RECURRENT. What they share with the CPU is not the order of sums."""
    here = seeded(kind, 5, 6, num_layers=2, bidirectional=True, dropout=0.25)
    there = copy.deepcopy(here).to("sim")
    x = torch.randn(7, 3, 5)
    ys = []
    for model, device in ((here, "cpu"), (there, "sim")):
        y = seeded(model, x.to(device))[0]
        y.square().sum().backward()
        ys.append(y.cpu())
    torch.testing.assert_close(*ys)
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad.cpu())


def test_packed_sequences() -> None:
    here = seeded(torch.nn.RNN, 5, 6)
    there = copy.deepcopy(here).to("sim")
    x = torch.randn(7, 3, 5)
    packed = [
        torch.nn.utils.rnn.pack_padded_sequence(x.to(device), [7, 4, 2])
        for device in ("cpu", "sim")
    ]
    assert_same(here(packed[0])[0].data, there(packed[1])[0].data)
    padded = [torch.nn.utils.rnn.pad_packed_sequence(p)[0] for p in packed]
    assert_same(*padded)


def test_a_padded_batch_through_an_encoder_in_eval() -> None:
    """torch's own fast path for inference, with and without padding."""
    layer = seeded(torch.nn.TransformerEncoderLayer, 16, 2, 32, batch_first=True)
    here = torch.nn.TransformerEncoder(layer, 2).eval()
    there = copy.deepcopy(here).to("sim")
    x, pad = torch.randn(2, 5, 16), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    with torch.no_grad():
        assert_same(here(x), there(x.to("sim")))
        expected = here(x, src_key_padding_mask=pad)
        found = there(x.to("sim"), src_key_padding_mask=pad.to("sim")).cpu()
    # Packing the batch without its padding needs nested tensors; the values at tokens are the same.
    torch.testing.assert_close(found[~pad], expected[~pad])


@pytest.mark.parametrize("way", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_a_small_transformer_trained_with_adamw(way: dict[str, bool]) -> None:
    def train(device: str) -> list[torch.Tensor]:
        seed()
        model = torch.nn.Sequential(
            torch.nn.Embedding(11, 16),
            torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True),
            torch.nn.Linear(16, 11),
        )
        tokens = torch.randint(11, (4, 6)).to(device)
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **way)
        seed(device)
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        return [loss.detach(), *(p.detach() for p in model.parameters())]

    expected, found = train("cpu"), train("sim")
    assert_same(expected, found)
    assert not torch.equal(found[1].cpu(), seeded(torch.nn.Embedding, 11, 16).weight)  # it learnt
    assert sim.races() == []


def test_checkpointed_dropout_draws_the_same_numbers_again() -> None:
    from torch.utils.checkpoint import checkpoint

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)).to("sim")
    x = leaf(4, 8).detach().to("sim").requires_grad_()
    (plain,) = torch.autograd.grad(seeded(model, x).sum(), x)
    for reentrant in (False, True):
        x.grad = None
        seeded(checkpoint, model, x, use_reentrant=reentrant).sum().backward()
        assert torch.equal(plain, x.grad)


def test_loss_scaling() -> None:
    model = torch.nn.Linear(4, 2, device="sim")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("sim", init_scale=4.0)
    for factor, stepped in ((1.0, True), (torch.inf, False)):
        before = model.weight.detach().clone()
        scaler.scale(model(torch.ones(1, 4, device="sim")).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(before, model.weight) is not stepped
    assert scaler.get_scale() == 2.0


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


# ---- random numbers ------------------------------------------------------------------------------

RANDOM: dict[str, Callable[[str], torch.Tensor]] = {
    "rand": lambda d: torch.rand(50, device=d),
    "randn": lambda d: torch.randn(50, device=d),
    "randn half": lambda d: torch.randn(50, dtype=torch.float16, device=d),
    "randn complex": lambda d: torch.randn(50, dtype=torch.complex64, device=d),
    "randint": lambda d: torch.randint(-5, 99, (50,), device=d),
    "randperm": lambda d: torch.randperm(50, device=d),
    "normal": lambda d: torch.normal(torch.zeros(50, device=d), torch.ones(50, device=d)),
    "randn_like": lambda d: torch.randn_like(torch.empty(50, device=d)),
    "normal_": lambda d: torch.empty(50, device=d).normal_(1, 2),
    "uniform_": lambda d: torch.empty(50, device=d).uniform_(1, 2),
    "random_": lambda d: torch.empty(50, device=d).random_(7),
    "bernoulli_": lambda d: torch.empty(50, device=d).bernoulli_(0.3),
    "bernoulli": lambda d: torch.full((50,), 0.3, device=d).bernoulli(),
    "exponential_": lambda d: torch.empty(50, device=d).exponential_(),
    "cauchy_": lambda d: torch.empty(50, device=d).cauchy_(),
    "geometric_": lambda d: torch.empty(50, device=d).geometric_(0.2),
    "log_normal_": lambda d: torch.empty(50, device=d).log_normal_(),
    "poisson": lambda d: torch.poisson(torch.full((50,), 4.0, device=d)),
    "binomial": lambda d: torch.binomial(
        torch.full((50,), 9.0, device=d), torch.rand(50, device=d)
    ),
    "multinomial": lambda d: torch.multinomial(torch.arange(50.0, device=d), 20),
    "multinomial again": lambda d: torch.multinomial(torch.arange(5.0, device=d), 20, True),
    "dropout": lambda d: F.dropout(torch.ones(50, device=d), 0.3),
    "dropout2d": lambda d: F.dropout2d(torch.ones(2, 20, 3, 1, device=d), 0.3),
    "alpha dropout": lambda d: F.alpha_dropout(torch.ones(50, device=d), 0.3, training=True),
    "rrelu": lambda d: F.rrelu(-torch.ones(50, device=d), training=True),
    "gumbel": lambda d: F.gumbel_softmax(torch.ones(5, 10, device=d)),
    "trunc_normal_": lambda d: torch.nn.init.trunc_normal_(torch.empty(50, device=d)),
    "kaiming_uniform_": lambda d: torch.nn.init.kaiming_uniform_(torch.empty(5, 10, device=d)),
    "orthogonal_": lambda d: torch.nn.init.orthogonal_(torch.empty(5, 10, device=d)),
    "Linear": lambda d: torch.nn.Linear(5, 10, device=d).weight,
    "Categorical": lambda d: torch.distributions.Categorical(torch.ones(9, device=d)).sample((9,)),
    "Dirichlet": lambda d: torch.distributions.Dirichlet(torch.ones(9, device=d)).sample(),
}


@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_are_those_of_the_cpu_with_the_same_seed(name: str) -> None:
    results = []
    for device in ("cpu", "sim"):
        seed(device)
        results.append([RANDOM[name](device), RANDOM[name](device)])
    assert_same(*results)
    assert not torch.equal(*results[1])  # the generator moved on


@pytest.mark.parametrize("draw", [torch.rand, torch.randn, torch.randperm])
def test_a_generator_of_ones_own(draw: Callable[..., torch.Tensor]) -> None:
    ours = torch.Generator(device="sim").manual_seed(5)
    its = torch.Generator().manual_seed(5)
    assert ours.device == torch.device("sim", 0) and ours.initial_seed() == 5
    before = torch.sim.get_rng_state()
    assert_same(draw(40, generator=its), draw(40, device="sim", generator=ours))
    assert torch.equal(before, torch.sim.get_rng_state())  # the device's own has not moved
    state = ours.get_state()
    first = draw(40, device="sim", generator=ours)
    ours.set_state(state)
    assert torch.equal(first, draw(40, device="sim", generator=ours))
    twin = ours.clone_state()
    assert torch.equal(draw(9, device="sim", generator=ours), draw(9, device="sim", generator=twin))


def test_a_generator_can_be_copied_and_pickled() -> None:
    ours = torch.Generator(device="sim").manual_seed(5)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.device.type == "sim" and torch.equal(twin.get_state(), ours.get_state())


def test_a_generator_of_another_device_is_refused() -> None:
    words = "Expected a '{}' device type for generator but found '{}'"
    ours, its = torch.Generator(device="sim"), torch.Generator()
    with pytest.raises(RuntimeError, match=words.format("sim", "cpu")):
        torch.randn(3, device="sim", generator=its)
    with pytest.raises(RuntimeError, match=words.format("cpu", "sim")):
        torch.randn(3, generator=ours)
    x = torch.zeros(3)
    with pytest.raises(RuntimeError, match=words.format("cpu", "sim")):
        x.normal_(generator=ours)
    assert x.tolist() == [0, 0, 0]


def test_states_of_the_devices_generators() -> None:
    sim.configure("rtx-4090", devices=2)
    torch.sim.manual_seed_all(3)
    states = torch.sim.get_rng_state_all()
    assert len(states) == 2 and torch.equal(*states)
    first = torch.rand(4, device="sim:1")
    assert torch.equal(states[0], torch.sim.get_rng_state("sim:0"))  # each device has its own
    assert not torch.equal(states[1], torch.sim.get_rng_state(1))
    torch.sim.set_rng_state_all(states)
    assert torch.equal(first.cpu(), torch.rand(4, device="sim:0").cpu())
    assert torch.equal(first, torch.rand(4, device="sim:1"))
    torch.sim.manual_seed(9)
    assert torch.sim.initial_seed() == 9
    torch.sim.seed()
    assert torch.sim.initial_seed() != 9


def test_fork_rng_puts_the_state_back() -> None:
    torch.manual_seed(1)
    expected = torch.randn(5, device="sim")
    torch.manual_seed(1)
    with torch.random.fork_rng(device_type="sim"):
        torch.manual_seed(2)
        torch.randn(5, device="sim")
    assert torch.equal(expected, torch.randn(5, device="sim"))


# ---- saving, loading, copying whole objects ------------------------------------------------------


def in_a_child(work: Callable[[], None]) -> None:
    """Where a mistake of the simulator kills the process, not the whole test run."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("target", [None, "cpu", "sim", "sim:0", torch.device("sim")], ids=str)
def test_save_and_load(target: Any) -> None:
    x = seeded(torch.randn, 4, 3).to("sim")
    saved = {"x": x, "row": x[1], "parameter": torch.nn.Parameter(x.t())}
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = torch.load(file, map_location=target)
    assert loaded["x"].device.type == ("cpu" if target == "cpu" else "sim")
    assert torch.equal(loaded["x"].cpu(), x.cpu())
    assert isinstance(loaded["parameter"], torch.nn.Parameter)
    assert loaded["parameter"].stride() == (1, 3)
    loaded["row"].zero_()  # what shared memory does so again
    assert loaded["x"][1].tolist() == [0, 0, 0] and x[1].count_nonzero() == 3


def test_save_and_load_without_zip() -> None:
    def work() -> None:
        file, x = io.BytesIO(), torch.arange(3, device="sim")
        torch.save([x, x[1:]], file, _use_new_zipfile_serialization=False)
        file.seek(0)
        assert_same([x.cpu(), x.cpu()[1:]], torch.load(file))

    in_a_child(work)


def test_load_onto_the_device_from_a_mapped_file(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(5)}, tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", mmap=True, map_location="sim")
    assert_same(torch.arange(5), loaded["a"])


def test_load_from_another_device() -> None:
    sim.configure("rtx-4090", devices=2)
    file = io.BytesIO()
    torch.save(torch.arange(3, device="sim:1"), file)
    for target, index in ((None, 1), ({"sim:1": "sim:0"}, 0), ("sim:0", 0)):
        file.seek(0)
        assert torch.load(file, map_location=target).device.index == index
    sim.configure("rtx-4090", devices=1)
    file.seek(0)
    with pytest.raises(RuntimeError, match=r"SIM device 1 but torch\.sim\.device_count"):
        torch.load(file)


def test_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = torch.nn.Linear(3, 2, device="sim")
    safetensors.torch.save_model(model, str(path))
    other = torch.nn.Linear(3, 2, device="sim")
    safetensors.torch.load_model(other, path)
    assert_same(model.weight.cpu(), other.weight)
    # safetensors knows no device by the name "sim"; a number means the current accelerator's.
    loaded = safetensors.torch.load_file(path, device=0)
    assert_same(model.bias.cpu(), loaded["bias"])


@pytest.mark.parametrize("assign", [True, False])
def test_state_dicts(assign: bool) -> None:
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, device="sim")
    weight = target.weight
    target.load_state_dict(source.state_dict(), assign=assign)
    assert target.weight.device.type == ("cpu" if assign else "sim")
    assert (target.weight is weight) is not assign
    assert torch.equal(target.weight.cpu(), source.weight)
    back = torch.nn.Linear(3, 2)
    back.load_state_dict(target.to("sim").state_dict())
    assert back.weight.device.type == "cpu" and torch.equal(back.weight, source.weight)


def test_deep_copies_keep_sharing() -> None:
    x = torch.arange(6, device="sim")
    a, b = copy.deepcopy([x, x[2:]])
    b.zero_()
    assert a.tolist() == [0, 1, 0, 0, 0, 0] and x.tolist() == [0, 1, 2, 3, 4, 5]
    model = torch.nn.Linear(2, 2, device="sim")
    twin = copy.deepcopy(model)
    assert_same(model.weight.cpu(), twin.weight)
    assert twin.weight.data_ptr() != model.weight.data_ptr()


def test_pickle() -> None:
    def work() -> None:
        x = torch.arange(6.0, device="sim").reshape(2, 3)
        loaded = pickle.loads(pickle.dumps([x, x.t(), torch.nn.Parameter(x)]))
        assert_same([x.cpu(), x.cpu().t(), x.cpu()], loaded)
        loaded[0].zero_()
        assert x.sum() == 15 and isinstance(loaded[2], torch.nn.Parameter)

    in_a_child(work)


def test_modules_move_there_and_back() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    for move in (lambda: model.to("sim"), model.cpu, model.sim, lambda: model.to("cpu")):
        move()
    model.sim(0)
    tensors = [*model.parameters(), *model.buffers()]
    assert {t.device for t in tensors} == {torch.device("sim", 0)}
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert_same(list(state.values()), list(model.state_dict().values()))
    assert model[0].weight.is_sim and not state["0.weight"].is_sim
    half = model.half()
    assert half[0].weight.dtype == torch.float16 and half[0].weight.is_sim
    assert half.to_empty(device="sim")[0].weight.isnan().all()


def test_data_swapped_between_host_and_device_keeps_the_parameter() -> None:
    model = torch.nn.Linear(3, 2)
    weight, values = model.weight, model.weight.detach().clone()
    weight.data = weight.data.to("sim")
    model.bias.data = model.bias.data.to("sim")
    assert model.weight is weight and weight.is_leaf and weight.requires_grad
    x = torch.ones(1, 3, device="sim")
    model(x).sum().backward()
    assert weight.grad is not None and weight.grad.device.type == "sim"
    weight.grad = None
    weight.data = torch.zeros(2, 3)
    assert weight.device.type == "cpu" and weight.tolist() == [[0, 0, 0], [0, 0, 0]]
    weight.data = values.to("sim")
    assert_same(values, weight.data)
    (weight * 2).sum().backward()
    assert weight.grad.tolist() == [[2, 2, 2], [2, 2, 2]]


# ---- views, storage, sizes -----------------------------------------------------------------------


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


# ---- devices and copies --------------------------------------------------------------------------

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
