"""What the documentation shows of commands is what they print, to the letter.

A block ``text`` that opens with ``$ greenroom ...`` has the command's standard output under it.
``pytest --rewrite-golden`` writes what is printed now.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.usage import Command
from PIL import Image

ROOT = Path(__file__).parents[2]
PAGES = ["docs/command-line.md", "docs/how-to/plan.md", "README.md"]
#: The picture that `greenroom plan` draws there.
CURVE = ROOT / "docs" / "pictures" / "curve.png"
SHOWN = re.compile(r"^```text\n\$ greenroom (.*)\n((?:.*\n)*?)```$", re.MULTILINE)


def blocks() -> list[Any]:
    found = []
    for page in PAGES:
        for match in SHOWN.finditer((ROOT / page).read_text(encoding="utf-8")):
            marks = [pytest.mark.slow] if not match[1].startswith("doctor") else []
            found.append(pytest.param(page, match[1], id=f"{page}: {match[1][:40]}", marks=marks))
    return found


def as_shown(text: str) -> str:
    """Without spaces at the ends of lines, and empty lines at the ends of the text."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines()).strip("\n") + "\n"


def of_any_machine(text: str) -> str:
    """Of the doctor's last table only what the rows are: what is in them is the machine's."""
    device, heading, machine = text.partition(" host and software")
    names = [re.split(r"  +", line.strip())[0] for line in machine.splitlines()]
    return device + heading + "\n".join(name.strip("─ ") for name in names)


@pytest.mark.parametrize(("page", "command"), blocks())
def test_a_page_shows_what_a_command_prints(
    page: str, command: str, greenroom_command: Command, pytestconfig: pytest.Config
) -> None:
    Path("src").symlink_to(ROOT / "src")
    done = greenroom_command(*shlex.split(command))
    assert done.code == 0, done.err
    printed = as_shown(done.out)
    text = (ROOT / page).read_text(encoding="utf-8")
    (shown,) = [match for match in SHOWN.finditer(text) if match[1] == command]
    if pytestconfig.getoption("rewrite_golden"):
        new = text[: shown.start(2)] + printed + text[shown.end(2) :]
        (ROOT / page).write_text(new, encoding="utf-8")
        if Path("curve.png").exists():
            CURVE.write_bytes(Path("curve.png").read_bytes())
        return
    if command.startswith("doctor"):
        assert of_any_machine(printed) == of_any_machine(shown[2])
    else:
        assert printed == shown[2]
    if Path("curve.png").exists():
        assert "(../pictures/curve.png)" in text
        with Image.open("curve.png") as drawn, Image.open(CURVE) as kept:
            assert drawn.size == kept.size
            # Another version of matplotlib places a letter a little elsewhere.
            away = np.asarray(drawn.convert("L"), int) - np.asarray(kept.convert("L"), int)
        assert np.abs(away).mean() < 5


def test_every_command_that_prints_something_of_its_own_is_shown() -> None:
    shown = {parameters.values[1].split()[0] for parameters in blocks()}
    assert shown == {"run", "demo", "bench", "plan", "doctor"}


def fields(heading: str) -> set[str]:
    """The JSON fields that the page lists in a row of its table."""
    text = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    text = text.partition("## JSON")[2]
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {heading} |")]
    return set(re.findall(r"`(\w+)`", row.split("|")[2]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "row"),
    [
        ("run {shapes} 'a red circle' --steps 1 --no-compare --json", "`run`, `demo`, `bench`"),
        ("plan {shapes} --steps 1 --json", "`plan`"),
        ("doctor --simulate rtx-4090 --json", "`doctor`"),
    ],
)
def test_the_fields_in_json_are_those_that_the_page_lists(
    command: str, row: str, greenroom_command: Command
) -> None:
    shapes = ROOT / "src/greenroom/zoo/weights/shapes"
    done = greenroom_command(*shlex.split(command.format(shapes=shapes)))
    found = json.loads(done.out)  # one document, and nothing beside it
    listed = fields(row)
    if "rows" in found:
        assert set(found["rows"][0]) == fields("each of their `rows`")
    if "curve" in found:
        points = fields("each point of its `curve`")
        assert all(set(point) == points for point in found["curve"])
        assert set(found["components"][0]) == fields("each of its `components`")
        listed |= points
    assert set(found) == listed
