"""Inspecting an engine folder made by hand: hashes, layers, precision."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from command_line import typed
from engine_folders import manifest_of
from rich.console import Console
from small_graphs import graph

from edgeseg.cli.inspect import inspect_engine, render
from edgeseg.graph.modules import module_of
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec
from edgeseg.store.documents import write_json
from edgeseg.store.hashing import FileRef
from edgeseg.store.manifest import (
    MANIFEST_NAME,
    AccuracyFigures,
    LatencyFigures,
    Manifest,
    PrecisionReport,
    Repair,
    Verification,
)

LATENCY = LatencyFigures(10.0, 11.0, 12.0, 20)


def write_graph(path: Path) -> None:
    """A quantized convolution between a float one and an argmax, named as edgeseg's export names them."""
    model = graph(
        "(float[1, 3, 8, 8] x) => (int64[1, 1, 8, 8] mask)",
        """a = Conv <pads = [1, 1, 1, 1]> (x, w) aq = QuantizeLinear(a, s, z) bq = QLinearConv(aq, s, z, wq, s, zw, s, z)
        b = DequantizeLinear(bq, s, z) mask = ArgMax <axis = 1> (b)""",
        w=np.ones((4, 3, 3, 3), np.float32),
        wq=np.ones((2, 4, 1, 1), np.int8),
        s=np.float32(0.1),
        z=np.uint8(0),
        zw=np.int8(0),
    )
    layers = ("encoder.layer1.0.conv1/Conv", "encoder.layer1.0.conv1/Quantize")
    head = ("segmentation_head.0/Conv", "segmentation_head.0/Dequantize", "edgeseg/ArgMax")
    for node, name in zip(model.graph.node, (*layers, *head), strict=True):
        node.name = name
    onnx.save(model, str(path))


def verification() -> Verification:
    figures = AccuracyFigures(0.7, 0.8, 0.9, (0.9, 0.5))
    return Verification(0.99, 0.95, 0.97, 12, "twelve scenes", figures, figures, LATENCY, LATENCY, 1000, 500)


