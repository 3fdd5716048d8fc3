"""A request's fields as people write them: Python arguments, command-line options, lines of a sweep's TOML.

A field is defined once, where its dataclass is: its :class:`Kind` says how a value is read from any of the three and
written back as words of a command, its help what it means. The options of the command line, the command a manifest
keeps and the check of Python's arguments all come from there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from edgeseg.errors import SpecError, did_you_mean, one_line

Request = TypeVar("Request")

MOST = 65535
"""Largest count of classes, channels, pixels of a side or images of a batch that a request may name."""

INT32 = (1 << 31) - 1
MAX_NAMES_BYTES = 16 << 20
"""Of a file of names, one a line."""


@dataclass(frozen=True)
class Kind:
    """How values of one sort are read and written.

    Attributes:
        wanted: what is allowed, as the rest of "give ...".
        read: makes the field's value of what a person wrote; raises ``TypeError``, ``ValueError`` or ``OverflowError``.
        write: the words after the option, one option each; ``None`` where no command line can say the value.
        metavar: of the value in the help.
        choices: the words allowed, if it is a choice.
        is_flag: without a value on the command line.
        repeats: may be given several times.
    """

    wanted: str
    read: Callable[[Any], Any]
    write: Callable[[Any], list[str] | None] = lambda value: [str(value)]
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    is_flag: bool = False
    repeats: bool = False

    def accept(self, name: str, value: object) -> Any:
        """Return the value as the field holds it. Raises :class:`SpecError`, naming the argument."""
        if self.choices and isinstance(value, str) and not self.repeats:
            word = value.strip().lower()
            one_of(name.replace("_", " "), word, self.choices, given=value)
            return word
        try:
            return self.read(value)
        except SpecError:
            raise
        except (TypeError, ValueError, OverflowError) as exc:
            raise SpecError(f"{name} is {shortened(value)}; give {self.wanted}") from exc


def one_of(what: str, word: str, allowed: Sequence[str], *, given: str | None = None) -> None:
    """Raise :class:`SpecError`, naming the nearest words, unless ``word`` is one of ``allowed``.

    ``given``: how it was written.
    """
    if word not in allowed:
        said = shortened(word if given is None else given)
        raise SpecError(f"unknown {what} {said}{did_you_mean(word, allowed)} (allowed: {', '.join(allowed)})")


def shortened(value: object) -> str:
    """A value for a message: one line, no longer than a message can bear."""
    if isinstance(value, int) and value.bit_length() > 200:
        # Python refuses to print what has thousands of digits.
        return f"a number of about {round(value.bit_length() * math.log10(2))} digits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:40]}... ({type(value).__name__})"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _word(value: Any) -> str:
    # As of a variable of the shell that is not set: never "the default".
    if not (text := _text(value)):
        raise ValueError
    return text


def _path_text(value: Any) -> str:
    path = str(value) if isinstance(value, Path) else _text(value)
    if not path or "\0" in path:
        raise ValueError
    return path


def _path(value: Any) -> Path:
    return Path(_path_text(value))


def _flag(value: Any) -> bool:
    # numpy.bool_ and a torch tensor of one truth value give one.
    plain = value.item() if hasattr(value, "item") else value
    if not isinstance(plain, bool):
        raise TypeError
    return plain


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return int(value) if isinstance(value, str) else operator.index(value)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    above, fraction, below = value.partition("/") if isinstance(value, str) else (value, "", "")
    divisor = float(below) if fraction else 1.0  # 1/255, as people write it
    if divisor == 0:
        raise ValueError
    number = float(above) / divisor
    if not math.isfinite(number):
        raise ValueError
    return number


def count_of(name: str, value: object, least: int, wanted: str) -> int:
    """A whole number that a program gives, Python's or numpy's. Raises :class:`SpecError` below ``least``, or for text."""
    try:
        number = _integer(None if isinstance(value, str) else value)
    except TypeError:
        number = least - 1
    if number < least:
        raise SpecError(f"{name} is {shortened(value)}; give {wanted}")
    return number


def whole(low: int, high: int, example: int) -> Kind:
    """A whole number: Python's, numpy's, or a torch tensor of one."""

    def read(value: Any) -> int:
        number = _integer(value)
        if not low <= number <= high:
            raise ValueError
        return number

    return Kind(f"a whole number from {low} to {high}, such as {example}", read, metavar="N")


def number(low: float, high: float, wanted: str) -> Kind:
    """A number within bounds."""

    def read(value: Any) -> float:
        plain = _float(value)
        if not low <= plain <= high:
            raise ValueError
        return plain

    return Kind(wanted, read, metavar="X")


def choice(words: tuple[str, ...]) -> Kind:
    """One of a few words, in any case."""
    return Kind(f"one of {', '.join(words)}", _text, choices=words)


def several(what: str, words: tuple[str, ...]) -> Kind:
    """Several of a few words, each given by itself, or ``none``; ``what`` one of them is."""
    one = choice((*words, "none"))

    def read(value: Any) -> tuple[str, ...]:
        given = (one.accept(what, word) for word in ([value] if isinstance(value, str) else value))
        return tuple(word for word in given if word != "none")

    return Kind(one.wanted, read, write=lambda given: list(given) or ["none"], choices=one.choices, repeats=True)


def counts(most: int, example: str, *, what: str = "different counts", repeats: bool = False) -> Kind:
    """Whole numbers from 1 on, comma-separated; each once, unless it ``repeats``."""

    def read(value: Any) -> tuple[int, ...]:
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Iterable) else [value]
        numbers = tuple(map(_integer, parts))
        once = repeats or len(set(numbers)) == len(numbers)
        if not numbers or not once or not all(1 <= number <= most for number in numbers):
            raise ValueError
        return numbers

    wanted = f"{what} from 1 to {most}, such as {example}"
    return Kind(wanted, read, write=lambda numbers: [",".join(map(str, numbers))], metavar="N,N,...")


def read_size(value: Any) -> tuple[int, int]:
    """``256``, ``"256"``, ``"352x480"`` or a pair -> ``(height, width)`` in pixels."""
    if isinstance(value, str):
        sides: Iterable[Any] = re.split("[xX]", value.strip())
    elif hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0:
        sides = [value]
    else:
        sides = value
    numbers = [_integer(side) for side in sides]
    if len(numbers) not in (1, 2) or not all(1 <= side <= MOST for side in numbers):
        raise ValueError
    return numbers[0], numbers[-1]


def _numbers(value: Any) -> tuple[float, ...]:
    if isinstance(value, str):
        parts: Iterable[Any] = value.split(",")
    elif hasattr(value, "flatten") and hasattr(value, "tolist"):
        # An array or tensor of any shape: SMP's own buffers are (1, 3, 1, 1).
        parts = value.flatten().tolist()
    else:
        parts = value if isinstance(value, Iterable) else [value]
    numbers = tuple(_float(part) for part in parts)
    if not numbers:
        raise ValueError
    return numbers


def _range(value: Any) -> tuple[float, float]:
    low, high = _numbers(value)
    if not low < high:
        raise ValueError
    return low, high


def _names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) and value.startswith("@"):
        return _listed_names(value[1:])
    if isinstance(value, str):
        return tuple(part.strip() for part in _word(value).split(","))
    return tuple(_text(name) for name in value)


def _listed_names(path: str) -> tuple[str, ...]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise SpecError(f"cannot read the names in {path}: it is no regular file")
        with open(path, "rb") as file:
            content = file.read(MAX_NAMES_BYTES + 1)
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as exc:
        raise SpecError(f"cannot read the names in {path}: {one_line(exc)}") from exc
    if len(content) > MAX_NAMES_BYTES:
        raise SpecError(f"cannot read the names in {path}: more than {MAX_NAMES_BYTES} bytes")
    return tuple(line.strip() for line in lines if line.strip())


def _settings(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {_text(key): _plain(key, item) for key, item in value.items()}
    if isinstance(value, str):
        raise TypeError
    return parse_settings(value)


def _plain(name: str, value: Any) -> Any:
    """A value that JSON can hold: what travels into the manifest and back."""
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {_text(key): _plain(name, item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(name, item) for item in value)
    raise SpecError(f"{name} is {shortened(value)}; give numbers, words, true or false, null, or lists of them")


def parse_settings(pairs: Iterable[str]) -> dict[str, Any]:
    """``("a=1", "b=[1,2]", "c=word")`` -> ``{"a": 1, "b": [1, 2], "c": "word"}``; values are JSON where they parse.

    Raises:
        SpecError: no ``=``, a key twice, or JSON nested too deep.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = _text(pair).partition("=")
        if not separator or not key:
            raise SpecError(f"{shortened(pair)} is not key=value")
        if key in result:
            raise SpecError(f"{key} is given twice")
        # Python's spellings are what people copy from their training script.
        spelled = {"True": "true", "False": "false", "None": "null"}.get(text, text)
        try:
            result[key] = msgspec.json.decode(spelled)
        except msgspec.DecodeError:
            result[key] = text
        except RecursionError as exc:
            raise SpecError(f"{key} is {shortened(text)}, nested too deep") from exc
    return result


