"""A manifest that says something else than its engine is refused: names, types, shapes, batch, values, sizes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
from cpu_folders import CLASSES, IMAGES, folder_for, own_scheme

import edgeseg
from edgeseg.backends import get_backend
from edgeseg.backends.compile import compile_folder
from edgeseg.backends.signature import TensorInfo, check_signature, expected_image, expected_outputs
from edgeseg.errors import ArtifactError, BuildError
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, OutputSpec, PipelineSpec
from edgeseg.store.documents import MAX_JSON_BYTES, read_json
from edgeseg.store.hashing import FileRef
from edgeseg.store.manifest import MANIFEST_NAME


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_for(tmp_path_factory.mktemp("engines") / "a", "onnxruntime", own_scheme())


@pytest.fixture(scope="module")
def with_openvino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("openvino")
    return folder_for(tmp_path_factory.mktemp("engines") / "b", "openvino", get_backend("openvino").scheme)


@pytest.fixture(params=["onnxruntime", "openvino"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder of its own to spoil."""
    source: Path = request.getfixturevalue("whole" if request.param == "onnxruntime" else "with_openvino")
    return Path(shutil.copytree(source, tmp_path / "engine"))


def edit(folder: Path, **changes: Any) -> None:
    """Set fields of the manifest; ``model__classes=3`` sets ``spec.model.classes``."""
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    for name, value in changes.items():
        *parents, last = name.split("__")
        place = manifest["spec"] if parents else manifest
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"output__kind": "logits"},
            "outputs is mask uint8 (1, 16, 16), its manifest says logits float32 (1, 5, 16, 16)",
        ),
        ({"output__kind": "probabilities"}, "its manifest says probabilities float32"),
        ({"output__confidence": True}, "its manifest says mask uint8 (1, 16, 16), confidence float32 (1, 16, 16)"),
        (
            {"model__task": "multilabel"},
            "output is mask uint8 (1, 16, 16), its manifest says mask uint8 (1, 5, 16, 16)",
        ),
        ({"model__classes": 300}, "its manifest says mask uint16 (1, 16, 16)"),
        ({"input__batch": {"minimum": 1, "optimum": 2, "maximum": 4}}, "manifest says image uint8 (1..4, 16, 16, 3)"),
        ({"input__batch": {"minimum": 2, "optimum": 2, "maximum": 2}}, "manifest says image uint8 (2, 16, 16, 3)"),
        ({"input__height": 32}, "input is image uint8 (1, 16, 16, 3), its manifest says image uint8 (1, 32, 16, 3)"),
        (
            {
                "input__channels": 1,
                "model__in_channels": 1,
                "preprocess__mean": [0.5],
                "preprocess__std": [0.5],
            },
            "manifest says image uint8 (1, 16, 16, 1)",
        ),
    ],
)
def test_another_contract_than_the_engines_is_refused_when_it_is_loaded(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    edit(folder, **changes)
    with pytest.raises(ArtifactError) as caught:
        edgeseg.load(folder)
    assert words in str(caught.value)
    assert str(caught.value).endswith("edited, or of another engine; build it again")


@pytest.mark.parametrize(
    ("changes", "values"),
    [({"model__classes": 2}, 2), ({"model__classes": 1, "model__task": "binary"}, 2), ({"model__classes": 3}, 3)],
)
def test_a_class_the_manifest_does_not_know_is_refused_when_it_is_met(
    folder: Path, changes: dict[str, Any], values: int
) -> None:
    with edgeseg.load(folder) as segmenter:
        largest = int(segmenter(IMAGES[0]).max())
        assert largest == CLASSES - 1
    edit(folder, **changes)
    with edgeseg.load(folder) as segmenter:
        for call in (
            lambda: segmenter(IMAGES[0]),
            lambda: segmenter(np.repeat(IMAGES, 2, axis=1)),
            lambda: segmenter.predict(IMAGES),
            lambda: list(segmenter.many([IMAGES[0]])),
        ):
            with pytest.raises(
                ArtifactError, match=rf"mask has the value {largest}, its manifest says {values} values"
            ):
                call()


def second_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))


