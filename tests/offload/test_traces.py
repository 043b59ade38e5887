"""What was learned of a call is kept for the next process."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from offload.small import Small, result, within_of

import greenroom.sim as sim
from greenroom.errors import BudgetTooSmall
from greenroom.pipeline import _kind_of


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("greenroom.core.plan._MOST_STEPS", 100)
    monkeypatch.setenv("GREENROOM_TRACES", str(tmp_path / "traces"))
    return tmp_path / "traces"


def is_learned(pipe: Small, *args: Any, budget: str = "28KiB", **kwargs: Any) -> bool:
    """Whether a call is learned, though it is the first of this pipeline; its picture is right."""
    learned = []

    def look(pipe: Small, step: int) -> None:
        learned.append(within_of(pipe)._first is not None)

    expected = result(pipe, *args, **kwargs)
    pipe.enable_model_cpu_offload(budget=budget)
    assert torch.equal(result(pipe, *args, each_step=look, **kwargs), expected)
    pipe.disable_model_cpu_offload()
    return learned[0]


def test_the_first_call_of_a_process_goes_as_planned(folder: Path) -> None:
    assert is_learned(Small())
    assert len(list(folder.iterdir())) == 1
    assert not is_learned(Small())
    assert is_learned(Small(), steps=3)  # another kind of call
    assert is_learned(Small(blocks=4))
    assert is_learned(Small(width=64))
    sim.configure("rtx-3090")
    assert is_learned(Small())


def test_what_is_read_is_what_was_measured(folder: Path) -> None:
    plans = []
    for _ in range(2):
        pipe = Small()
        pipe.enable_model_cpu_offload(budget="28KiB")
        for _ in range(2):
            result(pipe)
        *_, known = within_of(pipe).known._plans.values()
        plans.append([(s.seconds, s.beside_nbytes, s.opens) for s in known.plan.steps])
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "call": "another"}),
        lambda text: json.dumps({**json.loads(text), "places": []}),
        lambda text: json.dumps({**json.loads(text), "steps": [[0, "soon", -1]]}),
        lambda text: json.dumps({**json.loads(text), "steps": []}),
        lambda text: json.dumps({**json.loads(text), "format": 0}),
    ],
)
def test_files_that_cannot_be_read_are_ignored_and_replaced(
    folder: Path, spoil: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "greenroom")
    is_learned(Small())
    (file,) = folder.iterdir()
    file.write_text(spoil(file.read_text()))
    assert is_learned(Small())
    assert "ignored" in caplog.text
    assert not is_learned(Small())


def test_a_trace_that_is_wrong_is_learned_anew(folder: Path) -> None:
    is_learned(Small())
    (file,) = folder.iterdir()
    found = json.loads(file.read_text())
    found["steps"].reverse()
    file.write_text(json.dumps(found))
    pipe = Small()
    pipe.enable_model_cpu_offload(budget="28KiB")
    for _ in range(3):
        result(pipe, each_step=None)
    assert json.loads(file.read_text())["steps"] != found["steps"]
    director = within_of(pipe).director
    assert director is not None and director.deviations == 0


def test_a_folder_that_cannot_be_written_does_no_harm(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "greenroom")
    folder.write_text("a file, where the folder should be")
    for _ in range(2):
        assert is_learned(Small())
    assert "could not be kept" in caplog.text


def test_a_budget_that_is_known_to_be_too_small_is_refused_by_the_next_process(
    folder: Path,
) -> None:
    with pytest.warns(UserWarning, match="raise the budget"):
        is_learned(Small(works_on=60), 8, budget="32KiB")
    pipe = Small(works_on=60)
    pipe.enable_model_cpu_offload(budget="32KiB")
    with pytest.raises(BudgetTooSmall):
        result(pipe, 8, each_step=None)


def test_they_can_be_turned_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GREENROOM_TRACES", "off")
    for _ in range(2):
        assert is_learned(Small())
    assert not folder.exists()


def test_the_kind_of_a_call_means_the_same_everywhere() -> None:
    class Anything:
        pass

    def kind() -> str:
        x = torch.zeros(2, 3)
        return repr(_kind_of((x, "a"), {"b": Anything(), "c": [1], "g": 7.5, "f": print, "n": 3}))

    assert kind() == kind()
    assert "0x" not in kind()


@pytest.mark.slow
def test_another_process_finds_it(folder: Path) -> None:
    program = (
        "from offload.small import *\n"
        "import greenroom.sim\n"
        "pipe = Small()\n"
        "pipe.enable_model_cpu_offload(budget='28KiB')\n"
        "look = lambda pipe, step: print(within_of(pipe)._first is None)\n"
        "result(pipe, steps=1, each_step=look)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["tests", *sys.path])}
    said = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert said == [["False"], ["True"]]
