"""Where the verbs print: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

from edgeseg.console import plain_console, printable, printable_json
from edgeseg.progress import ConsoleReporter

if TYPE_CHECKING:
    from rich.console import Console


def echo(text: object, *, err: bool = False) -> None:
    """Print one line; what a terminal would obey is written out."""
    click.echo(printable(str(text)), err=err)


def print_json(value: object) -> None:
    """Print a dataclass as indented JSON on standard output."""
    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError:
        # A file name that is no UTF-8: Python holds its bytes as halves of surrogate pairs, which JSON can escape.
        text = json.dumps(msgspec.to_builtins(value), indent=2)
    click.echo(printable_json(text))


def show(path: Path) -> None:
    """Open a file or folder in the program the desktop has for it; where there is none, say so and go on."""
    linux = sys.platform.startswith("linux")
    if linux and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        echo(f"not opened: no display here; the result is {path}", err=True)
    elif click.launch(str(path.absolute())) != 0:
        echo(f"not opened: no program for it{' (xdg-open)' * linux}; the result is {path}", err=True)


def result_console() -> Console:
    """Where tables go: standard output."""
    return plain_console()


def error_console() -> Console:
    """Where sentences go that are no result: standard error."""
    return plain_console(stderr=True)


@contextmanager
def console_reporter() -> Iterator[ConsoleReporter]:
    """Yield a reporter on standard error whose progress bar is gone when the block ends, well or not."""
    reporter = ConsoleReporter(error_console())
    try:
        yield reporter
    finally:
        reporter.close()
