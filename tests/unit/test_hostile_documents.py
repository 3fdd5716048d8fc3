"""Hostile manifests, engine folders, graphs, tables, bench reports and sweeps: each is refused in one line that says why.

Every file is made here from a whole one. Images, masks, arrays and lists are in ``test_hostile_inputs.py``. And a short run of
``fuzz_readers.py``, whose seed is fixed: damaged files of every kind raise nothing but edgeseg's own errors.
"""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
import onnx
from fuzz_readers import Subject, fuzz, subjects
from onnx import TensorProto, helper

from edgeseg.errors import EdgesegError

DEEP = b"[" * 100_000 + b"]" * 100_000
Change = bytes | Callable[[Any], object]


def put(*path: str | int, value: object) -> Callable[[Any], object]:
    """Set one field of a document."""

    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        document[path[-1]] = value

    return change


def gone(*path: str | int) -> Callable[[Any], object]:
    def change(document: Any) -> None:
        for step in path[:-1]:
            document = document[step]
        del document[path[-1]]

    return change


ANY_JSON: dict[str, tuple[Change, str]] = {
    "empty": (b"", "is damaged or not one"),
    "text": (b"not JSON", "is damaged or not one"),
    "cut": (b'{"schema_version": 1, ', "is damaged or not one"),
    "page": (b"<!DOCTYPE html><html>404</html>", "is damaged or not one"),
    "bytes": (b'\xff\xfe{"a": 1}', "is damaged or not one"),
    "zeros": (bytes(4096), "is damaged or not one"),
    "a list": (b"[]", "is damaged or not one"),
    "null": (b"null", "is damaged or not one"),
    "deep": (b'{"schema_version": 1, "x": ' + DEEP + b"}", "nested too deeply|is damaged or not one"),
    "twice": (b"{}{}", "is damaged or not one"),
    "nan": (b'{"schema_version": NaN}', "is damaged or not one"),
    "digits": (b'{"schema_version": 1' + b"0" * 5000 + b"}", "is damaged or not one|schema version"),
    "version": (put("schema_version", value=10**6), "has schema version 1000000.*upgrade edgeseg"),
    "version 0": (put("schema_version", value=0), "version 0.*(build the engine|calibrate|measure) again"),
    "version of words": (put("schema_version", value="1"), "is damaged or not one.*schema_version"),
    "no version": (gone("schema_version"), "is damaged or not one.*missing required field `schema_version`"),
}

