"""The twelve architectures, exported and quantized: one contract, and an entry of a few lines for each.

Oracle: the module itself, called by hand on images normalized by numpy; of typed graphs, the fp32 graph.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("torch", reason="the convert extra is not installed")
pytest.importorskip("segmentation_models_pytorch", reason="the convert extra is not installed")

import onnx
import onnx_ir as ir
import onnxruntime as ort
from export_models import by_hand, smooth_images, smp_model
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from recorded_tensorrt.parser8 import complaints
from small_graphs import plain_logits, signal_to_noise_db

from edgeseg.backends import get_backend
from edgeseg.backends.tensorrt.opset17 import for_tensorrt_8
from edgeseg.convert import export as export_module
from edgeseg.convert.export import ConversionReport, export_onnx
from edgeseg.convert.loaded import LoadedModel
from edgeseg.convert.rewrites import REWRITES
from edgeseg.convert.simplify import infer_shapes, run_onnxsim
from edgeseg.demo import sample_folder
from edgeseg.graph.types import typed_precision
from edgeseg.mixed.sensitivity import NetworkModules
from edgeseg.quantize.calibration import calibrate
from edgeseg.quantize.fp16 import write_fp16
from edgeseg.quantize.lint import lint
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.quantize.table import CalibrationTable
from edgeseg.spec import ARCHITECTURES, OutputSpec, PipelineSpec
from edgeseg.store.manifest import MIN_INT8_SHARE, OnnxGraph
from edgeseg.store.onnx_file import read_onnx

pytestmark = pytest.mark.integration


@dataclass(frozen=True, eq=False)
class Exported:
    """An export, and the graph as torch made it; its table, images to quantize with, and its typed graphs, written once."""

    loaded: LoadedModel
    spec: PipelineSpec
    raw: Any
    graph: OnnxGraph
    report: ConversionReport

    @property
    def model(self) -> Any:
        return read_onnx(self.graph.path)

    @cached_property
    def images(self) -> list[NDArray[np.uint8]]:
        size = (self.spec.input.width, self.spec.input.height)
        paths = sorted((sample_folder() / "calib" / "images").iterdir())[:8]
        return [np.asarray(Image.open(path).convert("RGB").resize(size)) for path in paths]

    @cached_property
    def table(self) -> CalibrationTable:
        return calibrate(self.graph, CalibrationSet.open(self.images))

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        return logits(self.graph.path, self.images)

    @cached_property
    def fp16(self) -> OnnxGraph:
        return write_fp16(self.graph, self.table, self.graph.path.with_name("fp16.onnx"))

    @cache  # noqa: B019  it goes with the class's fixture
    def int8(self, scheme: str) -> OnnxGraph:
        return write_qdq(self.graph, self.table, SCHEMES[scheme], self.graph.path.with_name(f"{scheme}.onnx"))


def logits(path: Path, images: list[NDArray[np.uint8]]) -> NDArray[np.float32]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"image": image[None]})[0] for image in images])


def shape_of(value: Any) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.fixture(scope="class")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The export of the class's architecture, made once."""
    contract = request.cls
    loaded, spec = smp_model(
        contract.arch, contract.encoder, size=contract.size, output=OutputSpec("logits"), **contract.args
    )
    raw: list[Any] = []
    original = export_module.export_graph

    def recording(*args: Any) -> Any:
        raw.append(original(*args))
        return raw[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "export_graph", recording)
        graph, report = export_onnx(loaded, spec, tmp_path_factory.mktemp(contract.arch) / "graph.onnx")
    return Exported(loaded, spec, raw[0], graph, report)


