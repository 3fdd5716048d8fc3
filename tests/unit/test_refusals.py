"""What the system refuses, and what is damaged beyond reading, is one line of ours: never a raw exception."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgeseg
from edgeseg.arguments import PATH
from edgeseg.errors import ArtifactError, InputError, SpecError
from edgeseg.images.decoding import list_images, read_image
from edgeseg.spec import ModelSpec
from edgeseg.store import files
from edgeseg.store.engine import check_file, read_manifest
from edgeseg.store.hashing import FileRef

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


def test_as_many_classes_as_a_mask_can_hold() -> None:
    assert ModelSpec("fpn", classes=65536, task="multilabel").classes == 65536
    for classes in (65537, 1 << 62, 10**5000):
        with pytest.raises(SpecError, match="at most 65536, what a uint16 mask holds") as caught:
            ModelSpec("fpn", classes=classes, task="multilabel")
        assert len(str(caught.value)) < 120


def test_in_python_an_argument_has_its_name_there_and_a_command_its_options(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"build with batch, and compare edgeseg bench --batch and --streams$"):
        edgeseg.build("fpn", target="tensorrt", optimize_for="throughput", output=tmp_path / "engine")
