"""Where the verbs print: results to standard output, everything else to standard error."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

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
        text = msgspec.json.encode(value)
    except UnicodeEncodeError:
        # A file name that is no UTF-8: JSON has no bytes, so they are written as printed.
        text = msgspec.json.encode(_encodable(msgspec.to_builtins(value)))
    click.echo(printable_json(msgspec.json.format(text, indent=2).decode()))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", lambda found: printable(found[0]), value)
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    return [_encodable(item) for item in value] if isinstance(value, (list, tuple)) else value


def result_console() -> Console:
    """Where tables go: standard output."""
    return plain_console()


@contextmanager
def console_reporter() -> Iterator[ConsoleReporter]:
    """Yield a reporter on standard error whose progress bar is gone when the block ends, well or not."""
    reporter = ConsoleReporter(plain_console(stderr=True))
    try:
        yield reporter
    finally:
        reporter.close()