MANIFESTS: dict[str, tuple[Change, str]] = ANY_JSON | {
    "web app": (b'{"name": "my app", "icons": []}', "is damaged or not one"),
    "classes": (put("spec", "model", "classes", value=10**12), "1000000000000 classes; at most 65536"),
    "many digits": (
        put("spec", "model", "classes", value=10**400),
        "a number of about 40. digits classes; at most 65536",
    ),
    "classes of words": (
        put("spec", "model", "classes", value="5"),
        r"Expected `int`, got `str` - at `\$.spec.model.classes`",
    ),
    "no classes": (put("spec", "model", "classes", value=0), "classes"),
    "classes of a binary model": (
        lambda d: d["spec"]["model"].update(classes=10**12, task="binary"),
        "task binary has 1 class, got 1000000000000",
    ),
    "names for other classes": (put("spec", "model", "class_names", value=["a"]), "1 class names for 5 classes"),
    "stride": (put("spec", "input", "stride", value=0), "size 16x16 with 3 channels is not positive"),
    "task": (put("spec", "model", "task", value="regression"), "task|Invalid enum value"),
    "arch": (put("spec", "model", "arch", value="\x1b[2J"), "architecture"),
    "minus batch": (put("spec", "input", "batch", "minimum", value=-1), "batch -1:1:1 is not 1 <= MIN"),
    "batch of nothing": (put("spec", "input", "batch", value={"minimum": 0, "optimum": 0, "maximum": 0}), "batch"),
    "huge batch": (
        put("spec", "input", "batch", value={"minimum": 1, "optimum": 1, "maximum": 2**62}),
        "images of 16x16",
    ),
    "no height": (put("spec", "input", "height", value=-16), "is not positive"),
    "huge height": (put("spec", "input", "height", value=2**40), "images of 1099511627776x16"),
    "digits of a height": (put("spec", "input", "height", value=10**400), "images of a number of about 400 digitsx16"),
    "channels": (put("spec", "input", "channels", value=7), "channels"),
    "fit": (put("spec", "input", "fit", value="crop"), "fit|Invalid enum value"),
    "mean": (put("spec", "preprocess", "mean", value=[0.1]), "mean"),
    "std": (put("spec", "preprocess", "std", value=[0.0, 1.0, 1.0]), "std"),
    "target": (put("target", value="../../x"), "unknown target '../../x'"),
    "other target": (put("target", value="openvino"), "engine.onnx|openvino|built|compile"),
    "above": (put("graph", "name", value="../a.onnx"), r"names a file outside the folder: '../a.onnx'"),
    "a folder as engine": (put("engine", "name", value=".."), r"names a file outside the folder: '..'"),
    "absolute": (put("graph", "name", value="/etc/passwd"), "names a file outside the folder: '/etc/passwd'"),
    "engine above": (put("engine", "name", value="../engine.onnx"), "names a file outside the folder"),
    "engine of nothing": (put("engine", "name", value=""), "names a file outside the folder|lacks"),
    "engine with NUL": (put("engine", "name", value="a\0b"), r"names a file 'a\\x00b', which none of"),
    "engine with an escape": (put("engine", "name", value="\x1b[2J\n"), r"names a file '\\x1b\[2J\\n', which none of"),
    "long name": (put("engine", "name", value="n" * 300), "outside the folder|too long|lacks"),
    "no such file": (put("engine", "name", value="gone.onnx"), "lacks gone.onnx, which its manifest lists"),
    "the manifest": (put("engine", "name", value="manifest.json"), "manifest.json"),
    "hash": (put("engine", "sha256", value="0" * 64), "engine.onnx"),
    "size": (put("engine", "size_bytes", value=3), "engine.onnx"),
    "minus size": (put("engine", "size_bytes", value=-3), "size_bytes|engine.onnx"),
    "digits of a size": (put("engine", "size_bytes", value=10**400), "size_bytes"),
    "digits of a figure": (put("verification", "engine_size_bytes", value=10**400), "engine_size_bytes"),
    "figures of other classes": (
        lambda d: d["verification"].update(
            pytorch_accuracy={"per_class_iou": [0.5, 0.5]}, engine_accuracy={"per_class_iou": [0.5]}
        ),
        "figures of 2 classes for PyTorch and of 1 for the engine",
    ),
    "no MACs": (put("precision", "macs", value=-1), "macs"),
    "threads": (put("options", "threads", value=10**6), "threads is 1000000; give a number from 0"),
    "no threads": (put("options", "threads", value={"a": 1}), r"threads is \{'a': 1\}; give a number from 0"),
    "words as threads": (put("options", "threads", value="all"), "threads is 'all'; give a number from 0"),
    "device": (put("device", value={"cpu": "\x1b]0;evil\x07"}), "was built for a CPU with"),
    "lines": (put("device", value={"isa": "\x1b[2J\n"}), r"was built for a CPU with \[\\x1b\[2J\\n\], this one"),
    "no device": (put("device", value={}), "was built for a CPU with"),
    "no versions": (put("versions", value={}), "was built with onnxruntime None"),
    "no target": (gone("target"), "missing required field `target`"),
    "no spec": (gone("spec"), "missing required field `spec`"),
    "no graph": (gone("graph"), "missing required field `graph`"),
    "figures of words": (put("verification", "agreement", value="good"), "agreement"),
    "a list of notes": (put("notes", value=[1, 2]), "notes"),
}

TABLES: dict[str, tuple[Change, str]] = ANY_JSON | {
    "ranges of a list": (put("ranges", value=[]), "ranges"),
    "inverted": (put("ranges", value={"a": {"low": 1.0, "high": -1.0}}), "is damaged or not one"),
    "huge": (put("ranges", value={"a": {"low": 0.0, "high": 1e308}}), "."),
    "words": (put("ranges", value={"a": {"low": "0", "high": "1"}}), "is damaged or not one"),
    "minus images": (put("images", value=-1), "images"),
}

