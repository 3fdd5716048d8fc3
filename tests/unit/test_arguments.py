"""A build's arguments: one definition, read alike from Python, the command line and a sweep."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeseg
from edgeseg.arguments import arguments_of
from edgeseg.cli import build as build_verb
from edgeseg.errors import InputError, SpecError
from edgeseg.evaluate.summary import input_line
from edgeseg.pipeline.request import BuildRequest
from edgeseg.progress import LineReporter, reporter_of, stage
from edgeseg.spec import BatchRange, InputSpec, ModelRequest, ModelSpec, PipelineSpec
from edgeseg.store.engine import Engine

ARGUMENTS = {argument.name: argument for argument in arguments_of(BuildRequest).values()}


def test_python_and_the_command_line_take_what_the_request_defines() -> None:
    parameters = inspect.signature(edgeseg.build).parameters
    assert set(parameters) - set(ARGUMENTS) == {"model", "reporter"}
    for name, argument in ARGUMENTS.items():
        default = parameters[name].default
        settled = argument.default if default is None else argument.kind.accept(name, default)
        assert settled == argument.default, name
        assert name in (edgeseg.build.__doc__ or ""), name
    options = {option for parameter in build_verb.command.params for option in parameter.opts}
    assert {argument.flag for argument in ARGUMENTS.values()} <= options


@pytest.mark.parametrize(
    ("said", "field", "value"),
    [
        ({"size": 256}, "size", (256, 256)),
        ({"size": "64x96"}, "size", (64, 96)),
        ({"size": [64, 96]}, "size", (64, 96)),
        ({"size": np.array([64, 96])}, "size", (64, 96)),
        ({"size": np.int64(64)}, "size", (64, 64)),
        ({"batch": 4}, "batch", BatchRange(4, 4, 4)),
        ({"batch": [1, 2, 4]}, "batch", BatchRange(1, 2, 4)),
        ({"batch": np.array([1, 2, 4])}, "batch", BatchRange(1, 2, 4)),
        ({"batch": "1:2:4"}, "batch", BatchRange(1, 2, 4)),
        ({"batch": None}, "batch", BatchRange()),
        ({"classes": np.int64(3)}, "classes", 3),
        ({"classes": "3"}, "classes", 3),
        ({"mean": 0.5}, "mean", (0.5,)),
        ({"mean": np.float32([0.5, 0.25, 0.75])}, "mean", (0.5, 0.25, 0.75)),
        ({"mean": np.float32([0.5, 0.25, 0.75]).reshape(1, 3, 1, 1)}, "mean", (0.5, 0.25, 0.75)),
        ({"threshold": np.float32(0.25)}, "threshold", 0.25),
        ({"scale": "1/255"}, "scale", 1 / 255),
        ({"mean": "124/255,0.5"}, "mean", (124 / 255, 0.5)),
        ({"confidence": np.bool_(True)}, "confidence", True),
        ({"precision": "INT8"}, "precision", "int8"),
        ({"precision": "Fp32"}, "precision", "fp32"),
        ({"target": "OpenVINO"}, "target", "openvino"),
        ({"task": "Binary"}, "task", "binary"),
        ({"class_names": "road,sky"}, "class_names", ("road", "sky")),
        ({"class_names": ["road", "sky"]}, "class_names", ("road", "sky")),
        ({"class_names": None}, "class_names", ()),
        ({"weights": Path("a/b.pt")}, "weights", "a/b.pt"),
        ({"model_args": {"decoder_channels": np.array([64, 32])}}, "model_args", {"decoder_channels": [64, 32]}),
        ({"output": "engines/x"}, "folder", Path("engines/x")),
    ],
)
def test_what_has_one_meaning_is_taken(said: dict[str, Any], field: str, value: object) -> None:
    settled = getattr(BuildRequest.of({"arch": "fpn", **said}), field)
    assert settled == value
    assert type(settled) is type(value)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"size": "big"}, "size is 'big'; give HEIGHTxWIDTH in pixels"),
        ({"size": (1, 2, 3)}, "size is (1, 2, 3)"),
        ({"size": 0}, "size is 0"),
        ({"size": 1 << 62}, "size is 4611686018427387904"),
        ({"size": 64.5}, "size is 64.5"),
        ({"batch": (1, 2)}, "batch is (1, 2); give N or MIN:OPT:MAX"),
        ({"batch": "4:2:8"}, "1 <= MIN"),
        ({"classes": "three"}, "classes is 'three'; give a whole number"),
        ({"calibration": 3}, "calibration is 3; give a folder, a glob, a list, arrays or a table"),
        ({"calibration": b"photos"}, r"calibration is b'photos'; give a folder"),
        ({"classes": 1 << 62}, "classes is 4611686018427387904; give a whole number from 1 to 65535"),
        ({"classes": 10**400}, "classes is a number of about 400 digits"),
        ({"classes": True}, "classes is True"),
        ({"classes": 10**5000}, "classes is a number of about 5000 digits"),
        ({"mean": "a,b"}, "mean is 'a,b'; give a list of numbers"),
        ({"mean": [float("nan")]}, "mean is [nan]"),
        ({"mean": [10**400]}, "mean is [1000"),
        ({"std": ()}, "std is ()"),
        ({"clip": "1"}, "clip is '1'; give the lowest and the highest pixel value, such as -160,240"),
        ({"clip": (240, -160)}, "clip is (240, -160); give the lowest"),
        ({"precision": "int4"}, "unknown precision 'int4'; did you mean 'int8'?"),
        ({"precision": 8}, "precision is 8; give one of fp32, fp16, int8"),
        ({"weights": {"a": 1}}, "weights is {'a': 1}; give a path or a name"),
        ({"activation": print}, "activation is <built-in function print>"),
        ({"confidence": "yes"}, "confidence is 'yes'; give true or false"),
        ({"max_drop": 7}, "max_drop is 7; give a share of mIoU between 0 and 1"),
        ({"max_drop": float("nan")}, "max_drop is nan"),
        ({"validation": [1]}, "validation is [1]; give a path"),
        ({"model_args": {"norm": print}}, "norm is <built-in function print>"),
        ({"scale": "1/0"}, "scale is '1/0'; give a factor above 0"),
        ({"scale": "1/"}, "scale is '1/'"),
        ({"model_args": "a=1"}, "model_args is 'a=1'"),
        ({"model_args": ["a=" + "[" * 100_000]}, "nested too deep"),
        ({"class_names": [1, 2]}, "class_names is [1, 2]; give names"),
        ({"calibraton": "x"}, "no argument 'calibraton'; did you mean 'calibration'"),
    ],
)
def test_what_cannot_be_names_the_argument(said: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError) as caught:
        BuildRequest.of({"arch": "fpn", **said})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_errors_speak_python_to_python(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        edgeseg.build("fpn", weights="random", max_drop=0.01, precision="fp32", output=tmp_path / "e")
    assert str(caught.value) == "max_drop needs masks: give validation DIR with images/ and masks/"
    with pytest.raises(SpecError, match="model is 'fpn'; give an SMP module"):
        edgeseg.build(model="fpn")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="reporter is 3"):
        edgeseg.build("fpn", reporter=3)  # type: ignore[arg-type]


class Module:
    """As much of torch's as edgeseg looks at before it imports torch."""

    def state_dict(self) -> dict[str, object]:
        return {}

    def __call__(self, images: object) -> object:
        return images


