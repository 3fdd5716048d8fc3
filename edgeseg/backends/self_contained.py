"""Whether an ONNX file keeps all its data to itself, without ``onnx``, which a device that only runs engines has not.

A tensor may name a file beside the graph, or an address in memory, as the place of its values. The manifest vouches for
neither, and runtimes follow it: an edited engine could read other files, or end the process. So no engine with such a
tensor is opened.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from edgeseg.errors import ArtifactError

# onnx.proto: by message, the numbers of the fields that lead to tensors, and the message each holds.
_PATHS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def require_self_contained(path: Path) -> None:
    """Raise :class:`ArtifactError` if a tensor of the ONNX file keeps its values elsewhere, or the file cannot be read."""
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # No tensor points anywhere without this key; nearly every file is done with at memory speed.
            if data.find(b"location") >= 0 and _has_external_tensor(data):
                raise ArtifactError(
                    f"{path} keeps tensors outside the file, which no manifest vouches for; do not use this folder"
                )
    except OSError as exc:
        raise ArtifactError(f"cannot read {path}: {exc.strerror or exc}; build the engine again") from exc
    except ValueError as exc:
        raise ArtifactError(f"{path} is not an ONNX file or is truncated; build the engine again") from exc


def _has_external_tensor(data: mmap.mmap) -> bool:
    todo = [("model", 0, len(data))]
    while todo:
        message, begin, end = todo.pop()
        for number, wire, first, last in _fields(data, begin, end):
            if message == "tensor" and number == _EXTERNAL_DATA:
                return True
            if message == "tensor" and number == _DATA_LOCATION and wire == _VARINT and data[first:last] != b"\0":
                return True
            if wire == _BYTES and number in _PATHS[message]:
                todo.append((_PATHS[message][number], first, last))
    return False


def _fields(data: mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, begin and end of each field's content. Raises ``ValueError`` where it is no protobuf message."""
    position = begin
    while position < end:
        tag, position = _varint(data, position, end)
        wire, first = tag & 7, position
        if wire == _VARINT:
            _, position = _varint(data, position, end)
        elif wire == _BYTES:
            length, first = _varint(data, position, end)
            position = first + length
        elif wire in {_FIXED32, _FIXED64}:
            position += 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if position > end:
            raise ValueError("a field ends behind its message")
        yield tag >> 3, wire, first, position


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError("a number that does not end")