REPORTS: dict[str, tuple[Change, str]] = ANY_JSON | {
    "no rows": (gone("rows"), "missing required field `rows`"),
    "rows of a number": (put("rows", value=3), "rows"),
    "an empty row": (put("rows", value=[{}]), r"\$\.rows\[0\]"),
    "a number as date": (put("created_at", value=5), "created_at"),
    "the same row": (lambda d: d["rows"].append(d["rows"][0]), "two rows have the same id"),
    "comparison": (
        put("comparisons", value=[{"baseline": "x", "row": "y", "ratio": 1.0}]),
        "names .*, which is no row of the report|is damaged or not one",
    ),
    "minus time": (put("rows", 0, "latency", "end_to_end", "median_ms", value=-1.0), "median_ms|is damaged or not one"),
    "no time": (put("rows", 0, "latency", "end_to_end", "median_ms", value=0.0), "median_ms|is damaged or not one"),
    "endless time": (b'{"schema_version": 1, "rows": [{"x": 1e999}]}', "is damaged or not one|schema version"),
    "samples": (put("rows", 0, "latency", "samples_ms", value=["a"]), "samples_ms"),
    "minus size": (put("rows", 0, "engine", "size_bytes", value=-5), "size_bytes"),
    "digits": (put("rows", 0, "engine", "size_bytes", value=10**400), "size_bytes"),
    "batch": (put("rows", 0, "setting", "batch", value=0), "batch"),
    "share": (put("rows", 0, "accuracy", "truth", "miou", "value", value=7.0), "miou|value"),
    "confusion": (put("rows", 0, "accuracy", "truth", "confusion", value=[[-1]]), "confusion"),
    "confusion of three": (put("rows", 0, "accuracy", "truth", "confusion", 0, value=[1, 2, 3]), "not square"),
    "classes": (put("rows", 0, "engine", "classes", value=10**12), "classes"),
}

SWEEPS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "missing required field `archs`"),
    "text": (b"a sweep", "is no sweep"),
    "page": (b"<html>", "is no sweep"),
    "bytes": (b"\xff\xfe\0", "is no sweep"),
    "deep": (b'archs = ["fpn"]\nx = ' + b"[" * 20_000 + b"]" * 20_000, "nested too deeply|is no sweep"),
    "digits": (b'archs = ["fpn"]\nclasses = 1' + b"0" * 5000, "is no sweep"),
    "twice": (b'archs = ["fpn"]\narchs = ["fpn"]', "is no sweep"),
    "together": (b'archs = ["fpn"]\n[bench]\ntogether = "some"', "some"),
    "arch": (b'archs = ["fpm"]', "unknown .*'fpm'; did you mean 'fpn'"),
    "archs of a number": (b"archs = 3", "Expected `array`, got `int`"),
    "no archs": (b"archs = []", "archs"),
    "typo": (b'archs = ["fpn"]\nprecision = ["int8"]', "did you mean 'precisions'"),
    "duration": (b'archs = ["fpn"]\n[bench]\nduration_s = inf', "duration_s"),
    "minus duration": (b'archs = ["fpn"]\n[bench]\nduration_s = -1.0', "duration_s"),
    "no duration": (b'archs = ["fpn"]\n[bench]\nduration_s = nan', "duration_s"),
    "jobs": (b'archs = ["fpn"]\n[bench]\njobs = -1', "jobs"),
    "limit": (b'archs = ["fpn"]\n[bench]\nlimit = 0', "limit"),
    "baseline": (b'archs = ["fpn"]\n[bench]\nbaseline = "onnx"', "baseline"),
    "size": (b'archs = ["fpn"]\nsizes = ["big"]', "size"),
    "precision": (b'archs = ["fpn"]\nprecisions = ["int3"]', "unknown precisions 'int3'; did you mean 'int8'"),
    "target": (b'archs = ["fpn"]\ntargets = ["gpu"]', "unknown targets 'gpu'"),
    "classes": (b'archs = ["fpn"]\nclasses = 4611686018427387904', "classes"),
    "require": (b'archs = ["fpn"]\nrequire = "p99_ms <"', "require"),
    "require of words": (b'archs = ["fpn"]\nrequire = "speed > 3"', "speed"),
    "build": (b'archs = ["fpn"]\n[build]\nfrobnicate = 1', "frobnicate"),
    "weights": (b'archs = ["fpn"]\n[weights]\nfpm = "random"', "unknown weights 'fpm'"),
}


def dump(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString())


