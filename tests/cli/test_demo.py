"""`greenroom demo`: what somebody sees who has cloned the repository and has no GPU."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.usage import Command, Done
from PIL import Image

from greenroom import compare, demo, jobs
from greenroom.tables import cells

ROOT = Path(__file__).parents[2]
TINY = importlib.import_module("greenroom.zoo.tiny")  # the package has a function of that name


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of the tests' own; the simulator has been loaded from the user's."""
    folder = tmp_path_factory.mktemp("cache") / "greenroom"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GREENROOM_CACHE", str(folder))
        yield folder


@pytest.fixture
def two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the two ways of `greenroom run` left out, which take most of the time."""
    monkeypatch.setattr(demo, "WAYS", compare.TWO_WAYS)


def printed_rows(page: str) -> list[list[str]]:
    """The rows of all tables, as their cells."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


@pytest.mark.slow
def test_every_way_gives_the_same_picture_and_the_readme_shows_their_cost(
    greenroom_command: Command, cache: Path
) -> None:
    done = greenroom_command("demo", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert [row["way"] for row in report["rows"]] == list(demo.WAYS)
    for row in report["rows"]:
        is_first = row["way"] == "resident"
        assert row["same_output"] is (None if is_first else True)
        assert row["races"] == 0
    rows = [compare.Row(**row) for row in report["rows"]]
    assert [len(row.call_seconds) for row in rows] == [1, 1, 1, 1, 2, 2]
    for row in rows:
        assert [row.way, *cells(row, calls=2)] in printed_rows("README.md")
    with Image.open("greenroom-demo.png") as picture:
        assert picture.size == (128, 128)
    assert [path.name for path in Path().iterdir()] == ["greenroom-demo.png"]
    # It says what it is at, on standard error.
    assert done.err.splitlines()[0] == "running it on a simulated rtx-4060-laptop"
    assert done.err.splitlines()[-1] == "  6/6 greenroom"


@pytest.mark.slow
@pytest.mark.usefixtures("two_ways")
def test_the_pipeline_is_saved_once_and_answers_the_prompt_that_was_given(
    greenroom_command: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: dict[str, Any] = {}
    (folder,) = {demo.model_folder() for _ in range(2)}
    assert folder.parent == cache and (folder / "model_index.json").is_file()
    assert [path.name for path in cache.iterdir()] == [folder.name]

    def build() -> None:
        pytest.fail("it was built again")

    monkeypatch.setattr(TINY, "demo_sdxl", build)
    for prompt in ("a cat", "a dog"):
        done = greenroom_command("demo", prompt, "--output", f"{prompt}.png")
        assert done.code == 0, done.err
        assert f"wrote {prompt}.png" in done.out
        pictures[prompt] = np.asarray(Image.open(f"{prompt}.png"))
    assert not np.array_equal(pictures["a cat"], pictures["a dog"])


@pytest.mark.slow
@pytest.mark.usefixtures("two_ways", "cache")
def test_a_card_too_small_for_any_way_is_told_and_nothing_is_written(
    greenroom_command: Command,
) -> None:
    done = greenroom_command("demo", "--capacity", "100MiB")
    assert done.code == 1
    assert done.out.count("does not fit") == 2 and "100.0 MiB" in done.out
    assert "out of memory" in done.err.splitlines()[-1]
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "options",
    [
        ["--simulate", "nope"],
        ["--capacity", "plenty"],
        ["--capacity", "0"],
        ["--device", "warp"],
        ["--output", "nowhere/a.png"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_refused_before_anything_runs(
    options: list[str], greenroom_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs._demo, "model_folder", lambda: pytest.fail("it went on"))
    done: Done = greenroom_command("demo", *options)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("greenroom: ")
    assert list(Path().iterdir()) == []


def test_a_pipeline_that_cannot_be_saved_leaves_no_half_of_it(
    greenroom_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "model_index.json").write_text("{}", encoding="utf-8")
            raise OSError(28, "No space left on device")

    monkeypatch.setenv("GREENROOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TINY, "demo_sdxl", Full)
    done = greenroom_command("demo")
    assert (done.code, done.out) == (1, "")
    assert "No space left on device" in done.err and "GREENROOM_CACHE" in done.err
    assert list((tmp_path / "cache").iterdir()) == []
