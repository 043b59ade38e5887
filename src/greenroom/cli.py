"""The command line: what each command takes. What they do is elsewhere.

Exit codes: 0 done, 1 something did not come out as it should, 2 wrong usage.

Options that several commands have are defined once, above them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NoReturn, Protocol

import typer
from typer.core import TyperGroup

#: Of the parser's own refusals. Newer typers bring it along, older ones have click's.
_ParserError: type[Exception] = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """Refuses what it cannot parse in one sentence, as everything else is refused."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _parsing():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _parsing():  # of a command's own arguments
            return super().invoke(ctx)


app = typer.Typer(
    name="greenroom",
    cls=_Commands,
    help="Run PyTorch pipelines of several models on accelerators too small to hold them all.\n\n"
    "Exit codes: 0 done, 1 something did not come out as it should, 2 wrong usage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: paragraphs wrap, and errors are one sentence
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Device = Annotated[
    str | None,
    typer.Option(
        help="Where to run, as torch names it: cuda, cuda:1, sim. Else the machine's accelerator, "
        "or the simulated one if there is none."
    ),
]
Simulate = Annotated[
    str | None,
    typer.Option(
        metavar="CARD", help="Simulate this card: rtx-4090, h200 ... (rtx-4060-laptop if none)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print everything as JSON.")]
Model = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A folder with a diffusers pipeline.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.")]
Size = Annotated[str | None, typer.Option(metavar="WxH", help="Width and height, e.g. 1024x1024.")]
Side = Annotated[int | None, typer.Option(min=1, help="In pixels.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the random numbers.")]
Calls = Annotated[int, typer.Option(min=1, help="How often to ask in each way.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Any other argument of the pipeline's call, e.g. guidance_scale=3.5. Repeatable.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float16, bfloat16, float32, or auto: what the weights are stored in, and float32 for "
        "float16 on the simulator, whose kernels are the CPU's."
    ),
]


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        from . import __version__

        print(f"greenroom {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command(short_help="Answer a prompt with a pipeline too large for the device.")
def run(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to ask it.")],
    device: Device = None,
    simulate: Simulate = None,
    capacity: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help='The simulated device\'s memory, e.g. "8GiB". Else too little for the whole '
            "pipeline: room for its largest component, and for activations.",
        ),
    ] = None,
    steps: Steps = None,
    size: Size = None,
    width: Side = None,
    height: Side = None,
    seed: Seed = 0,
    settings: Settings = None,
    dtype: Dtype = "auto",
    calls: Calls = 1,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="The file to write; its ending says the form. Else picture.png, video.gif or "
            "answer.npz in the current folder. What is there is replaced.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option(help="Run diffusers' own model offload first, and compare with it.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Answer a prompt with a pipeline too large for the device, and tell what it cost.

    The pipeline runs with diffusers' own model offload, then with greenroom's, and the two answers
    must be the same to the bit. Without an accelerator both run on a simulated one: computed by
    this machine's CPU, so a large pipeline takes its time, but timed and metered as on the card.
    """
    with _sentences():
        from . import jobs

        report = jobs.run(
            model,
            prompt,
            device=device,
            simulate=simulate,
            capacity=capacity,
            dtype=dtype,
            seed=seed,
            settings=jobs.call_settings(steps, size, width, height, settings or ()),
            calls=calls,
            output=output,
            compares=compare,
        )
    _finish(report, as_json)


@app.command(short_help="Draw a picture in several ways of offloading, and compare.")
def demo(
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT",
            help="One thing or two: red, orange, yellow, green, blue, purple, white or black; "
            "circle, square, triangle, diamond, star or cross; left of, right of, above or below; "
            "on a colour.",
        ),
    ] = "a green triangle left of a red square",
    device: Device = None,
    simulate: Simulate = None,
    capacity: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help='The simulated device\'s memory, e.g. "8GiB". Else 20 MiB: too little for the '
            "whole pipeline.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The picture. What is there is replaced.")
    ] = Path("greenroom-demo.png"),
    as_json: Json = False,
) -> None:
    """Draw what a prompt says, and compare greenroom with diffusers' ways of offloading.

    The pipeline is a small SDXL whose trained weights come with greenroom: nothing is downloaded.
    It draws plain shapes, 64 x 64 pixels, and most prompts come out right. Beside the picture it
    writes another one, of device memory over time.
    """
    # The model is small: OpenMP's waiting threads would cost more than they save. torch reads it
    # when it is imported, which is below.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with _sentences():
        from . import jobs

        report = jobs.demo(
            prompt, device=device, simulate=simulate, capacity=capacity, output=output
        )
    _finish(report, as_json)


@app.command(short_help="Measure a pipeline in every way of offloading, side by side.")
def bench(
    model: Model,
    prompt: Annotated[
        str | None, typer.Option(metavar="PROMPT", help="What to ask it; else the demo's.")
    ] = None,
    device: Device = None,
    simulate: Simulate = None,
    capacity: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES", help="The simulated device's memory, e.g. \"8GiB\". Else the card's."
        ),
    ] = None,
    budget: Annotated[
        str,
        typer.Option(
            metavar="BYTES",
            help='Device memory for greenroom\'s last way: "12GiB", "80%" of the device\'s, or '
            "auto: what is free.",
        ),
    ] = "auto",
    calls: Calls = 2,
    steps: Steps = None,
    size: Size = None,
    settings: Settings = None,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure a pipeline in every way of offloading, side by side.

    All of it on the device, if it fits; diffusers' model offload, sequential offload, and group
    offload with a stream, by blocks and by leaves; greenroom one component at a time, and within a
    budget. Each way gets a pipeline of its own, the same prompt and the same random numbers, and
    all answers must be the same to the bit. A way that does not fit, or one of diffusers' that
    fails, is told, and the others go on. Nothing is written, and what greenroom learned of such
    calls before is not used.
    """
    with _sentences():
        from . import jobs

        asked = {} if prompt is None else {"prompt": prompt}
        report = jobs.bench(
            model,
            **asked,
            device=device,
            simulate=simulate,
            capacity=capacity,
            budget=budget,
            dtype=dtype,
            seed=seed,
            settings=jobs.call_settings(steps, size, None, None, settings or ()),
            calls=calls,
        )
    _finish(report, as_json)


@app.command(short_help="Predict whether a pipeline runs within a budget, and how fast.")
def plan(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL_DIR",
            help="A folder with a diffusers pipeline. Its configs are enough; weights are not "
            "looked at.",
            show_default=False,
        ),
    ] = None,
    card: Annotated[
        str | None,
        typer.Option(
            "--simulate",
            "--device",
            metavar="CARD",
            help="The card to plan for: rtx-4090, h200 ... (rtx-4060-laptop if none).",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help='Device memory to run within: "12GiB", or "80%" of the card\'s. Else all it has.',
        ),
    ] = None,
    steps: Steps = None,
    size: Size = None,
    settings: Settings = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float16, bfloat16, float32, or auto: what the weights are stored in, else what "
            "the configs say, else float32."
        ),
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Draw seconds over the budget, as a PNG. What is there is replaced.",
        ),
    ] = None,
    save_trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what was measured, to plan with elsewhere."),
    ] = None,
    from_trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Plan with what was measured before, instead of MODEL_DIR."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Predict, before running, whether a pipeline runs within a budget, how fast, and why.

    The pipeline is built from its configs, without weights, and called once on the simulated card
    as if there were memory enough. From what was measured then, the plan for any budget is
    computed, and how long it takes. Exit codes: 0 it runs within the budget, 1 it does not, 2
    wrong usage.
    """
    with _sentences():
        from . import jobs

        found = jobs.plan(
            model,
            card=card,
            budget=budget,
            settings=jobs.call_settings(steps, size, None, None, settings or ()),
            dtype=dtype,
            output=output,
            save_trace=save_trace,
            from_trace=from_trace,
        )
    jobs.print_forecast(found, as_json=as_json)
    raise typer.Exit(0 if found.fits else 1)


@app.command(
    "exec",
    short_help="Run a script, unchanged, with greenroom behind its offloading.",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
)
def execute(
    command: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT", help="A Python script, and its arguments."),
    ],
    is_module: Annotated[
        bool, typer.Option("-m", help="SCRIPT is a module's name, as in python -m.")
    ] = False,
    simulate: Annotated[
        str | None,
        typer.Option(
            metavar="CARD",
            help="Simulate this card, so that the script finds an accelerator: rtx-4090, h200 ...",
        ),
    ] = None,
    capacity: Annotated[
        str | None, typer.Option(metavar="BYTES", help="The simulated device's memory.")
    ] = None,
    devices: Annotated[
        int | None, typer.Option(min=1, max=16, help="How many of them to simulate.")
    ] = None,
) -> None:
    """Run a script, unchanged, with greenroom behind its pipe.enable_model_cpu_offload().

    Options for greenroom stand before the script; all that follows it is the script's.
    """
    path, *arguments = command
    if not is_module and not os.path.isfile(path):
        _refuse(f"there is no script {path!r}", 2)
    if simulate is None and (capacity is not None or devices is not None):
        _refuse("--capacity and --devices are for a simulated card: name it with --simulate", 2)
    with _sentences():
        if simulate is not None:
            _simulate(simulate, capacity, devices or 1)
        from .drop_in import install

        install()
    raise _ScriptRequest(path, arguments, is_module)


@app.command(short_help="Look at this machine, measure its link, say what is wrong.")
def doctor(
    device: Annotated[
        str | None,
        typer.Option(
            help="What to measure, as torch names it: cuda, cuda:1, sim. Else the machine's "
            "accelerator; that there is none is a trouble."
        ),
    ] = None,
    simulate: Annotated[
        str | None,
        typer.Option(metavar="CARD", help="Measure this card, simulated: rtx-4090, h200 ..."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at this machine: devices, memory, the speed of the link, versions, and what is wrong.

    Copies of up to 256 MiB are made and timed in both directions. Each trouble comes with what to
    do about it. Exit codes: 0 nothing is wrong, 1 something is, 2 wrong usage.
    """
    with _sentences():
        from .doctor import examine

        examination = examine(device, simulate)
    _finish(examination, as_json)


