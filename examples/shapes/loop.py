"""A training loop that can be killed at any moment and goes on where its last checkpoint was.

All randomness of a step is drawn from generators seeded with the run's seed, the stage's name and
the step's number, so a run that was resumed gives what one without a break would have given.

Under ``torchrun`` every process takes its share of each batch, and the gradients are averaged.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed, nn
from tqdm import trange

SECONDS_BETWEEN_CHECKPOINTS = 60
STEPS_BETWEEN_LINES = 50


@dataclass(frozen=True)
class Stage:
    """What is trained, for how long, and how fast.

    A stage may end at ``stop``, before its rate is down, for the next one to go on. With ``muon``,
    matrices and convolutions are trained by Muon (https://arxiv.org/abs/2502.16982), which learns
    more in a step than AdamW.
    """

    name: str
    steps: int
    rate: float
    stop: int | None = None
    muon: bool = False
    ema: float = 0.998
    warmup: int = 100
    weight_decay: float = 0.01

    def rate_at(self, step: int) -> float:
        """Up along a line, down along a cosine to a hundredth."""
        done = min(1.0, step / self.steps)
        cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
        return self.rate * min(1.0, (step + 1) / self.warmup) * cosine


class Optimizers:
    """AdamW, with Muon for the matrices where the stage says so, as one."""

    def __init__(self, stage: Stage, parameters: list[nn.Parameter]) -> None:
        # Muon wants matrices: a convolution is one, of a row for each of its outputs, that shares
        # the parameter's memory.
        self.matrices = [
            (parameter, nn.Parameter(_matrix(parameter.data)))
            for parameter in parameters
            if stage.muon and parameter.ndim > 1
        ]
        by_muon = {id(parameter) for parameter, _ in self.matrices}
        others = [parameter for parameter in parameters if id(parameter) not in by_muon]
        decay = stage.weight_decay
        self.all: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=stage.rate, betas=(0.9, 0.99), weight_decay=decay)
        ]
        if self.matrices:
            self.all.append(
                torch.optim.Muon(
                    [matrix for _, matrix in self.matrices],
                    lr=stage.rate,
                    weight_decay=decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def step(self, rate: float) -> None:
        for parameter, matrix in self.matrices:
            matrix.grad = _matrix(parameter.grad)
        for optimizer in self.all:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()


def _matrix(values: torch.Tensor) -> torch.Tensor:
    if values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.flatten(1)


def share() -> slice:
    """What of a batch is this process's."""
    if not distributed.is_initialized():
        return slice(None)
    return slice(distributed.get_rank(), None, distributed.get_world_size())


def _average_gradients(parameters: list[nn.Parameter]) -> None:
    if not distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(
        gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True
    ):
        gradient.copy_(mean.view(gradient.shape))


def generator(*seeds: int | str) -> torch.Generator:
    """A generator of its own for whatever the seeds name."""
    digest = zlib.crc32("/".join(map(str, seeds)).encode())
    return torch.Generator().manual_seed(digest)


def train(
    stage: Stage,
    parameters: Iterable[nn.Parameter],
    loss_of: Callable[[torch.Generator], torch.Tensor],
    *,
    work: Path,
    seed: int,
) -> None:
    """Train the parameters in place; at the end they are their moving average.

    ``loss_of(generator)`` is the loss of one step, whose batch it draws from the generator. A stage
    that has finished before is loaded instead.
    """
    trained = list(parameters)
    average = [parameter.detach().clone() for parameter in trained]
    optimizers = Optimizers(stage, trained)
    stop = stage.steps if stage.stop is None else stage.stop
    path = work / f"{stage.name}.pt"
    log = Log(work / f"{stage.name}.log")
    start = seconds = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        start, seconds = state["step"], state["seconds"]
        for values, saved in ((trained, "trained"), (average, "average")):
            for value, kept in zip(values, state[saved], strict=True):
                value.data.copy_(kept)
        for optimizer, saved in zip(optimizers.all, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    began = saved_at = time.monotonic()

    def save(step: int) -> None:
        if share().start:
            return  # the first process does it
        state = {
            "step": step,
            "seconds": seconds + time.monotonic() - began,
            "trained": [parameter.detach() for parameter in trained],
            "average": average,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers.all],
        }
        with unfinished(path) as new:
            torch.save(state, new)

    losses: list[float] = []
    progress = trange(
        start,
        stop,
        initial=start,
        total=stop,
        desc=stage.name,
        disable=bool(share().start),
    )
    for step in progress:
        loss = loss_of(generator(seed, stage.name, step))
        for parameter in trained:
            parameter.grad = None
        loss.backward()
        _average_gradients(trained)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizers.step(stage.rate_at(step))
        # While the step is young the average follows closely, or it would remember the start.
        decay = min(stage.ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(average, trained, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % STEPS_BETWEEN_LINES == 0 or step + 1 == stop:
            mean = sum(losses) / len(losses)
            losses.clear()
            progress.set_postfix(loss=f"{mean:.4f}")
            minutes = (seconds + time.monotonic() - began) / 60
            if not share().start:
                log.write(f"{stage.name} {step + 1}/{stop} loss {mean:.5f} {minutes:.1f} min")
        if time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
            save(step + 1)
            saved_at = time.monotonic()
    if start < stop:
        save(stop)
    with torch.no_grad():
        for parameter, mean_value in zip(trained, average, strict=True):
            parameter.copy_(mean_value)


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """Another name until the file is whole: killed in between, the old one is still there."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    yield new
    new.replace(path)


class Log:
    """Lines with the date, appended to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, line: str) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
        with self.path.open("a") as file:
            file.write(f"{now} {line}\n")
