"""The portable graph as TensorRT's parser gets it, and what its node names say about messages and layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
from onnx import TensorProto

from edgeseg.backends.tensorrt.log import blamed_node
from edgeseg.errors import SpecError
from edgeseg.graph.modules import module_of
from edgeseg.graph.proto import copied
from edgeseg.graph.types import graph_macs, node_dtypes, precision_report
from edgeseg.spec import PipelineSpec, Precision
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import read_onnx


@dataclass(frozen=True)
class ParsedGraph:
    """A graph read once for a build.

    Attributes:
        path: of the file.
        model: its content, or what it was rewritten to for one target.
        spec: the contract.
        requested: the precision asked for.
        nodes: names of all nodes of ``model``, in order.
        macs: multiply-accumulates of one image, by node of the file.
        dtypes: what each node of the file is to compute in, by the graph's types.
        origins: by node of ``model`` that a rewrite made: the node of the file it is a part of.
        float32: nodes of ``model`` that must not be computed in half precision: the float32 islands of an FP16 graph among
            them, which TensorRT 8 would compute in half as well.
    """

    path: Path
    model: onnx.ModelProto
    spec: PipelineSpec
    requested: Precision
    nodes: tuple[str, ...]
    macs: Mapping[str, int]
    dtypes: Mapping[str, str]
    origins: Mapping[str, str] = field(default_factory=dict)
    float32: frozenset[str] = frozenset()

    @classmethod
    def read(cls, graph: OnnxGraph, requested: Precision) -> ParsedGraph:
        """Read and measure a graph. Raises ``ArtifactError``."""
        model = read_onnx(graph.path)
        nodes = tuple(node.name for node in model.graph.node)
        macs, dtypes = graph_macs(model, graph.spec.input), node_dtypes(model)
        # A Cast says its type itself, and of an image's 0..255 half precision loses nothing.
        computing = [n.name for n in model.graph.node if n.op_type != "Cast" and not n.name.startswith("preprocess/")]
        islands = frozenset(name for name in computing if requested == "fp16" and dtypes[name] == "fp32")
        return cls(graph.path, model, graph.spec, requested, nodes, macs, dtypes, float32=islands)

    @property
    def has_qdq(self) -> bool:
        return any(node.op_type == "QuantizeLinear" for node in self.model.graph.node)

    def require_fits(self, *, implicit: bool) -> None:
        """Raise ``SpecError`` when the graph is not the kind the build needs, or is written for another target."""
        if implicit and self.has_qdq:
            raise SpecError(
                f"{self.path.name} has Q/DQ nodes, implicit calibration needs the fp32 graph; build the folder with: "
                "edgeseg build ... --target tensorrt --backend-option implicit_calibration=true"
            )
        if not implicit and self.requested == "int8" and not self.has_qdq:
            raise SpecError(
                f"{self.path.name} has no Q/DQ nodes, so int8 needs --backend-option implicit_calibration=true"
            )
        zero_points = {n.input[2] for n in self.model.graph.node if n.op_type == "QuantizeLinear" and len(n.input) > 2}
        unsigned = {t.name for t in self.model.graph.initializer if t.data_type == TensorProto.UINT8} & zero_points
        if unsigned:
            raise SpecError(
                f"{self.path.name} is quantized for another target (unsigned activations), which TensorRT does not take; "
                "build it with: edgeseg build ... --target tensorrt"
            )

    @property
    def tensors(self) -> set[str]:
        """Names of all values of the graph."""
        graph = self.model.graph
        return {v.name for v in graph.input} | {name for node in graph.node for name in node.output}

    def expected_share(self, implicit: bool) -> Mapping[str, float]:
        """Shares of MACs per dtype that the graph asks for; with implicit calibration everything is to be int8."""
        if implicit:
            return {"int8": 1.0}
        return precision_report(self.requested, self.dtypes, self.macs).mac_share

    def for_parser(self, *, opset_17: bool, has_normalization: bool = True) -> ParsedGraph:
        """The graph with what TensorRT's parser cannot do written in another way.

        No version has 16-bit integers: masks of more than 256 classes leave the engine as int32, and uint16 images come as
        float32, which holds every value of theirs.

        Args:
            opset_17: for TensorRT 8, see :func:`~edgeseg.backends.tensorrt.opset17.for_tensorrt_8`.
            has_normalization: as there.

        Raises:
            BuildError: TensorRT 8 would read a node wrongly, and it cannot be written otherwise.
        """
        from edgeseg.backends.tensorrt.opset17 import for_tensorrt_8

        wide = [v.name for v in self.model.graph.output if v.type.tensor_type.elem_type == TensorProto.UINT16]
        image = self.model.graph.input[0]
        image_type = image.type.tensor_type.elem_type
        # What FP16 would round: 16 bits of a pixel, a float's 24.
        exact = {n.name for n in self.model.graph.node if n.name.startswith("preprocess/")}
        float32 = self.float32 if image_type == TensorProto.UINT8 else self.float32 | exact
        if not opset_17 and not wide and image_type != TensorProto.UINT16:
            return replace(self, float32=float32) if float32 != self.float32 else self
        model = copied(self.model)
        for node in model.graph.node:
            if node.op_type == "Cast" and node.output[0] in wide:
                next(a for a in node.attribute if a.name == "to").i = TensorProto.INT32
        for value in model.graph.output:
            if value.name in wide:
                value.type.tensor_type.elem_type = TensorProto.INT32
        if image_type == TensorProto.UINT16:
            model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT
        if not opset_17:
            return replace(self, model=model, float32=float32)
        rewritten = for_tensorrt_8(model, has_normalization=has_normalization)
        nodes = tuple(node.name for node in rewritten.model.graph.node)
        parts = {name for name, origin in rewritten.origins.items() if origin in float32}
        every = float32 | parts | rewritten.float32
        return replace(self, model=rewritten.model, nodes=nodes, origins=rewritten.origins, float32=every)

    def where(self, node: str) -> str:
        """``, at node encoder.conv1/Conv (module encoder.conv1 of the model)``, or ``""`` without a node.

        A node that a rewrite made is none of the user's: named is the one it was made of.
        """
        if not node:
            return ""
        node = self.origins.get(node, node)
        module = module_of(node)
        return f", at node {node}" + (f" (module {module} of the SMP model)" if module else "")

    def blame(self, text: str) -> str:
        """:meth:`where` of the node a message speaks of, if it names one."""
        return self.where(blamed_node(text, self.nodes) or "")