def fpn_manifest(folder: Path, *, verified: bool = True, names: tuple[str, ...] = ("road", "car")) -> Manifest:
    return manifest_of(
        folder,
        PipelineSpec(ModelSpec("fpn", "resnet18", classes=2, class_names=names), InputSpec(64, 96)),
        PrecisionReport(
            "int8", {"int8": 0.9, "fp32": 0.1}, {"int8": 0.5, "fp32": 0.5}, 7424, "executed", {"x/Conv": "first layer"}
        ),
        "onnxruntime",
        engine="engine.onnx",
        edgeseg_version="0.1.0",
        name="fpn-small",
        scheme="onnxruntime-vnni",
        weights="test weights",
        inputs_sha256={},
        options={"threads": 2},
        versions={"onnxruntime": "1.31.1"},
        device={"cpu": "Some CPU"},
        notes=("the auxiliary head was dropped",),
        verification=verification() if verified else None,
        repairs=(
            Repair("bias-correction", {"biases": 12}, "onnxruntime-vnni", 8, 0.9712, 0.9731),
            Repair("equalization", {"channels": 1234}, "onnxruntime-vnni", 8, 0.9731, None),
        ),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_graph(tmp_path / "model.onnx")
    write_graph(tmp_path / "engine.onnx")
    write_json(tmp_path / MANIFEST_NAME, fpn_manifest(tmp_path))
    return tmp_path


def text_of(folder: Path, *, layers: bool = False, width: int = 150) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(render(inspect_engine(folder), layers=layers))
    return capture.get()


def test_layers_carry_module_precision_and_macs(folder: Path) -> None:
    report = inspect_engine(folder)
    assert report.layers is not None
    layers = [(layer.module, layer.op, layer.dtype, layer.macs) for layer in report.layers]
    assert layers == [
        ("encoder.layer1.0.conv1", "Conv", "fp32", 4 * 64 * 27),
        ("encoder.layer1.0.conv1", "QuantizeLinear", "fp32", 0),
        ("segmentation_head.0", "QLinearConv", "int8", 2 * 64 * 4),
        ("segmentation_head.0", "DequantizeLinear", "int8", 0),
        ("", "ArgMax", "fp32", 0),
    ]
    assert report.layers_of == "engine.onnx, the graph onnxruntime executes"


@pytest.mark.parametrize("file", ["", "engine.onnx", MANIFEST_NAME])
def test_every_verb_takes_a_file_of_the_folder_for_it(folder: Path, file: str) -> None:
    given = str(folder / file)
    assert json.loads(typed("inspect", given, "--json").stdout)["folder"] == str(folder)
    known_by = {
        "compile": (["--output", str(folder)], "exists; give --force"),
        "bench": (["--json", str(folder / "engine.onnx"), "--force"], "would replace the input"),
    }
    for verb, (options, message) in known_by.items():
        assert message in typed(verb, given, *options).stderr


def test_files_are_listed_with_what_they_are(folder: Path) -> None:
    report = inspect_engine(folder)
    assert [(f.role, f.name) for f in report.files] == [("engine", "engine.onnx"), ("portable graph", "model.onnx")]
    assert all(len(f.sha256) == 64 for f in report.files)


def test_the_text_shows_spec_precision_verification_and_modules(folder: Path) -> None:
    text = text_of(folder)
    for expected in (
        "fpn-resnet18, 2 classes, multiclass",
        "uint8 (1, 64x96, 3)",
        "90.0% in int8",
        "float: x/Conv: first layer",
        "twelve scenes",
        "road",
        "encoder.layer1",
        "segmentation_head",
        "(around the network)",
        "note: the auxiliary head was dropped",
        "8 images of the calibration set",
    ):
        assert expected in text


def test_the_text_shows_what_was_done_for_int8_and_what_it_gained(folder: Path) -> None:
    lines = [line.split() for line in text_of(folder).splitlines()]
    assert ["biases", "corrected", "12", "biases", "0.9712", "0.9731"] in lines
    assert ["channels", "equalized", "1,234", "channels", "0.9731", "-"] in lines


def test_every_layer_can_be_listed(folder: Path) -> None:
    text = text_of(folder, layers=True)
    assert "encoder.layer1.0.conv1/Conv" in text
    assert "edgeseg/ArgMax" in text


def test_it_fits_a_narrow_terminal(folder: Path) -> None:
    lines = text_of(folder, layers=True, width=70).splitlines()
    assert all(len(line) <= 70 for line in lines)


def test_macs_that_cannot_be_counted_are_not_zero(folder: Path) -> None:
    """ONNX Runtime's own operators are saved without shapes."""
    model = onnx.load(str(folder / "engine.onnx"))
    del model.graph.value_info[:]
    for node in model.graph.node:
        if "Conv" in node.op_type:
            node.op_type, node.domain = "NotKnownToAnyone", "com.microsoft"
    onnx.save(model, str(folder / "engine.onnx"))
    write_json(folder / MANIFEST_NAME, fpn_manifest(folder))
    layers = inspect_engine(folder).layers
    assert layers is not None
    assert {layer.macs for layer in layers} == {None}
    for shown in (text_of(folder), text_of(folder, layers=True)):
        assert "MMAC" not in shown  # a column of dashes says nothing
        assert "share" not in shown.partition("(around the network)")[2]


def test_an_engine_that_is_no_onnx_file_lists_the_portable_graph(folder: Path) -> None:
    (folder / "engine.xml").write_text("<net/>")
    manifest = dataclasses.replace(fpn_manifest(folder), engine=FileRef.of(folder / "engine.xml"), target="openvino")
    write_json(folder / MANIFEST_NAME, manifest)
    report = inspect_engine(folder)
    assert report.layers is not None
    assert "portable graph (openvino fuses it further)" in report.layers_of


def test_an_unverified_engine_says_so(folder: Path) -> None:
    write_json(folder / MANIFEST_NAME, fpn_manifest(folder, verified=False, names=()))
    assert "not verified against PyTorch" in text_of(folder)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("encoder.layer3.0.conv1/Conv", "encoder.layer3.0.conv1"),
        ("encoder.layer3.0.conv1/Conv/weight/DQ", "encoder.layer3.0.conv1"),
        ("Transpose_7", ""),
        ("edgeseg/ArgMax", ""),
        ("", ""),
    ],
)
def test_module_of_a_node(name: str, module: str) -> None:
    assert module_of(name) == module


@pytest.mark.parametrize("arguments", [(), ("--layers",), ("--json",)])
def test_what_a_manifest_holds_cannot_steer_the_terminal(folder: Path, arguments: tuple[str, ...]) -> None:
    hostile = "\x1b]0;owned\x07\x1b[2J\u202eevil\nedgeseg: all is well"
    model = onnx.load(str(folder / "engine.onnx"))
    model.graph.node[0].name = hostile
    onnx.save(model, str(folder / "engine.onnx"))
    manifest = dataclasses.replace(
        fpn_manifest(folder, names=(hostile, "car")),
        name=hostile,
        weights=hostile,
        scheme=hostile,
        device={"cpu": hostile},
        options={hostile: hostile},
        notes=(hostile,),
        command=hostile,
        precision=PrecisionReport("int8", {hostile: 0.9}, {}, 7424, "executed", float_layers={hostile: hostile}),
    )
    write_json(folder / MANIFEST_NAME, manifest)
    done = typed("inspect", folder, *arguments)
    assert done.returncode == 0
    said = done.stdout
    assert not set(said) & {"\x1b", "\x07", "\u202e"}
    assert not any(line.startswith("edgeseg: all is well") for line in said.splitlines())
    if "--json" in arguments:
        assert json.loads(said)["manifest"]["weights"] == hostile
    else:
        assert said.count("\\x1b") >= 8
