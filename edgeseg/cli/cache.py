"""``edgeseg cache``."""

from __future__ import annotations

import click

from edgeseg.cli.output import echo


@click.command("cache", short_help="Show or clear what is kept between builds.")
@click.option("--clear", is_flag=True, help="Remove what is kept; the next build makes it again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(clear: bool, as_json: bool) -> None:
    """Show where edgeseg keeps exported graphs, calibration tables and judged images between runs, and how much of it.

    EDGESEG_CACHE names another folder. It may be removed at any time.
    """
    from edgeseg.cli.doctor import MIB, cache_line
    from edgeseg.store import cache

    if clear:
        freed_bytes = cache.clear()
        echo(f"removed {freed_bytes / MIB:.0f} MiB", err=as_json)
    content = cache.cache_content()
    if as_json:
        from edgeseg.cli.output import print_json

        print_json(content)
    else:
        echo(cache_line(content))
