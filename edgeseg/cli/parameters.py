"""Option types the verbs share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import msgspec

from edgeseg.errors import SpecError
from edgeseg.spec import BatchRange

EXISTING_FOLDER = click.Path(path_type=Path, file_okay=False)
ANY_PATH = click.Path(path_type=Path)


class SizeType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on only
    """``HxW`` in pixels, or one number for a square."""

    name = "HxW"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", value)
        if not match or int(match[1]) == 0 or (match[2] is not None and int(match[2]) == 0):
            self.fail(f"{value!r} is not HEIGHTxWIDTH in pixels, such as 352x480", param, ctx)
        return int(match[1]), int(match[2] or match[1])


class BatchType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on only
    """``N`` or ``MIN:OPT:MAX``."""

    name = "N|MIN:OPT:MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> BatchRange:
        if isinstance(value, BatchRange):
            return value
        try:
            return BatchRange.parse(value)
        except SpecError as exc:
            self.fail(str(exc), param, ctx)


class NumbersType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on only
    """Comma-separated numbers, one per channel."""

    name = "r,g,b"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers, such as 0.485,0.456,0.406", param, ctx)


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
        if not numbers or min(numbers) < 1 or len(set(numbers)) != len(numbers):
            self.fail(f"{value!r} is not a list of different counts from 1 on, such as 1,4,8", param, ctx)
        return tuple(numbers)


class NamesType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.5 on only
    """Comma-separated names, or ``@FILE`` with one a line."""

    name = "a,b,c|@FILE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        if value.startswith("@"):
            try:
                lines = Path(value[1:]).read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as exc:
                self.fail(f"cannot read {value[1:]}: {exc}", param, ctx)
            return tuple(line.strip() for line in lines if line.strip())
        return tuple(part.strip() for part in value.split(","))


def parse_key_values(option: str, pairs: tuple[str, ...]) -> dict[str, Any]:
    """``("a=1", "b=[1,2]", "c=word")`` -> ``{"a": 1, "b": [1, 2], "c": "word"}``; values are JSON where they parse.

    Raises:
        click.BadParameter: no ``=``, or a key twice.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise click.BadParameter(f"{pair!r} is not key=value", param_hint=option)
        if key in result:
            raise click.BadParameter(f"{key} is given twice", param_hint=option)
        # Python's spellings are what people copy from their training script.
        spelled = {"True": "true", "False": "false", "None": "null"}.get(text, text)
        try:
            result[key] = msgspec.json.decode(spelled)
        except msgspec.DecodeError:
            result[key] = text
    return result
