"""What uint16 and float32 images change around the network: normalization, FP16, TensorRT's graph, signatures.

Oracles: numpy in float64, ONNX Runtime on the graph as written, the DataType lists of every TensorRT recorded.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from recorded_tensorrt import VERSIONS, Recorder
from small_graphs import graph, run

from edgeseg.backends import get_backend
from edgeseg.backends.signature import TensorInfo, check_signature, expected_image, expected_outputs
from edgeseg.backends.tensorrt.graph import ParsedGraph
from edgeseg.convert.albumentations_file import saved_beside
from edgeseg.convert.preprocessing import RecordedNormalization, in_words, recorded_preprocess, resolve_preprocess
from edgeseg.convert.saved_preprocessing import CONFIG_NAME, SavedPreprocessing
from edgeseg.errors import ArtifactError, SpecError
from edgeseg.evaluate.summary import input_line
from edgeseg.quantize.fp16 import fp16_model
from edgeseg.spec import InputSpec, ModelRequest, ModelSpec, PipelineSpec, Preprocess
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

SIDE = 8
RNG = np.random.default_rng(4)
KINDS: dict[Any, int] = {"uint8": TensorProto.UINT8, "uint16": TensorProto.UINT16, "float32": TensorProto.FLOAT}


def network(dtype: str, scale: float, offset: float) -> onnx.ModelProto:
    """Normalization as the exporter writes it, and one convolution."""
    word = {"uint8": "uint8", "uint16": "uint16", "float32": "float"}[dtype]
    cast = "" if dtype == "float32" else "real = Cast <to = 1> (image) "
    first = "image" if dtype == "float32" else "real"
    made = graph(
        f"({word}[1, {SIDE}, {SIDE}, 1] image) => (float[1, 2, {SIDE}, {SIDE}] logits)",
        f"""{cast}planes = Transpose <perm = [0, 3, 1, 2]> ({first}) scaled = Mul(planes, gain) x = Add(scaled, shift)
        logits = Conv <pads = [1, 1, 1, 1]> (x, w)""",
        gain=np.array(scale, np.float32),
        shift=np.array(offset, np.float32),
        w=RNG.standard_normal((2, 1, 3, 3)).astype(np.float32),
    )
    for node in made.graph.node:
        node.name = ("encoder.conv1/" if node.op_type == "Conv" else "preprocess/") + node.op_type
    return made


def images(dtype: str) -> np.ndarray:
    return RNG.integers(20000, 32001, (1, SIDE, SIDE, 1)).astype(dtype)


def pipeline(dtype: Any, preprocess: Preprocess, channels: int = 1) -> PipelineSpec:
    return PipelineSpec(
        ModelSpec("custom", classes=2, in_channels=channels), InputSpec(32, 32, channels, dtype=dtype), preprocess
    )


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_fp16_keeps_the_normalization_in_float32(dtype: str) -> None:
    """Half precision has steps of 16 at 26000, a sixth of the deviation here, and no 65535 at all."""
    model = network(dtype, 1 / 100, -260)
    half = fp16_model(model, {})
    assert next(node for node in half.graph.node if node.op_type == "Conv").input[1] == "w_fp16"
    given = RNG.integers(25800, 26201, (1, SIDE, SIDE, 1)).astype(dtype)
    full, reduced = run(model, image=given)[0], run(half, image=given)[0]
    assert np.abs(full - reduced).max() < 0.02
    for node in model.graph.node:  # what the rule does not know is in half, and off
        node.name = node.name.replace("preprocess/", "wrapped/")
    assert np.abs(full - run(fp16_model(model, {}), image=given)[0]).max() > 0.05
    given[0, 0, 0] = 65535
    assert np.isfinite(run(half, image=given)[0]).all()


@pytest.mark.parametrize("opset_17", [False, True])
@pytest.mark.parametrize("dtype", KINDS)
def test_tensorrt_gets_16_bits_as_float32(tmp_path: Path, dtype: Any, opset_17: bool) -> None:
    model = network(dtype, 1 / 3000, -26000 / 3000)
    onnx.save(model, tmp_path / "model.onnx")
    spec = pipeline(dtype, Preprocess((0.4,), (0.05,), 1 / 65535))
    stored = OnnxGraph(tmp_path / "model.onnx", sha256_file(tmp_path / "model.onnx"), "fp32", spec, "0" * 64)
    parsed = ParsedGraph.read(stored, "fp32").for_parser(opset_17=opset_17)
    kind = parsed.model.graph.input[0].type.tensor_type.elem_type
    assert kind == (TensorProto.FLOAT if dtype == "uint16" else KINDS[dtype])
    given = images("uint16" if dtype == "uint16" else dtype) if dtype != "uint8" else images("uint16").astype(np.uint8)
    fed = given.astype(np.float32) if dtype == "uint16" else given
    np.testing.assert_allclose(run(parsed.model, image=fed)[0], run(model, image=given)[0], atol=1e-5)
    # Where types are hints only (TensorRT 8, weak typing) these are asked for in float32.
    assert ("preprocess/Mul" in parsed.float32) == (dtype != "uint8")
    assert "encoder.conv1/Conv" not in parsed.float32


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tensorrt_rtx_parses_and_builds_them(tmp_path: Path, dtype: Any, precision: Any) -> None:
    """The real parser and builder; running the engine needs a GPU."""
    pytest.importorskip("tensorrt_rtx")
    model = network(dtype, 1 / 3000, -26000 / 3000)
    onnx.save(model if precision == "fp32" else fp16_model(model, {}), tmp_path / "model.onnx")
    spec = pipeline(dtype, Preprocess((0.4,), (0.05,), 1 / 65535))
    stored = OnnxGraph(tmp_path / "model.onnx", sha256_file(tmp_path / "model.onnx"), precision, spec, "0" * 64)
    built = get_backend("tensorrt-rtx").build(stored, tmp_path, {"sm": [86]})
    assert built.path is not None
    assert built.precision.mac_share == {precision: 1.0}


@pytest.mark.parametrize("version", VERSIONS)
def test_no_tensorrt_has_unsigned_16_bits(version: str) -> None:
    kinds = vars(Recorder(version).module.DataType)
    assert not [name for name in kinds if name in ("UINT16", "INT16")]


def test_signatures_say_the_dtype() -> None:
    spec = pipeline("uint16", Preprocess((0.4,), (0.1,), 1 / 65535))
    assert expected_image(spec).dtype == "uint16"
    assert expected_image(spec, has_uint16=False).dtype == "float32"
    outputs = expected_outputs(spec)
    check_signature([expected_image(spec)], outputs, spec)
    check_signature([expected_image(spec, has_uint16=False)], outputs, spec, has_uint16=False)
    with pytest.raises(ArtifactError, match="the engine's input is image uint8 .*its manifest says image uint16"):
        check_signature([replace(expected_image(spec), dtype="uint8")], outputs, spec)
    many = replace(spec, model=ModelSpec("custom", classes=300, in_channels=1))
    (mask,) = expected_outputs(many)
    assert mask.dtype == "uint16"
    for wide in ("int32", "int64"):
        has = TensorInfo("mask", wide, mask.shape)
        check_signature([expected_image(many, has_uint16=False)], [has], many, has_uint16=False)
        with pytest.raises(ArtifactError):
            check_signature([expected_image(many)], [has], many)


def settled(judge: Any = None, recorded: RecordedNormalization | None = None, **asked: Any) -> Any:
    request = ModelRequest(**asked)
    return resolve_preprocess(request, "resnet18", 1, recorded=recorded, judge=judge)


@pytest.mark.parametrize(
    ("asked", "value", "expected"),
    [
        ({"input_dtype": "uint16", "mean": 0.4, "std": 0.1}, 30000, (30000 / 65535 - 0.4) / 0.1),
        ({"input_dtype": "uint16", "mean": 26000, "std": 3000}, 30000, (30000 - 26000) / 3000),
        ({"input_dtype": "uint16", "mean": 0.5, "std": 0.2, "scale": 1 / 4095}, 3000, (3000 / 4095 - 0.5) / 0.2),
        ({"input_dtype": "float32", "mean": 0.4, "std": 0.1}, 0.55, (0.55 - 0.4) / 0.1),
        ({"input_dtype": "float32", "mean": -100, "std": 800}, -1000, (-1000 + 100) / 800),
        ({"input_dtype": "float32", "mean": 0, "std": 1, "scale": 1 / 255}, 51, 0.2),
        ({"mean": 0.4, "std": 0.1}, 102, 0.0),
    ],
)
def test_mean_and_std_are_of_the_scaled_value(asked: dict[str, Any], value: float, expected: float) -> None:
    preprocess, _ = settled(**asked)
    assert (value * preprocess.scale - preprocess.mean[0]) / preprocess.std[0] == pytest.approx(expected, abs=1e-9)


def test_the_two_usual_scales_of_16_bits_are_judged_but_a_floats_is_told() -> None:
    offered: list[Any] = []

    def judge(candidates: Any) -> Preprocess:
        offered.append([p.scale for p in candidates])
        chosen: Preprocess = candidates[1]
        return chosen

    _, notes = settled(judge, input_dtype="uint16", mean=0.4, std=0.1)
    assert offered == [[1 / 65535, 1.0]]
    assert "images keep their values 0..65535" in notes[-1]
    assert "images are divided by 65535" in notes[-1]
    settled(judge, input_dtype="float32", mean=0.4, std=0.1)
    assert len(offered) == 1
    _, notes = settled(input_dtype="uint16", mean=26000, std=3000)
    assert notes == ("--mean/--std above 1 are taken for pixel values 0..65535",)
    assert in_words(Preprocess((0.0,), (1.0,), 1.0), "float32") == "images keep their values and not normalized further"


def test_what_is_assumed_of_wide_images_is_said() -> None:
    preprocess, notes = settled(input_dtype="uint16")
    assert preprocess.scale == 1 / 65535
    assert any("uint16 images: mean and std of" in n and "for values 0..65535; give --mean" in n for n in notes)
    preprocess, notes = settled(input_dtype="float32")
    assert preprocess.scale == 1.0
    assert any("float32 images: " in n and "for values 0..1; give --mean" in n for n in notes)
    with pytest.raises(SpecError, match="give --mean and --std"):
        settled(input_dtype="uint16", scale=1 / 255)
    assert not any("images:" in n for n in settled()[1])


def test_a_recorded_range_is_of_the_full_scale() -> None:
    settings = {"preprocess": {"mean": [0.5], "std": [0.25], "input_range": [0, 1]}}
    known = recorded_preprocess(settings, {}, "uint16")
    assert known is not None
    assert known.preprocess.scale == 1 / 65535
    plain = recorded_preprocess(settings, {}, "float32")
    assert plain is not None
    assert plain.preprocess.scale == 1.0


def test_the_input_line_says_what_mean_and_std_are_of() -> None:
    thermal = pipeline("uint16", Preprocess((0.4,), (0.1,), 1 / 65535, source="given"))
    assert "32x32 uint16 grey, resized; mean 0.4 std 0.1 of 0..1" in input_line(thermal, is_default_size=False)
    raw = replace(thermal, preprocess=Preprocess((26000.0,), (3000.0,), 1.0))
    assert "of 0..65535" in input_line(raw, is_default_size=False)
    scan = pipeline("float32", Preprocess((-100.0,), (800.0,), 1.0))
    assert "32x32 float32 grey" in input_line(scan, is_default_size=False)
    assert "of pixel values (" in input_line(scan, is_default_size=False)
    twelve = replace(thermal, preprocess=Preprocess((0.4,), (0.1,), 1 / 4095))
    assert "of pixel values times 0.0002442" in input_line(twelve, is_default_size=False)
    assert thermal.in_words == "custom-resnet34, 2 classes, 32x32 uint16 grey (resize) -> mask"


def saved(folder: Path, dtype: Any, *transforms: dict[str, Any]) -> SavedPreprocessing:
    content = {"__version__": "2.0", "transform": {"__class_fullname__": "Compose", "p": 1.0, "transforms": transforms}}
    (folder / CONFIG_NAME).write_text(json.dumps(content))
    stated = saved_beside(folder / "model.safetensors", dtype)
    assert stated is not None
    return stated


NORMALIZE = {"__class_fullname__": "Normalize", "mean": [0.4], "std": [0.1], "max_pixel_value": 65535.0}


def test_saved_normalization_of_16_bits_suggests_16_bits(tmp_path: Path) -> None:
    for uint8 in (
        saved(tmp_path, "uint8", NORMALIZE),
        saved(tmp_path, "uint8", {"__class_fullname__": "ToFloat", "max_value": 65535}),
    ):
        assert [note.rpartition(": ")[2] for note in uint8.doubts] == ["--input-dtype uint16?"]
    wide = saved(tmp_path, "uint16", NORMALIZE)
    assert wide.doubts == ()
    assert wide.normalization is not None
    assert wide.normalization.scale == 1 / 65535
    assert saved(tmp_path, "uint8", {**NORMALIZE, "max_pixel_value": 255.0}).doubts == ()
    # Without a number, by the dtype of the image: albumentations' own rule for ToFloat.
    for dtype, top in (("uint8", 255), ("uint16", 65535), ("float32", 1)):
        known = saved(tmp_path, dtype, {"__class_fullname__": "ToFloat", "max_value": None}).normalization
        assert known is not None
        assert known.scale == 1 / top


def test_saved_padding_is_in_the_images_levels(tmp_path: Path) -> None:
    pad = {"__class_fullname__": "PadIfNeeded", "min_height": 64, "min_width": 64, "fill": 26000.4}
    wide = saved(tmp_path, "uint16", pad).fitting(None, None, [(40, 50)], 1)
    assert wide.padding is not None
    assert wide.padding.value == (26000,)
    assert any("26000.4 of 65535, is 26000 here" in note or "2.6e+04 of 65535" in note for note in wide.notes)
    exact = saved(tmp_path, "float32", pad).fitting(None, None, [(40, 50)], 1)
    assert exact.padding is not None
    assert exact.padding.value == (26000.4,)
    assert not any("colour of padding" in note for note in exact.notes)
    # After Normalize the fill is in its units.
    behind = saved(tmp_path, "uint16", NORMALIZE, {**pad, "fill": 0.0}).fitting(None, None, [(40, 50)], 1)
    assert behind.padding is not None
    assert behind.padding.value == (round(0.4 * 65535),)
    with pytest.raises(SpecError, match="fills with a colour that no image has"):
        saved(tmp_path, "uint8", pad).require_fit(())
