"""Every architecture, quantized: the graph keeps its scheme's rules, runs, agrees with fp32, and runs in int8."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from recorded_tensorrt.parser8 import complaints
from small_graphs import plain_logits, signal_to_noise_db

from edgeseg.backends import get_backend
from edgeseg.backends.tensorrt.opset17 import for_tensorrt_8
from edgeseg.convert.export import export_onnx
from edgeseg.convert.load import load_model
from edgeseg.demo import sample_folder
from edgeseg.graph.types import typed_precision
from edgeseg.mixed.sensitivity import NetworkModules
from edgeseg.quantize.calibration import CalibrationSet, calibrate
from edgeseg.quantize.fp16 import write_fp16
from edgeseg.quantize.lint import lint
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.quantize.table import CalibrationTable
from edgeseg.spec import ARCHITECTURES, InputSpec, ModelRequest, OutputSpec, PipelineSpec
from edgeseg.store.manifest import MIN_INT8_SHARE, OnnxGraph

pytestmark = pytest.mark.integration

SIZES = {"pan": 128}
RESNET: dict[str, Any] = {"encoder": "resnet18"}
ENCODERS: dict[str, dict[str, Any]] = {
    "segformer": {"encoder": "mit_b0"},
    # The depth of the default, of fewer channels.
    "dpt": {"encoder": "tu-vit_tiny_patch16_224", "model_args": {"dynamic_img_size": True}},
}


def demo_images(count: int, side: int) -> list[NDArray[np.uint8]]:
    paths = sorted((sample_folder() / "calib" / "images").iterdir())[:count]
    return [np.asarray(Image.open(path).convert("RGB").resize((side, side))) for path in paths]


@dataclass(frozen=True, eq=False)
class Quantizable:
    """An fp32 graph of logits, its table, and images; each of its typed graphs is written once."""

    graph: OnnxGraph
    table: CalibrationTable
    images: list[NDArray[np.uint8]]
    folder: Path

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        return logits(self.graph.path, self.images)

    @cached_property
    def fp16(self) -> OnnxGraph:
        return write_fp16(self.graph, self.table, self.folder / "fp16.onnx")

    @cache  # noqa: B019  it goes with the module's fixture
    def int8(self, scheme: str) -> OnnxGraph:
        return write_qdq(self.graph, self.table, SCHEMES[scheme], self.folder / f"{scheme}.onnx")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def quantizable(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Quantizable:
    """An architecture with random weights."""
    arch = request.param
    side = SIZES.get(arch, 64)
    loaded = load_model(ModelRequest(arch=arch, weights="random", classes=4, **ENCODERS.get(arch, RESNET)))
    spec = PipelineSpec(
        loaded.model, InputSpec(side, side, stride=loaded.stride), loaded.preprocess, OutputSpec("logits")
    )
    folder = tmp_path_factory.mktemp(arch)
    graph, _ = export_onnx(loaded, spec, folder / "model.onnx")
    images = demo_images(8, side)
    return Quantizable(graph, calibrate(graph, CalibrationSet.open(images)), images, folder)


def logits(path: Path, images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"image": image[None]})[0] for image in images])


@pytest.mark.parametrize("scheme", ["onnxruntime-vnni", "tensorrt"])
def test_quantized_graph_follows_its_scheme_and_the_fp32_graph(quantizable: Quantizable, scheme: str) -> None:
    quantized = quantizable.int8(scheme)
    model = onnx.load(str(quantized.path))
    assert lint(model, SCHEMES[scheme]) == []
    operators = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    # 8-bit rounding of every activation leaves random networks 15 to 40 dB; a wrong scale or axis leaves less than 5.
    assert signal_to_noise_db(quantizable.logits, logits(quantized.path, quantizable.images)) > 10


def test_tensorrt_8_takes_every_precision_and_computes_the_same(quantizable: Quantizable) -> None:
    """Nothing its parser's source refuses is left, and ONNX Runtime gets the same logits, of int8 from the same integers."""
    typed = {"fp32": quantizable.graph, "fp16": quantizable.fp16, "int8": quantizable.int8("tensorrt")}
    for precision, one in typed.items():
        given = onnx.load(str(one.path))
        made = for_tensorrt_8(given)
        onnx.checker.check_model(made.model, full_check=True)
        assert list(complaints(made.model, "8.5")) == []
        assert list(complaints(for_tensorrt_8(given, has_normalization=True).model, "8.6")) == []
        before, after = (plain_logits(model, quantizable.images[:1]) for model in (given, made.model))
        if precision == "int8":
            assert weights_of(made.model) == weights_of(given)
        if not set(made.origins) & {f"{node}/variance" for node in made.origins.values()}:
            np.testing.assert_array_equal(after, before)
        else:  # a mean has another order of sums, which a Q behind it may round to another integer
            assert signal_to_noise_db(before, after) > {"fp32": 90, "fp16": 45, "int8": 30}[precision]


