"""The command line.

Exit codes: 0 done, 1 something did not come out as it should, 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Annotated

import typer

from .core.units import format_bytes

app = typer.Typer(
    name="greenroom",
    help="Run PyTorch pipelines of several models on accelerators too small to hold them all.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _options() -> None:
    # The models that the commands run themselves are small: OpenMP's waiting threads would cost
    # more than they save. Must be set before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@app.command()
def demo(
    profile: Annotated[
        str, typer.Option(help="The machine to simulate, e.g. rtx-4090 or h200.")
    ] = "rtx-4060-laptop",
    capacity: Annotated[
        str | None, typer.Option(help='Its device memory, e.g. "150MiB"; else the real card\'s.')
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Compare the ways of offloading on a small SDXL pipeline, on the simulated accelerator."""
    rows = []
    try:
        _quieten()
        from .demo import WAYS, compare

        print(f"running a small SDXL on a simulated {profile}", file=sys.stderr, flush=True)
        for row in compare(profile, capacity):
            rows.append(row)
            print(f"  {len(rows)}/{len(WAYS)} {row.way}", file=sys.stderr, flush=True)
    except (ValueError, ImportError) as error:
        print(f"greenroom: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    except RuntimeError as error:
        if type(error).__name__ != "SimulatorBuildError":
            raise
        print(f"greenroom: {error}", file=sys.stderr)
        raise typer.Exit(1) from error

    if as_json:
        print(json.dumps([row.to_dict() for row in rows], indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table(
            title=f"SDXL's classes, 266 MB of random weights, 4 steps, on a simulated {profile}",
            caption="times are virtual, bytes of one call; 'same': the CPU's picture, bit by bit",
        )
        table.add_column("way")
        for heading in ("to enable", "a call", "peak", "to device", "to host", "races", "same"):
            table.add_column(heading, justify="right")
        for row in rows:
            if not row.fits:
                table.add_row(row.way, *["-"] * 6, "does not fit")
                continue
            table.add_row(
                row.way,
                f"{row.enable_seconds * 1e3:.1f} ms",
                f"{row.seconds * 1e3:.1f} ms",
                format_bytes(row.peak_bytes),
                format_bytes(row.h2d_bytes),
                format_bytes(row.d2h_bytes),
                str(row.races),
                "yes" if row.same_output else "NO",
            )
        Console(width=None if sys.stdout.isatty() else 110).print(table)
    if any(row.races or row.same_output is False for row in rows):
        raise typer.Exit(1)


@app.command(
    "exec",
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "allow_interspersed_args": False,
    },
)
def execute(
    context: typer.Context, script: Annotated[str, typer.Argument(help="A Python script.")]
) -> None:
    """Run a script, unchanged, with greenroom behind its pipe.enable_model_cpu_offload()."""
    if not os.path.isfile(script):
        print(f"greenroom: there is no script {script!r}", file=sys.stderr)
        raise typer.Exit(2)
    from .drop_in import run_script

    run_script(script, context.args)


def _quieten() -> None:
    """Keep the libraries' notes about other things out of our output."""
    warnings.simplefilter("ignore")
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()


def main() -> None:
    """Run the command line."""
    app()
