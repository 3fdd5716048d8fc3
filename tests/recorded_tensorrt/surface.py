"""A module generated from a recorded surface: what the version lacks raises, what is called is recorded."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

VERSIONS = ("8.5.3.1", "8.6.1", "10.3.0", "10.16.1.11", "11.4.0.106")
RTX = "rtx-1.7.1.116"
"""TensorRT-RTX: the real module builds without a GPU, so only what needs one is tried on this."""
DATA = Path(__file__).resolve().parent.parent / "data" / "tensorrt-api"


@dataclass(frozen=True)
class Call:
    """``name`` is ``Class.method``, or ``Class.property =`` for an assignment."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    target: Any = None


class Recorder:
    """One recorded module.

    Args:
        version: one of :data:`VERSIONS`, or :data:`RTX`.
        behaviour: by ``Class.method`` or ``Class.property``: called with the object and the arguments (nothing for a
            property), returns the result. Laid over the defaults of :data:`recorded_tensorrt.fake.DEFAULTS`.

    Attributes:
        module: to use as ``tensorrt``.
        calls: everything called and assigned, in order.
        fakery: knobs of the default behaviour.
    """

    def __init__(self, version: str, behaviour: Mapping[str, Callable[..., Any]] | None = None) -> None:
        from recorded_tensorrt.fake import DEFAULTS, Fakery

        self.version = version
        self.calls: list[Call] = []
        self.fakery = Fakery()
        self.behaviour: dict[str, Callable[..., Any]] = {**DEFAULTS, **(behaviour or {})}
        surface = json.loads((DATA / f"{version}.json").read_text())
        self.classes: dict[str, Any] = {}
        self.module = ModuleType("tensorrt")
        self.module.__spec__ = ModuleSpec("tensorrt", None)  # torch asks what it could import for it
        self.module.__version__ = surface["version"]  # type: ignore[attr-defined]
        severities = {name: value for value, name in enumerate(surface["severities"])}
        self.classes["Severity"] = severity = _make_enum(self, "Severity", severities)
        for name, facts in surface["classes"].items():
            made = _make_enum(self, name, facts["enum"]) if "enum" in facts else _make_class(self, name, facts)
            self.classes[name] = made
            setattr(self.module, name, made)
            if name in ("ILogger", "Logger"):
                made.Severity = severity
                for level in severity:
                    setattr(made, level.name, level)
        for name, value in surface["values"].items():
            enumeration, _, member = value.partition(".")
            setattr(self.module, name, getattr(self.classes[enumeration], member))
        for name, overloads in surface["functions"].items():
            setattr(self.module, name, self._function(name, overloads))
        self.module.__getattr__ = self._missing  # type: ignore[attr-defined]

    @property
    def names(self) -> list[str]:
        """Names of all calls, in order."""
        return [call.name for call in self.calls]

    def of(self, name: str) -> list[Call]:
        """All calls of one name, in order."""
        return [call for call in self.calls if call.name == name]

    def new(self, class_name: str, **state: Any) -> Any:
        """An object as the library returns it: no constructor runs. ``state`` are its properties."""
        made = object.__new__(self.classes[class_name])
        object.__setattr__(made, "_state", dict(state))
        return made

    def set_flags(self) -> set[str]:
        """Names of the builder flags that were set."""
        return {call.arguments["flag"].name for call in self.of("IBuilderConfig.set_flag")}

    def perform(self, name: str, target: Any, arguments: dict[str, Any], result: str) -> Any:
        """Record a call and return what its behaviour gives."""
        self.calls.append(Call(name, dict(arguments), target))
        behaviour = self.behaviour.get(name)
        if behaviour is not None:
            return behaviour(target, **arguments)
        if result == "None":
            return None
        raise AssertionError(f"the recorded tensorrt {self.version} has no behaviour for {name}; give it one")

    def _missing(self, name: str) -> Any:
        raise AttributeError(f"tensorrt {self.version} has no {name}")

    def _function(self, name: str, overloads: list[list[str]]) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            arguments, result = bind(self, name, overloads, args, kwargs)
            return self.perform(name, None, arguments, result)

        return function


class _EnumType(enum.EnumMeta):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        if name in cls._member_map_:
            return cls._member_map_[name]
        raise AttributeError(f"tensorrt {cls._version} has no {cls.__name__}.{name}")


class _EnumBase(enum.Enum, metaclass=_EnumType):
    # As pybind11's: converts to int, does not compare equal to one.
    def __int__(self) -> int:
        return int(self.value)

    def __index__(self) -> int:
        return int(self.value)


def _make_enum(recorder: Recorder, name: str, members: dict[str, int]) -> Any:
    made = _EnumBase(name, members)  # type: ignore[call-overload]
    type.__setattr__(made, "_version", recorder.version)
    return made


class _RecordedType(type):
    """The class object: refuses unknown class attributes, abstract construction, and a forgotten ``super().__init__``."""

    _recorder: Recorder
    _recorded_name: str

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if "_state" not in made.__dict__:
            raise TypeError(f"{cls._recorded_name}.__init__() must be called when overriding __init__")
        return made

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(f"tensorrt {cls._recorder.version} has no {cls._recorded_name}.{name}")


