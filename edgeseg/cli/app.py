"""The command group: which verbs there are, and what an error looks like to a person.

Standard output carries the result (with ``--json`` only JSON), standard error progress and messages. Exit code 0 ok,
1 a problem the message explains, 2 usage, 3 a gate not met, 130 interrupted.
"""

from __future__ import annotations

import importlib
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from edgeseg.errors import EdgesegError
from edgeseg.version import __version__

VERBS: dict[str, tuple[str, str]] = {
    "build": ("edgeseg.cli.build", "Convert, quantize, build and verify an engine."),
    "calibrate": ("edgeseg.cli.calibrate", "Make a calibration table by itself."),
    "compile": ("edgeseg.cli.compile", "Build this machine's engine from a folder's portable graph."),
    "run": ("edgeseg.cli.run", "Segment images, folders, videos or a camera."),
    "bench": ("edgeseg.cli.bench", "Measure engines: latency, memory, power, profile, accuracy."),
    "compare": ("edgeseg.cli.compare", "Compare two bench reports; exit 3 on a regression."),
    "report": ("edgeseg.cli.report", "Decide what to deploy; write HTML, Markdown and CSV."),
    "sweep": ("edgeseg.cli.sweep", "Build and measure many combinations; one report."),
    "inspect": ("edgeseg.cli.inspect", "Show what an engine folder holds and check its hashes."),
    "cache": ("edgeseg.cli.cache", "Show or clear what is kept between builds."),
    "doctor": ("edgeseg.cli.doctor", "Show what this machine has and what will be fast on it."),
}


class _LazyGroup(click.Group):
    """Imports a verb's module only when that verb is called, so that ``--help`` stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(VERBS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in VERBS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-"):
            from edgeseg.errors import did_you_mean

            ctx.fail(f"no command {args[0]!r}{did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgeseg")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Make segmentation-models-pytorch models fast on edge devices, and know what it cost.

    \b
    edgeseg build --arch fpn --precision int8          the demo model, built and verified
    edgeseg run engines/fpn-demo-int8 photos/ --output out --overlay
    """


def main() -> NoReturn:
    """Entry point: run the command, print one line for an error, exit with its code."""
    debug = "--debug" in sys.argv[1:]
    # --debug is accepted anywhere: people add it at the end of the command that just failed.
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    signal.signal(signal.SIGTERM, _terminate)
    try:
        cli.main(args=arguments, prog_name="edgeseg", standalone_mode=False)
    except click.UsageError as exc:
        exc.show()
        sys.exit(2)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("edgeseg: interrupted; nothing half-done was left behind", err=True)
        sys.exit(130)
    except EdgesegError as exc:
        if debug:
            raise
        click.echo(f"edgeseg: {exc}", err=True)
        sys.exit(exc.exit_code)
    except BrokenPipeError:
        # The reader of a pipe (head, less) went away: not an error of ours, and nobody is left to tell.
        sys.stderr.close()
        sys.exit(1)
    except Exception as exc:
        if debug:
            raise
        text = " ".join(str(exc).split())[:300]
        click.echo(
            f"edgeseg: internal error, {type(exc).__name__}: {text}; this is a bug: report it with the output of --debug",
            err=True,
        )
        sys.exit(1)
    sys.exit(0)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    # Unwinds the stack, so that scratch folders are removed as after Ctrl-C.
    raise KeyboardInterrupt
