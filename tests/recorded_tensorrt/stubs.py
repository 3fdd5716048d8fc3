"""Type stubs of the recorded surfaces, and mypy on the backend files with them.

    python tests/recorded_tensorrt/stubs.py            # what `make typecheck` runs
    python tests/recorded_tensorrt/stubs.py 11.4.0.106 # one version

The package ``tensorrt-stubs`` has syntax errors, and turns ``import tensorrt`` into an empty package at run time. So the
stubs are made here, from the names, arity and types of the real modules, for each version edgeseg speaks to. With them mypy
finds a method or property that does not exist, a wrong keyword, a missing or superfluous argument, an argument of another
type, a wrong use of a result, and a method of a subclass that TensorRT would not call. The surfaces do not tell the types of
properties and of a container's items: those are ``Any``.

A version lacks what others have; the code asks before it uses such things, mostly in ways mypy cannot follow. What it then
still reports for a version is listed in :data:`LACKING`, and nothing else may be reported.
"""

from __future__ import annotations

import json
import keyword
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data" / "tensorrt-api"
BACKEND = ROOT / "edgeseg" / "backends" / "tensorrt"

_REMOVED = frozenset(
    {
        'backend.py: "type[NetworkDefinitionCreationFlag]" has no attribute "EXPLICIT_BATCH"',
        'backend.py: "type[BuilderFlag]" has no attribute "FP16"',
        'backend.py: "type[BuilderFlag]" has no attribute "INT8"',
        'backend.py: "IBuilderConfig" has no attribute "int8_calibrator"',
        'backend.py: "IBuilderConfig" has no attribute "set_calibration_profile"',
        'calibration.py: Module "tensorrt" has no attribute "IInt8EntropyCalibrator2"',
        'backend.py: "ILayer" has no attribute "precision"',
        'backend.py: "ILayer" has no attribute "set_output_type"; maybe "get_output_type"?',
        'backend.py: "type[BuilderFlag]" has no attribute "PREFER_PRECISION_CONSTRAINTS"',
    }
)
_BEFORE_10 = frozenset(
    {
        'backend.py: "type[NetworkDefinitionCreationFlag]" has no attribute "STRONGLY_TYPED"',
        'module.py: "TensorRT" has no attribute "OnnxParserRefitter"',
        'progress.py: "IBuilderConfig" has no attribute "progress_monitor"',
        'progress.py: Module "tensorrt" has no attribute "IProgressMonitor"',
    }
)
LACKING: dict[str, frozenset[str]] = {
    "8.5.3.1": _BEFORE_10
    | {
        'backend.py: "IBuilderConfig" has no attribute "builder_optimization_level"',
        'backend.py: "IBuilderConfig" has no attribute "max_aux_streams"',
        'backend.py: "IBuilderConfig" has no attribute "hardware_compatibility_level"',
        'module.py: "Runtime" has no attribute "engine_host_code_allowed"',
    },
    "8.6.1": _BEFORE_10,
    "10.3.0": frozenset(),
    "10.16.1.11": frozenset(),
    "11.4.0.106": _REMOVED,
    "rtx-1.7.1.116": frozenset(),
}
"""By version: ``file: message`` of what mypy reports. Each is behind a question for the feature, which a test on the
recorded module of that version walks through."""

# Not for TensorRT-RTX: it has its own of these.
_TENSORRT_ONLY = {
    "backend.py",
    "calibration.py",
    "implicit.py",
    "times.py",
    "timing.py",
}

# Types the surfaces name that are no classes of theirs.
_PARAMETERS = {
    "int": "SupportsIndex",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "buffer": "bytes | bytearray | memoryview",
    "list": "Sequence[Any]",
    "sequence": "Sequence[Any]",
    "tuple": "Sequence[Any]",
    "Dims": "Sequence[int] | Dims",
}
_RESULTS = {
    "int": "int",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "None": "None",
    "list": "list[Any]",
    "tuple": "tuple[Any, ...]",
}
_ALIASES = {"IEngineInspector": "EngineInspector", "IParserError": "ParserError"}
# Classes that are there to be derived from: TensorRT calls their methods, all of them have to be written.
_INTERFACES = re.compile(r"ILogger|IProfiler|IProgressMonitor|IInt8\w*Calibrator2?")
_NOT_OVERRIDDEN = {"__init__", "get_algorithm"}
_EXTRA = {
    "IHostMemory": ["def __buffer__(self, flags: int, /) -> memoryview: ..."],
    "Dims": [
        "def __len__(self) -> int: ...",
        "def __iter__(self) -> Iterator[int]: ...",
        "def __getitem__(self, index: int) -> int: ...",
    ],
}


def stub_of(surface: dict[str, Any]) -> str:
    """The text of ``tensorrt.pyi``."""
    classes = surface["classes"]
    lines = [
        "from abc import abstractmethod",
        "from collections.abc import Iterator, Sequence",
        "from typing import Any, ClassVar, SupportsIndex, overload",
        "__version__: str",
        *_enum("Severity", surface["severities"]),
    ]
    for name, facts in classes.items():
        lines += _enum(name, facts["enum"]) if "enum" in facts else _class(name, facts, classes, surface["severities"])
    for name, overloads in surface["functions"].items():
        lines += [line.replace("self, ", "").replace("self", "") for line in _method(name, overloads, classes, "")]
    lines += [f"{name}: {value.partition('.')[0]}" for name, value in surface["values"].items()]
    return "\n".join(lines) + "\n"


def module_stub(surface: dict[str, Any]) -> str:
    """The text of ``tensorrt_surface.pyi``: class ``TensorRT`` is what an argument that is the module has."""
    lines = ["import tensorrt", "class TensorRT:", "    __version__: str"]
    lines += [f"    {name}: type[tensorrt.{name}]" for name in surface["classes"]]
    lines += [f"    {name}: tensorrt.{value.partition('.')[0]}" for name, value in surface["values"].items()]
    return "\n".join(lines) + "\n"


