"""The training: it goes on where it was killed, and one command gives a pipeline that loads."""

from __future__ import annotations

from pathlib import Path

import loop
import parts
import pytest
import torch
import train
from diffusers import DiffusionPipeline
from torch import nn


class Killed(Exception):
    pass


def fit(work: Path, *, muon: bool, killed_at: int | None = None) -> nn.Linear:
    """Thirty steps on a linear layer, or as many as it takes until it is killed."""
    torch.manual_seed(0)
    layer, steps = nn.Linear(8, 8), 0

    def loss_of(rng: torch.Generator) -> torch.Tensor:
        nonlocal steps
        if steps == killed_at:
            raise Killed
        steps += 1
        x = torch.randn(16, 8, generator=rng)
        return (layer(x) - x.flip(1)).square().mean()

    stage = loop.Stage("layer", steps=30, rate=1e-2, warmup=5, muon=muon)
    loop.train(stage, layer.parameters(), loss_of, work=work, seed=7)
    return layer


@pytest.mark.parametrize("muon", [False, True])
def test_a_run_killed_twice_gives_what_a_run_without_a_break_gives(
    muon: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", -1.0)  # after every step
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    expected = fit(whole, muon=muon)
    for after in (13, 4):
        with pytest.raises(Killed):
            fit(broken, muon=muon, killed_at=after)
    got = fit(broken, muon=muon, killed_at=13)  # 13 + 4 + 13 steps: the last is just made
    assert all(map(torch.equal, got.parameters(), expected.parameters()))
    finished = fit(broken, muon=muon, killed_at=0)  # loaded, not trained again
    assert all(map(torch.equal, finished.parameters(), expected.parameters()))


def test_a_stage_that_stops_early_leaves_the_rate_of_its_whole_length() -> None:
    whole = loop.Stage("whole", steps=100, rate=1.0, warmup=10)
    early = loop.Stage("early", steps=100, rate=1.0, warmup=10, stop=40)
    assert [early.rate_at(n) for n in range(40)] == [whole.rate_at(n) for n in range(40)]
    rates = [whole.rate_at(n) for n in range(100)]
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, abs=0.001)


def test_muon_trains_convolutions_in_place_whatever_their_layout() -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        conv = nn.Conv2d(8, 16, 3).to(memory_format=layout)
        before = conv.weight.detach().clone()
        optimizers = loop.Optimizers(
            loop.Stage("conv", steps=1, rate=1e-2, muon=True, weight_decay=0.0),
            list(conv.parameters()),
        )
        conv(torch.randn(4, 8, 6, 6)).square().sum().backward()
        optimizers.step(1e-2)
        change = (conv.weight.detach() - before).flatten(1)
        # An orthogonal matrix, as far as Muon's five iterations go, times the rate.
        lengths = torch.linalg.svdvals(change) / (1e-2 * 0.2 * max(change.shape) ** 0.5)
        assert lengths.min() > 0.6
        assert lengths.max() < 1.3


@pytest.fixture
def few_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "PICTURES", 40)
    monkeypatch.setattr(train, "OUTLINED_PICTURES", 12)


@pytest.mark.slow
def test_one_command_gives_a_pipeline_and_an_adapter_that_load(
    tmp_path: Path, few_pictures: None
) -> None:
    out = tmp_path / "out"
    train.main(["--out", str(out), "--work", str(tmp_path / "work"), "--scale", "0.0001"])
    pipe = DiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red star", "num_inference_steps": 2, "output_type": "pt"}
    plain = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert plain.shape == (1, 3, 64, 64)
    pipe.load_lora_weights(out / "outlined")
    adapted = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    assert not torch.equal(adapted, plain)
    log = (out / "train.log").read_text().splitlines()
    assert [line.split()[2] for line in log] == list(train.STAGES)


def test_whitened_latents_have_mean_0_and_deviation_1_and_decode_to_the_same(
    tmp_path: Path, few_pictures: None
) -> None:
    trainer = train.Trainer(tmp_path, device="cpu", seed=0, scale=1.0)
    vae, pictures = trainer.pipe.vae.eval(), trainer.plain.batch(torch.arange(40))
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        expected = vae.decode(before.mode()).sample
        trainer.whiten()
        after = vae.encode(pictures).latent_dist
        got = vae.decode(after.mode()).sample
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)
    # The deviations were measured in bfloat16.
    assert after.mean.mean((0, 2, 3)).abs().max() < 0.05
    assert (after.mean.std((0, 2, 3)) - 1).abs().max() < 0.05
    torch.testing.assert_close(
        after.std / after.mean.std((0, 2, 3), keepdim=True),
        before.std / before.mean.std((0, 2, 3), keepdim=True),
        atol=1e-4,
        rtol=1e-2,
    )
    assert vae.config.scaling_factor == 1.0
    assert after.mean.shape[1] == parts.LATENT_CHANNELS
