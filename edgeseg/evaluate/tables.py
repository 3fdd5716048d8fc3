"""Tables for a terminal of any width: figures are never cut nor split, names give way and wrap at hyphens."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from edgeseg.console import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group
    from rich.table import Table

MISSING = "-"
"""Printed for what was not measured; never 0."""
NARROWEST_NAME = 10
"""A name is wrapped to no fewer columns; a terminal too narrow even for that shows lines longer than itself."""

Kind: TypeAlias = Literal["name", "words", "figure"]


def number(value: float, digits: int, *, signed: bool = False) -> str:
    """``value`` with so many digits after the point; what rounds to zero has no sign."""
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text if re.search(r"[1-9n]", text) else text.lstrip("+-")  # the n of nan and inf


def milliseconds(value: float) -> str:
    """Two digits after the point, none from a second on: five tell enough, and the name beside them needs the room."""
    return f"{value:.2f}" if value < 1000 else f"{value:.0f}"


def wrapped(name: str, width: int) -> str:
    """``name`` in lines of at most ``width`` columns, broken behind hyphens, slashes, underscores, commas and spaces; only a
    part that is longer by itself is cut."""
    lines: list[str] = []
    line = ""
    for part in re.split(r"(?<=[-/_, ])(?=\w)", name):
        if line and len((line + part).rstrip()) > width:
            lines.append(line.rstrip())
            line = ""
        line += part
        while len(line.rstrip()) > width:
            lines.append(line[:width])
            line = line[width:]
    return "\n".join([*lines, line.rstrip()] if line.strip() or not lines else lines)


@dataclass
class FigureTable:
    """A table as rich prints it, fitted to the terminal it is printed on.

    A column of figures in which nothing was measured is left out.

    Attributes:
        columns: heading, in which a line end starts a line, and kind. ``figure``: right-aligned, never wrapped; ``words``:
            wraps at spaces and commas; ``name``: gives way last and most, see :func:`wrapped`.
        title: above the table.
        has_header: whether the headings are printed.
    """

    columns: tuple[tuple[str, Kind], ...]
    title: str | None = None
    has_header: bool = True
    rows: list[tuple[tuple[str, ...], str | None]] = field(default_factory=list)

    @classmethod
    def of(cls, name: str, *figures: str) -> FigureTable:
        """A table whose first column is a name, and the others figures."""
        return cls(((name, "name"), *((heading, "figure") for heading in figures)))

    def add(self, *cells: str, style: str | None = None) -> None:
        """Add a row; one with fewer cells than columns is filled up with empty ones."""
        shown = map(printable, cells)
        self.rows.append(((*shown, *[""] * (len(self.columns) - len(cells))), style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Wrap words, then names, by as much as the table is too wide; in the end within a word, such as a path."""
        widths = dict.fromkeys(range(len(self.columns)), 10_000)
        for kind, is_whole in (("words", True), ("name", False), ("words", False)):
            for index in (k for k, (_, of) in enumerate(self.columns) if of == kind):
                table = self._table(widths)
                excess = console.measure(table, options=options.update(width=10_000)).maximum - options.max_width
                if excess <= 0:
                    break
                cells = [self.columns[index][0], *(cells[index] for cells, _ in self.rows)]
                longest = max(len(line) for cell in cells for line in wrapped(cell, widths[index]).split("\n"))
                least = max(len(part) for cell in cells for part in cell.split(" ")) if is_whole else NARROWEST_NAME
                widths[index] = max(least, longest - excess)
        yield self._table(widths)

    def _table(self, widths: dict[int, int]) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        shown = [k for k, (_, kind) in enumerate(self.columns) if kind != "figure" or self._is_measured(k)]
        table = Table(
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            show_header=self.has_header,
            title=None if self.title is None else Text(self.title),
            title_justify="left",
        )
        for k in shown:
            heading, kind = self.columns[k]
            table.add_column(_lines(heading, widths[k]), justify="right" if kind == "figure" else "left", no_wrap=True)
        for cells, style in self.rows:
            table.add_row(*(_lines(cells[k], widths[k]) for k in shown), style=style)
        return table

    def _is_measured(self, index: int) -> bool:
        return not self.rows or any(cells[index] not in {"", MISSING} for cells, _ in self.rows)


def _lines(text: str, width: int) -> Group:
    """``text`` wrapped, each line by itself: our console writes out a line end that is within a text."""
    from rich.console import Group
    from rich.text import Text

    # Text, not str: rich would read [brackets] in a name as markup.
    return Group(*map(Text, wrapped(text, width).split("\n")))


def counted(count: int, one: str, many: str | None = None) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count} {one if count == 1 else many or one + 's'}"
