"""Graphs of dynamic batch and size: as few layers as the rewrites left, and for SM 75 the same function in other operators.

TensorRT-RTX really parses and builds them. Built, not run: a GPU is needed for that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

pytest.importorskip("torch", reason="the convert extra is not installed")
pytest.importorskip("segmentation_models_pytorch", reason="the convert extra is not installed")
trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

from export_models import smooth_images, smp_model  # noqa: E402
from recorded_tensorrt.graphs import SIDE as SMALL_SIDE  # noqa: E402
from recorded_tensorrt.graphs import small_model  # noqa: E402
from small_graphs import plain_session  # noqa: E402

from edgeseg.backends import get_backend  # noqa: E402
from edgeseg.backends.tensorrt.graph import ParsedGraph  # noqa: E402
from edgeseg.backends.tensorrt.module import TENSORRT_RTX  # noqa: E402
from edgeseg.backends.tensorrt.rtx import parse_network  # noqa: E402
from edgeseg.backends.tensorrt.turing import for_turing  # noqa: E402
from edgeseg.convert.export import export_onnx  # noqa: E402
from edgeseg.errors import BuildError  # noqa: E402
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, OutputSpec, PipelineSpec  # noqa: E402
from edgeseg.store.hashing import sha256_file  # noqa: E402
from edgeseg.store.manifest import OnnxGraph  # noqa: E402

pytestmark = pytest.mark.integration

SIDE = 64
SHAPES: dict[str, dict[str, Any]] = {
    "dynamic batch": {"batch": BatchRange(1, 2, 4)},
    "dynamic size": {"dynamic_size": True},
    "both": {"batch": BatchRange(1, 2, 4), "dynamic_size": True},
}
# Of weights as training leaves them. Those of an untrained ViT are zeros and ones: biases go away, and all norms share one
# pair of constants, which makes 155 layers less (dpt).
MOST_LAYERS: dict[tuple[str, str], int | None] = {
    ("dpt", "dynamic batch"): 655,
    ("dpt", "dynamic size"): 770,
    ("pspnet", "dynamic batch"): 90,
    ("pspnet", "dynamic size"): 170,
    ("upernet", "dynamic batch"): 150,
    ("upernet", "dynamic size"): 267,
    ("segformer", "dynamic size"): 85,
    ("manet", "both"): None,
}
WITH_PRODUCTS = ("dpt", "manet", "pspnet", "upernet")


# Static graphs are counted and built where they are quantized, test_export.py.
@pytest.fixture(scope="module", params=MOST_LAYERS, ids=lambda case: " ".join(case))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxGraph, str]:
    arch, shape = request.param
    encoder, args = ("tu-vit_tiny_patch16_224", {"dynamic_img_size": True}) if arch == "dpt" else ("resnet18", {})
    size, output = (SIDE, SIDE), OutputSpec("logits")
    loaded, spec = smp_model(arch, encoder, size=size, output=output, image=SHAPES[shape], **args)
    graph, _ = export_onnx(loaded, spec, tmp_path_factory.mktemp(arch) / "model.onnx")
    return graph, shape


def logits(model: onnx.ModelProto, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    return np.asarray(plain_session(model).run(["logits"], {"image": images})[0])


def layers(parsed: ParsedGraph) -> int:
    with TENSORRT_RTX.heard(trt) as library:
        return int(parse_network(library, library.made(trt.Builder), parsed).num_layers)


def test_layers_of_the_parsed_network(exported: tuple[OnnxGraph, str]) -> None:
    graph, shape = exported
    most = MOST_LAYERS[graph.spec.model.arch, shape]
    assert most is None or layers(ParsedGraph.read(graph, "fp32")) <= most


def test_the_graph_for_sm_75_computes_the_same(exported: tuple[OnnxGraph, str]) -> None:
    graph, shape = exported
    before = ParsedGraph.read(graph, "fp32")
    after = for_turing(before)
    if graph.spec.model.arch not in WITH_PRODUCTS:
        assert after is before
        return
    assert not {"MatMul", "Gemm"} & {node.op_type for node in after.model.graph.node}
    assert set(before.macs) <= set(after.nodes), "what multiplies keeps its name"
    count = 2 if shape in ("dynamic batch", "both") else 1
    height, width = (SIDE, SIDE + 32) if shape in ("dynamic size", "both") else (SIDE, SIDE)
    noise = np.random.default_rng(1).integers(0, 256, (count, height, width, 3)).astype(np.uint8)
    for images in (smooth_images(count, height, width), noise):
        expected = logits(before.model, images)
        assert np.abs(logits(after.model, images) - expected).max() <= 2e-5 * np.abs(expected).max()


def test_it_builds_for_sm_75(exported: tuple[OnnxGraph, str], tmp_path: Path) -> None:
    graph, _ = exported
    built = get_backend("tensorrt-rtx").build(graph, tmp_path, {"sm": "75"})
    assert built.path is not None and built.path.stat().st_size > 0
    assert built.precision.mac_share == {"fp32": 1.0}
    assert built.precision.float_layers == {}


def test_a_product_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    model = small_model()
    value = next(node.input[0] for node in model.graph.node if node.op_type == "ArgMax")
    del model.graph.node[-2:]  # the mask's
    einsum = onnx.helper.make_node(
        "Einsum", [value, value], ["logits"], "decoder.odd/Einsum", equation="bchw,bdhw->bcd"
    )
    model.graph.node.append(einsum)
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, (1, 4, 4)))
    path = tmp_path / "odd.onnx"
    onnx.save(model, str(path))
    spec = PipelineSpec(ModelSpec("unet", classes=4), InputSpec(SMALL_SIDE, SMALL_SIDE), output=OutputSpec("logits"))
    odd = OnnxGraph(path, sha256_file(path), "fp32", spec, "0" * 64)
    with pytest.raises(BuildError, match=r"at node decoder\.odd/Einsum .*; leave 75 out of sm"):
        get_backend("tensorrt-rtx").build(odd, tmp_path, {"sm": "75"})
