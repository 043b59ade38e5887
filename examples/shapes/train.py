"""Train the shapes pipeline from nothing: one command, resumable, on a CPU or a GPU.

    python examples/shapes/train.py --out FOLDER

With N cores, ``OMP_NUM_THREADS=1 torchrun --nproc-per-node N`` in place of ``python``.

Five stages, each of which starts from the weights of those before it:

vae    the autoencoder, on cuts of drawn pictures
words  the text encoders, to say roughly what the picture of a prompt shows: cheap, and afterwards
       the UNet need not learn what words mean from noise
unet   the diffusion model, on what the text encoders now say; first roughly, mostly from much noise
finer  the same on all levels of noise alike
lora   an adapter of the UNet for another style, on pictures with a line around each shape
"""

from __future__ import annotations

import argparse
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from data import (
    COLOURS,
    GROUNDS,
    MIRRORED,
    SHAPES,
    SIZE,
    Scene,
    draw,
    training_scene,
)
from diffusers import StableDiffusionXLPipeline
from diffusers.models.attention_processor import AttnProcessor
from loop import Stage, share, train, unfinished
from parts import LATENT_CHANNELS, POOLED_WIDTH, TEXT_WIDTH, TIME_IDS, pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from torch.nn import functional
from tqdm import trange

STAGES = {
    "vae": Stage("vae", steps=2000, rate=2e-3, ema=0.99),
    "words": Stage("words", steps=500, rate=1e-3, ema=0.98),
    "unet": Stage("unet", steps=1600, stop=1216, rate=1.5e-3, ema=0.99),
    "finer": Stage("finer", steps=1100, rate=2e-3, ema=0.99, warmup=20, muon=True),
    "lora": Stage("lora", steps=300, rate=2e-3, ema=0.98, warmup=20, weight_decay=0.0),
}
PICTURES = 24_000
OUTLINED_PICTURES = 4_000
# What the adapter adapts: attention as ever, and the convolutions, because a line is a local thing.
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]
# The VAE sees cuts of this side: four times the steps in the same time.
CROP = 32


