"""ONNX files read with suspicion and written atomically. Needs ``onnx``; never imports torch."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper

from edgeseg.errors import ArtifactError, first_line
from edgeseg.store.atomic import write_bytes
from edgeseg.store.files import require_regular, require_utf8

MAX_PROTOBUF_BYTES = 2**31 - 1
"""Largest serialized message protobuf reads back; also the largest single-file graph."""


def read_onnx(path: Path, *, data_beside: bool = False) -> onnx.ModelProto:
    """Read and check an ONNX file that may come from anywhere.

    A tensor that keeps its values elsewhere is refused: in another file, which no manifest vouches for, or at an address in
    memory, which some runtimes follow.

    Args:
        path: of the file.
        data_beside: take values that are in a file right beside it, as torch's exporter leaves them.

    Raises:
        ArtifactError: not readable, above 2 GiB, not ONNX, structurally invalid, or with external data.
    """
    path = Path(path)
    model = parse_onnx(path)
    if not model.graph.node:
        raise ArtifactError(f"{path} holds no ONNX graph; export it again")
    if data_beside:
        _load_data_beside(model, path)
    _refuse_external_data(model, path)
    place = os.path.abspath(path)
    require_utf8(place, "ONNX", ArtifactError)
    try:
        onnx.checker.check_model(place)
    except (onnx.checker.ValidationError, ValueError, OSError, RuntimeError) as exc:
        raise ArtifactError(f"{path} is not a valid ONNX graph: {first_line(exc)}; export it again") from exc
    return model


def parse_onnx(path: Path, again: str = "export it again") -> onnx.ModelProto:
    """Read an ONNX file, of operators nobody knows too; of its content nothing is checked. ``again`` is the advice.

    Raises:
        ArtifactError: not readable, above 2 GiB (before memory is taken for it), or not ONNX.
    """
    try:
        size_bytes = require_regular(path, "ONNX file", ArtifactError)
        if size_bytes > MAX_PROTOBUF_BYTES:
            raise ArtifactError(f"{path} has {size_bytes / 2**30:.1f} GiB, an ONNX file holds 2; {again}")
        return onnx.load_model(path, load_external_data=False)
    except OSError as exc:
        raise ArtifactError(f"cannot read {path}: {exc.strerror or exc}; give the path of an .onnx file") from exc
    except (DecodeError, ValueError) as exc:
        raise ArtifactError(f"{path} is not an ONNX file or is truncated; {again}") from exc


def _load_data_beside(model: onnx.ModelProto, path: Path) -> None:
    """Load the weights that are in a regular file in the folder of ``path``; what is anywhere else is left as it is."""
    total = 0
    for tensor in model.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        name = where.get("location", "")
        file = path.parent / name
        if (
            tensor.data_location != onnx.TensorProto.EXTERNAL
            or name in {"", ".", ".."}
            or {"/", "\\", "\0"} & set(name)
        ):
            continue
        if file.is_symlink():
            raise ArtifactError(
                f"{path} keeps tensor {tensor.name!r} in {name!r}, which is a link; put the file itself there"
            )
        size = require_regular(file, f"the data of {path.name}", ArtifactError)
        try:
            start = int(where.get("offset", 0))
            length = int(where.get("length", size - start))
        except ValueError:
            start = length = -1
        if start < 0 or length < 0 or start + length > size:
            raise ArtifactError(f"{path} keeps tensor {tensor.name!r} in {name!r}, which is shorter; export it again")
        total += length
        if total > MAX_PROTOBUF_BYTES:
            raise ArtifactError(
                f"{path} and its data have {total / 2**30:.1f} GiB, an ONNX file holds 2; export it again"
            )
        with file.open("rb") as data:
            data.seek(start)
            tensor.raw_data = data.read(length)
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def _refuse_external_data(model: onnx.ModelProto, path: Path) -> None:
    # onnx offers the traversal of every tensor (nested graphs, attributes and functions too) under a private name only.
    for tensor in external_data_helper._get_all_tensors(model):
        if tensor.external_data or tensor.data_location != onnx.TensorProto.DEFAULT:
            location = next((e.value for e in tensor.external_data if e.key == "location"), "")
            raise ArtifactError(
                f"{path} keeps tensor {tensor.name!r} outside the file, in {location!r}; save the model again as one file"
            )


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model`` as one self-contained file, atomically; the same graph always gives the same bytes.

    Initializers and noted shapes of ``model`` are put in the order of their names: passes collect them in sets, whose
    order differs from one process to the next, and with it the hash the graph is known by.

    Raises:
        ArtifactError: larger than 2 GB (protobuf's limit), or the disk is full or read-only.
    """
    path = Path(path)
    model.graph.initializer.sort(key=lambda tensor: tensor.name)
    model.graph.value_info.sort(key=lambda value: value.name)
    size = model.ByteSize()
    if size > MAX_PROTOBUF_BYTES:
        raise ArtifactError(f"the graph has {size / 2**30:.1f} GiB, an ONNX file holds 2; use a smaller encoder")
    data = model.SerializeToString(deterministic=True)
    try:
        write_bytes(path, data)
    except OSError as exc:
        full = exc.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
        hint = "free space" if full else "give a folder that can be written"
        raise ArtifactError(f"cannot write {path}: {exc.strerror}; {hint}") from exc
