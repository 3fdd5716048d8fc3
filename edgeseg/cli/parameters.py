"""Option types the verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from edgeseg.arguments import PATH_OR_WORD, Kind
from edgeseg.errors import SpecError
from edgeseg.spec import ARCHITECTURES


class _PathType(click.Path):
    """A path; nothing in its place, as of a variable of the shell that is not set, would mean the folder one is in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty; give a path", param, ctx)
        return super().convert(value, param, ctx)


class _EngineType(_PathType):
    """An engine folder, or a file in it, which stands for it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from edgeseg.store.engine import folder_of

        return folder_of(super().convert(value, param, ctx))


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

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Architectures by name; files where a path is taken."""
        if param.name == "arch":
            return [CompletionItem(name) for name in ARCHITECTURES if name.startswith(incomplete)]
        takes_path = self.kind is PATH_OR_WORD or any(word in self.name for word in ("PATH", "DIR"))
        return [CompletionItem(incomplete, type="file")] if takes_path else []


class _PlaceType(_PathType):
    """A path, or a URL, which a path would rob of its second slash."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if "://" in str(value) else super().convert(value, param, ctx)


ANY_PATH = _PathType(path_type=Path)
ENGINE = _EngineType(path_type=Path)
PLACE = _PlaceType(path_type=Path)
PATH_AS_TYPED = KindType(PATH_OR_WORD)
