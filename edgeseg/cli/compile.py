"""``edgeseg compile``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeseg.backends import BACKENDS
from edgeseg.cli.output import console_reporter, echo, print_json
from edgeseg.cli.parameters import ANY_PATH, ENGINE
from edgeseg.cli.shared_options import request_options

if TYPE_CHECKING:
    from edgeseg.store.engine import Engine


@click.command("compile", short_help="Build this machine's engines from folders' portable graphs.")
@click.argument("folders", type=ENGINE, metavar="ENGINE_DIR...", nargs=-1, required=True)
@click.option("--all", "inside", is_flag=True, help="ENGINE_DIR holds engine folders: compile each of them.")
@click.option("--target", type=click.Choice(tuple(BACKENDS)), help="[default: the folder's own]")
@request_options("backend_options")
@click.option("--output", type=ANY_PATH, help="Write a new folder instead of replacing the engine in ENGINE_DIR.")
@click.option("--force", is_flag=True, help="Replace what is at --output.")
@click.option(
    "--graph-for",
    type=click.Choice(("tensorrt-8",)),
    help="Compile nothing: write the graph to --output FILE.onnx, as this builder's own tools (trtexec) take it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON, of several a list.")
def command(
    folders: tuple[Path, ...],
    inside: bool,
    target: str | None,
    given: dict[str, Any],
    output: Path | None,
    force: bool,
    graph_for: str | None,
    as_json: bool,
) -> None:
    """Build this machine's engines from the portable graphs in ENGINE_DIR. Needs no PyTorch.

    Where a folder carries several graphs that meet its --max-drop or --min-agreement, all are built and timed, and the fastest is
    kept. Of several folders, those that fail are named at the end, and the others compiled all the same.
    """
    from edgeseg.backends.compile import engine_folders
    from edgeseg.errors import BuildError, EdgesegError, SpecError
    from edgeseg.pipeline.fastest import compile_fastest

    chosen = engine_folders(folders) if inside else list(folders)
    if output is not None and len(chosen) > 1:
        raise SpecError(
            f"--output is one folder, {len(chosen)} are to be compiled; leave it out, or give one ENGINE_DIR"
        )
    if graph_for is not None:
        if output is None or len(chosen) > 1 or target is not None or given["backend_options"] or as_json:
            raise SpecError("--graph-for takes one ENGINE_DIR and --output FILE.onnx, and no other option than --force")
        from edgeseg.backends.compile import write_graph_for_tensorrt_8

        flags = write_graph_for_tensorrt_8(chosen[0], output, force=force)
        echo(f"graph: {output}; on the device: trtexec {' '.join((f'--onnx={output.name}', *flags))}")
        return
    compiled: list[Engine] = []
    failed: dict[Path, EdgesegError] = {}
    for folder in chosen:
        try:
            with console_reporter() as reporter:
                engine = compile_fastest(
                    folder,
                    target=target,
                    options=given["backend_options"],
                    output=output,
                    force=force,
                    reporter=reporter,
                )
        except EdgesegError as exc:
            if len(chosen) == 1:
                raise
            failed[folder] = exc
            echo(f"{folder}: {exc}", err=True)
            continue
        compiled.append(engine)
        if not as_json:
            _say(engine)
    manifests = [engine.manifest for engine in compiled]
    if failed:
        listed = ", ".join(str(folder) for folder in failed)
        error = BuildError(
            f"{len(failed)} of {len(chosen)} folders were not compiled ({listed}); the reasons are above"
        )
        error.figures = manifests
        raise error
    if as_json:
        print_json(manifests[0] if len(chosen) == 1 else manifests)


def _say(engine: Engine) -> None:
    from edgeseg.evaluate.summary import time_line

    report = engine.manifest.precision
    share = report.mac_share.get(report.requested, 0.0)
    echo(f"engine: {engine.folder} ({engine.manifest.target}, {share:.1%} of MACs in {report.requested})")
    if (time := time_line(report)) is not None:
        echo(time)