def write_settings(settings: Mapping[str, Any]) -> list[str]:
    """``KEY=VALUE`` words; a value is written as JSON unless it is a word that reads as itself."""
    words = []
    for key, value in settings.items():
        plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./x+-]*", value) is not None
        is_word = plain and value not in {"true", "false", "null", "True", "False", "None"}
        words.append(f"{key}={value}" if is_word else f"{key}={json.dumps(value)}")
    return words


def _write_names(names: tuple[str, ...]) -> list[str] | None:
    if any("," in name or name != name.strip() for name in names) or names[0].startswith("@"):
        return None
    return [",".join(names)]


TEXT = Kind("a name", _word)
PATH = Kind("a path", _path, metavar="PATH")
PATH_OR_WORD = Kind("a path or a name", _path_text)
FLAG = Kind("true or false", _flag, write=lambda value: [], is_flag=True)
SIZE = Kind(
    f"HEIGHTxWIDTH in pixels, such as 352x480, each from 1 to {MOST}",
    read_size,
    write=lambda size: [f"{size[0]}x{size[1]}"],
    metavar="HxW",
)
NUMBERS = Kind(
    "a list of numbers, such as 0.485,0.456,0.406, or one for all channels",
    _numbers,
    write=lambda values: [",".join(repr(value) for value in values)],
    metavar="r,g,b",
)
RANGE = replace(
    NUMBERS, wanted="the lowest and the highest pixel value, such as -160,240", read=_range, metavar="LOW,HIGH"
)
NAMES = Kind("names, such as road,sky", _names, write=_write_names, metavar="a,b,c|@FILE")
SETTINGS = Kind(
    "settings by name, such as threads=2", _settings, write=write_settings, metavar="KEY=VALUE", repeats=True
)