def _simulate(card: str, capacity: str | None, devices: int) -> None:
    from . import sim
    from .errors import UsageError

    try:
        sim.configure(card, capacity=capacity, devices=devices)
    except ValueError as error:
        raise UsageError(str(error)) from error


class _ScriptRequest(BaseException):
    """Leaves the command line, so that the script runs with nothing of it around."""

    def __init__(self, name: str, arguments: list[str], is_module: bool) -> None:
        self.name, self.arguments, self.is_module = name, arguments, is_module


def _refuse(sentence: str, code: int) -> NoReturn:
    print(f"greenroom: {sentence}", file=sys.stderr)
    raise typer.Exit(code)


class _Outcome(Protocol):
    """What a command found, and whether all is well with it."""

    @property
    def is_sound(self) -> bool: ...

    def print(self, *, as_json: bool) -> None: ...


def _finish(outcome: _Outcome, as_json: bool) -> NoReturn:
    outcome.print(as_json=as_json)
    raise typer.Exit(0 if outcome.is_sound else 1)


@contextlib.contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except _ParserError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            raise  # no refusal: it shows the help
        said: Any = error
        message = said.format_message().rstrip(".")
        message = message[:1].lower() + message[1:].replace(": Input should", ": it should")
        command = said.ctx.command_path if said.ctx is not None else "greenroom"
        _refuse(f"{message}; {command} --help tells what there is", 2)


@contextlib.contextmanager
def _sentences() -> Iterator[None]:
    """Let what is the user's to mend end the command with a sentence; bugs have tracebacks."""
    try:
        yield
    except Exception as error:
        from .errors import GreenroomError, UsageError

        if isinstance(error, (UsageError, ImportError)):
            _refuse(str(error), 2)
        if isinstance(error, (GreenroomError, OSError)) or _is_build_error(error):
            _refuse(str(error), 1)
        raise


def _is_build_error(error: Exception) -> bool:
    # Not by class: where there is no compiler, that cannot be imported either.
    return type(error).__name__ == "SimulatorBuildError"


def main() -> None:
    """Run the command line."""
    hook = sys.excepthook
    try:
        app()
    except _ScriptRequest as request:
        wanted = request
    from .scripts import run_module, run_script

    sys.excepthook = hook  # the command line has set its own
    (run_module if wanted.is_module else run_script)(wanted.name, wanted.arguments)
