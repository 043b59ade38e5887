"""What the documentation site's build makes: help texts, the picture of the states, no requests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from enum import Enum
from pathlib import Path

import page_hooks
import pytest
import state_diagram
from docstring_examples import fence
from typer.main import get_command
from typer.testing import CliRunner

import greenroom
from greenroom.cli import app
from greenroom.core.machine import TABLE

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(get_command(app).commands)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


# ---- the command line


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_every_command_is_on_its_page_with_what_help_prints(command: str) -> None:
    marker = f"<!-- generated: help {command}".rstrip() + " -->"
    heading = f"## greenroom {command}".rstrip()
    assert f"\n{heading}\n\n{marker}\n" in page("command-line.md")
    help_page = page_hooks.on_page_markdown(marker)
    printed = CliRunner().invoke(
        app,
        [*([command] if command else []), "--help"],
        prog_name="greenroom",
        env={"COLUMNS": str(page_hooks.COLUMNS + 2)},
        terminal_width=page_hooks.COLUMNS,
    )
    assert help_page == f"```text\n{printed.output.rstrip()}\n```"


def test_every_command_says_what_it_does_in_one_line_that_is_not_cut_off() -> None:
    text = page_hooks.on_page_markdown("<!-- generated: help -->")
    for command in COMMANDS:
        (line,) = re.findall(rf"^  {command} +(.*)$", text, re.MULTILINE)
        assert line.endswith(".") and not line.endswith("...")


@pytest.mark.parametrize(
    ("words", "expected"),
    [("greenroom d", {"demo", "doctor"}), ("greenroom doctor --si", {"--simulate"})],
)
def test_shells_can_complete(words: str, expected: set[str]) -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("greenroom"))],
        env={
            **os.environ,
            "_GREENROOM_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(len(words.split()) - 1),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert set(done.stdout.split()) == expected, done.stderr


# ---- the states


def test_the_picture_shows_every_state_and_move_of_the_machines_table() -> None:
    svg = ET.fromstring(page_hooks.on_page_markdown("<!-- generated: states picture -->"))
    texts = [(text.get("class"), text.text or "") for text in svg.iter("text")]
    states = {text for kind, text in texts if kind == "state"}
    assert states == {state.value for state, _ in TABLE}
    moves = [move for kind, text in texts if kind == "move" for move in text.split(", ")]
    expected = [
        event.__name__ + (f" / {instruction.__name__}" if instruction else "")
        for (_, event), (_, instruction) in TABLE.items()
    ]
    assert sorted(moves) == sorted(expected)
    # Nothing is drawn outside the picture, nor one state over another.
    boxes = [tuple(float(box.get(side, "")) for side in ("x", "y")) for box in svg.iter("rect")]
    assert all(
        0 <= x <= state_diagram.WIDTH - state_diagram.BOX_W
        and 0 <= y <= state_diagram.HEIGHT - state_diagram.BOX_H
        for x, y in boxes
    )
    assert all(
        abs(a[0] - b[0]) > state_diagram.BOX_W or abs(a[1] - b[1]) > state_diagram.BOX_H
        for a in boxes
        for b in boxes
        if a is not b
    )


def test_the_table_in_words_has_every_move_in_a_line() -> None:
    lines = page_hooks.on_page_markdown("<!-- generated: states table -->").splitlines()[2:]
    assert len(lines) == len(TABLE)
    assert "| home | `Needed` | **onloading** | carries out `Onload` |" in lines
    assert "| kept | `Release` | kept |  |" in lines


class Light(Enum):
    RED = "red"
    GREEN = "green <&>"


class Turn:
    pass


def test_any_table_can_be_drawn() -> None:
    table = {(Light.RED, Turn): (Light.GREEN, None), (Light.GREEN, Turn): (Light.RED, Turn)}
    svg = state_diagram.draw(table)
    assert ET.fromstring(svg).tag == "svg"
    assert "green &lt;&amp;&gt;" in svg and "Turn / Turn" in svg


# ---- the pages


def test_the_changelog_is_the_repositorys_with_links_that_fit_the_page() -> None:
    text = page_hooks.on_page_markdown(page("changelog.md"))
    assert "## Unreleased" in text and "](simulator.md)" in text
    assert text.count("# Changelog") == 1


def test_every_public_name_is_in_the_reference() -> None:
    pages = page("reference/greenroom.md") + page("reference/observe.md")
    listed = re.findall(r"^::: greenroom\.(\w+)$", pages, re.MULTILINE)
    assert sorted(listed) == sorted(set(greenroom.__all__) - {"__version__"})


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ('<script src="https://cdn.example/a.js"></script>', ["<script> https://cdn.example/a.js"]),
        ('<link rel="stylesheet" href="//fonts.example/css">', ["<link> //fonts.example/css"]),
        ('<img src="http://example/a.png">', ["<img> http://example/a.png"]),
        ('<script src="assets/a.js"></script><img src="a.png">', []),
        ('<a href="https://example.org">a link is followed by the reader alone</a>', []),
        ('<img src="data:image/png;base64,AAAA">', []),
    ],
)
def test_what_a_page_asks_other_hosts_for_is_found(html: str, found: list[str]) -> None:
    assert page_hooks.outside_resources(html) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Says.\n\n>>> a\n>>> b\n\nMore.", "Says.\n\n\n```pycon\n>>> a\n>>> b\n```\n\nMore."),
        (">>> a\n1", "\n```pycon\n>>> a\n1\n```"),
        ("None here.", "None here."),
    ],
)
def test_examples_in_docstrings_become_code(text: str, expected: str) -> None:
    assert fence(text) == expected