@dataclass(frozen=True)
class Argument:
    """One field of a request, as people say it.

    Attributes:
        kind: how it is read and written.
        help: what it means, for the command line's help.
        field: the dataclass's name of it.
        name: Python's name of it: the field's, unless it differs.
        metavar: instead of the kind's.
        repeated: whether the command that makes an engine again names it.
        default: of the field; ``None`` where nothing said means something of its own.
    """

    kind: Kind
    help: str | None
    field: str
    name: str
    metavar: str | None
    repeated: Literal["changed", "always", "never"]
    default: Any

    @property
    def flag(self) -> str:
        """The option; of what may be given several times each gives one: ``--model-arg`` for ``model_args``."""
        return "--" + (self.name.removesuffix("s") if self.kind.repeats else self.name).replace("_", "-")


def argument(
    kind: Kind,
    default: Any = None,
    *,
    help: str | None = None,
    name: str | None = None,
    metavar: str | None = None,
    repeated: Literal["changed", "always", "never"] = "changed",
    positional: bool = False,
) -> Any:
    """A dataclass field people can say; see :class:`Argument`. ``default`` may be a callable that makes it.

    Keyword-only unless ``positional``, each by itself: a ``KW_ONLY`` among the fields cannot be read on Python 3.10.
    """
    settings = {"argument": (kind, help, name, metavar, repeated)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=settings, kw_only=not positional)
    return dataclasses.field(default=default, metadata=settings, kw_only=not positional)


def arguments_of(request: Any) -> dict[str, Argument]:
    """Every argument of a request class or instance, by field, in order."""
    arguments = {}
    for field in dataclasses.fields(request):
        if "argument" in field.metadata:
            kind, help_text, name, metavar, repeated = field.metadata["argument"]
            made = field.default_factory
            default = field.default if made is dataclasses.MISSING else made()
            arguments[field.name] = Argument(
                kind, help_text, field.name, name or field.name, metavar, repeated, default
            )
    return arguments


def request_of(request: type[Request], what: str, given: Mapping[str, Any]) -> Request:
    """The request of arguments by Python's names, whatever kind of value people wrote.

    Raises:
        SpecError: an argument that ``what`` has not, or a value that is not allowed.
    """
    fields = {argument.name: argument.field for argument in arguments_of(request).values()}
    for name in given:
        if name not in fields:
            raise SpecError(f"{what} has no argument {name!r}{did_you_mean(name, fields)}")
    return request(**{fields[name]: value for name, value in given.items()})


def settle(request: Any) -> None:
    """Bring every field of a frozen request to the value it stands for; ``None`` stands for the default.

    Raises:
        SpecError: a value of another kind; names the argument.
    """
    for argument in arguments_of(request).values():
        value = getattr(request, argument.field)
        settled = argument.default if value is None else argument.kind.accept(argument.name, value)
        object.__setattr__(request, argument.field, settled)


def words_of(request: Any) -> list[str] | None:
    """The command-line options that say what differs from the defaults; ``None`` where no command line can say it."""
    words = []
    for argument in arguments_of(request).values():
        value = getattr(request, argument.field)
        # Images given as arrays compare element by element: what has no default is asked for by identity.
        is_default = value is None if argument.default is None else value == argument.default
        if argument.repeated == "never" or (is_default and argument.repeated != "always"):
            continue
        said = argument.kind.write(value)
        if said is None:
            return None
        if argument.kind.is_flag:
            words.append(argument.flag if value else f"--no-{argument.flag[2:]}")
        for word in said:
            # A value that begins with a dash would be read as an option.
            words += [f"{argument.flag}={word}"] if word.startswith("-") else [argument.flag, word]
    return words