def weights_of(model: onnx.ModelProto) -> dict[str, bytes]:
    """The int8 constants, by the DQ that reads them: as they are, or made by a Q, which numpy does here."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    weights: dict[str, bytes] = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        maker = makers.get(node.input[0])
        if node.input[0] in constants:
            weights[node.name] = constants[node.input[0]].tobytes()
        elif maker is not None and maker.input[0] in constants:
            floats, scale = (constants[name] for name in maker.input[:2])
            axis = next((a.i for a in maker.attribute if a.name == "axis"), 0) % max(floats.ndim, 1)
            steps = scale.reshape([-1 if i == axis else 1 for i in range(floats.ndim)]) if scale.size > 1 else scale
            weights[node.name] = np.clip(np.rint(floats / steps), -128, 127).astype(np.int8).tobytes()
    assert weights
    return weights


def test_half_of_the_modules_in_float(quantizable: Quantizable, tmp_path: Path) -> None:
    """A seeded choice in three schemes; the linter raises, and TensorRT-RTX runs what stays float in FP16."""
    graph, images = quantizable.graph, quantizable.images
    names = NetworkModules.of(graph).modules.names
    floats = random.Random(graph.spec.model.arch).sample(names, len(names) // 2)
    for scheme in ("onnxruntime-vnni", "openvino", "tensorrt"):
        quantized = write_qdq(graph, quantizable.table, SCHEMES[scheme], tmp_path / f"{scheme}.onnx", floats)
        assert signal_to_noise_db(quantizable.logits, logits(quantized.path, images)) > 10
        shares = typed_precision(quantized.path, "int8", graph.spec.input).mac_share
        assert set(shares) <= {"int8", "fp32", "fp16"} and shares["int8"] > 0
        assert shares.get("fp16", 0.0) > 0 if scheme == "tensorrt" else shares["fp32"] > 0
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        built = get_backend("tensorrt-rtx").build(quantized, tmp_path, {"sm": "86"})
        assert built.precision.mac_share["int8"] == pytest.approx(shares["int8"], abs=0.05)
        assert built.precision.mac_share["fp16"] == pytest.approx(shares["fp16"], abs=0.05)


def test_engine_runs_in_int8(quantizable: Quantizable, tmp_path: Path) -> None:
    backend = get_backend("onnxruntime")
    built = backend.build(quantizable.int8(backend.scheme), tmp_path, {})
    assert built.path.is_file()
    # Attention multiplies activations with each other, in float.
    assert built.precision.mac_share.get("int8", 0.0) >= 0.97, built.precision.float_layers


def test_fp16_graph_is_typed_and_close(quantizable: Quantizable) -> None:
    half = quantizable.fp16
    model = onnx.load(str(half.path))
    types = element_types(model)
    convolutions = [n for n in model.graph.node if n.op_type in {"Conv", "MatMul", "Gemm"}]
    assert all(types[n.output[0]] == onnx.TensorProto.FLOAT16 for n in convolutions)
    assert types["logits"] == onnx.TensorProto.FLOAT
    assert signal_to_noise_db(quantizable.logits, logits(half.path, quantizable.images)) > 35


def test_typed_graphs_build_in_tensorrt_rtx(quantizable: Quantizable, tmp_path: Path) -> None:
    """Built, not run: a GPU is needed for that. SM 75 has an engine of its own: it may need another graph."""
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    graph = quantizable.graph
    for one in (graph, quantizable.fp16, quantizable.int8("tensorrt")):
        for sm in ("86,89,120", "75"):
            built = get_backend("tensorrt-rtx").build(one, tmp_path, {"sm": sm})
            assert built.path is not None and built.path.stat().st_size > 0
            share = built.precision.mac_share.get(one.precision, 0.0)
            assert share >= (MIN_INT8_SHARE if one.precision == "int8" else 0.95), built.precision.float_layers
    # As few layers as the rewrites left; a plain export has 1685 (dpt) and 532 (pspnet).
    most = {"dpt": 500, "pspnet": 90, "upernet": 150}.get(graph.spec.model.arch)
    if most is not None:
        assert parsed_layers(trt, graph.path) <= most


def parsed_layers(trt: Any, path: Path) -> int:
    """Layers of the network TensorRT's parser makes of a file."""
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse(path.read_bytes())
    return int(network.num_layers)


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    return {value.name: value.type.tensor_type.elem_type for value in values}
