"""Engines behind the input and output of hosts that are not edgeseg.

What each host does around the graph is written here again in numpy, after its source, and the masks that come out are compared
with those of the engine folder's own segmenter. No host was started.
"""

from __future__ import annotations

import configparser
import json
import re
import runpy
import shutil
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner
from cpu_folders import CLASSES, IMAGES, SIDE, folder_for, model, own_scheme
from engine_folders import write_manifest
from handed_over import assert_whole, changed
from numpy.typing import NDArray
from small_graphs import graph, run, table_for, two_layers

import edgeseg
from edgeseg.backends import get_backend
from edgeseg.backends.portable import open_graph, portable_engine
from edgeseg.cli import export
from edgeseg.cli.app import cli
from edgeseg.errors import BuildError, SpecError
from edgeseg.handover import deepstream, face, isaac_ros
from edgeseg.handover.folder import HOSTS, export_engine
from edgeseg.quantize.fp16 import fp16_model, magnitudes
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.runtime.overlay import spec_palette
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, OutputSpec, PipelineSpec, Preprocess
from edgeseg.store.engine import open_engine, read_manifest
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph, PrecisionReport

KINDS = ("fp32", "fp16", "int8", "binary", "batches")
GPU_KINDS = ("fp32", "fp16", "int8 of TensorRT", "binary")
NAMES = ("road", "sky; high", "car", "tree", "nighttime road")
GREATER = "score = Sub(l, limit) over = Greater(score, zero) one = Cast <to = 2> (over) mask = Squeeze(one, axis)"


def binary_model() -> onnx.ModelProto:
    """One class, above 0.3 of a sigmoid: its score is 0.85 above where 0.5 would be."""
    rng = np.random.default_rng(8)
    return graph(
        f"(uint8[1, {SIDE}, {SIDE}, 3] image) => (uint8[1, {SIDE}, {SIDE}] mask)",
        f"""real = Cast <to = 1> (image) planes = Transpose <perm = [0, 3, 1, 2]> (real) x = Mul(planes, gain)
        l = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) {GREATER}""",
        gain=np.array(1 / 128, np.float32),
        w1=rng.standard_normal((1, 3, 3, 3)).astype(np.float32),
        b1=np.array([0.1], np.float32),
        limit=np.array(np.log(0.3 / 0.7), np.float32),
        zero=np.array(0, np.float32),
        axis=np.array([1], np.int64),
    )


