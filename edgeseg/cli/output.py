"""Where the verbs print: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
import msgspec

from edgeseg.progress import ConsoleReporter

if TYPE_CHECKING:
    from rich.console import Console


def print_json(value: object) -> None:
    """Print a dataclass as indented JSON on standard output. Bytes of file names that are not UTF-8 become ``\\udcXX``."""
    try:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    except UnicodeEncodeError:
        # Python holds such bytes as halves of surrogate pairs, which JSON can escape and msgspec does not.
        text = json.dumps(msgspec.to_builtins(value), indent=2)
    click.echo(text)


def result_console() -> Console:
    """Where tables go: standard output. Names and messages are printed as they are, brackets included."""
    from rich.console import Console

    # rich would read edgeseg[tensorrt], or a class called [void], as a style and drop it.
    return Console(markup=False)


@contextmanager
def console_reporter() -> Iterator[ConsoleReporter]:
    """Yield a reporter on standard error whose progress bar is gone when the block ends, well or not."""
    from rich.console import Console

    reporter = ConsoleReporter(Console(stderr=True))
    try:
        yield reporter
    finally:
        reporter.close()
