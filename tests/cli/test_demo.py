"""`greenroom demo`: what somebody sees who has cloned the repository and has no GPU."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli.usage import Command, Done
from PIL import Image, ImageOps

from greenroom import compare, demo, jobs
from greenroom.tables import cells

ROOT = Path(__file__).parents[2]
#: The picture in the README.
SHOWN = ROOT / "docs" / "pictures" / "demo.png"
#: The picture of device memory there.
MEMORY_SHOWN = SHOWN.with_name("demo-memory.png")


@pytest.fixture
def two_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the two ways of `greenroom run` left out, which take most of the time."""
    monkeypatch.setattr(demo, "WAYS", compare.TWO_WAYS)


@pytest.fixture
def one_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only greenroom's, where there is nothing to compare."""
    monkeypatch.setattr(demo, "WAYS", {compare.GREENROOM: demo.WAYS[compare.GREENROOM]})


def printed_rows(page: str) -> list[list[str]]:
    """The rows of all tables, as their cells."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


def colours(file: str | Path) -> dict[str, np.ndarray]:
    """Where a picture is red and where it is green, as (row, column) pairs."""
    with Image.open(file) as picture:
        red, green, blue = np.moveaxis(np.asarray(picture.convert("RGB"), dtype=int), -1, 0)
    return {
        "red": np.argwhere((red > 150) & (green < 100) & (blue < 100)),
        "green": np.argwhere((green > 120) & (red < 100) & (blue < 100)),
    }


def is_drawn(file: str | Path) -> bool:
    """Whether something green is left of something red, neither of them a speck."""
    found = colours(file)
    if min(map(len, found.values())) < 100:
        return False
    return bool(found["green"][:, 1].max() < found["red"][:, 1].min())


@pytest.mark.slow
def test_every_way_draws_the_same_picture_and_the_readme_shows_it_and_its_cost(
    greenroom_command: Command,
) -> None:
    done = greenroom_command("demo", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    rows = [compare.Row(**row) for row in report["rows"]]
    assert [row.way for row in rows] == list(demo.WAYS)
    resident, first, *others = rows
    # The card has too little memory for all of it.
    assert report["capacity_bytes"] == demo.CAPACITY < report["weights_bytes"]
    assert not resident.fits
    assert first.same_output is None  # there is nothing before it
    assert all(row.same_output is True for row in others)
    assert [row.races for row in rows] == [None, 0, 0, 0, 0, 0, 0]
    assert [len(row.call_seconds) for row in rows] == [0, 1, 1, 1, 2, 2, 2]
    for row in rows:
        assert [row.way, *cells(row, calls=2)] in printed_rows("README.md")
    # It says what it is at, on standard error.
    assert done.err.splitlines()[0] == "running it on a simulated rtx-4060-laptop with 20.0 MiB"
    assert done.err.splitlines()[-1] == f"  7/7 {demo.WITHIN_BUDGET}"

    assert report["files"] == ["greenroom-demo.png", "greenroom-demo-memory.png"]
    assert sorted(path.name for path in Path().iterdir()) == sorted(report["files"])
    assert is_drawn("greenroom-demo.png")
    with Image.open("greenroom-demo.png") as drawn, Image.open(SHOWN) as shown:
        assert drawn.size == shown.size == (64, 64)
        # Another processor adds up in another order, which may change a pixel's last bit.
        difference = np.asarray(drawn, dtype=int) - np.asarray(shown, dtype=int)
    assert np.abs(difference).mean() < 1
    with Image.open("greenroom-demo-memory.png") as drawn, Image.open(MEMORY_SHOWN) as shown:
        assert drawn.size == shown.size
        # Another version of matplotlib places a letter a little elsewhere.
        difference = np.asarray(drawn.convert("L"), int) - np.asarray(shown.convert("L"), int)
    assert np.abs(difference).mean() < 5
    for picture in (SHOWN, MEMORY_SHOWN):
        assert picture.stat().st_size < 60_000
        assert picture.relative_to(ROOT).as_posix() in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.slow
def test_where_everything_fits_the_picture_is_the_resident_pipelines_and_the_budget_is_kept(
    greenroom_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("resident", demo.WITHIN_BUDGET)
    monkeypatch.setattr(demo, "WAYS", {name: demo.WAYS[name] for name in names})
    done = greenroom_command("demo", "--capacity", "8GiB", "--json")
    assert done.code == 0, done.err
    resident, budgeted = (compare.Row(**row) for row in json.loads(done.out)["rows"])
    assert resident.fits and budgeted.same_output is True
    assert resident.peak_bytes is not None and budgeted.peak_bytes is not None
    assert resident.peak_bytes > demo.CAPACITY
    assert budgeted.peak_bytes <= demo.BUDGET < 0.6 * resident.peak_bytes


@pytest.mark.slow
@pytest.mark.usefixtures("one_way")
def test_it_draws_what_the_prompt_says(greenroom_command: Command) -> None:
    for prompt, is_mirrored in (
        ("a red square left of a green triangle", True),
        ("a green circle left of a red square", False),
    ):
        done = greenroom_command("demo", prompt, "--output", "drawn.png")
        assert done.code == 0, done.err
        assert "wrote drawn.png" in done.out
        if is_mirrored:
            with Image.open("drawn.png") as picture:
                ImageOps.mirror(picture).save("drawn.png")
        assert is_drawn("drawn.png"), prompt


@pytest.mark.slow
@pytest.mark.usefixtures("two_ways")
def test_a_card_too_small_for_any_way_is_told_and_nothing_is_written(
    greenroom_command: Command,
) -> None:
    done = greenroom_command("demo", "--capacity", "4MiB")
    assert done.code == 1
    assert done.out.count("does not fit") == 2 and "4.0 MiB" in done.out
    last = done.err.splitlines()[-1]
    assert "out of memory" in last and last.endswith("Give it more (--capacity)")
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
    monkeypatch.setattr(jobs, "open_folder", lambda _: pytest.fail("it went on"))
    done: Done = greenroom_command("demo", *options)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert line.startswith("greenroom: ")
    assert list(Path().iterdir()) == []
