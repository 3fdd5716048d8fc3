"""Option types the verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeseg.arguments import MOST, Kind
from edgeseg.errors import SpecError

ANY_PATH = click.Path(path_type=Path)


class KindType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on only
    """What a :class:`~edgeseg.arguments.Kind` reads."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.name = kind.metavar or "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.kind.accept("it" if param is None else str(param.name), value)
        except SpecError as exc:
            self.fail(str(exc), param, ctx)


class CountsType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on only
    """Comma-separated whole numbers from 1 on, each once."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = [int(part) for part in value.split(",")]
        except ValueError:
            numbers = []
        if not numbers or min(numbers) < 1 or max(numbers) > MOST or len(set(numbers)) != len(numbers):
            self.fail(f"{value!r} is not a list of different counts from 1 to {MOST}, such as 1,4,8", param, ctx)
        return tuple(numbers)