def folder_of(folder: Path, network: onnx.ModelProto, spec: PipelineSpec, precision: Any) -> Path:
    folder.mkdir(parents=True)
    onnx.save(network, folder / "model.onnx")
    made = OnnxGraph(folder / "model.onnx", sha256_file(folder / "model.onnx"), precision, spec, "0" * 64)
    built = get_backend("onnxruntime").build(made, folder, {})
    write_manifest(folder, spec, target="onnxruntime", built=built)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An ONNX Runtime engine of each kind of graph, fit policy ``tile``."""
    base = tmp_path_factory.mktemp("hosts")
    spec = PipelineSpec(
        ModelSpec("custom", classes=CLASSES, class_names=NAMES), InputSpec(SIDE, SIDE, stride=1, fit="tile")
    )
    binary = replace(
        spec,
        model=ModelSpec("custom", classes=1, task="binary", class_names=("road",)),
        output=OutputSpec(threshold=0.3),
    )
    made = {"int8": folder_for(base / "int8", "onnxruntime", own_scheme())}
    changed(made["int8"], spec=spec)
    scheme = get_backend("tensorrt").scheme
    made["int8 of TensorRT"] = folder_for(base / "gpu", "tensorrt", scheme, portable_only=True)
    changed(made["int8 of TensorRT"], spec=spec)
    made["fp32"] = folder_of(base / "fp32", model(), spec, "fp32")
    half = fp16_model(model(), magnitudes(table_for(model(), image=IMAGES)))
    made["fp16"] = folder_of(base / "fp16", half, spec, "fp16")
    made["binary"] = folder_of(base / "binary", binary_model(), binary, "fp32")
    batches = model()
    for value in (*batches.graph.input, *batches.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del batches.graph.value_info[:]
    many = replace(spec, input=replace(spec.input, batch=BatchRange(1, 2, 4)))
    made["batches"] = folder_of(base / "batches", batches, many, "fp32")
    return made


def own_masks(folder: Path) -> NDArray[Any]:
    if read_manifest(folder).target == "tensorrt":  # there is no GPU here: the portable graph, as verification runs it
        with open_graph(open_engine(folder)) as graph_session:
            return np.asarray(graph_session.run(IMAGES)["mask"])
    with edgeseg.load(folder) as segmenter:
        return np.stack([np.asarray(segmenter(image)) for image in IMAGES])


def copied(folder: Path, to: Path, **fields: Any) -> Path:
    return changed(Path(shutil.copytree(folder, to)), **fields)


def session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


# The QGIS plug-in: model_base.py (preprocessing, metadata), segmentor.py, map_processor_segmentation.py (_process_tile).
def deepness_masks(path: Path, images: NDArray[np.uint8]) -> NDArray[Any]:
    run = session(path)
    (given,) = run.get_inputs()
    metadata = run.get_modelmeta().custom_metadata_map
    assert str(json.loads(metadata["model_type"])).capitalize() == "Segmentor"
    tiles = np.float32(images[:, :, :, : given.shape[-3]] * 1.0 / 255.0)
    tiles = (tiles - np.zeros(3, np.float32)) / np.ones(3, np.float32)
    masks = []
    for result in run.run(None, {given.name: np.transpose(tiles, (0, 3, 1, 2))}):
        result[result < float(json.loads(metadata["seg_thresh"]))] = 0.0
        assert result.shape[1] > 1  # one plane would be taken for a sigmoid
        masks.append(np.argmax(result, axis=1))
    (mask,) = masks
    return np.asarray(mask)


# DeepStream: NvDsInferConvert_CxToP3FloatKernel, parseSemanticSegmentationOutput.
def deepstream_masks(folder: Path, images: NDArray[np.uint8]) -> NDArray[Any]:
    # GLib's key files are read by configparser but for nesting, which there is none of.
    parser = configparser.ConfigParser()
    parser.read(folder / deepstream.CONFIG_NAME)
    key = parser["property"]
    assert (key["network-type"], key["network-input-order"], key["segmentation-output-order"]) == ("2", "0", "0")
    assert (key["model-color-format"], key["maintain-aspect-ratio"]) == ("0", "0")
    assert (key["network-mode"], key["strongly-typed"]) == ("0", "1")
    assert key["infer-dims"] == f"3;{SIDE};{SIDE}"
    assert not {"offsets", "mean-file", "int8-calib-file"} & set(key)
    run = session(folder / key["onnx-file"])
    (given,), (output,) = run.get_inputs(), run.get_outputs()
    assert (given.type, output.type) == ("tensor(float)", "tensor(float)")
    planes = np.float32(float(key["net-scale-factor"]) * images.transpose(0, 3, 1, 2))
    (probabilities,) = run.run([key["output-blob-names"]], {given.name: planes})
    classes, threshold = int(key["num-detected-classes"]), float(key["segmentation-threshold"])
    assert classes == probabilities.shape[1]
    assert len((folder / key["labelfile-path"]).read_text().splitlines()) == classes
    highest = np.full(probabilities[:, 0].shape, -1.0, np.float32)
    mask = np.full(highest.shape, -1)
    for index in range(classes):
        better = (probabilities[:, index] > highest) & (probabilities[:, index] > threshold)
        mask[better] = index
        highest[better] = probabilities[:, index][better]
    return mask


# Isaac ROS: isaac_ros_unet_encoder.launch.py with ImageToTensorNode and ImageTensorNormalizeNode, CopyTensorDataCuda of the
# segmentation postprocessor (NHWC), ColorizeSegmentationMaskImpl.
def isaac_ros_masks(folder: Path, images: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    told = json.loads((folder / isaac_ros.PARAMETERS_NAME).read_text())
    encoder, node, decoder = told["encoder"], told["tensor_rt"], told["decoder"]
    assert (encoder["network_image_height"], encoder["network_image_width"]) == (str(SIDE), str(SIDE))
    assert (encoder["keep_aspect_ratio"], encoder["enable_padding"], encoder["use_planar_input"]) == (
        "False",
        "True",
        "True",
    )
    real = images.astype(np.float32) * np.float32(1 / 255)
    mean, std = (np.array(json.loads(encoder[f"image_{name}"]), np.float32) for name in ("mean", "stddev"))
    planes = ((real - mean) / std).transpose(0, 3, 1, 2)
    assert encoder["final_tensor_name"] in node["input_tensor_names"]
    run = session(folder / node["model_file_path"])
    (output,) = run.get_outputs()
    assert output.type in ("tensor(int32)", "tensor(int64)")
    assert output.shape == [1, SIDE, SIDE, 1]
    (classes,) = run.run(node["output_binding_names"], {node["input_binding_names"][0]: planes})
    assert (decoder["network_output_type"], decoder["mask_height"], decoder["mask_width"]) == ("argmax", SIDE, SIDE)
    mask = classes[..., 0].astype(np.uint8)
    palette = np.array(decoder["color_palette"], np.int64)
    colours = palette[mask % len(palette)]
    return mask, np.stack([(colours >> shift) & 0xFF for shift in (16, 8, 0)], axis=-1).astype(np.uint8)


# jetson-inference: gpuTensorNormMean of tensorConvert.cu, classify of segNet.cpp, LoadClassLabels and LoadClassColors.
def jetson_inference_masks(folder: Path, images: NDArray[np.uint8], ignored: str) -> NDArray[Any]:
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    planes = ((images * np.float32(1 / 255) - mean) / std).transpose(0, 3, 1, 2)
    labels = []
    for line in (folder / "labels.txt").read_text().splitlines():
        labels.append(line[10:] if len(line) > 9 and line[0] == "n" and line[9] == " " else line)
    (scores,) = session(folder / "model.onnx").run(["output_0"], {"input_0": planes})
    assert scores.dtype == np.float32
    assert len(labels) == scores.shape[1]
    left_out = next((index for index, label in enumerate(labels) if label.lower() == ignored.lower()), -1)
    mask = np.full(scores[:, 0].shape, -1)
    highest = np.full(mask.shape, -100000.0, np.float32)
    for index in range(scores.shape[1]):
        if index == left_out:
            continue
        better = (mask < 0) | (scores[:, index] > highest)
        mask[better] = index
        highest[better] = scores[:, index][better]
    return mask.astype(np.uint8)


def agreement(one: NDArray[Any], other: NDArray[Any]) -> float:
    assert one.shape == other.shape
    assert len(np.unique(other)) > 1  # a mask of one class would prove nothing
    return float(np.mean(one == other))


@pytest.mark.parametrize("kind", KINDS)
def test_deepness_gives_the_engines_masks(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    export_engine(folders[kind], "deepness", tmp_path / "out", resolution_cm=12.5)
    assert_whole(tmp_path / "out")
    path = tmp_path / "out" / "model.onnx"
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert agreement(deepness_masks(path, IMAGES), own_masks(folders[kind])) == 1.0


def test_deepness_reads_its_settings_from_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    export_engine(folders["binary"], "deepness", tmp_path / "binary", resolution_cm=12.5)
    export_engine(folders["fp32"], "deepness", tmp_path / "fp32", resolution_cm=12.5)
    metadata = session(tmp_path / "fp32" / "model.onnx").get_modelmeta().custom_metadata_map
    read = {name: json.loads(text) for name, text in metadata.items()}
    assert (read["resolution"], read["tile_size"], read["tiles_overlap"], read["seg_small_segment"]) == (
        12.5,
        SIDE,
        25,
        0,
    )
    # As get_outputs_channel_names sorts and checks them.
    assert [read["class_names"][str(index)] for index in range(CLASSES)] == list(NAMES)
    binary = session(tmp_path / "binary" / "model.onnx")
    assert json.loads(binary.get_modelmeta().custom_metadata_map["class_names"]) == {"0": "background", "1": "road"}
    assert [output.shape for output in binary.get_outputs()] == [[1, 2, SIDE, SIDE]]


SPEC = PipelineSpec(ModelSpec("custom", classes=CLASSES), InputSpec(SIDE, SIDE, stride=1, fit="tile"))
COMMON: list[tuple[dict[str, Any], str]] = [
    ({"spec": replace(SPEC, model=replace(SPEC.model, task="multilabel"))}, "multilabel; give --task multiclass"),
    ({"spec": replace(SPEC, output=OutputSpec("logits"))}, "gives logits; build with --output-kind mask"),
    ({"spec": replace(SPEC, model=ModelSpec("custom", classes=300))}, "300 classes; at most 256"),
    ({"spec": replace(SPEC, input=replace(SPEC.input, dynamic_size=True))}, "build without --dynamic-size"),
    ({"spec": replace(SPEC, input=replace(SPEC.input, batch=BatchRange(2, 2, 2)))}, "takes 2; build with --batch 1"),
    ({"spec": replace(SPEC, input=replace(SPEC.input, fit="letterbox"))}, "for letterbox; build with --fit"),
    (
        {"spec": replace(SPEC, input=replace(SPEC.input, dtype="uint16"))},
        "hands over pixels of 8 bits, the engine takes uint16; give --to triton",
    ),
]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *COMMON,
        ({"target": "tensorrt"}, "graphs of --target onnxruntime, this is tensorrt's"),
        # Each reason takes another build, so all are said.
        (
            {"target": "tensorrt", "spec": replace(SPEC, input=replace(SPEC.input, fit="resize", width=2 * SIDE))},
            "--target onnxruntime, this is tensorrt's; build for that; it brings images to size by tile.*; it cuts square",
        ),
        ({"spec": replace(SPEC, input=replace(SPEC.input, width=2 * SIDE))}, f"square tiles.*--size {SIDE}x{SIDE}"),
    ],
)
def test_what_deepness_cannot_run_is_refused(
    fields: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    engine = copied(folders["fp32"], tmp_path / "engine", **fields)
    with pytest.raises(SpecError, match=message):
        export_engine(engine, "deepness", tmp_path / "out", resolution_cm=10)
    assert not (tmp_path / "out").exists()


def test_the_ground_resolution_is_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    for wrong in (None, 0.0, float("nan")):
        with pytest.raises(SpecError, match="give --resolution CM"):
            export_engine(folders["fp32"], "deepness", tmp_path / "out", resolution_cm=wrong)
    with pytest.raises(SpecError, match="leave it out with --to triton"):
        export_engine(folders["fp32"], "triton", tmp_path / "out", resolution_cm=10.0)


def test_a_graph_that_gives_other_masks_is_not_handed_over(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A host that divides twice: the graph undoes what the host is said to do, so the check must see the difference.
    put = face._put_input
    monkeypatch.setattr(face, "_put_input", lambda model, wanted: put(model, replace(wanted, scale=1 / 128)))
    with pytest.raises(BuildError, match="agrees with the engine on .*nothing was written"):
        export_engine(folders["fp32"], "deepness", tmp_path / "out", resolution_cm=10)
    assert not (tmp_path / "out").exists()


def test_a_mask_made_in_another_way_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    odd = onnx.load(folders["fp32"] / "model.onnx")
    cast = odd.graph.node[-1]
    odd.graph.node.insert(len(odd.graph.node) - 1, onnx.helper.make_node("Add", [cast.input[0]] * 2, ["twice"]))
    cast.input[0] = "twice"
    spec = read_manifest(folders["fp32"]).spec
    engine = folder_of(tmp_path / "engine", odd, spec, "fp32")
    with pytest.raises(SpecError, match="made in a way"):
        export_engine(engine, "deepness", tmp_path / "out", resolution_cm=10)


def test_the_verb_hands_over_to_deepness(folders: dict[str, Path], tmp_path: Path) -> None:
    arguments = [
        "export",
        str(folders["fp32"]),
        "--to",
        "deepness",
        "--output",
        str(tmp_path / "out"),
        "--resolution",
        "10",
    ]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "out" / "README.md") in done.output
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "Load default parameters" in readme
    assert "written and checked in ONNX Runtime, not started" in readme.replace("\n", " ").replace("Written", "written")


def for_gpu(folder: Path, to: Path, **fields: Any) -> Path:
    """The same graph as an engine for TensorRT, whose masks are those of the folder on the CPU."""
    spec = fields.pop("spec", read_manifest(folder).spec)
    fit = fields.pop("fit", "resize")
    return copied(
        folder, to, **{"target": "tensorrt", "spec": replace(spec, input=replace(spec.input, fit=fit)), **fields}
    )


@pytest.mark.parametrize("kind", [*GPU_KINDS, "batches"])
def test_deepstream_gives_the_engines_masks(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    export_engine(for_gpu(folders[kind], tmp_path / "engine"), "deepstream", tmp_path / "out")
    assert_whole(tmp_path / "out")
    assert agreement(deepstream_masks(tmp_path / "out", IMAGES), own_masks(folders[kind])) == 1.0
    # DeepStream divides labels at semicolons.
    assert ";" not in (tmp_path / "out" / "labels.txt").read_text()
    batch = "4" if kind == "batches" else "1"
    assert f"\nbatch-size={batch}\n" in (tmp_path / "out" / deepstream.CONFIG_NAME).read_text()
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"nvinfer config-file-path={deepstream.CONFIG_NAME}" in readme
    assert "not started" in readme


FOUR = PipelineSpec(
    ModelSpec("custom", classes=CLASSES, in_channels=4),
    InputSpec(SIDE, SIDE, channels=4, stride=1),
    Preprocess(mean=(0.5,) * 4, std=(0.5,) * 4),
)


BATCHES = {"spec": replace(SPEC, input=replace(SPEC.input, batch=BatchRange(1, 2, 4)))}
REFUSED: dict[tuple[str, str], list[tuple[dict[str, Any], str]]] = {
    ("deepstream", "int8 of TensorRT"): [
        ({"fit": "letterbox"}, "by resize, the engine was built for letterbox; build with --fit resize"),
        ({"target": "onnxruntime"}, "graphs of --target tensorrt"),
        ({"spec": FOUR}, "1 or 3 channels, the engine takes 4"),
        ({"options": {"typing": "weak"}}, "build without --backend-option typing=weak"),
        ({"options": {"implicit_calibration": True}}, "build without --backend-option implicit_calibration"),
    ],
    ("isaac-ros", "fp32"): [
        ({"fit": "tile"}, "by resize, the engine was built for tile; build with --fit resize"),
        ({"spec": FOUR}, "3 channels, the engine takes 4"),
        (BATCHES, "takes 1:2:4; build with --batch 1"),
    ],
    ("jetson-inference", "fp32"): [
        ({"precision": PrecisionReport("int8", {}, {}, 0, "typed")}, "no integers; build with --precision fp16"),
        ({"spec": FOUR}, "3 channels, the engine takes 4"),
        (BATCHES, "takes 1:2:4; build with --batch 1"),
    ],
}


@pytest.mark.parametrize(
    ("host", "kind", "fields", "message"),
    [(*key, *case) for key, cases in REFUSED.items() for case in (*COMMON[:5], *cases)],
)
def test_what_a_host_cannot_run_is_refused(
    host: str, kind: str, fields: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=message):
        export_engine(for_gpu(folders[kind], tmp_path / "engine", **fields), host, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", GPU_KINDS)
def test_isaac_ros_gives_the_engines_masks(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    engine, output = for_gpu(folders[kind], tmp_path / "engine"), tmp_path / "out"
    export_engine(engine, "isaac-ros", output)
    assert_whole(output)
    own = own_masks(folders[kind])
    mask, picture = isaac_ros_masks(output, IMAGES)
    assert agreement(mask, own) == 1.0
    np.testing.assert_array_equal(picture, spec_palette(read_manifest(engine).spec)[own])


def test_the_launch_file_starts_what_the_parameters_say(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_engine(for_gpu(folders["fp32"], tmp_path / "engine"), "isaac-ros", tmp_path / "out")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "--saveEngine=model.plan --stronglyTyped" in readme
    assert f"ros2 launch ./{isaac_ros.LAUNCH_NAME}" in readme

    class Recorded:
        """Takes the place of ROS's descriptions: it keeps what they are given."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.args, self.kwargs = args, kwargs

    for name in ("ament_index_python", "launch", "launch_ros"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, attributes in {
        "launch": {"LaunchDescription": Recorded},
        "ament_index_python.packages": {"get_package_share_directory": lambda package: f"/share/{package}"},
        "launch.actions": {"IncludeLaunchDescription": Recorded},
        "launch.launch_description_sources": {"PythonLaunchDescriptionSource": Recorded},
        "launch_ros.actions": {"ComposableNodeContainer": Recorded},
        "launch_ros.descriptions": {"ComposableNode": Recorded},
    }.items():
        stand_in = types.ModuleType(name)
        vars(stand_in).update(attributes)
        monkeypatch.setitem(sys.modules, name, stand_in)
    made = runpy.run_path(str(tmp_path / "out" / isaac_ros.LAUNCH_NAME))["generate_launch_description"]()
    container, encoder = made.args[0]
    runner, decoder = container.kwargs["composable_node_descriptions"]
    (parameters,) = runner.kwargs["parameters"]
    assert Path(parameters["model_file_path"]).is_file()
    assert parameters["engine_file_path"] == str(tmp_path / "out" / "model.plan")
    assert parameters["force_engine_update"] is False
    assert decoder.kwargs["parameters"][0]["network_output_type"] == "argmax"
    arguments = dict(encoder.kwargs["launch_arguments"])
    assert all(isinstance(value, str) for value in arguments.values())
    assert arguments["component_container_name"] == container.kwargs["name"]


@pytest.mark.parametrize("kind", ["fp32", "fp16", "binary"])
def test_jetson_inference_gives_the_engines_masks(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    spec = read_manifest(folders[kind]).spec
    names = ("void",) if kind == "binary" else ("void", "none", *NAMES[2:])
    spec = replace(spec, model=replace(spec.model, class_names=names))
    output = tmp_path / "out"
    export_engine(for_gpu(folders[kind], tmp_path / "engine", spec=spec), "jetson-inference", output)
    assert_whole(output)
    readme = (output / "README.md").read_text()
    ignored = re.search(r"--ignore-class=(\S+) ", readme)
    assert ignored is not None
    masks = jetson_inference_masks(output, IMAGES, ignored[1])
    assert agreement(masks, own_masks(folders[kind])) == 1.0
    colours = np.array([line.split() for line in (output / "colors.txt").read_text().splitlines()], np.uint8)
    np.testing.assert_array_equal(colours, spec_palette(spec))
    labels = (output / "labels.txt").read_text().splitlines()
    assert labels == (["background", "void"] if kind == "binary" else ["void", "none", "car", "tree", "nighttime_road"])
    # TensorRT 8 of JetPack 4 to 6 reads opset 17 at most.
    graph_file = onnx.load(output / "model.onnx")
    onnx.checker.check_model(graph_file, full_check=True)
    assert [domain.version for domain in graph_file.opset_import] == [17]
    assert [(i.name, o.name) for i, o in zip(graph_file.graph.input, graph_file.graph.output, strict=True)] == [
        ("input_0", "output_0")
    ]


def test_another_way_of_resizing_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    spec = read_manifest(folders["fp32"]).spec
    area = replace(spec, input=replace(spec.input, interpolation="area"))
    export_engine(for_gpu(folders["fp32"], tmp_path / "area", spec=area), "deepstream", tmp_path / "out")
    assert "resizes for this model by area" in (tmp_path / "out" / "README.md").read_text()


def test_every_host_of_the_verb_is_known(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="unknown host 'tritton'; did you mean 'triton'"):
        export_engine(folders["fp32"], "tritton", tmp_path / "out")
    (option,) = (p for p in export.command.params if p.name == "host")
    assert isinstance(option.type, click.Choice)
    assert set(option.type.choices) == set(HOSTS)


@pytest.mark.parametrize("answer", ["scores", "probabilities", "classes"])
def test_classes_that_fill_a_kernels_blocks_are_not_shown(answer: Any, tmp_path: Path) -> None:
    classes = 11
    network = two_layers(SIDE, SIDE, classes)
    onnx.save(network, tmp_path / "float.onnx")
    spec = PipelineSpec(ModelSpec("custom", classes=classes), InputSpec(SIDE, SIDE, stride=1, fit="tile"))
    fp32 = OnnxGraph(tmp_path / "float.onnx", sha256_file(tmp_path / "float.onnx"), "fp32", spec, "0" * 64)
    written = write_qdq(fp32, table_for(network, image=IMAGES), SCHEMES["onnxruntime-vnni"], tmp_path / "model.onnx")
    assert max(tensor.dims[0] for tensor in onnx.load(written.path).graph.initializer if len(tensor.dims) == 4) == 16
    built = portable_engine(written, "onnxruntime", "int8", {})
    write_manifest(tmp_path, spec, target="onnxruntime", built=built, scheme="onnxruntime-vnni")
    host = face.Face("image", "answer", answer)
    made = face.with_face(open_engine(tmp_path), host)
    (shown,) = run(made, image=host.normalized(IMAGES))
    assert shown.shape == ((1, SIDE, SIDE, 1) if answer == "classes" else (1, classes, SIDE, SIDE))
    with open_graph(open_engine(tmp_path)) as graph_session:
        np.testing.assert_array_equal(host.mask(shown), graph_session.run(IMAGES)["mask"])