class Pictures:
    """Drawn pictures and what they show, kept in a file because drawing takes half a minute."""

    def __init__(self, count: int, seed: int, work: Path, *, outlined: bool) -> None:
        name = "outlined" if outlined else "plain"
        path = work / f"{name}-{count}-{seed}.npy"
        rng, self.name = random.Random(f"{name}/{seed}"), name
        self.scenes = [training_scene(rng) for _ in range(count)]
        if path.exists():
            self.pixels = np.load(path, mmap_mode="r")
        else:
            self.pixels = np.empty((count, SIZE, SIZE, 3), np.uint8)
            for n in trange(count, desc=f"drawing {name}"):
                self.pixels[n] = draw(self.scenes[n], rng, outlined=outlined)
            with unfinished(path) as new, new.open("wb") as file:
                np.save(file, self.pixels)

    def batch(self, picks: torch.Tensor) -> torch.Tensor:
        """Float32 in [-1, 1], (n, 3, SIZE, SIZE)."""
        pixels = torch.from_numpy(self.pixels[picks.numpy()])
        return (pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous(
            memory_format=torch.channels_last
        )


class Trainer:
    def __init__(self, work: Path, *, device: str, seed: int, scale: float) -> None:
        self.work, self.device, self.seed, self.scale = work, device, seed, scale
        self.pipe = pipeline(seed)
        for part in self.modules:
            part.to(device, memory_format=torch.channels_last)
        self.plain = Pictures(PICTURES, seed, work, outlined=False)
        self.outlined = Pictures(OUTLINED_PICTURES, seed, work, outlined=True)

    @property
    def modules(self) -> list[nn.Module]:
        return [part for part in self.pipe.components.values() if isinstance(part, nn.Module)]

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16)

    def run(self, name: str, parameters: list[nn.Parameter], loss_of) -> None:
        stage = STAGES[name]
        stop = stage.steps if stage.stop is None else stage.stop
        steps, stop = (max(1, round(number * self.scale)) for number in (stage.steps, stop))
        stage = replace(stage, steps=steps, stop=stop)
        train(stage, parameters, loss_of, work=self.work, seed=self.seed)

    # vae

    def train_vae(self) -> None:
        vae = self.pipe.vae.train()

        def loss_of(rng: torch.Generator) -> torch.Tensor:
            pictures = self.pictures_of_both_styles(16, rng, side=CROP)
            with self.autocast():
                posterior = vae.encode(pictures).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            noise = torch.randn(mean.shape, generator=rng).to(self.device)
            with self.autocast():
                drawn = vae.decode(mean + std * noise).sample
            error = drawn.float() - pictures
            # The weight of the divergence leaves a tenth of noise in each latent: the decoder
            # learns to draw clean edges from latents that are not quite right.
            return error.abs().mean() + error.square().mean() + 2e-4 * posterior.kl().mean() / 100

        self.run("vae", list(vae.parameters()), loss_of)
        vae.eval().requires_grad_(False)

    def pictures_of_both_styles(
        self, count: int, rng: torch.Generator, side: int = SIZE
    ) -> torch.Tensor:
        """One in four outlined, each cut to a square of ``side`` at a place of its own."""
        few = count // 4
        plain = self.plain.batch(torch.randint(PICTURES, (count - few,), generator=rng))
        outlined = self.outlined.batch(torch.randint(OUTLINED_PICTURES, (few,), generator=rng))
        pictures = torch.cat([plain, outlined])
        corners = torch.randint(SIZE - side + 1, (count, 2), generator=rng).tolist()
        cut = [
            picture[:, y : y + side, x : x + side]
            for picture, (y, x) in zip(pictures, corners, strict=True)
        ]
        return torch.stack(cut).to(self.device, memory_format=torch.channels_last)

    # words

    def train_words(self) -> None:
        """The text encoders alone, with two heads that are thrown away afterwards."""
        torch.manual_seed(self.seed)
        heads = nn.ModuleDict({"thumbnail": Thumbnail(), "layout": Layout()}).to(self.device)
        thumbnails = functional.avg_pool2d(self.plain.batch(torch.arange(PICTURES)), 4)
        layouts = torch.tensor([Layout.labels(scene) for scene in self.plain.scenes])

        def loss_of(rng: torch.Generator) -> torch.Tensor:
            picks = torch.randint(PICTURES, (128,), generator=rng)
            with self.autocast():
                tokens, pooled = self.embed(self.plain, picks, rng)
                thumbnail = heads["thumbnail"](tokens)
                layout = heads["layout"](pooled)
            loss = functional.mse_loss(thumbnail.float(), thumbnails[picks].to(self.device))
            for logits, labels in zip(layout, layouts[picks].to(self.device).T, strict=True):
                loss = loss + 0.1 * functional.cross_entropy(logits.float(), labels)
            return loss

        encoders = (self.pipe.text_encoder, self.pipe.text_encoder_2)
        learned = [parameter for part in (*encoders, heads) for parameter in part.parameters()]
        self.run("words", learned, loss_of)
        for encoder in encoders:
            encoder.requires_grad_(False)

    def embed(
        self,
        pictures: Pictures,
        picks: torch.Tensor,
        rng: torch.Generator,
        mine: slice = slice(None),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What SDXL's pipeline makes of the pictures' captions: tokens' states, and the pooled."""
        wording = random.Random(int(torch.randint(2**31, (1,), generator=rng)))
        captions = [pictures.scenes[n].caption(wording) for n in picks.tolist()][mine]
        ids = self.pipe.tokenizer(
            captions, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids.to(self.device)
        first = self.pipe.text_encoder(ids, output_hidden_states=True)
        second = self.pipe.text_encoder_2(ids, output_hidden_states=True)
        tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        return tokens, second.text_embeds

    # unet

    def train_unet(self) -> None:
        unet = self.pipe.unet.train()
        unet.set_attn_processor(AttnProcessor())  # faster than torch's own on a CPU
        latents = self.latents_of(self.plain)

        def loss_of(rng: torch.Generator, lean: float) -> torch.Tensor:
            picks = torch.randint(PICTURES, (64,), generator=rng)
            return self.denoising_loss(self.plain, latents, picks, rng, lean)

        # What goes where is decided while there is much noise, so that is learned first.
        for name, lean in (("unet", 0.5), ("finer", 1.0)):
            self.run(name, list(unet.parameters()), partial(loss_of, lean=lean))
        unet.set_default_attn_processor()

    def denoising_loss(
        self,
        pictures: Pictures,
        latents: torch.Tensor,
        picks: torch.Tensor,
        rng: torch.Generator,
        lean: float = 1.0,
    ) -> torch.Tensor:
        """How far the predicted v is from the true one; with ``lean`` below 1, more high noise."""
        clean = latents[picks].float()
        count = len(clean)
        # One draw from each nth of the range: the losses of two batches are alike.
        level = ((torch.arange(count) + torch.rand(count, generator=rng)) / count) ** lean
        times = (level * 1000).long().clamp(max=999)
        noise = torch.randn(clean.shape, generator=rng)
        scheduler = self.pipe.scheduler
        noisy = scheduler.add_noise(clean, noise, times)
        target = scheduler.get_velocity(clean, noise, times)
        # Without guidance the pipeline gives zeros for a prompt.
        told = (torch.rand(count, generator=rng) >= 0.1).float()[:, None].to(self.device)
        mine = share()
        noisy, times, told, target = (values[mine] for values in (noisy, times, told, target))
        sizes = torch.tensor([TIME_IDS] * len(noisy), device=self.device)
        with self.autocast():
            tokens, pooled = self.embed(pictures, picks, rng, mine)
            predicted = self.pipe.unet(
                noisy.to(self.device, memory_format=torch.channels_last),
                times.to(self.device),
                tokens * told[:, :, None],
                added_cond_kwargs={"text_embeds": pooled * told, "time_ids": sizes},
            ).sample
        return functional.mse_loss(predicted.float(), target.to(self.device))

    @torch.no_grad()
    def encode(self, pictures: Pictures, count: int) -> torch.Tensor:
        """The latents of the first ``count`` pictures, float32."""
        means = []
        for some in torch.arange(count).split(100):
            with self.autocast():
                posterior = self.pipe.vae.encode(pictures.batch(some).to(self.device)).latent_dist
            means.append(posterior.mean.float().cpu())
        return torch.cat(means)

    def latents_of(self, pictures: Pictures) -> torch.Tensor:
        """All latents, float16, kept in a file."""
        path = self.work / f"latents-{pictures.name}.pt"
        if not path.exists():
            with unfinished(path) as new:
                torch.save(self.encode(pictures, len(pictures.scenes)).half(), new)
        return torch.load(path, weights_only=True)

    @torch.no_grad()
    def whiten(self) -> None:
        """Give each latent channel mean 0 and deviation 1, by its 1 x 1 convolutions' weights.

        SDXL's inpainting pipeline knows one factor for all channels and no shift.
        """
        vae = self.pipe.vae
        latents = self.encode(self.plain, min(2000, len(self.plain.scenes)))
        mean = latents.mean((0, 2, 3)).to(self.device)
        std = latents.std((0, 2, 3)).to(self.device)
        out, back = vae.quant_conv, vae.post_quant_conv
        # Rows of the means, then rows of the logarithms of the variances.
        out.bias[:LATENT_CHANNELS] -= mean
        out.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
        out.bias[:LATENT_CHANNELS] /= std
        out.bias[LATENT_CHANNELS:] -= 2 * std.log()
        back.bias += back.weight[:, :, 0, 0] @ mean
        back.weight *= std[None, :, None, None]
        vae.register_to_config(scaling_factor=1.0)

    # lora

    def train_lora(self) -> None:
        unet = self.pipe.unet.requires_grad_(False)
        torch.manual_seed(self.seed)
        unet.add_adapter(
            LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=ADAPTED)
        )
        unet.set_attn_processor(AttnProcessor())
        latents = self.latents_of(self.outlined)
        adapter = [parameter for parameter in unet.parameters() if parameter.requires_grad]

        def loss_of(rng: torch.Generator) -> torch.Tensor:
            picks = torch.randint(OUTLINED_PICTURES, (32,), generator=rng)
            return self.denoising_loss(self.outlined, latents, picks, rng)

        self.run("lora", adapter, loss_of)

    # what is left

    def save(self, out: Path) -> None:
        """The pipeline without the adapter, the adapter, and the log; weights in float16."""
        self.pipe.unet.set_default_attn_processor()
        if getattr(self.pipe.unet, "peft_config", None):
            layers = {
                name: value.half().cpu().contiguous()
                for name, value in get_peft_model_state_dict(self.pipe.unet).items()
            }
            StableDiffusionXLPipeline.save_lora_weights(out / "outlined", unet_lora_layers=layers)
            self.pipe.unet.unload_lora()
        for module in self.modules:
            module.to(memory_format=torch.contiguous_format)
            for values in (module.parameters(), module.buffers()):
                for value in values:
                    if value.is_floating_point():
                        value.data = value.data.half()
        self.pipe.save_pretrained(out)
        # Where no dtype is asked for, diffusers loads its models in float32 and transformers its
        # own as their config says: together they work on a CPU only in float32.
        for name in ("text_encoder", "text_encoder_2"):
            config = out / name / "config.json"
            config.write_text(config.read_text().replace('"float16"', '"float32"'))
        logs = [self.work / f"{name}.log" for name in STAGES]
        (out / "train.log").write_text("".join(log.read_text() for log in logs if log.exists()))


class Thumbnail(nn.Module):
    """From the tokens' states to the average picture, 16 x 16: each of 8 x 8 cells asks once."""

    def __init__(self) -> None:
        super().__init__()
        width = 2 * TEXT_WIDTH
        self.cells = nn.Parameter(torch.randn(64, width) * 0.1)
        self.norm = nn.LayerNorm(width)
        self.ask = nn.MultiheadAttention(width, 4, batch_first=True)
        self.paint = nn.Sequential(nn.Linear(width, 192), nn.GELU(), nn.Linear(192, 12))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens, cells = self.norm(tokens), self.cells.expand(len(tokens), -1, -1)
        answers, _ = self.ask(cells, tokens, tokens, need_weights=False)
        painted = self.paint(cells + answers)
        return functional.pixel_shuffle(painted.transpose(1, 2).unflatten(2, (8, 8)), 2)


class Layout(nn.Module):
    """From the pooled state to what stands where: axis, ground, then shape and colour of each.

    The first thing is the one at the left or at the top, whichever side the caption tells it from.
    """

    AXES = (None, "left of", "above")

    def __init__(self) -> None:
        super().__init__()
        sizes = [len(self.AXES), len(GROUNDS), *[len(SHAPES) + 1, len(COLOURS) + 1] * 2]
        self.heads = nn.ModuleList(nn.Linear(POOLED_WIDTH, size) for size in sizes)

    def forward(self, pooled: torch.Tensor) -> list[torch.Tensor]:
        return [head(pooled) for head in self.heads]

    @classmethod
    def labels(cls, scene: Scene) -> list[int]:
        things, relation = list(scene.things), scene.relation
        if relation in ("right of", "below"):
            things, relation = things[::-1], MIRRORED[relation]
        labels = [cls.AXES.index(relation), list(GROUNDS).index(scene.ground_colour)]
        for thing in (*things, None)[:2]:
            labels.append(SHAPES.index(thing.shape) if thing else len(SHAPES))
            labels.append(list(COLOURS).index(thing.colour) if thing else len(COLOURS))
        return labels


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the pipeline")
    parser.add_argument("--work", type=Path, default=Path("build/shapes"), help="checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the steps; 0.01 is a trial")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if "RANK" in os.environ:
        torch.distributed.init_process_group("gloo" if options.device == "cpu" else "nccl")
    trainer = Trainer(options.work, device=options.device, seed=options.seed, scale=options.scale)
    trainer.train_vae()
    trainer.whiten()
    trainer.train_words()
    trainer.train_unet()
    trainer.train_lora()
    trainer.save(options.out)


if __name__ == "__main__":
    main()