def test_a_module_may_come_first_or_as_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[BuildRequest, object]] = []
    manifest: Any = None
    engine = Engine(Path("engines/a"), manifest)

    def keep(request: BuildRequest, *, model: object, reporter: object) -> Engine:
        asked.append((request, model))
        return engine

    monkeypatch.setattr("edgeseg.pipeline.build.run_build", keep)
    module: Any = Module()
    assert edgeseg.build(module, size=64).folder == Path.cwd() / "engines/a"
    edgeseg.build(model=module, size=64)
    edgeseg.build(weights=module, size=64)
    assert asked == [(BuildRequest(size=(64, 64)), module)] * 3
    with pytest.raises(SpecError, match="two modules were given"):
        edgeseg.build(module, model=module)


def test_the_input_in_one_line() -> None:
    spec = PipelineSpec(ModelSpec("fpn", classes=2), InputSpec(64, 96, batch=BatchRange(1, 2, 4), fit="tile"))
    line = input_line(spec, is_default_size=False)
    assert line == (
        "64x96 RGB, batch 1:2:4, tiled; mean 0.485,0.456,0.406 std 0.229,0.224,0.225 of 0..1 (from ImageNet default)"
    )
    assert input_line(spec, is_default_size=True) == f"{line}; the size is only a default, give --size"


def test_a_function_is_told_a_line_per_stage_and_note() -> None:
    lines: list[str] = []
    reporter = reporter_of(lines.append)
    assert isinstance(reporter, LineReporter)
    with stage(reporter, "export") as said:
        reporter.note("assumed")
        reporter.progress(1, 2)
        said.append("done")
    assert lines[0] == "note: assumed"
    assert lines[1].startswith("export") and lines[1].endswith("s  done")


def test_names_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffroad\n\n sky \n".encode())
    assert ModelRequest(class_names=f"@{path}").class_names == ("road", "sky")  # type: ignore[arg-type]
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr("edgeseg.arguments.MAX_NAMES_BYTES", 10)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, why in (
        (path, "more than 10 bytes"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path, "no regular file"),
        ("/dev/zero", "no regular file"),
        (tmp_path / "none", "No such file"),
        (tmp_path / "latin", "utf-8"),
        ("a\0b", "null byte"),
    ):
        with pytest.raises(SpecError, match=f"^cannot read the names in [^\n]*: .*{why}[^\n]*$"):
            ModelRequest(class_names=f"@{name}")  # type: ignore[arg-type]
