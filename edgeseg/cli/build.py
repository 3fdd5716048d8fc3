"""``edgeseg build``."""

from __future__ import annotations

from typing import Any

import click

from edgeseg.cli.output import console_reporter, echo, print_json, result_console
from edgeseg.cli.parameters import PATH_AS_TYPED
from edgeseg.cli.shared_options import request_options
from edgeseg.console import hanging
from edgeseg.errors import SpecError, typed
from edgeseg.pipeline.request import BuildRequest


@click.command("build", short_help="Convert, quantize, build and verify an engine.")
@click.argument("model", required=False, metavar="[MODEL.onnx]", type=PATH_AS_TYPED)
@request_options()
@click.option("--dry-run", is_flag=True, help="Load the model, say what would be built, and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON instead of a table.")
def command(given: dict[str, Any], model: str | None, dry_run: bool, as_json: bool) -> None:
    """Convert, quantize, build and verify an engine: of an ONNX file, or of an SMP model that --weights or --arch name.

    Without either of --weights and MODEL.onnx the demo model of the architecture is built (unet, fpn, pspnet, deeplabv3plus).
    """
    if model is not None:
        if not model.lower().endswith(".onnx"):
            raise SpecError(
                f"MODEL is an .onnx file, got {model}; give a checkpoint with --weights, an architecture with --arch"
            )
        if given["weights"] is not None:
            raise SpecError(f"{model} holds its weights; leave --weights out")
        given["weights"] = model
    request = BuildRequest.of(given)
    if dry_run:
        _plan_and_print(request, as_json)
    else:
        _build_and_print(request, as_json)


def _plan_and_print(request: BuildRequest, as_json: bool) -> None:
    from edgeseg.pipeline.plan import plan_build

    with console_reporter() as reporter:
        plan = plan_build(request, None, reporter)
    if as_json:
        print_json(plan.summary(request))
        return
    for name, value in plan.summary(request).items():
        shown = ", ".join(value) if isinstance(value, list) else value or "-"
        head = f"{name:<12} "
        # A command is copied: it stays one line.
        for line in [f"{head}{shown}"] if name == "command" else hanging(head, shown, result_console()):
            echo(line)


def _build_and_print(request: BuildRequest, as_json: bool) -> None:
    from edgeseg.pipeline.build import run_build

    with console_reporter() as reporter:
        engine = run_build(request, model=None, reporter=reporter)
    if as_json:
        print_json(engine.manifest)
        return
    from edgeseg.evaluate.summary import build_summary

    result_console().print(build_summary(engine))
    if engine.manifest.engine is None:
        target = engine.manifest.target
        echo(f"portable folder: {engine.folder}, no {target} engine yet: it is built on the device that runs it")
        search = engine.manifest.search
        if search is not None and len(search.graphs) > 1:
            size_mb = sum(graph.size_bytes for graph in search.graphs) / 1e6
            echo(
                f"it carries {len(search.graphs)} graphs that meet the goal ({size_mb:.1f} MB); the device keeps the fastest"
            )
        echo(f"on the device: {typed('compile', engine.folder, '--target', target)}")
        return
    from edgeseg.backends import get_backend

    if not get_backend(engine.manifest.target).status().available:
        echo(f"engine: {engine.folder}, built here for {engine.manifest.target}; it runs where there is a GPU for it")
        return
    echo(f"engine: {engine.folder}")
    echo(f"run it: {typed('run', engine.folder, 'IMAGE...', '--output', 'out', '--overlay')}")
