"""Layers and their training have the CPU's bits, at sizes that reach the CPU's fast kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sim.comparing import assert_same, copied, seed, seeded
from torch.utils._pytree import tree_leaves

import greenroom.sim as sim


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
    """Close, not equal: off the CPU, torch multiplies the inputs step by step, not all at once."""
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
