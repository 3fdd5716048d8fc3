"""What the system refuses, and what is damaged beyond reading, is one line of ours: never a raw exception."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from PIL import Image

import edgeseg
from edgeseg.arguments import PATH
from edgeseg.cli.inspect import read_layers
from edgeseg.errors import ArtifactError, EdgesegError, InputError, SpecError
from edgeseg.evaluate.results import read_report
from edgeseg.images.decoding import list_images, read_image
from edgeseg.quantize.table import load_table
from edgeseg.spec import ModelSpec
from edgeseg.store import files
from edgeseg.store.artifacts import MANIFEST_NAME, FileRef, check_file, read_manifest
from edgeseg.sweep.config import read_config

TOO_LONG = "x" * 300


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (lambda: read_image(TOO_LONG), InputError),
        (lambda: list_images(TOO_LONG), InputError),
        (lambda: list_images(f"{TOO_LONG}*"), InputError),
        (lambda: read_image("a\0b.png"), InputError),
        (lambda: list_images("a\0*"), InputError),
        (lambda: edgeseg.load(TOO_LONG), ArtifactError),
        (lambda: edgeseg.load("a\0b"), ArtifactError),
        (lambda: edgeseg.build("fpn", output=TOO_LONG), ArtifactError),
        (lambda: edgeseg.build("fpn", output="a\0b"), SpecError),
        (lambda: edgeseg.build("fpn", calibration=TOO_LONG), InputError),
        (lambda: edgeseg.build("fpn", validation=TOO_LONG), InputError),
        (lambda: PATH.accept("validation", "a\0b"), SpecError),
    ],
)
def test_names_no_system_takes(act: Callable[[], object], kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([np.zeros((64, 64, 3), np.uint8)], "only 1 image in the given images; calibration needs at least 8"),
        (np.zeros((3, 64, 64, 3), np.uint8), "only 3 images in the given images; calibration needs at least 8"),
        ([np.zeros((64, 64, 3), np.float32)], "array 0 is float32, the engine takes uint8"),
        ([], "the given images holds no images"),
    ],
)
def test_arrays_that_cannot_be_calibrated_on_are_refused_before_the_work(
    given: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeseg.pipeline.plan.load_stage", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match=message):
        edgeseg.build("fpn", calibration=given, target="onnxruntime", output=tmp_path / "engine")


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests may run as root, whom no permission stops: the system's answer is put in its place."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    reference = FileRef.of(tmp_path / "a.png")

    def refuse(path: Path, *args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("is_file", "stat", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, refuse)
            with pytest.raises(ArtifactError, match=r"a\.png: Permission denied"):
                check_file(tmp_path, reference)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "stat", refuse)
        with pytest.raises(InputError, match=r"a\.png: Permission denied"):
            read_image(tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_file", refuse)
        with pytest.raises(ArtifactError, match="Permission denied"):
            read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("read", "name", "text"),
    [
        (lambda path: read_manifest(path.parent), MANIFEST_NAME, "["),
        (read_report, "bench.json", "["),
        (load_table, "table.json", '{"ranges":'),
        (read_config, "sweep.toml", "a=" + "["),
    ],
)
def test_files_nested_too_deep(read: Callable[[Path], object], name: str, text: str, tmp_path: Path) -> None:
    opening = text[-1] if text[-1] == "[" else text
    (tmp_path / name).write_text(text + opening * 100_000)
    with pytest.raises(EdgesegError) as caught:
        read(tmp_path / name)
    assert name in str(caught.value)


def test_a_damaged_graph_is_listed_or_refused(tmp_path: Path) -> None:
    floats = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["y"], name="encoder.conv/Conv", pads=[1, 1, 1, 1]),
            helper.make_node("MatMul", ["y", "m"], ["z"], name="decoder/MatMul"),
            helper.make_node("Shape", ["z"], ["s"]),
            helper.make_node("Gather", ["s", "i"], ["q"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", floats, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("z", floats, None), helper.make_tensor_value_info("q", 7, None)],
        [
            helper.make_tensor("w", floats, (4, 3, 3, 3), [0.0] * 108),
            helper.make_tensor("m", floats, (8, 8), [0.0] * 64),
            helper.make_tensor("i", onnx.TensorProto.INT64, (), [0]),
        ],
    )
    whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]).SerializeToString()
    path = tmp_path / "engine.onnx"
    path.write_bytes(whole)
    assert [layer.macs for layer in read_layers(path)][:2] == [4 * 8 * 8 * 27, 4 * 8 * 8 * 8]
    chance, refused = random.Random(0), 0
    for _ in range(600):
        damaged = bytearray(whole)
        place = chance.randrange(len(damaged))
        if chance.random() < 0.5:
            damaged[place] = chance.randrange(256)
        else:
            del damaged[place : place + chance.randrange(1, 8)]
        path.write_bytes(damaged)
        try:
            read_layers(path)
        except EdgesegError:
            refused += 1
    assert 0 < refused < 600


def test_as_many_classes_as_a_mask_can_hold() -> None:
    assert ModelSpec("fpn", classes=65536, task="multilabel").classes == 65536
    for classes in (65537, 1 << 62, 10**5000):
        with pytest.raises(SpecError, match="at most 65536, what a uint16 mask holds") as caught:
            ModelSpec("fpn", classes=classes, task="multilabel")
        assert len(str(caught.value)) < 120