def small(change: Callable[[onnx.ModelProto], object] = lambda model: None) -> bytes:
    """Identity, changed."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"], "n")], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    change(model)
    return dump(model)


def external(location: str) -> Callable[[onnx.ModelProto], object]:
    def change(model: onnx.ModelProto) -> None:
        tensor = model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[4])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return change


GRAPHS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "holds no ONNX graph|is not an ONNX file"),
    "text": (b"not a graph", "is not an ONNX file"),
    "zeros": (bytes(4096), "is not an ONNX file"),
    "page": (b"<!DOCTYPE html>", "is not an ONNX file"),
    "cut": (small()[:-9], "is not an ONNX file"),
    "no node": (small(lambda m: m.graph.ClearField("node")), "holds no ONNX graph"),
    "no opset": (small(lambda m: m.ClearField("opset_import")), "is not a valid ONNX graph"),
    "opset 0": (small(lambda m: m.opset_import[0].ClearField("version")), "is not a valid ONNX graph"),
    "IR 9999": (small(lambda m: setattr(m, "ir_version", 9999)), "is not a valid ONNX graph"),
    "operator": (small(lambda m: setattr(m.graph.node[0], "op_type", "System")), "is not a valid ONNX graph"),
    "loop": (small(lambda m: m.graph.node[0].input.__setitem__(0, "y")), "is not a valid ONNX graph"),
    "unknown input": (small(lambda m: m.graph.node[0].input.__setitem__(0, "z")), "is not a valid ONNX graph"),
    "beside": (small(external("w.bin")), "keeps tensor 'w' outside the file, in 'w.bin'"),
    "absolute": (small(external("/etc/passwd")), "keeps tensor 'w' outside the file, in '/etc/passwd'"),
    "above": (small(external("../w.bin")), "outside the file, in '../w.bin'"),
    "memory": (small(external("*/_ORT_MEM_ADDR_/*")), r"outside the file, in '\*/_ORT_MEM_ADDR_/\*'"),
    "nowhere": (small(external("")), "outside the file, in ''"),
    "shape": (
        small(lambda m: m.graph.initializer.add(name="w", data_type=1, dims=[2**40, 2**40], raw_data=b"1234")),
        "is not a valid ONNX graph",
    ),
    "minus": (
        small(lambda m: m.graph.initializer.add(name="w", data_type=1, dims=[-4], raw_data=b"1234")),
        "is not a valid ONNX graph",
    ),
}

DOCUMENTS: dict[str, dict[str, tuple[Change, str]]] = {
    "engine/manifest.json": MANIFESTS,
    "table/table.json": TABLES,
    "report/bench.json": REPORTS,
    "sweep/sweep.toml": dict(SWEEPS),
    "onnx/a.onnx": dict(GRAPHS),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Subject]:
    return subjects(tmp_path_factory.mktemp("documents"))


def refused(subject: Subject, words: str) -> None:
    with pytest.raises(EdgesegError, match=words) as caught:
        subject.read(subject.path)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 900 + len(str(subject.path))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, cases in DOCUMENTS.items() for name in cases])
def test_each_is_refused_in_one_line_that_says_why(whole: dict[str, Subject], kind: str, name: str) -> None:
    subject, (change, words) = whole[kind], DOCUMENTS[kind][name]
    good = subject.path.read_bytes()
    content = change
    if not isinstance(content, bytes):
        document = json.loads(good)
        content(document)
        content = json.dumps(document).encode()
    try:
        subject.path.write_bytes(content)
        refused(subject, words)
    finally:
        subject.path.write_bytes(good)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_what_is_no_regular_file_is_not_waited_for(whole: dict[str, Subject], kind: str) -> None:
    subject = whole[kind]
    good = subject.path.read_bytes()
    for make in (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path)):
        subject.path.unlink()
        make(subject.path)
        refused(subject, "regular file|folder|cannot read|Is a directory")
        subject.path.rmdir() if subject.path.is_dir() else subject.path.unlink()
        subject.path.write_bytes(good)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_file_of_gigabytes_is_not_read(whole: dict[str, Subject], kind: str) -> None:
    subject = whole[kind]
    good = subject.path.read_bytes()
    try:
        os.truncate(subject.path, 6 << 30)  # sparse: no disk is filled
        refused(subject, "larger than|more than|GiB")
    finally:
        subject.path.write_bytes(good)


KINDS = (
    *("image", "bands", "wide", "mask", "calibration", "list", "camvid", "sweep", "report", "onnx", "table", "engine"),
    *("transform", "card", "names", "state", "cache", "video", "handover"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_raise_nothing_but_our_own(whole: dict[str, Subject], kind: str) -> None:
    chosen = {name: subject for name, subject in whole.items() if name.startswith(f"{kind}/")}
    if not chosen:
        pytest.skip("needs a package that is not installed")
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, subject in chosen.items():
        subject.read(subject.path)
        assert fuzz(subject, random.Random(name), 25) == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 2 << 20