def renamed_output(model: onnx.ModelProto) -> None:
    name = model.graph.output[0].name
    model.graph.node.append(onnx.helper.make_node("Identity", [name], ["masks"]))
    model.graph.output[0].name = "masks"


def renamed_input(model: onnx.ModelProto) -> None:
    name = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["picture" if used == name else used for used in node.input]
    model.graph.input[0].name = "picture"


def text_beside(model: onnx.ModelProto) -> None:
    value = onnx.helper.make_tensor("text", onnx.TensorProto.STRING, [1], [b"\xff"])
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["aux_logits"], value=value))
    model.graph.output.append(onnx.helper.make_tensor_value_info("aux_logits", onnx.TensorProto.STRING, [1]))


def float_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def sequence_output(model: onnx.ModelProto) -> None:
    name, dtype = model.graph.output[0].name, onnx.TensorProto.UINT8
    model.graph.node.append(onnx.helper.make_node("SequenceConstruct", [name], ["masks"]))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_sequence_value_info("masks", dtype, None))


def taller_mask(model: onnx.ModelProto) -> None:
    """Twice as high as the image, by a factor that depends on it: nobody can tell the size before it runs."""
    (mask,) = model.graph.output
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 2, 1]), "factors"))
    model.graph.node[-1].output[0] = "first"
    for node in (
        onnx.helper.make_node("Cast", [model.graph.input[0].name], ["pixels"], to=onnx.TensorProto.INT64),
        onnx.helper.make_node("ReduceMin", ["pixels"], ["least"], keepdims=0),
        onnx.helper.make_node("Sub", ["least", "least"], ["nothing"]),
        onnx.helper.make_node("Add", ["factors", "nothing"], ["repeats"]),
        onnx.helper.make_node("Tile", ["first", "repeats"], [mask.name]),
    ):
        model.graph.node.append(node)
    for axis, dim in enumerate(mask.type.tensor_type.shape.dim):
        dim.dim_param = f"size{axis}"


def hungry(model: onnx.ModelProto) -> None:
    """It wants 4 PiB when it runs."""
    (mask,) = model.graph.output
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1 << 25, 1 << 25]), "sizes"))
    model.graph.node[-1].output[0] = "first"
    for node in (
        onnx.helper.make_node("ConstantOfShape", ["sizes"], ["zeros"]),
        onnx.helper.make_node("ReduceMax", ["zeros"], ["zero"], keepdims=0),
        onnx.helper.make_node("Cast", ["zero"], ["none"], to=onnx.TensorProto.UINT8),
        onnx.helper.make_node("Add", ["first", "none"], [mask.name]),
    ):
        model.graph.node.append(node)


def put(change: Callable[[onnx.ModelProto], None], folder: Path, role: str, name: str) -> None:
    """Change an ONNX file of the folder. The hashes are right, as an attacker, or a script that means well, would make them."""
    model = onnx.load(str(folder / name))
    change(model)
    (folder / name).write_bytes(model.SerializeToString())
    ref = FileRef.of(folder / name)
    edit(folder, **{role: {"name": ref.name, "sha256": ref.sha256, "size_bytes": ref.size_bytes}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (second_input, r"inputs are image uint8 \(1, 16, 16, 3\), more float32 \(1\), its manifest says image"),
        (renamed_output, "outputs is masks uint8"),
        (renamed_input, r"input is picture uint8 \(1, 16, 16, 3\), its manifest says image"),
        (text_beside, r"output is aux_logits string \(1\), its manifest says aux_logits float32"),
    ],
)
def test_another_engine_under_the_manifest_is_refused(
    whole: Path, tmp_path: Path, change: Callable[[onnx.ModelProto], None], words: str
) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "engine"))
    put(change, copy, "engine", "engine.onnx")
    with pytest.raises(ArtifactError, match=words):
        edgeseg.load(copy)


