"""ONNX files that keep values elsewhere: found without ``onnx`` wherever they hide, and given to no backend."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from cpu_folders import folder_for, own_scheme  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

import edgeseg  # noqa: E402
from edgeseg.backends.cpu.onnxruntime import open_unoptimized  # noqa: E402
from edgeseg.backends.self_contained import require_self_contained  # noqa: E402
from edgeseg.backends.tensorrt.module import Library  # noqa: E402
from edgeseg.errors import ArtifactError  # noqa: E402
from edgeseg.store.documents import write_json  # noqa: E402
from edgeseg.store.engine import read_manifest  # noqa: E402
from edgeseg.store.hashing import FileRef  # noqa: E402
from edgeseg.store.manifest import MANIFEST_NAME  # noqa: E402


def tensor(location: str | None = None) -> onnx.TensorProto:
    made = numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(2, 3), "at this location")
    if location is not None:
        made.ClearField("raw_data")
        made.data_location = TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "4096"), ("length", "24")):
            made.external_data.add(key=key, value=value)
    return made


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def model(*nodes: onnx.NodeProto, initializers: tuple[onnx.TensorProto, ...] = (), **more: object) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "location", [value("x")], [value("y")], list(initializers))
    return helper.make_model(graph, **more)


def in_an_initializer(held: onnx.TensorProto) -> onnx.ModelProto:
    return model(helper.make_node("MatMul", ["x", held.name], ["y"]), initializers=(held,))


def in_an_attribute(held: onnx.TensorProto) -> onnx.ModelProto:
    return model(helper.make_node("Constant", [], ["w"], value=held), helper.make_node("MatMul", ["x", "w"], ["y"]))


def in_a_branch(held: onnx.TensorProto) -> onnx.ModelProto:
    branch = helper.make_graph([helper.make_node("Identity", [held.name], ["y"])], "b", [], [value("y")], [held])
    return model(helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch))


def in_a_function(held: onnx.TensorProto) -> onnx.ModelProto:
    body = [helper.make_node("Constant", [], ["w"], value=held), helper.make_node("MatMul", ["x", "w"], ["y"])]
    function = helper.make_function("own", "f", ["x"], ["y"], body, [helper.make_opsetid("", 20)])
    return model(helper.make_node("f", ["x"], ["y"], domain="own"), functions=[function])


def in_a_sparse_initializer(held: onnx.TensorProto) -> onnx.ModelProto:
    made = model(helper.make_node("MatMul", ["x", "w"], ["y"]))
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(held, numpy_helper.from_array(np.arange(6)), [12]))
    return made


PLACES = [in_an_initializer, in_an_attribute, in_a_branch, in_a_function, in_a_sparse_initializer]


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_kept_elsewhere_is_found_wherever_it_is(
    tmp_path: Path, place: Callable[[onnx.TensorProto], onnx.ModelProto]
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(place(tensor()).SerializeToString())
    require_self_contained(path)  # "location" is a word like any other
    for location in ("w.bin", "*/_ORT_MEM_ADDR_/*"):
        path.write_bytes(place(tensor(location)).SerializeToString())
        with pytest.raises(ArtifactError, match="keeps tensors outside the file"):
            require_self_contained(path)


@pytest.mark.parametrize("content", [b"", b"location", in_a_branch(tensor("w.bin")).SerializeToString()[:-30]])
def test_what_is_no_protobuf_is_one_clear_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"m\.onnx is not an ONNX file or is truncated"):
        require_self_contained(tmp_path / "m.onnx")


def test_tensorrt_takes_no_weights_back_from_it(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(in_an_initializer(tensor("w.bin")).SerializeToString())
    untouched: Any = None
    with pytest.raises(ArtifactError, match="keeps tensors outside the file"):
        Library("TensorRT", untouched, untouched, untouched).refit(untouched, tmp_path / "m.onnx")


@pytest.mark.parametrize("location", ["w.bin", "*/_ORT_MEM_ADDR_/*"])
def test_no_backend_gets_it(tmp_path: Path, location: str) -> None:
    """Folders whose hashes are right, as an attacker would make them."""
    pytest.importorskip("openvino", reason="openvino is not installed")
    (tmp_path / "m.onnx").write_bytes(in_an_initializer(tensor(location)).SerializeToString())
    (tmp_path / "w.bin").write_bytes(bytes(5000))
    with pytest.raises(ArtifactError, match="outside the file"):
        open_unoptimized(tmp_path / "m.onnx")
    folder = folder_for(tmp_path / "a", "onnxruntime", own_scheme())
    (folder / "w.bin").write_bytes(bytes(5000))
    graph = onnx.load(str(folder / "model.onnx"))
    weight = next(t for t in graph.graph.initializer if t.data_type == TensorProto.INT8 and len(t.dims) == 4)
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, held in (("location", location), ("offset", "4096"), ("length", str(int(np.prod(weight.dims))))):
        weight.external_data.add(key=key, value=held)
    for name in ("model.onnx", "engine.onnx"):
        (folder / name).write_bytes(graph.SerializeToString())
    refs = {"graph": FileRef.of(folder / "model.onnx"), "engine": FileRef.of(folder / "engine.onnx")}
    write_json(folder / MANIFEST_NAME, dataclasses.replace(read_manifest(folder), **refs))
    with pytest.raises(ArtifactError, match="outside the file"):
        edgeseg.load(folder)
    for target in ("onnxruntime", "openvino"):
        # In a process of its own: what this guards against is the end of the process.
        command = [
            sys.executable,
            "-m",
            "edgeseg",
            "compile",
            folder,
            "--target",
            target,
            "--output",
            tmp_path / target,
        ]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 1
        assert f"outside the file, in {location!r}" in done.stderr
        assert not (tmp_path / target).exists()