class _Object(metaclass=_RecordedType):
    _recorder: Recorder
    _recorded_name: str
    _properties: dict[str, str]
    _state: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise AttributeError(f"tensorrt {self._recorder.version} has no {self._recorded_name}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        recorder, recorded = self._recorder, self._recorded_name
        if name in self._properties:
            if self._properties[name] != "rw":
                raise AttributeError(f"tensorrt {recorder.version}: {recorded}.{name} cannot be set")
            recorder.calls.append(Call(f"{recorded}.{name} =", {"value": value}, self))
            self._state[name] = value
        elif type(self) is recorder.classes[recorded]:
            raise AttributeError(f"tensorrt {recorder.version} has no {recorded}.{name}")
        else:
            object.__setattr__(self, name, value)


def _make_class(recorder: Recorder, name: str, facts: dict[str, Any]) -> Any:
    bases: tuple[type, ...] = (_Object,)
    if name == "IHostMemory":
        # Holds bytes that open().write(), bytes() and memoryview() take, as the real one's buffer does.
        bases = (_Object, bytes)
    elif name == "Logger":
        bases = (recorder.classes["ILogger"],)
    elif name.startswith("IInt8") and name != "IInt8Calibrator":
        bases = (recorder.classes["IInt8Calibrator"],)
    inherited = dict(getattr(bases[0], "_properties", {}))
    namespace: dict[str, Any] = {
        "_recorder": recorder,
        "_recorded_name": name,
        "_properties": {**inherited, **facts["properties"]},
        "__module__": "tensorrt",
    }
    for method, overloads in facts["methods"].items():
        if method != "__init__":
            namespace[method] = _make_method(recorder, name, method, overloads)
    for prop in facts["properties"]:
        namespace[prop] = _make_property(recorder, name, prop)
    namespace["__init__"] = _make_constructor(recorder, name, facts["methods"].get("__init__"))
    return _RecordedType(name, bases, namespace)


def _make_constructor(recorder: Recorder, name: str, overloads: list[list[str]] | None) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807  # becomes the class's
        if overloads is None:
            raise TypeError(f"tensorrt.{name}: No constructor defined!")
        arguments, _ = bind(recorder, f"{name}.__init__", overloads, args, kwargs)
        object.__setattr__(self, "_state", dict(arguments))
        recorder.calls.append(Call(f"{name}.__init__", arguments, self))
        if f"{name}.__init__" in recorder.behaviour:
            recorder.behaviour[f"{name}.__init__"](self, **arguments)

    return __init__


def _make_method(recorder: Recorder, class_name: str, name: str, overloads: list[list[str]]) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        full = f"{class_name}.{name}"
        arguments, result = bind(recorder, full, overloads, args, kwargs)
        return recorder.perform(full, self, arguments, result)

    method.__name__ = name
    return method


def _make_property(recorder: Recorder, class_name: str, name: str) -> property:
    def read(self: Any) -> Any:
        if name in self._state:
            return self._state[name]
        behaviour = recorder.behaviour.get(f"{class_name}.{name}")
        if behaviour is None:
            raise AssertionError(
                f"the recorded tensorrt {recorder.version} knows no value of {class_name}.{name}; give it a behaviour"
            )
        return behaviour(self)

    return property(read, lambda self, value: None)  # assignments go through _Object.__setattr__


def bind(
    recorder: Recorder, name: str, overloads: list[list[str]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """Arguments by parameter name, and the result's type, of the first overload that takes them. Raises TypeError."""
    for overload in overloads:
        arguments = _fit(recorder, overload[:-1], args, kwargs)
        if arguments is not None:
            return arguments, overload[-1].removeprefix("-> ")
    given = ", ".join([*(type(a).__name__ for a in args), *(f"{k}={type(v).__name__}" for k, v in kwargs.items())])
    allowed = " or ".join(f"({', '.join(overload[:-1])})" for overload in overloads)
    raise TypeError(f"tensorrt {recorder.version}: {name}({given}): incompatible arguments, supported: {allowed}")


def _fit(
    recorder: Recorder, parameters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    names = [parameter.partition(":")[0] for parameter in parameters]
    if len(args) > len(parameters) or not set(kwargs) <= set(names[len(args) :]):
        return None
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    for parameter in parameters:
        name, _, kind = parameter.partition(": ")
        if name not in arguments:
            if not kind.endswith(" ="):
                return None
        elif not _is_a(recorder, arguments[name], kind.removesuffix(" =")):
            return None
    return arguments


def _is_a(recorder: Recorder, value: Any, kind: str) -> bool:
    if kind == "int":
        return hasattr(value, "__index__")
    if kind in ("str", "bool"):
        return isinstance(value, str if kind == "str" else bool) or (kind == "str" and value is None)
    if kind == "float":
        return isinstance(value, (int, float))
    if kind == "buffer":
        return isinstance(value, (bytes, bytearray, memoryview)) or hasattr(value, "__array_interface__")
    if kind == "list":
        return isinstance(value, (list, tuple))
    if kind == "Dims":
        return isinstance(value, (list, tuple, recorder.classes["Dims"]))
    wanted = recorder.classes.get(kind)
    if wanted is None:
        return True  # a type the surface does not describe
    return isinstance(value, wanted) or (value is None and not issubclass(wanted, enum.Enum))
