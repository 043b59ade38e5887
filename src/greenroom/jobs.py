"""What the commands do that ask a pipeline something, in several ways: an answer, and a report."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import demo as _demo
from . import observe
from .answer import Answer, check_output
from .compare import GREENROOM, TWO_WAYS, Row, Way, compare
from .core.units import format_bytes
from .errors import UsageError
from .grant import AUTO, read_budget
from .model_folder import DTYPES, ModelFolder, component_sizes, open_folder
from .place import DEFAULT_PROFILE, Place, capacities, find_place
from .question import Question
from .traces import keeping_none
from .ways import INCUMBENTS, side_by_side

if TYPE_CHECKING:
    from .forecast import Forecast

#: Arguments of a call that have options of their own, or are none of the user's.
_NOT_TO_SET = ("prompt", "generator", "output_type", "return_dict")


@dataclass(frozen=True)
class Report:
    """What came of it: a row for each way, greenroom's last, and the files that were written."""

    title: str
    pipeline: str
    place: Place
    dtype: torch.dtype
    weights_bytes: int
    rows: Sequence[Row]
    files: Sequence[Path]

    @property
    def is_sound(self) -> bool:
        """Whether greenroom answered, and nothing speaks against any answer."""
        return all(row.is_sound for row in self.rows) and self.rows[-1].fits is True

    def print(self, *, as_json: bool) -> None:
        """Print it on standard output."""
        if as_json:
            print(json.dumps(self.to_dict(), indent=2))
            return
        from .tables import print_rows

        print_rows(self.rows, self.title, are_virtual=self.place.is_simulated)
        for file in self.files:
            print(f"wrote {file}")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        return {
            "pipeline": self.pipeline,
            "device": str(self.place.device),
            "simulated": self.place.profile,
            "capacity_bytes": self.place.capacity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "weights_bytes": self.weights_bytes,
            "rows": [row.to_dict() for row in self.rows],
            "files": [str(file) for file in self.files],
        }


def run(
    model: Path,
    prompt: str,
    *,
    device: str | None = None,
    simulate: str | None = None,
    capacity: str | None = None,
    dtype: str = "auto",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    calls: int = 1,
    output: Path | None = None,
    compares: bool = True,
) -> Report:
    """Answer a prompt with the pipeline in a folder. The arguments are those of the command.

    Raises:
        UsageError: what was asked cannot be. Nothing has been written.
        LoadError, SimulatorBuildError, OSError: what was asked did not come out.
    """
    _quieten(shows_loading=True)
    check_output(output or Path("picture.png"))
    question = Question(prompt, seed, settings or {})
    subject = _look_into(model, question, device, simulate, capacity, dtype)
    place, sizes, name = subject.place, subject.sizes, subject.name
    ways = TWO_WAYS if compares else {GREENROOM: TWO_WAYS[GREENROOM]}
    chooses = place.is_simulated and capacity is None
    for tried in _with_capacities(place, sizes) if chooses else (place,):
        rows, answers = _answer(ways, subject.load, question, tried, calls, must_fit=chooses)
        if rows[-1].fits:
            break
    if not rows[-1].fits:
        _say(f"greenroom: out of memory: {name} does not run on {tried}. {_advice(tried)}")
    return _report(subject, tried, rows, _write(rows, answers, output))


def bench(
    model: Path,
    prompt: str = _demo.PROMPT,
    *,
    device: str | None = None,
    simulate: str | None = None,
    capacity: str | None = None,
    budget: str = AUTO,
    dtype: str = "auto",
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
    calls: int = 2,
) -> Report:
    """Measure the pipeline in a folder in every way. The arguments are those of the command.

    Raises:
        UsageError: what was asked cannot be.
        LoadError, SimulatorBuildError, OSError: what was asked did not come out.
    """
    _quieten(shows_loading=True)
    read_budget(budget, 2**60)  # before anything is loaded
    question = Question(prompt, seed, settings or {})
    subject = _look_into(model, question, device, simulate, capacity, dtype)
    ways = side_by_side(budget)
    with keeping_none():  # so that the first call is one each time
        rows, _ = _answer(ways, subject.load, question, subject.place, calls, may_fail=INCUMBENTS)
    if not rows[-1].fits:
        why = rows[-1].reason or f"out of memory. {_advice(subject.place)}"
        _say(f"greenroom: {subject.name} does not run within {budget}: {why}")
    return _report(subject, subject.place, rows, [])


