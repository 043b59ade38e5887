"""Predicts what a folder's pipeline will take: builds it blank, records it dry, and computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..core.units import format_bytes
from ..errors import UsageError
from ..grant import AUTO, read_budget
from ..model_folder import DTYPES, open_folder
from ..question import Question
from .forecast import Forecast, forecast, most_points
from .recording import COARSEST, Card, Recording

_PROMPT = "an astronaut riding a green horse"
_RECUTS = 3  # for small budgets
_CALLS = 3 + _RECUTS


def predict(
    model: str | os.PathLike[str],
    *,
    device: str = "rtx-4090",
    budget: int | str | None = None,
    dtype: str = "auto",
    settings: Mapping[str, Any] | None = None,
) -> Forecast:
    """What a pipeline will take on a card within a budget, from its configs alone.

    >>> print(greenroom.predict("FLUX.1-dev", device="rtx-4090", budget="12GiB"))

    Neither weights nor a GPU are needed: the pipeline is built blank and runs dry on the simulated
    accelerator, which is started anew before and after. `Recording.load` and `forecast` plan with a
    trace that was measured elsewhere.

    Args:
        model: a folder as `save_pretrained` and the Hub lay it out: ``model_index.json`` and the
            components' configs.
        device: the card, one of `greenroom.sim.PROFILES`.
        budget: bytes of device memory, ``"12GiB"``, or ``"80%"`` of the card's; else all of it.
        dtype: ``"float16"``, ``"bfloat16"``, ``"float32"``; ``"auto"``: as stored, without weights
            what the configs say, and float32 if they do not.
        settings: arguments of the pipeline's call, ``{"num_inference_steps": 28}``.

    Raises:
        UsageError: what was asked cannot be, or the pipeline cannot be built from its configs.
        ImportError: diffusers, transformers or what else the pipeline needs is not installed.
        SimulatorBuildError: the simulated accelerator could not be compiled.
    """
    recording = record(model, device=device, budget=budget, dtype=dtype, settings=settings)
    return forecast_within(recording, budget)


def record(
    model: str | os.PathLike[str],
    *,
    device: str,
    budget: int | str | None = None,
    dtype: str = "auto",
    settings: Mapping[str, Any] | None = None,
    begin: Callable[[str, bool], object] = lambda dtype, is_told: None,
) -> Recording:
    """Record a folder's pipeline on a simulated card, its parts cut for the budget and others.

    `begin` is called with the weights' dtype, and whether anybody told it, when nothing that was
    asked is left to refuse and before anything is built.

    Raises:
        as `predict`.
    """
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"there is no dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    folder = open_folder(Path(model))
    question = Question(_PROMPT, settings=settings or {})
    question.check(folder.pipeline_class)
    from .. import sim
    from .blank import build, dtype_of
    from .recorder import Recorder, card_of, simulator_as_before

    try:
        card = card_of(sim.get_profile(device), is_watched=False)
    except ValueError as error:
        raise UsageError(str(error)) from error
    granted = granted_of(card, budget)
    told = DTYPES.get(dtype) or dtype_of(folder)
    chosen = told or folder.stored_dtype
    name, said = folder.pipeline_class.__name__, str(chosen).removeprefix("torch.")
    begin(said, told is not None)
    with simulator_as_before(), _bar(_CALLS, f"simulating {name}", "call") as bar:
        pipe = build(folder, chosen)
        recorder = Recorder(pipe, device, question.put_to, bar.update)
        try:
            recorder.record(granted)
            least = granted
            for _ in range(_RECUTS):
                before = least
                least = recorder.recording(name, said, {}).cut_for(least).least
                if least >= COARSEST or 0.9 * before < least <= before:
                    break
                recorder.record(least)
        except torch.OutOfMemoryError as error:
            raise UsageError(f"{name} is larger than any device: {error}") from error
        return recorder.recording(name, said, settings or {})


def forecast_within(recording: Recording, budget: int | str | None) -> Forecast:
    """The forecast for a recorded call within a budget, by default all of its card's memory.

    Raises:
        UsageError: there is no such budget.
    """
    granted = granted_of(recording.card, budget)
    with _bar(most_points(), "planning", "budget") as bar:
        return forecast(recording, granted, bar.update)


def _bar(total: int, doing: str, unit: str) -> Any:
    """A progress bar on standard error, where there is somebody to see it."""
    return tqdm(total=total, desc=doing, unit=unit, leave=False, disable=None)


def granted_of(card: Card, budget: int | str | None) -> int:
    """The budget in bytes.

    Raises:
        UsageError: it is no size, or more than the card has.
    """
    memory = card.memory_nbytes
    if memory is None and (budget is None or str(budget).strip().endswith("%")):
        raise UsageError(
            f"budget={budget!r}: nobody said how much memory {card.name} has; give bytes"
        )
    if budget is None:
        budget = "100%"
    granted = read_budget(budget, memory or 0)
    if granted == AUTO:
        raise UsageError(
            f"budget={budget!r} is what is free on the device when a call begins, which nobody "
            "knows before; give bytes, or a share such as '80%'"
        )
    if memory is not None and granted > memory:
        raise UsageError(f"budget={budget!r}: {card.name} has {format_bytes(memory)}")
    return granted
