"""``edgeseg compare``."""

from __future__ import annotations

from pathlib import Path

import click

from edgeseg.cli.output import error_console, print_json, result_console
from edgeseg.cli.parameters import ANY_PATH


@click.command("compare", short_help="Compare two bench reports; exit 3 on a regression.")
@click.argument("old", type=ANY_PATH, metavar="OLD.json")
@click.argument("new", type=ANY_PATH, metavar="NEW.json")
@click.option(
    "--max-regression",
    "limits",
    multiple=True,
    metavar="[METRIC=]PERCENT",
    help="Exit 3 when a figure got worse by more, and by more than noise, or when noise hides it; repeatable. Without METRIC: "
    "median_ms. Others: p99_ms, cold_start_ms, peak_rss_bytes, size_bytes, and miou (in points).",
)
@click.option("--across-devices", is_flag=True, help="Compare reports of different devices all the same.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(old: Path, new: Path, limits: tuple[str, ...], across_devices: bool, as_json: bool) -> None:
    """Compare the rows that two reports of edgeseg bench have in common: what got worse, and whether by more than noise.

    Latency is compared beside the baseline where both reports have the same: between two runs the machine itself may
    have become slower.
    """
    from edgeseg.evaluate.regressions import change_table, check_limits, compare_reports, parse_limits, remarks
    from edgeseg.evaluate.results import read_report

    gates = parse_limits(limits)
    first, second = read_report(old), read_report(new)
    changes = compare_reports(first, second, across_devices=across_devices)
    if not as_json:
        result_console().print(change_table(changes))
    for remark in remarks(first, second, changes):
        (error_console() if as_json else result_console()).print(remark, highlight=False)
    check_limits(changes, gates)
    if as_json:
        print_json(changes)
