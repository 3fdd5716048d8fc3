"""What reaches a person's terminal: names from files and checkpoints may hold anything, escape sequences included."""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

# Control characters, line and paragraph ends, marks that change the direction of writing or are not seen, surrogates.
# The joiners U+200C and U+200D stay: Persian and emoji are written with them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    r"""One line of text that a terminal shows as it is: what it would obey is written out, ``\x1b`` or ``\u202e``."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def printable_json(text: str) -> str:
    """JSON of the same value in which no character is obeyed by a terminal; its own line ends stay."""

    def escaped(match: re.Match[str]) -> str:
        units = match[0].encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[i : i + 4]}" for i in range(0, len(units), 4))

    return "\n".join(_UNSAFE.sub(escaped, line) for line in text.split("\n"))


def markdown_text(text: str) -> str:
    """Text on one line that Markdown shows as it is: no markup, no HTML, no new table cell."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore inside a word is no markup.
    return re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", flat)


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints names as they are, brackets included, and as escapes what a terminal would obey."""
    # rich would read edgeseg[tensorrt], or a class called [void], as a style and drop it.
    # NO_COLOR: whoever asks for no colours wants no escape sequences for bold either.
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    # COLUMNS=0, as of a terminal without a size: rich would print nothing.
    width = shutil.get_terminal_size().columns if os.environ.get("COLUMNS") == "0" else None
    return _console_class()(markup=False, stderr=stderr, color_system=colours, width=width)


@lru_cache(maxsize=1)
def _console_class() -> type[Console]:
    from rich.console import Console
    from rich.text import Text

    class PlainConsole(Console):
        """Every text, in tables too, is rendered here: the one place where escapes are written out."""

        def render(self, renderable: Any, options: Any = None) -> Iterable[Any]:
            if isinstance(renderable, str):
                renderable = printable(renderable)
            elif isinstance(renderable, Text) and _UNSAFE.search(renderable.plain):
                renderable = Text(
                    printable(renderable.plain),
                    style=renderable.style,
                    justify=renderable.justify,
                    overflow=renderable.overflow,
                    no_wrap=renderable.no_wrap,
                    end=renderable.end,
                )
            return super().render(renderable, options)

        def on_broken_pipe(self) -> None:
            # rich would exit with 1 by itself; what that means is for the command to say.
            raise BrokenPipeError

    return PlainConsole


def hanging(head: str, text: str, console: Console) -> list[str]:
    """``head`` and ``text`` in lines that a terminal does not split within a word; one line where there is none."""
    width = max(console.width - len(head), 20)
    lines = (
        textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) if console.is_terminal else [text]
    )
    return [f"{head if n == 0 else ' ' * len(head)}{line}" for n, line in enumerate(lines or [""])]


def draws_bars(console: Console) -> bool:
    """Whether progress bars make sense: into a file or a log they are noise. FORCE_COLOR says that a pipe ends on one."""
    return console.is_terminal
