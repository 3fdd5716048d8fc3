"""``edgeseg inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from edgeseg.cli.output import print_json, result_console
from edgeseg.cli.parameters import ANY_PATH


@click.command("inspect", short_help="Show what an engine folder holds and check its hashes.")
@click.argument("folder", type=ANY_PATH, metavar="ENGINE_DIR")
@click.option("--layers", is_flag=True, help="List every layer of the executed graph.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(folder: Path, layers: bool, as_json: bool) -> None:
    """Show what ENGINE_DIR holds, check its hashes, and list what runs in which precision."""
    from edgeseg.inspect_engine import inspect_engine, render

    found = inspect_engine(folder)
    if as_json:
        print_json(found)
    else:
        result_console().print(render(found, layers=layers))