def _enum(name: str, members: Any) -> list[str]:
    return [
        f"class {name}:",
        "    name: str",
        "    value: int",
        f"    __members__: ClassVar[dict[str, {name}]]",
        "    def __int__(self) -> int: ...",
        "    def __index__(self) -> int: ...",
        *(f"    {member}: ClassVar[{name}]" for member in members if not keyword.iskeyword(member)),
    ]


def _class(name: str, facts: dict[str, Any], classes: dict[str, Any], severities: list[str]) -> list[str]:
    base = "(ILogger)" if name == "Logger" else ""
    lines = [f"class {name}{base}:"]
    if name == "ILogger":
        lines.append("    Severity: ClassVar[type[Severity]]")
        lines += [f"    {level}: ClassVar[Severity]" for level in severities]
    for prop, access in facts["properties"].items():
        if access == "rw":
            lines.append(f"    {prop}: Any")
        else:
            lines += ["    @property", f"    def {prop}(self) -> Any: ..."]
    for method, overloads in facts["methods"].items():
        if method == "__init__" or not keyword.iskeyword(method):
            lines += ["    " + line for line in _method(method, overloads, classes, name)]
    lines += ["    " + line for line in _EXTRA.get(name, [])]
    return [*lines, "    ..."]


def _method(name: str, overloads: list[list[str]], classes: dict[str, Any], owner: str) -> list[str]:
    overridden = bool(_INTERFACES.fullmatch(owner)) and name not in _NOT_OVERRIDDEN
    lines = []
    for *parameters, result in overloads:
        lines += ["@overload"] if len(overloads) > 1 else ["@abstractmethod"] if overridden else []
        written, optional = ["self"], False
        for parameter in parameters:
            word, _, kind = parameter.partition(": ")
            # pybind11 takes an optional parameter before one that is not; Python's syntax does not.
            optional = optional or kind.endswith(" =")
            # Of a method TensorRT calls, the parameters are what it gives.
            typed = _typed(kind.removesuffix(" ="), _RESULTS if overridden else _PARAMETERS, classes)
            written.append(f"{word}: {typed}{' = ...' if optional else ''}")
        returned = _typed(result.removeprefix("-> "), _RESULTS, classes)
        if overridden and returned not in ("None", "bool", "int"):
            returned = "Any"  # a subclass may return None, which the signatures do not say
        lines.append(f"def {name}({', '.join(written)}) -> {returned}: ...")
    return lines


def _typed(kind: str, known: dict[str, str], classes: dict[str, Any]) -> str:
    if kind in known:
        return known[kind]
    kind = _ALIASES.get(kind, kind)
    return kind if kind in classes or kind == "Severity" else "Any"


def write_stubs(version: str, folder: Path) -> None:
    """Write ``tensorrt.pyi`` and ``tensorrt_surface.pyi`` of a version, to be found by ``MYPYPATH``."""
    surface = json.loads((DATA / f"{version}.json").read_text())
    folder.mkdir(parents=True, exist_ok=True)
    # How mypy judges the stubs themselves is of no interest: overloads of the real module do overlap.
    (folder / "tensorrt.pyi").write_text("# mypy: ignore-errors\n" + stub_of(surface))
    (folder / "tensorrt_surface.pyi").write_text("# mypy: ignore-errors\n" + module_stub(surface))


def reported(version: str, files: list[Path], cache: Path | None = None) -> set[str]:
    """Run ``mypy --strict`` on files with the stubs of a version; ``file: message`` of every error in them.

    Args:
        version: of a recorded surface.
        files: to check; what they import is read too.
        cache: mypy's cache folder; default one of its own.
    """
    with tempfile.TemporaryDirectory(prefix="tensorrt-stubs-") as scratch:
        write_stubs(version, Path(scratch) / "stubs")
        done = subprocess.run(
            [
                *(sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--hide-error-context"),
                # The code has ignores for the runs without stubs, where every class of TensorRT's is Any.
                *("--no-warn-unused-ignores", "--cache-dir", str(cache or Path(scratch) / "cache")),
                *map(str, files),
            ],
            env={**os.environ, "MYPYPATH": str(Path(scratch) / "stubs")},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode not in (0, 1):
        raise RuntimeError(done.stdout + done.stderr)
    errors = re.findall(r"^(.+?):\d+: error: (.*?)(?:  \[[\w-]+\])?$", done.stdout, re.MULTILINE)
    asked = {path.resolve() for path in files}
    return {f"{Path(file).name}: {message}" for file, message in errors if (ROOT / file).resolve() in asked}


def backend_files(version: str) -> list[Path]:
    """The files that speak to this version's product."""
    files = sorted(BACKEND.glob("*.py"))
    if version.startswith("rtx"):
        return [path for path in files if path.name not in _TENSORRT_ONLY]
    return [path for path in files if not path.name.startswith("rtx")]


def main(versions: list[str]) -> int:
    """Print what is reported and not expected, or expected and not reported; whether there is any."""
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="tensorrt-mypy-") as cache:
        for version in versions or list(LACKING):
            errors = reported(version, backend_files(version), Path(cache))
            for message in sorted(errors - LACKING[version]):
                print(f"TensorRT {version}: {message}")
            for message in sorted(LACKING[version] - errors):
                print(f"TensorRT {version}: no longer reported, take it out of LACKING: {message}")
            wrong += len(errors ^ LACKING[version])
    print(f"mypy with TensorRT's names and signatures: {wrong or 'no'} errors")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
