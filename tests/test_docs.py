"""The documentation's examples run, its figures are asserted in them, and its links lead somewhere.

Every ``python`` block runs as a program of its own, unless the line ``<!-- not run -->`` stands
above it. A block that opens with the name of a test file (``# test_offload.py``) is run by pytest.
Under the line ``<!-- printed by the example above -->`` stands what an example prints;
``pytest --rewrite-golden`` writes it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import greenroom.sim  # noqa: F401  (so that every example starts on a fresh simulator)

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CHANGELOG.md",
    *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md")),
)
#: Their examples must not get lost: that no block is found would pass unseen.
WITH_EXAMPLES = {
    "README.md",
    "docs/index.md",
    "docs/observe.md",
    "docs/simulator.md",
    "docs/tutorial.md",
    *(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/how-to/*.md")),
}
NOT_RUN = "<!-- not run -->"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(
    r"\A[^`]*?<!-- printed by the example above -->\n```text\n(.*?)```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks() -> list[pytest.param]:
    found = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            if not text[: match.start()].rstrip().endswith(NOT_RUN):
                line = text.count("\n", 0, match.start(1)) + 1
                found.append(pytest.param(page, line, match[1], id=f"{page}:{line}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("page", "line", "code"), blocks())
def test_an_example_runs(
    page: str,
    line: int,
    code: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    pytestconfig: pytest.Config,
) -> None:
    monkeypatch.chdir(tmp_path)  # what it writes
    if name := re.match(r"# (test_\w+\.py)\n", code):
        (tmp_path / name[1]).write_text(code, encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", name[1]],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout
    else:
        # Empty lines in front, so that a traceback shows the page's own line numbers.
        padded = "\n" * (line - 1) + code
        exec(compile(padded, str(ROOT / page), "exec"), {"__name__": "example"})
        check_printed(page, code, capsys.readouterr().out, pytestconfig)


def check_printed(page: str, code: str, out: str, config: pytest.Config) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    after = text.index(code) + len(code) + len("```\n")
    shown = PRINTED.match(text[after:])
    if shown is None:
        return
    printed = "".join(f"{line.rstrip()}\n" for line in out.splitlines())
    if config.getoption("rewrite_golden"):
        begin, end = after + shown.start(1), after + shown.end(1)
        (ROOT / page).write_text(text[:begin] + printed + text[end:], encoding="utf-8")
    else:
        assert printed == shown[1]


def test_the_pages_have_examples() -> None:
    assert {parameters.values[0] for parameters in blocks()} == WITH_EXAMPLES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in LINK.findall(text):
        if link.startswith("https://"):
            continue
        target, _, heading = link.partition("#")
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        assert not heading or heading in headings(path), link


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
