"""Export of the twelve architectures: one contract, and an entry of a few lines for each.

Oracle: the module itself, called by hand on images normalized by numpy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

pytest.importorskip("torch", reason="the convert extra is not installed")
pytest.importorskip("segmentation_models_pytorch", reason="the convert extra is not installed")

import onnx_ir as ir
import onnxruntime
from export_models import by_hand, smooth_images, smp_model
from numpy.typing import NDArray
from small_graphs import plain_logits

from edgeseg.convert import export as export_module
from edgeseg.convert.export import ConversionReport, export_onnx
from edgeseg.convert.load import LoadedModel
from edgeseg.convert.rewrites import REWRITES
from edgeseg.convert.simplify import infer_shapes, run_onnxsim
from edgeseg.spec import ARCHITECTURES, PipelineSpec
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import read_onnx

pytestmark = pytest.mark.integration


@dataclass(frozen=True)
class Exported:
    """An export, and the graph as torch made it."""

    loaded: LoadedModel
    spec: PipelineSpec
    raw: Any
    graph: OnnxGraph
    report: ConversionReport

    @property
    def model(self) -> Any:
        return read_onnx(self.graph.path)


def outputs(model: Any, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {"image": images}), strict=True))


def shape_of(value: Any) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.fixture(scope="class")
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The export of the class's architecture, made once."""
    contract = request.cls
    loaded, spec = smp_model(contract.arch, contract.encoder, size=contract.size, **contract.args)
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
    modules: ClassVar[set[str]] = {"encoder", "decoder", "segmentation_head", "preprocess", "postprocess"}

    def test_the_mask_is_pytorchs(self, exported: Exported) -> None:
        images = smooth_images(2, *self.size)
        for image in images:
            logits = by_hand(exported.loaded, image[None]).numpy()
            mask = outputs(exported.model, image[None])["mask"]
            assert mask.dtype == np.uint8
            assert mask.shape == (1, *self.size)
            top = np.partition(logits, -2, axis=1)
            tied = top[:, -1] - top[:, -2] < 1e-3 * np.abs(logits).max()
            assert len(np.unique(mask)) > 1, "a model that sees one class everywhere proves nothing"
            assert tied.mean() < 0.05
            assert ((mask == logits.argmax(1)) | tied).all()

    def test_the_file_keeps_the_contract(self, exported: Exported) -> None:
        model = exported.model
        assert [(v.name, shape_of(v)) for v in model.graph.input] == [("image", [1, *self.size, 3])]
        assert [(v.name, shape_of(v)) for v in model.graph.output] == [("mask", [1, *self.size])]
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
        assert all(
            o.startswith(n.name) or o == "mask" for n in exported.model.graph.node for o in n.output if o != "logits"
        )

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


class TestDPT(ExportContract):
    arch = "dpt"
    encoder = "tu-vit_tiny_patch16_224"
    args: ClassVar[dict[str, Any]] = {"dynamic_img_size": True}
    rewrites: ClassVar[set[str]] = {"slices", "qkv", "attention_scale", "readout", "tokens", "layout", "conv_resize"}


def test_every_architecture_has_an_entry() -> None:
    assert {c.arch for c in ExportContract.__subclasses__()} == set(ARCHITECTURES)