@dataclass
class _Subject:
    """A pipeline's folder that was looked into, with what is to be measured on which device."""

    folder: ModelFolder
    place: Place
    dtype: torch.dtype
    sizes: Mapping[str, int]
    spare: list[Any]  # it has been loaded once

    @property
    def name(self) -> str:
        return self.folder.pipeline_class.__name__

    def load(self) -> Any:
        """The pipeline, in host memory."""
        pipe = self.spare.pop() if self.spare else self.folder.load(self.dtype)
        pipe.set_progress_bar_config(disable=None)  # shown where there is somebody to see it
        return pipe


def _look_into(
    model: Path,
    question: Question,
    device: str | None,
    simulate: str | None,
    capacity: str | None,
    dtype: str,
) -> _Subject:
    """Load the pipeline in a folder, if it can be asked this; say how large it is."""
    if dtype not in ("auto", *DTYPES):
        raise UsageError(f"there is no dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    folder = open_folder(model)
    question.check(folder.pipeline_class)
    place = find_place(device, simulate, capacity)
    chosen = DTYPES.get(dtype) or _dtype_for(place, folder)
    _say(f"loading {folder.pipeline_class.__name__} in {_name(chosen)} from {model}")
    if dtype == "auto" and chosen != folder.stored_dtype:
        _say(
            f"its weights are stored in {_name(folder.stored_dtype)}, in which the simulator is "
            f"slow: --dtype {_name(folder.stored_dtype)} computes in it all the same"
        )
    first = folder.load(chosen)
    sizes = component_sizes(first)
    largest = max(sizes, key=sizes.__getitem__)
    _say(
        f"its weights are {format_bytes(sum(sizes.values()))}, its largest component is {largest} "
        f"with {format_bytes(sizes[largest])}"
    )
    return _Subject(folder, place, chosen, sizes, [first])


def _report(subject: _Subject, place: Place, rows: Sequence[Row], files: Sequence[Path]) -> Report:
    nbytes = sum(subject.sizes.values())
    title = f"{subject.name}, {format_bytes(nbytes)} in {_name(subject.dtype)}, on {place}"
    return Report(title, subject.name, place, subject.dtype, nbytes, rows, files)


def demo(
    prompt: str = _demo.PROMPT,
    *,
    device: str | None = None,
    simulate: str | None = None,
    capacity: str | None = None,
    output: Path = Path("greenroom-demo.png"),
) -> Report:
    """Answer a prompt with the pipeline that comes with greenroom, in every way worth comparing.

    A simulated card has too little memory for the whole pipeline, unless `capacity` says how much.
    Beside what was drawn there will be a picture of device memory over time.

    Raises:
        UsageError: what was asked cannot be. Nothing has been written.
        SimulatorBuildError, OSError: it did not come out.
    """
    _quieten()
    check_output(output)
    place = find_place(device, simulate, capacity)
    if place.is_simulated and capacity is None:
        place = place.with_capacity(_demo.CAPACITY)
    folder = open_folder(_demo.MODEL)
    sizes: dict[str, int] = {}

    def load() -> Any:
        pipe = folder.load(torch.float32)
        pipe.set_progress_bar_config(disable=True)
        sizes.update(component_sizes(pipe))
        return pipe

    question = Question(prompt, settings=_demo.SETTINGS)
    reports: dict[str, Any] = {}

    def watch(way: str, pipe: Any) -> None:
        if way in _demo.WATCHED:
            reports[_demo.WATCHED[way]] = observe.report(pipe)

    with keeping_none():  # so that the first call is one each time
        rows, answers = _answer(_demo.WAYS, load, question, place, _demo.CALLS, watch=watch)
    if not rows[-1].fits:
        more = ". Give it more (--capacity)" if place.is_simulated else ""
        _say(f"greenroom: out of memory: the demo does not run on {place}{more}")
    steps = _demo.SETTINGS["num_inference_steps"]
    weights = format_bytes(sum(sizes.values()))
    return Report(
        f"a small SDXL, {weights} of trained weights, {steps} steps, on {place}",
        folder.pipeline_class.__name__,
        place,
        torch.float32,
        sum(sizes.values()),
        rows,
        [*_write(rows, answers, output), *_write_memory(reports, output)],
    )


def plan(
    model: Path | None,
    *,
    card: str | None = None,
    budget: str | None = None,
    settings: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    output: Path | None = None,
    save_trace: Path | None = None,
    from_trace: Path | None = None,
) -> Forecast:
    """Predict what a pipeline will take. The arguments are those of the command.

    Raises:
        UsageError: what was asked cannot be. Nothing has been written.
        SimulatorBuildError, OSError: it did not come out.
    """
    from .forecast import Recording, forecast_within, record

    for file in (output, save_trace):
        if file is not None:
            _check_file(file)
    if output is not None and output.suffix.lower() != ".png":
        raise UsageError(f"the curve is drawn as a PNG: --output curve.png, not {str(output)!r}")
    if from_trace is not None:
        _refuse_beside_a_trace(model, card, dtype, settings)
        if not from_trace.is_file():
            raise UsageError(f"there is no trace {str(from_trace)!r}: --save-trace writes one")
        recording = Recording.load(from_trace)
    elif model is None:
        raise UsageError("name the pipeline's folder, MODEL_DIR, or a trace: --from-trace FILE")
    else:
        _quieten()

        def begin(chosen: str, is_told: bool) -> None:
            _say(
                f"building {model} in {chosen} from its configs, and calling it on a simulated card"
            )
            if not is_told:
                _say("there are no weights, and no config tells their dtype: --dtype does")
            elif chosen == "float16" and dtype == "auto":
                _say("run and bench simulate it in float32: --dtype float32 plans for that")

        recording = record(
            model,
            device=card or DEFAULT_PROFILE,
            budget=budget,
            dtype=dtype,
            settings=settings,
            begin=begin,
        )
    found = forecast_within(recording, budget)
    if save_trace is not None:
        recording.save(save_trace)
        _say(f"wrote {save_trace}")
    if output is not None:
        found.draw(output)
        _say(f"wrote {output}")
    return found


def print_forecast(forecast: Forecast, *, as_json: bool) -> None:
    """Print it on standard output."""
    if as_json:
        print(json.dumps(forecast.to_dict(), indent=2))
        return
    from rich.console import Console

    # What is no terminal has no width of its own.
    Console(width=None if sys.stdout.isatty() else 110, highlight=False).print(forecast)


def _check_file(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        what = path if path.is_dir() else path.parent
        why = "it is a folder" if path.is_dir() else "no folder that can be written to"
        raise UsageError(f"{str(path)!r} cannot be written: {str(what)!r}: {why}")


def _refuse_beside_a_trace(
    model: Path | None, card: str | None, dtype: str, settings: Mapping[str, Any] | None
) -> None:
    given = [
        name
        for name, is_given in (
            ("MODEL_DIR", model is not None),
            ("--simulate", card is not None),
            ("--dtype", dtype != "auto"),
            ("--steps, --size and --set", bool(settings)),
        )
        if is_given
    ]
    if given:
        raise UsageError(
            f"a trace says itself what was measured: leave out {' and '.join(given)}, or "
            "--from-trace"
        )


def _write_memory(reports: Mapping[str, observe.Report], output: Path) -> list[Path]:
    """Draw device memory over time beside what was answered."""
    if not reports:
        return []
    path = output.with_name(f"{output.stem}-memory.png")
    observe.write_picture(reports, path)
    return [path]


def call_settings(
    steps: int | None,
    size: str | None,
    width: int | None,
    height: int | None,
    others: Iterable[str],
) -> dict[str, Any]:
    """The arguments of a pipeline's call, by diffusers' names, from the command's options.

    Raises:
        UsageError: they are not of their form, or say something twice.
    """
    if size is not None:
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size)
        if match is None:
            raise UsageError(f"--size is width x height in pixels, such as 512x512, not {size!r}")
        if width is not None or height is not None:
            raise UsageError("--size gives width and height; leave out --width and --height")
        width, height = int(match[1]), int(match[2])
    named = {"num_inference_steps": steps, "width": width, "height": height}
    settings: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for text in others:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--set takes NAME=VALUE, such as guidance_scale=3.5, not {text!r}")
        if name in settings or name in _NOT_TO_SET:
            raise UsageError(f"--set cannot give {name!r}: it is given otherwise, or twice")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return settings


def _answer(
    ways: Mapping[str, Way],
    load: Callable[[], Any],
    question: Question,
    place: Place,
    calls: int | Mapping[str, int],
    *,
    must_fit: bool = False,
    watch: Callable[[str, Any], None] | None = None,
    may_fail: Container[str] = (),
) -> tuple[list[Row], list[Answer | None]]:
    """Put the question in each way; if all must fit, no further than the first that does not."""
    _say(f"running it on {place}")
    rows: list[Row] = []
    answers: list[Answer | None] = []
    found = compare(ways, load, question, place, calls=calls, watch=watch, may_fail=may_fail)
    for row, answer in found:
        rows.append(row)
        answers.append(answer)
        outcome = "" if row.fits else f": {row.reason or 'does not fit'}"
        _say(f"  {len(rows)}/{len(ways)} {row.way}{outcome}")
        if must_fit and not row.fits:
            break
    return rows, answers


def _write(
    rows: Sequence[Row], answers: Sequence[Answer | None], output: Path | None
) -> list[Path]:
    """Write greenroom's answer, and the one it should have been if it is another."""
    mine = answers[-1]
    if mine is None:
        return []
    if not mine.is_finite:
        _say("greenroom: the answer has numbers that are infinite or NaN: try --dtype float32")
    files = mine.write(output)
    left_out = sorted(mine.arrays.keys() - set(mine.shown)) if mine.shown else []
    if left_out and files[0].suffix != ".npz":
        _say(f"not in the file: {', '.join(left_out)}. As numpy's arrays: --output answer.npz")
    if rows[-1].same_output is False:
        other = next(answer for answer in answers if answer is not None)
        name = files[0].with_name(f"{files[0].stem}-expected{files[0].suffix}")
        _say("greenroom: the answers differ; both are written")
        files += other.write(name)
    return files


def _with_capacities(place: Place, sizes: Mapping[str, int]) -> Iterator[Place]:
    from . import sim

    most = sim.get_profile(str(place.profile)).memory_bytes
    return (place.with_capacity(capacity) for capacity in capacities(sizes, most))


def _dtype_for(place: Place, folder: ModelFolder) -> torch.dtype:
    # The simulator computes with the CPU's kernels, which take minutes for a float16 convolution.
    is_slow = place.is_simulated and folder.stored_dtype == torch.float16
    return torch.float32 if is_slow else folder.stored_dtype


def _advice(place: Place) -> str:
    more = "Give it more (--capacity), or ask" if place.is_simulated else "Ask"
    return f"{more} for a smaller picture (--size)"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _quieten(*, shows_loading: bool = False) -> None:
    """Keep the libraries' notes about other things out of our output.

    Their progress bars as well, but for those of loading something large, on a terminal.
    """
    warnings.simplefilter("ignore")
    try:
        from diffusers.utils import logging as diffusers_logging
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise ImportError(
            "pipelines are diffusers' and transformers', and one of them is not installed: "
            "pip install 'greenroom[diffusers,transformers]'"
        ) from error
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        if not shows_loading or not sys.stderr.isatty():
            logging.disable_progress_bar()
