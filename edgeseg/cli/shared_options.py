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


def request_options(
    *names: str, of: type[Any] = BuildRequest, into: str = "given", flags: dict[str, str] | None = None
) -> Callable[[Callable[P, R]], Callable[..., R]]:
    """Add the options of a request's arguments; the command gets them by Python's names.

    Args:
        names: of the arguments, as Python calls them; none: all.
        of: the request.
        into: the command's parameter that gets them.
        flags: options this verb calls by another name.
    """
    arguments = {argument.name: argument for argument in arguments_of(of).values()}
    chosen = [arguments[name] for name in names or arguments]

    def add(command: Callable[P, R]) -> Callable[..., R]:
        @wraps(command)
        def with_given(*args: P.args, **options: P.kwargs) -> R:
            given: dict[str, Any] = {argument.name: options.pop(argument.field) for argument in chosen}
            sm = options.pop("sm", None)
            if sm is not None:
                given["backend_options"] = {**(given["backend_options"] or {}), "sm": sm}
            options[into] = given
            return command(*args, **options)

        decorated: Callable[..., R] = with_given
        for argument in reversed(chosen):
            if argument.name == "backend_options":
                decorated = _SM(decorated)
            decorated = _option(argument, (flags or {}).get(argument.name, argument.flag))(decorated)
        return decorated

    return add


def argument_names(request: type[Any]) -> Iterable[str]:
    """Python's names of a request's arguments, in order."""
    return [argument.name for argument in arguments_of(request).values()]


def _option(argument: Argument, flag: str) -> Callable[[Callable[..., R]], Callable[..., R]]:
    kind, default = argument.kind, argument.default
    if kind.is_flag:
        spelled = flag if default is False else f"{flag}/--no-{flag[2:]}"
        return click.option(spelled, argument.field, is_flag=True, default=default, help=argument.help)
    metavar = None if kind.choices else argument.metavar or kind.metavar
    choices = click.Choice(kind.choices, case_sensitive=False) if kind.choices else None
    if kind.repeats:
        return click.option(
            flag,
            argument.field,
            type=choices,
            multiple=True,
            metavar=metavar,
            help=argument.help,
            callback=_all_of(kind),
        )
    said = kind.write(default) if default else None
    return click.option(
        flag,
        argument.field,
        type=choices or KindType(kind),
        default=said[0] if said else None,
        show_default=bool(said),
        metavar=metavar,
        help=argument.help,
    )


def _all_of(kind: Kind) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], Any]:
    """What makes one value of an option that was given several times."""

    def read(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> Any:
        try:
            return kind.accept(str(param.name), values) if values else None
        except SpecError as exc:
            raise click.BadParameter(str(exc), ctx, param) from exc

    return read
