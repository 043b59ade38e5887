"""What the site's build adds to the pages: what is generated, and a look at what came out.

``<!-- generated: NAME ARGUMENT -->`` on a page is replaced by what the function NAME makes.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import state_diagram
from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]

#: Of help texts; what fits on a page beside its menus.
COLUMNS = 80

PLACE = re.compile(r"^<!-- generated: (\w+) ?(.*?) -->$", re.MULTILINE)


def help_text(command: str) -> str:
    """What ``greenroom COMMAND --help`` prints."""
    import typer
    from typer.main import get_command

    from greenroom.cli import app

    whole: Any = get_command(app)
    context = typer.Context(
        whole, info_name="greenroom", terminal_width=COLUMNS, **whole.context_settings
    )
    found = whole
    if command:
        found = whole.commands[command]
        context = typer.Context(found, parent=context, info_name=command)
    return f"```text\n{found.get_help(context).rstrip()}\n```"


def state_table(which: str) -> str:
    """The table of states, as a picture or in words."""
    from greenroom.core.machine import TABLE

    return state_diagram.draw(TABLE) if which == "picture" else state_diagram.describe(TABLE)


def changelog(_: str) -> str:
    """The changelog, which lies beside the pages' folder, without its heading."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return text.partition("\n")[2].replace("](docs/", "](")


MAKERS = {"help": help_text, "states": state_table, "changelog": changelog}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill a page's places."""
    return PLACE.sub(lambda match: MAKERS[match[1]](match[2]), markdown)


# ---- nothing is asked for from elsewhere

#: What a browser fetches by itself, by element.
FETCHED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}


class _Fetches(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(FETCHED.get(tag, ""))
        if address is not None and re.match(r"(\w+:)?//", address):
            self.found.append(f"<{tag}> {address}")


def outside_resources(html: str) -> list[str]:
    """What a page lets the browser fetch from other hosts."""
    parser = _Fetches()
    parser.feed(html)
    return parser.found


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that needs a network."""
    if found := outside_resources(output):
        raise PluginError(f"{page.file.src_uri} asks for {', '.join(found)}")
    return output
