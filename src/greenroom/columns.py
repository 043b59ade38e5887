"""Tables for people, which a narrow terminal gets in pieces instead of with cut-off cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table


@dataclass
class Columns:
    """Rows of cells under headings; the first column tells the rows apart.

    right: headings whose cells are numbers; by default all but the first.
    """

    headings: Sequence[str]
    right: Sequence[str] | None = None
    rows: list[tuple[Sequence[str], str | None]] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)

    def add(self, *cells: str, style: str | None = None) -> None:
        """Add a row."""
        self.rows.append((cells, style))

    def add_section(self) -> None:
        """Set what follows apart."""
        self.sections.add(len(self.rows))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One table if it fits; else as many as it takes, each with the rows' names."""
        shown = list(range(1, len(self.headings)))
        while shown:
            count = len(shown)
            while count > 1 and self._width(console, shown[:count]) > options.max_width:
                count -= 1
            yield self._table(shown[:count])
            shown = shown[count:]

    def _width(self, console: Console, shown: Sequence[int]) -> int:
        return console.measure(
            self._table(shown), options=console.options.update(width=10**4)
        ).maximum

    def _table(self, shown: Sequence[int]) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for which in (0, *shown):
            heading = self.headings[which]
            is_number = which > 0 if self.right is None else heading in self.right
            table.add_column(heading, justify="right" if is_number else "left", no_wrap=True)
        for number, (cells, style) in enumerate(self.rows):
            if number in self.sections:
                table.add_section()
            table.add_row(*(cells[which] for which in (0, *shown)), style=style)
        return table


def as_html(text: str) -> str:
    """Plain text with tables, for a notebook."""
    return f"<pre style='line-height: 1.2'>{escape(text)}</pre>"
