"""Options of the command line made from the arguments of a request, which are defined where the request is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import click

from edgeseg.arguments import Argument, Kind, arguments_of
from edgeseg.cli.parameters import KindType
from edgeseg.errors import SpecError
from edgeseg.pipeline.request import BuildRequest

P = ParamSpec("P")
R = TypeVar("R")

# On the command line alone: another word for a backend option.
_SM = click.option("--sm", help="Compute capabilities for tensorrt-rtx, such as 86,89,120; one engine holds them all.")


def request_options(*names: str, flags: dict[str, str] | None = None) -> Callable[[Callable[P, R]], Callable[..., R]]:
    """Add the options of these arguments of a build; the command gets them as ``given``, by Python's names.

    Args:
        names: of :class:`~edgeseg.pipeline.api.BuildRequest`'s arguments, as Python calls them.
        flags: options this verb calls by another name.
    """
    arguments = {argument.name: argument for argument in arguments_of(BuildRequest).values()}
    chosen = [arguments[name] for name in names]

    def add(command: Callable[P, R]) -> Callable[..., R]:
        @wraps(command)
        def with_given(*args: P.args, **options: P.kwargs) -> R:
            given = {argument.name: options.pop(argument.field) for argument in chosen}
            sm = options.pop("sm", None)
            settings = given.get("backend_options")
            if sm is not None and isinstance(settings, dict):
                given["backend_options"] = {**settings, "sm": sm}
            options["given"] = given
            return command(*args, **options)

        decorated: Callable[..., R] = with_given
        for argument in reversed(chosen):
            if argument.name == "backend_options":
                decorated = _SM(decorated)
            decorated = _option(argument, (flags or {}).get(argument.name, argument.flag))(decorated)
        return decorated

    return add


def argument_names(request: type[Any] = BuildRequest) -> Iterable[str]:
    """Python's names of a request's arguments, in order."""
    return [argument.name for argument in arguments_of(request).values()]


def _option(argument: Argument, flag: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    kind = argument.kind
    if kind.is_flag:
        spelled = f"{flag}/--no-{flag[2:]}" if argument.default else flag
        return click.option(spelled, argument.field, is_flag=True, default=bool(argument.default), help=argument.help)
    if kind.repeats:
        return click.option(
            flag, argument.field, multiple=True, metavar=kind.metavar, help=argument.help, callback=_all_of(kind)
        )
    default = argument.default or None
    return click.option(
        flag,
        argument.field,
        type=click.Choice(kind.choices, case_sensitive=False) if kind.choices else KindType(kind),
        default=None if default is None else str(default),
        show_default=default is not None,
        metavar=None if kind.choices else argument.metavar or kind.metavar,
        help=argument.help,
    )


def _all_of(kind: Kind) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], Any]:
    """What makes one value of an option that was given several times."""

    def read(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Any:
        try:
            return kind.accept(str(param.name), values)
        except SpecError as exc:
            raise click.BadParameter(str(exc), ctx, param) from exc

    return read
