"""The command group: which verbs there are, and what an error looks like to a person.

Standard output carries the result (with ``--json`` only JSON, in every end), standard error progress and messages.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import click

from edgeseg.console import printable
from edgeseg.errors import EdgesegError, is_interruption, one_line, refusal
from edgeseg.version import __version__

EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "a problem the message explains",
    2: "a request that cannot be met: usage, options, sizes, outputs that exist",
    3: "a limit that was set is not met, or noise hides whether it is",
    130: "interrupted, or the reader of the output went away",
}

VERBS: dict[str, tuple[str, str]] = {
    "build": ("edgeseg.cli.build", "Convert, quantize, build and verify an engine."),
    "calibrate": ("edgeseg.cli.calibrate", "Make a calibration table by itself."),
    "sensitivity": ("edgeseg.cli.sensitivity", "What INT8 of each module loses and saves."),
    "compile": ("edgeseg.cli.compile", "Build this machine's engine from a folder's portable graph."),
    "run": ("edgeseg.cli.run", "Segment images, folders, videos or a camera."),
    "bench": ("edgeseg.cli.bench", "Measure engines: latency, memory, power, profile, accuracy."),
    "compare": ("edgeseg.cli.compare", "Compare two bench reports; exit 3 on a regression."),
    "report": ("edgeseg.cli.report", "Decide what to deploy; write HTML, Markdown and CSV."),
    "sweep": ("edgeseg.cli.sweep", "Build and measure many combinations; one report."),
    "export": ("edgeseg.cli.export", "Write an engine as another host takes it, such as Triton."),
    "inspect": ("edgeseg.cli.inspect", "Show what an engine folder holds and check its hashes."),
    "cache": ("edgeseg.cli.cache", "Show or clear what is kept between builds."),
    "doctor": ("edgeseg.cli.doctor", "Show what this machine has and what will be fast on it."),
}


class _ReaderGone(Exception):  # noqa: N818  # no error of ours, and nobody is left to tell
    """Whoever read standard output (head, less) went away."""


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
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES.items()])

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as exc:
            # click would exit with 1: the code of a problem, which a reader such as head is not.
            raise _ReaderGone from exc

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS and not args[0].startswith("-") and not ctx.resilient_parsing:
            from edgeseg.errors import did_you_mean

            ctx.fail(f"no command {args[0]!r}{did_you_mean(args[0], VERBS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgeseg")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Make segmentation-models-pytorch models fast on edge devices, and know what it cost.

    \b
        edgeseg build --arch fpn --precision int8    # the demo model
        edgeseg run engines/fpn-demo-int8 photos/ --output out --overlay
    """
    os.getcwd()  # one that was deleted is refused here: libraries of PyTorch would end the process, in words of their own


def main() -> NoReturn:
    """Entry point: run the command, tell how it ended, exit with its code (:data:`EXIT_CODES`)."""
    debug = "--debug" in sys.argv[1:]
    # --debug is accepted anywhere: people add it at the end of the command that just failed.
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    signal.signal(signal.SIGTERM, _terminate)
    if "_EDGESEG_COMPLETE" in os.environ:
        importlib.import_module("edgeseg.cli.completion")
    try:
        cli.main(args=arguments, prog_name="edgeseg", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except (BrokenPipeError, _ReaderGone):
        code = 130
    except BaseException as exc:
        if debug and not isinstance(exc, (click.ClickException, click.Abort)):
            for line in "".join(traceback.format_exception(exc)).splitlines():
                click.echo(printable(line), err=True)
        ending = _Ending.of(exc)
        code = ending.code
        with contextlib.suppress(OSError):  # nobody is left to tell
            ending.tell(as_json=_asks_for_json(arguments))
    _let_go_of_output()
    sys.exit(code)


@dataclass(frozen=True)
class _Ending:
    """How a command ended that did not succeed.

    Attributes:
        code: one of :data:`EXIT_CODES`.
        kind: the error's class.
        message: one line.
        figures: see :attr:`~edgeseg.errors.EdgesegError.figures`.
        usage: what to print before the message.
    """

    code: int
    kind: str
    message: str
    figures: object = None
    usage: str = ""

    @classmethod
    def of(cls, error: BaseException) -> _Ending:
        kind = type(error).__name__
        if isinstance(error, click.ClickException):
            context = getattr(error, "ctx", None)
            help_line = (
                "" if context is None else f"{context.get_usage()}\nTry '{context.command_path} --help' for help.\n"
            )
            message = error.format_message()
            if isinstance(error, click.MissingParameter):
                message = " ".join(message.split())  # choices come a line each
            return cls(error.exit_code, kind, message, usage=help_line)
        if isinstance(error, click.Abort) or is_interruption(error):
            return cls(130, "Interrupted", "interrupted; no output is left half-written")
        if isinstance(error, EdgesegError):
            return cls(error.exit_code, kind, str(error), error.figures)
        if isinstance(error, OSError):
            return cls(1, kind, refusal(error))
        if isinstance(error, MemoryError):
            return cls(1, kind, "out of memory; close other programs, or ask for less: a smaller --size or --batch")
        message = f"internal error, {kind}: {one_line(error)}; this is a bug: report it with the output of --debug"
        return cls(1, "InternalError", message)

    def tell(self, *, as_json: bool) -> None:
        """Print the message on standard error and, where JSON was asked for, JSON on standard output."""
        if self.usage:
            click.echo(self.usage, err=True)
        click.echo(f"edgeseg: {printable(self.message)}", err=True)
        if as_json:
            from edgeseg.cli.output import print_json

            ending: dict[str, object] = {"error": {"kind": self.kind, "message": self.message}}
            print_json(ending if self.figures is None else {**ending, "figures": self.figures})


def _asks_for_json(arguments: list[str]) -> bool:
    """Whether standard output was to be JSON: ``--json``, or ``--json -`` where a file is named."""
    if arguments[:1] in (["bench"], ["sensitivity"]):
        return "--json=-" in arguments or ("--json", "-") in itertools.pairwise(arguments)
    return "--json" in arguments


def _let_go_of_output() -> None:
    """Flush; what cannot be written any more would make Python complain at exit, so it goes nowhere."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    # Unwinds the stack, so that scratch folders are removed as after Ctrl-C.
    raise KeyboardInterrupt
