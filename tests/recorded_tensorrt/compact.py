"""Make tests/data/tensorrt-api from full dumps of TensorRT's Python bindings: keep what a test could touch.

    python tests/recorded_tensorrt/compact.py FOLDER_WITH_DUMPS

A dump holds, per class of the real binding module, its enum members and the docstring of each attribute, from which the
signatures are read. Written are names, parameters, defaults and result types; nothing is added by hand but ``__version__``
and the members of ``ILogger.Severity``, which the dumps show as prose.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

VERSIONS = ("8.5.3.1", "8.6.1", "10.3.0", "10.16.1.11", "11.4.0.106", "rtx-1.7.1.116")
DATA = Path(__file__).resolve().parent.parent / "data" / "tensorrt-api"
SEVERITIES = ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"]


def short_type(text: str) -> str:
    """``tensorrt.ILogger.Severity`` -> ``Severity``; containers by their outer name only."""
    text = text.strip()
    if "[" in text:
        return text.partition("[")[0].rpartition(".")[2].lower()
    word = re.split(r"::|\.", text)[-1]
    return {"SupportsInt": "int", "SupportsFloat": "float", "Buffer": "buffer"}.get(word, word)


def split_parameters(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += character
    return [part.strip() for part in (*parts, current) if part.strip()]


def signature(text: str) -> list[str]:
    """``f(self: A, b: int = 0) -> C`` -> ``["b: int =", "-> C"]``."""
    head, _, result = text.rpartition(") -> ")
    parameters = split_parameters(head.partition("(")[2])
    written = []
    for parameter in parameters:
        name, _, rest = parameter.partition(":")
        if name == "self":
            continue
        kind, default, _ = rest.partition(" = ")
        written.append(f"{name.strip()}: {short_type(kind)}{' =' if default else ''}")
    return [*written, f"-> {short_type(result)}"]


def compact_class(dump: dict[str, Any]) -> dict[str, Any]:
    """One class of a dump."""
    if "enum" in dump:
        return {"enum": dump["enum"]}
    kept: dict[str, Any] = {"methods": {}, "properties": {}}
    for name, said in dump["members"].items():
        if isinstance(said, list):
            overloads = [text for text in said if "*args" not in text]
            kept["methods"][name] = [signature(text) for text in overloads]
        elif said.startswith("property"):
            kept["properties"][name] = "rw" if said.endswith("rw") else "r"
    kept["methods"] = {n: s for n, s in kept["methods"].items() if not n.startswith("add_") or "profile" in n}
    return kept


def main() -> None:
    """Read the dumps in the folder given and write one compact file a version."""
    source = Path(sys.argv[1])
    for version in VERSIONS:
        dump = json.loads((source / f"{version}.json").read_text())
        surface = {
            "version": version.removeprefix("rtx-"),
            "origin": f"names and signatures of the Python bindings of TensorRT {version}, read from the module itself",
            "severities": SEVERITIES,
            "values": {n: d["value"] for n, d in dump.items() if "value" in d},
            "functions": {n: [signature(d["function"])] for n, d in dump.items() if "function" in d},
            "classes": {n: compact_class(d) for n, d in dump.items() if "members" in d or "enum" in d},
        }
        text = json.dumps(surface, sort_keys=True, separators=(",", ":"))
        (DATA / f"{version}.json").write_text(re.sub(r'("[A-Za-z]\w*":\{"(?:enum|methods)")', r"\n\1", text) + "\n")


if __name__ == "__main__":
    main()
