"""``edgeseg compile``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeseg.backends import BACKENDS
from edgeseg.cli.output import console_reporter, echo, print_json
from edgeseg.cli.parameters import ANY_PATH
from edgeseg.cli.shared_options import request_options


@click.command("compile", short_help="Build this machine's engine from a folder's portable graph.")
@click.argument("folder", type=ANY_PATH, metavar="ENGINE_DIR")
@click.option("--target", type=click.Choice(tuple(BACKENDS)), help="[default: the folder's own]")
@request_options("backend_options")
@click.option("--output", type=ANY_PATH, help="Write a new folder instead of replacing the engine in ENGINE_DIR.")
@click.option("--force", is_flag=True, help="Replace an engine folder that is at --output.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def command(
    folder: Path,
    target: str | None,
    given: dict[str, Any],
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build this machine's engine from the portable graph in ENGINE_DIR. Needs no PyTorch.

    Where the folder carries several graphs that meet its --max-drop or --min-agreement, all are built and timed, and the
    fastest is kept.
    """
    from edgeseg.evaluate.summary import time_line
    from edgeseg.pipeline.fastest import compile_fastest

    with console_reporter() as reporter:
        engine = compile_fastest(
            folder,
            target=target,
            options=given["backend_options"],
            output=output,
            force=force,
            reporter=reporter,
        )
    if as_json:
        print_json(engine.manifest)
    else:
        report = engine.manifest.precision
        share = report.mac_share.get(report.requested, 0.0)
        echo(f"engine: {engine.folder} ({engine.manifest.target}, {share:.1%} of MACs in {report.requested})")
        if (time := time_line(report)) is not None:
            echo(time)
