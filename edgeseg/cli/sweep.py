"""``edgeseg sweep``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from edgeseg.arguments import NAMES
from edgeseg.cli.output import echo
from edgeseg.cli.parameters import ANY_PATH, PATH_AS_TYPED, KindType

if TYPE_CHECKING:
    from edgeseg.sweep.config import SweepConfig


@click.command("sweep", short_help="Build and measure many combinations; one report.")
@click.argument("config_path", required=False, type=ANY_PATH, metavar="[SWEEP.toml]")
@click.option("--archs", type=KindType(NAMES), default=(), help="Instead of a file: architectures (demo weights).")
@click.option("--precisions", type=KindType(NAMES), default=(), help="Instead of the file's.")
@click.option("--targets", type=KindType(NAMES), default=(), help="Instead of the file's.")
@click.option("--data", type=PATH_AS_TYPED, help="Instead of the file's: images to judge accuracy on, or demo.")
@click.option("--require", metavar="EXPRESSION", help="Instead of the file's: see edgeseg report --help.")
@click.option("--output", type=ANY_PATH, help="Instead of the file's: folder of engines, results and reports.")
@click.option("--jobs", type=click.IntRange(1, 1024), default=1, show_default=True, help="Processes that build.")
@click.option("--executor", type=click.Choice(("local", "ray")), default="local", show_default=True)
@click.option(
    "--ray-address",
    help="Of a Ray cluster; local for one of this sweep's own.  [default: RAY_ADDRESS, else one on this machine, else local]",
)
@click.option("--force", is_flag=True, help="Replace reports and engines in the folder that no sweep wrote.")
@click.option("--json", "as_json", is_flag=True, help="Print the decision as JSON instead of tables.")
def command(
    config_path: Path | None,
    archs: tuple[str, ...],
    precisions: tuple[str, ...],
    targets: tuple[str, ...],
    data: str | None,
    require: str | None,
    output: Path | None,
    jobs: int,
    executor: Literal["local", "ray"],
    ray_address: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Build every combination of SWEEP.toml, measure all engines in turns, write one report.

    A sweep that was interrupted, or whose config has grown, goes on where it stopped. A cell that fails does not stop
    the others; the exit code is 1 then, or 3 when no engine meets the requirement or noise
    could turn the verdict.
    """
    from edgeseg.cli.report import write_reports
    from edgeseg.decide.entries import failed_measurements
    from edgeseg.sweep.run import run_sweep
    from edgeseg.sweep.state import remember_reports

    instead = {"archs": archs, "precisions": precisions, "targets": targets, "data": data, "require": require}
    config = _config(config_path, {**instead, "output": output and str(output)})
    html, markdown, csv = reports = [Path(config.output) / f"report.{kind}" for kind in ("html", "md", "csv")]
    result = run_sweep(
        config,
        jobs=jobs,
        executor=executor,
        ray_address=ray_address,
        reports=reports,
        force=force,
        say=lambda line: echo(f"  {line}", err=True),
    )
    try:
        code = write_reports(result.runs, html, markdown, csv, config.require, config.title, as_json, result.failures)
    finally:
        remember_reports(reports)
    failed = (*result.failures, *failed_measurements(result.runs))
    for name, reason in failed:
        echo(f"failed: {name}: {reason}", err=True)
    sys.exit(code or (1 if failed else 0))


def _config(path: Path | None, instead: dict[str, Any]) -> SweepConfig:
    """The file's, or one of ``--archs`` alone, with what options say instead."""
    import msgspec

    from edgeseg.sweep.config import SweepConfig, read_config

    given = {name: value for name, value in instead.items() if value}
    if path is None and "archs" not in given:
        raise click.UsageError("give a SWEEP.toml, or --archs")
    config = SweepConfig(given["archs"]) if path is None else read_config(path)
    if "data" in given:
        given["bench"] = {**config.bench, "data": given.pop("data")}
    return msgspec.structs.replace(config, **given)