def test_a_mask_of_another_size_is_refused_when_it_is_met(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "engine"))
    put(taller_mask, copy, "engine", "engine.onnx")
    with edgeseg.load(copy) as segmenter:
        for call in (
            lambda: segmenter(IMAGES[0]),
            lambda: segmenter.predict(IMAGES),
            lambda: list(segmenter.many([IMAGES[0]])),
        ):
            with pytest.raises(ArtifactError, match=r"mask is \(1, 32, 16\) of images of \(16, 16\)"):
                call()


@pytest.mark.parametrize(
    "change", [second_input, renamed_output, renamed_input, text_beside, float_input, sequence_output]
)
def test_a_graph_of_another_contract_is_not_compiled_over_the_engine(
    folder: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    put(change, folder, "graph", "model.onnx")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ArtifactError, match=r"^the engine's (in|out)put.* its manifest says (image|mask|aux_logits)"):
        compile_folder(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_graph_that_fails_when_it_runs_is_one_line(folder: Path) -> None:
    put(hungry, folder, "graph", "model.onnx")
    with pytest.raises(BuildError, match=r"^(ONNX Runtime failed to run the engine|OpenVINO .* cannot compile)"):
        compile_folder(folder)


def test_a_json_of_the_largest_size_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[]".ljust(MAX_JSON_BYTES))
    assert read_json(path, list[int], "list") == []
    path.write_bytes(b"[]".ljust(MAX_JSON_BYTES + 1))
    with pytest.raises(ArtifactError, match="larger than 64 MiB"):
        read_json(path, list[int], "list")


# Without an engine: what is compared, for every kind of contract.
SPECS = [
    PipelineSpec(
        ModelSpec("fpn", classes=1 if task == "binary" else classes, task=task),
        InputSpec(64, 96, batch=batch, dynamic_size=dynamic),
        output=OutputSpec(kind, confidence),
    )
    for task in ("multiclass", "binary", "multilabel")
    for classes in (4, 300)
    for kind in ("mask", "logits", "probabilities")
    for confidence in (False, True)
    for batch in (BatchRange(), BatchRange(1, 2, 4))
    for dynamic in (False, True)
]


@pytest.mark.parametrize("spec", SPECS)
def test_an_engine_of_the_contract_passes_and_sizes_left_open_too(spec: PipelineSpec) -> None:
    inputs, outputs = [expected_image(spec)], expected_outputs(spec)
    check_signature(inputs, outputs, spec)
    check_signature(inputs, [*outputs, TensorInfo("aux_logits", "float32", ((1, 1), (4, 4)))], spec)

    def opened(tensor: TensorInfo) -> TensorInfo:
        assert tensor.shape is not None
        return TensorInfo(tensor.name, tensor.dtype, tuple((0, None) for _ in tensor.shape))

    check_signature([opened(t) for t in inputs], [opened(t) for t in outputs], spec)
    check_signature(inputs, [TensorInfo(t.name, t.dtype, None) for t in outputs], spec)
    if spec.mask_dtype == "uint16" and spec.output.kind == "mask":
        wide = [TensorInfo(t.name, t.dtype.replace("uint16", "int32"), t.shape) for t in outputs]
        check_signature(inputs, wide, spec, has_uint16=False)
        with pytest.raises(ArtifactError, match="mask int32"):
            check_signature(inputs, wide, spec)


@pytest.mark.parametrize("spec", SPECS[::7])
def test_every_difference_is_refused(spec: PipelineSpec) -> None:
    inputs, outputs = [expected_image(spec)], expected_outputs(spec)
    for tensors in (inputs, outputs):
        for index, tensor in enumerate(tensors):
            assert tensor.shape is not None
            others = [
                TensorInfo("other", tensor.dtype, tensor.shape),
                TensorInfo(tensor.name, "float16", tensor.shape),
                TensorInfo(tensor.name, tensor.dtype, tensor.shape[:-1]),
                TensorInfo(tensor.name, tensor.dtype, (*tensor.shape[:-1], (1, 1))),
            ]
            for other in others:
                changed = [*tensors[:index], other, *tensors[index + 1 :]]
                with pytest.raises(ArtifactError, match="its manifest says"):
                    check_signature(
                        changed if tensors is inputs else inputs, changed if tensors is outputs else outputs, spec
                    )
