"""One question put to one pipeline in several ways, each measured, all compared to the bit."""

from __future__ import annotations

import gc
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .answer import Answer
from .errors import BudgetTooSmall, UsageError
from .pipeline import enable_model_cpu_offload
from .place import Place
from .question import Question

#: Makes a pipeline in host memory run on a device in some way.
Way = Callable[[Any, torch.device], Any]

GREENROOM = "greenroom"
MODEL_OFFLOAD = "model offload"


def _diffusers(pipe: Any, device: torch.device) -> None:
    try:
        pipe.enable_model_cpu_offload(device=device)
    except ValueError as error:
        raise UsageError(f"diffusers does not offload this pipeline: {error}") from error


def _greenroom(pipe: Any, device: torch.device) -> None:
    enable_model_cpu_offload(pipe, device=device)


#: The method that greenroom stands in for, and greenroom.
TWO_WAYS: Mapping[str, Way] = {MODEL_OFFLOAD: _diffusers, GREENROOM: _greenroom}


@dataclass(frozen=True)
class Row:
    """What one way of running the pipeline cost. What a device does not tell is None.

    fits: whether there was memory enough; None if it failed for another reason.
    enable_seconds: what turning it on took, loading onto the device or page-locking included.
    call_seconds: of each call, in order.
    peak_bytes: the most device memory in use during any of the calls.
    h2d_bytes, d2h_bytes: what the last call moved to the device and to the host.
    races: found while enabling and during all calls.
    same_output: all its answers are those of the first way that fits, to the bit; None where there
        is nothing to compare.
    reason: why it has no answer, if there is more to say than that the device was full.
    """

    way: str
    fits: bool | None
    enable_seconds: float | None = None
    call_seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    h2d_bytes: int | None = None
    d2h_bytes: int | None = None
    races: int | None = None
    same_output: bool | None = None
    reason: str | None = None

    @property
    def is_sound(self) -> bool:
        """Whether nothing speaks against what it answered. That it does not fit does not."""
        return not self.races and self.same_output is not False

    def to_dict(self) -> dict[str, Any]:
        """The row as plain values."""
        return asdict(self)


def compare(
    ways: Mapping[str, Way],
    load: Callable[[], Any],
    question: Question,
    place: Place,
    *,
    calls: int | Mapping[str, int] = 1,
    watch: Callable[[str, Any], None] | None = None,
    may_fail: Container[str] = (),
) -> Iterator[tuple[Row, Answer | None]]:
    """Put the question in each way, to a pipeline of its own; rows come with the last answer.

    A way whose weights or activations do not fit into the device's memory, or into its budget, gets
    no answer.

    Args:
        ways: by name, in order.
        load: makes the pipeline, in host memory.
        question: what is asked.
        place: where.
        calls: how often each pipeline is asked; or by the ways' names, once where one is missing.
        watch: is given each way's name, and the pipeline that has answered in it.
        may_fail: ways that this pipeline may be unfit for: an error of theirs is told in their row.
    """
    reference: Answer | None = None
    for name, enable in ways.items():
        place.prepare()
        times = calls if isinstance(calls, int) else calls.get(name, 1)
        pipe = None
        try:
            pipe = load()
            row, answers = _measure(name, enable, pipe, question, place, times)
            if watch is not None:
                watch(name, pipe)
        except Exception as error:
            row, answers = _without_answer(name, error, may_fail=name in may_fail), []
        del pipe
        gc.collect()  # a pipeline and its hooks hold each other
        if answers:
            is_first, reference = reference is None, reference or answers[0]
            is_same = all(answer.is_same(reference) for answer in answers)
            if not (is_first and is_same):  # of the first, that it is itself says nothing
                row = replace(row, same_output=is_same)
        yield row, answers[-1] if answers else None


def _without_answer(name: str, error: Exception, *, may_fail: bool) -> Row:
    """The row of a way that has raised; or raise, if it is none that is told in a row."""
    if isinstance(error, BudgetTooSmall):
        return Row(name, fits=False, reason=str(error))
    if is_out_of_memory(error):
        return Row(name, fits=False)
    if not may_fail or isinstance(error, UsageError):
        raise error
    reason = " ".join(str(error).split())
    return Row(name, fits=None, reason=f"{type(error).__name__}: {reason}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had too little memory; not every backend has a class of its own for it."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def _measure(
    name: str, enable: Way, pipe: Any, question: Question, place: Place, times: int
) -> tuple[Row, list[Answer]]:
    with place.measure() as enabling:
        enable(pipe, place.device)
    answers, costs = [], []
    for _ in range(times):
        with place.measure() as cost:
            answers.append(question.put_to(pipe))
        costs.append(cost)
    races = [cost.races for cost in (enabling, *costs) if cost.races is not None]
    peaks = [cost.peak_bytes for cost in costs if cost.peak_bytes is not None]
    row = Row(
        name,
        fits=True,
        enable_seconds=enabling.seconds,
        call_seconds=tuple(cost.seconds for cost in costs),
        peak_bytes=max(peaks, default=None),
        h2d_bytes=costs[-1].h2d_bytes,
        d2h_bytes=costs[-1].d2h_bytes,
        races=sum(races) if races else None,
    )
    return row, answers
