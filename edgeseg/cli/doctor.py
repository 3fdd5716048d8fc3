"""``edgeseg doctor``."""

from __future__ import annotations

import click

from edgeseg.cli.output import print_json, result_console


@click.command("doctor", short_help="Show what this machine has and what will be fast on it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Show this machine's CPU, packages and backends, what is missing with its pip line, and what will be fast."""
    from edgeseg.doctor import diagnose, render

    diagnosis = diagnose()
    if as_json:
        print_json(diagnosis)
    else:
        result_console().print(render(diagnosis))
