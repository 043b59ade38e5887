"""Golden traces: what the engine orders in the second call of tiny pipelines, step by step.

The files in tests/golden/ are read as code is: a changed one says what a change in src/ does to the
order of copies. When it is what was meant, write them anew and commit them together:

    python -m pytest tests/offload/test_golden.py --rewrite-golden

Each file has the trace without a budget (what the machine instructs) and within one (what the
director orders); the parts that go to the device as one, with their bytes, come first. A line is a
step, with what is ordered before it; steps before which nothing is stand in a row. What is repeated
as it is stands there once, after "28 x". Time is virtual, so nothing depends on the machine; layers
of another version of diffusers or transformers may.
"""

from __future__ import annotations

import difflib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from offload.golden import GOLDEN, folded, steps_text, text_of

TESTS = Path(__file__).parents[1]
FILES = TESTS / "golden"
pytestmark = pytest.mark.usefixtures("quick_collections")


def difference(expected: str, found: str) -> str:
    lines = difflib.unified_diff(
        expected.splitlines(), found.splitlines(), "expected", "found", lineterm=""
    )
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_ordered_is_what_the_file_says(name: str, request: pytest.FixtureRequest) -> None:
    path, found = FILES / f"{name}.txt", text_of(name)
    if request.config.getoption("rewrite_golden"):
        path.write_text(found, encoding="utf-8")
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    if found != expected:
        pytest.fail(
            f"{name} is ordered otherwise. If that is meant: --rewrite-golden\n"
            + difference(expected, found),
            pytrace=False,
        )


def test_every_file_is_of_a_pipeline() -> None:
    assert {path.stem for path in FILES.iterdir()} == set(GOLDEN)


@pytest.mark.slow
def test_the_same_is_ordered_every_time() -> None:
    assert text_of("wan2.2") == text_of("wan2.2")


@pytest.mark.slow
def test_the_same_is_ordered_in_every_process() -> None:
    # Addresses differ, and so does the order of sets.
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    paths = [str(TESTS), *sys.path]
    environment = {
        "PYTHONHASHSEED": seed,
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }
    names = ["wan2.2", "sd-encoded-apart"]
    process = subprocess.run(
        [sys.executable, "-m", "offload.golden", *names],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    for name in names:
        expected = (FILES / f"{name}.txt").read_text(encoding="utf-8")
        assert found[name] == expected, difference(expected, found[name])


def quiet(names: str) -> list[tuple[str, tuple[str, ...]]]:
    return [(name, ()) for name in names]


def test_loops_are_folded() -> None:
    assert list(folded(quiet("abcbcbcd"))) == [(1, 0, 1), (3, 1, 3), (1, 7, 8)]
    assert list(folded(quiet("aaaa"))) == [(4, 0, 1)]
    assert list(folded(quiet("abc"))) == [(1, 0, 3)]
    assert steps_text([("a", ("-b", "+a")), *quiet("cdcdcd")]) == ("a               -b +a\n3 x c d")