class ExportContract:
    """What holds for every architecture. Subclasses say which one, and what its rewrites are expected to do."""

    arch: ClassVar[str]
    encoder: ClassVar[str] = "resnet18"
    size: ClassVar[tuple[int, int]] = (64, 96)
    args: ClassVar[dict[str, Any]] = {}
    rewrites: ClassVar[set[str]] = set()
    """Rewrites that must apply."""
    modules: ClassVar[set[str]] = {"encoder", "decoder", "segmentation_head", "preprocess"}

    def test_the_logits_are_pytorchs(self, exported: Exported) -> None:
        images = smooth_images(2, *self.size)
        expected = np.concatenate([by_hand(exported.loaded, image[None]).numpy() for image in images])
        assert len(np.unique(expected.argmax(1))) > 1, "a model that sees one class everywhere proves nothing"
        np.testing.assert_allclose(
            logits(exported.graph.path, list(images)), expected, atol=1e-3 * float(np.abs(expected).max())
        )

    def test_the_file_keeps_the_contract(self, exported: Exported) -> None:
        model = exported.model
        assert [(v.name, shape_of(v)) for v in model.graph.input] == [("image", [1, *self.size, 3])]
        assert [(v.name, shape_of(v)) for v in model.graph.output] == [("logits", [1, 5, *self.size])]
        assert {o.domain for o in model.opset_import} == {""}
        assert not model.functions
        assert not model.metadata_props
        assert not any(n.metadata_props or n.doc_string for n in model.graph.node)
        assert exported.graph.sha256 == hashlib.sha256(exported.graph.path.read_bytes()).hexdigest()

    def test_nodes_are_called_after_modules(self, exported: Exported) -> None:
        names = [n.name for n in exported.model.graph.node]
        assert len(set(names)) == len(names)
        assert {name.split(".")[0].split("/")[0] for name in names} == self.modules
        paths = {path for path, _ in exported.loaded.module.named_modules()}
        known = sum(name.rpartition("/")[0] in paths for name in names)
        assert known >= 0.9 * (len(names) - 8)
        assert all(o.startswith(n.name) for n in exported.model.graph.node for o in n.output if o != "logits")

    def test_each_rewrite_keeps_the_logits(self, exported: Exported) -> None:
        model = ir.serde.deserialize_model(infer_shapes(run_onnxsim(exported.raw)))
        noise = np.random.default_rng(1).integers(0, 256, (1, *self.size, 3), dtype=np.uint8)
        images = np.concatenate([smooth_images(1, *self.size), noise])

        applied, before = {}, plain_logits(ir.serde.serialize_model(model), images)
        for rewrite in REWRITES:
            if count := rewrite.apply(model):
                applied[rewrite.name] = count
                logits = plain_logits(ir.serde.serialize_model(model), images)
                assert np.abs(logits - before).max() <= 2e-5 * max(1.0, np.abs(before).max()), rewrite.name
                before = logits
        assert self.rewrites <= set(applied)
        assert applied == exported.report.rewrites

    def test_the_report_counts(self, exported: Exported) -> None:
        report = exported.report
        assert report.nodes == len(exported.model.graph.node)
        assert report.nodes_exported == len(exported.raw.graph.node)
        assert 0 < report.macs <= report.macs_exported
        assert report.mask_agreement == 1.0
        assert 0 < report.max_abs_error < 1e-2

    @pytest.mark.parametrize("scheme", ["onnxruntime-vnni", "tensorrt"])
    def test_quantized_graph_follows_its_scheme_and_the_fp32_graph(self, exported: Exported, scheme: str) -> None:
        quantized = exported.int8(scheme)
        model = onnx.load(str(quantized.path))
        assert lint(model, SCHEMES[scheme]) == []
        operators = {node.op_type for node in model.graph.node}
        assert {"QuantizeLinear", "DequantizeLinear"} <= operators
        # 8-bit rounding of every activation leaves random networks 15 to 40 dB; a wrong scale or axis leaves less than 5.
        assert signal_to_noise_db(exported.logits, logits(quantized.path, exported.images)) > 10

    def test_tensorrt_8_takes_every_precision_and_computes_the_same(self, exported: Exported) -> None:
        """Nothing its parser's source refuses is left, and ONNX Runtime gets the same logits, of int8 from the same integers."""
        typed = {"fp32": exported.graph, "fp16": exported.fp16, "int8": exported.int8("tensorrt")}
        for precision, one in typed.items():
            given = onnx.load(str(one.path))
            made = for_tensorrt_8(given)
            onnx.checker.check_model(made.model, full_check=True)
            assert list(complaints(made.model, "8.5")) == []
            assert list(complaints(for_tensorrt_8(given, has_normalization=True).model, "8.6")) == []
            before, after = (plain_logits(model, exported.images[:1]) for model in (given, made.model))
            if precision == "int8":
                assert weights_of(made.model) == weights_of(given)
            if not set(made.origins) & {f"{node}/variance" for node in made.origins.values()}:
                np.testing.assert_array_equal(after, before)
            else:  # a mean has another order of sums, which a Q behind it may round to another integer
                assert signal_to_noise_db(before, after) > {"fp32": 90, "fp16": 45, "int8": 30}[precision]

    def test_half_of_the_modules_in_float(self, exported: Exported, tmp_path: Path) -> None:
        """A seeded choice in three schemes; the linter raises, and TensorRT-RTX runs what stays float in FP16."""
        graph, images = exported.graph, exported.images
        names = NetworkModules.of(graph).modules.names
        floats = random.Random(graph.spec.model.arch).sample(names, len(names) // 2)
        for scheme in ("onnxruntime-vnni", "openvino", "tensorrt"):
            quantized = write_qdq(graph, exported.table, SCHEMES[scheme], tmp_path / f"{scheme}.onnx", floats)
            assert signal_to_noise_db(exported.logits, logits(quantized.path, images)) > 10
            shares = typed_precision(quantized.path, "int8", graph.spec.input).mac_share
            assert set(shares) <= {"int8", "fp32", "fp16"} and shares["int8"] > 0
            assert shares.get("fp16", 0.0) > 0 if scheme == "tensorrt" else shares["fp32"] > 0
        if importlib.util.find_spec("tensorrt_rtx") is not None:
            built = get_backend("tensorrt-rtx").build(quantized, tmp_path, {"sm": "86"})
            assert built.precision.mac_share["int8"] == pytest.approx(shares["int8"], abs=0.05)
            assert built.precision.mac_share["fp16"] == pytest.approx(shares["fp16"], abs=0.05)

    def test_engine_runs_in_int8(self, exported: Exported, tmp_path: Path) -> None:
        backend = get_backend("onnxruntime")
        built = backend.build(exported.int8(backend.scheme), tmp_path, {})
        assert built.path.is_file()
        # Attention multiplies activations with each other, in float.
        assert built.precision.mac_share.get("int8", 0.0) >= 0.97, built.precision.float_layers

    def test_fp16_graph_is_typed_and_close(self, exported: Exported) -> None:
        half = exported.fp16
        model = onnx.load(str(half.path))
        types = element_types(model)
        convolutions = [n for n in model.graph.node if n.op_type in {"Conv", "MatMul", "Gemm"}]
        assert all(types[n.output[0]] == onnx.TensorProto.FLOAT16 for n in convolutions)
        assert types["logits"] == onnx.TensorProto.FLOAT
        assert signal_to_noise_db(exported.logits, logits(half.path, exported.images)) > 35

    def test_typed_graphs_build_in_tensorrt_rtx(self, exported: Exported, tmp_path: Path) -> None:
        """Built, not run: a GPU is needed for that. SM 75 has an engine of its own: it may need another graph."""
        trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
        graph = exported.graph
        int8 = exported.int8("tensorrt")
        for one, sm in ((graph, "75"), (exported.fp16, "75"), (int8, "75"), (int8, "86")):
            built = get_backend("tensorrt-rtx").build(one, tmp_path, {"sm": sm})
            assert built.path is not None and built.path.stat().st_size > 0
            share = built.precision.mac_share.get(one.precision, 0.0)
            assert share >= (MIN_INT8_SHARE if one.precision == "int8" else 0.95), built.precision.float_layers
        # As few layers as the rewrites left; a plain export has 1685 (dpt) and 532 (pspnet).
        most = {"dpt": 650, "pspnet": 90, "upernet": 150}.get(graph.spec.model.arch)
        if most is not None:
            assert parsed_layers(trt, graph.path) <= most


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


class TestUnet(ExportContract):
    arch = "unet"


class TestUnetPlusPlus(ExportContract):
    arch = "unetplusplus"


class TestManet(ExportContract):
    arch = "manet"


class TestLinknet(ExportContract):
    arch = "linknet"


class TestFPN(ExportContract):
    arch = "fpn"
    rewrites: ClassVar[set[str]] = {"stacked_sum"}


class TestPSPNet(ExportContract):
    arch = "pspnet"


class TestDeepLabV3(ExportContract):
    arch = "deeplabv3"
    rewrites: ClassVar[set[str]] = {"conv_concat", "resize_scales"}


class TestDeepLabV3Plus(ExportContract):
    arch = "deeplabv3plus"
    rewrites: ClassVar[set[str]] = {"conv_concat"}


class TestPAN(ExportContract):
    arch = "pan"
    size = (128, 128)


class TestUPerNet(ExportContract):
    arch = "upernet"


class TestSegformer(ExportContract):
    arch = "segformer"
    rewrites: ClassVar[set[str]] = {"linear_conv", "conv_resize", "conv_concat", "compose_conv"}


class TestMixTransformer(ExportContract):
    """The encoder Segformer was made with: attention, and a decoder behind tokens."""

    arch = "segformer"
    encoder = "mit_b0"
    rewrites: ClassVar[set[str]] = {"tokens", "reshape_twice", "layout", "conv_concat"}


class TestDPT(ExportContract):
    arch = "dpt"
    encoder = "tu-vit_tiny_patch16_224"
    args: ClassVar[dict[str, Any]] = {"dynamic_img_size": True}
    rewrites: ClassVar[set[str]] = {"slices", "qkv", "attention_scale", "readout", "tokens", "layout", "conv_resize"}


def test_every_architecture_has_an_entry() -> None:
    assert {c.arch for c in ExportContract.__subclasses__()} == set(ARCHITECTURES)
