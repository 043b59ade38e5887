"""One way of running one full-size pipeline on a simulated card, in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

DOES_NOT_FIT = 3  # exit status of a measuring process

Enable = Callable[[Any], Any]


# ---- in the process
# -----------------------------------------------------------------------------------------------


def load(name: str, profile: str, capacity: str | None = None) -> Any:
    """Choose the card, and build the pipeline in its host's memory."""
    import diffusers

    import greenroom.sim as sim
    from greenroom import zoo

    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    sim.configure(profile, capacity=capacity, dry_above="1MiB")
    pipe = zoo.full(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure(
    pipe: Any, name: str, enable: Enable, calls: int, arguments: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Enable one way and call the pipeline a few times in a row.

    A call takes until its picture is done. What it has begun to do for the next one by then is in
    the seconds of the next.
    """
    import torch

    import greenroom.sim as sim
    from greenroom import zoo
    from greenroom.traces import keeping_none

    with sim.measure() as enabling:
        enable(pipe)
    measured = []
    for _ in range(calls):
        with keeping_none(), sim.measure(settle=False) as call:  # the first call is one each time
            pipe(**zoo.full_call_kwargs(name, **arguments))
            torch.get_device_module("sim").current_stream().synchronize()
        measured.append(call)
    return {"enable": _plain(enabling), "calls": [_plain(call) for call in measured]}


def _plain(cost: Any) -> dict[str, Any]:
    return {**dataclasses.asdict(cost), "races": [str(race) for race in cost.races]}


def answer(measure: Callable[..., dict[str, Any]], job: str) -> None:
    """Do what `in_fresh_process` asked for, and print the result where it looks for it."""
    import torch

    try:
        print(json.dumps(measure(*json.loads(job))))
    except torch.OutOfMemoryError:
        sys.exit(DOES_NOT_FIT)


# ---- outside of it
# ------------------------------------------------------------------------------------------------


def in_fresh_process(script: str, *job: Any, seed: int = 0) -> dict[str, Any] | None:
    """Run `script --measure` with a job, see `answer`; None if the device had too little memory."""
    child = subprocess.run(
        [sys.executable, script, "--measure", json.dumps(job)],
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONHASHSEED": str(seed),
            "TRANSFORMERS_VERBOSITY": "error",
        },
    )
    if child.returncode == DOES_NOT_FIT:
        return None
    child.check_returncode()
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def largest_spread_s(runs: list[dict[str, Any]]) -> float:
    """How far repetitions lie apart, in enabling or in a call."""
    seconds = [[run["enable"]["seconds"], *(c["seconds"] for c in run["calls"])] for run in runs]
    return max(max(s) - min(s) for s in zip(*seconds, strict=True))
