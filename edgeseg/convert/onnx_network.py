"""An ONNX file as a module: run by ONNX Runtime as it is written, and put into the graph that is exported.

To the stages after loading it is a module like any other, its Q/DQ pairs the fake-quantizers of one.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import version_converter
from onnx_ir.passes.common import ShapeInferencePass
from torch import Tensor, nn

from edgeseg.convert.fake_quantizers import DOMAIN, MARK, Mode
from edgeseg.convert.naming import name_by_scope
from edgeseg.convert.onnx_pairs import take_pairs
from edgeseg.convert.onnx_reading import OPSET, read_source
from edgeseg.errors import ArtifactError, BuildError, EdgesegError, SpecError, first_line
from edgeseg.graph.editing import given, replace
from edgeseg.graph.running import GraphSession

_CALL = "OnnxFile"


class OnnxNetwork(nn.Module):
    """Runs an ONNX file: float32 ``(N, C, H, W)`` -> its output.

    Attributes:
        stem: of the file's name, which stands for the encoder's.
        image_shape: ``(N, C, H, W)`` of the image it takes; ``None`` for what it leaves open.
        quantizers: its Q/DQ pairs; their mode says in which form it runs.
        optimized: let ONNX Runtime do what it does by default, to be timed.

    Raises:
        ArtifactError, SpecError: see :func:`~edgeseg.convert.onnx_reading.read_source`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.stem = path.stem
        self.graphs = _Graphs(path)
        self.image_shape = self.graphs.source.shape
        self.quantizers = nn.ModuleList(self.graphs.pairs)
        self.optimized = False

    @property
    def end(self) -> _Step:
        """The node that makes the output, and those before it."""
        return _Step(ir.serde.deserialize_model(self.graphs.source.model).graph.outputs[0].producer())

    @property
    def _mode(self) -> Mode:
        parts: Any = self.quantizers
        return next((part.mode for part in parts), "on")

    def forward(self, image: Tensor) -> Tensor:
        """Run a batch, or stand for the file's nodes in a graph that is exported."""
        if torch.compiler.is_exporting():
            batch, _, height, width = image.shape
            shape = (batch, self.graphs.classes or 0, height, width)
            call: Tensor = torch.onnx.ops.symbolic(
                f"{DOMAIN}::{_CALL}", (image,), dtype=image.dtype, shape=shape, version=1
            )
            return call
        if image.dtype != torch.float32:
            raise RuntimeError(f"an ONNX file takes float32, got {image.dtype}")
        return torch.from_numpy(self.graphs.run(self._mode, self.optimized, image.cpu().numpy())).to(image.device)

    def as_timed(self) -> OnnxNetwork:
        """The same file as ONNX Runtime runs it by default."""
        twin = copy.copy(self)
        twin.optimized = True
        return twin

    def inline(self, exported: ir.Model) -> None:
        """Put the file's nodes in the place of its call in ``exported``; in mode ``marked``, with the marks of its pairs.

        Raises:
            SpecError: its opset cannot be converted.
        """
        graph = exported.graph
        call = next(node for node in graph if node.domain == DOMAIN and node.op_type == _CALL)
        image = given(call)
        inner = ir.serde.deserialize_model(self.graphs.in_own_opset()).graph
        taken = {value.name for value in _values(graph)}
        values = {str(value.name): value for value in _values(inner)}
        for value in values.values():
            if not value.is_initializer():
                value.shape = None  # the file's names of sizes are not those of the engine
            if value.name in taken:
                value.name = f"{value.name}_of_file"
        before, after = inner.inputs[0], inner.outputs[0]
        nodes, weights = list(inner), list(inner.initializers.values())
        inner.inputs.clear()
        inner.outputs.clear()
        inner.initializers.clear()
        inner.remove(nodes)
        for value in weights:
            graph.register_initializer(value)
        graph.insert_before(call, nodes)
        before.replace_all_uses_with(image)
        for name, pair in self.graphs.marks if self._mode == "marked" else ():
            if pair.grid is not None:
                source = image if values[name] is before else values[name]
                graph.insert_before(call, ir.node(MARK, [source], dataclasses.asdict(pair.grid), domain=DOMAIN))
        after.dtype = ir.DataType.FLOAT
        replace(call.outputs[0], after)
        graph.remove(call, safe=True)
        ShapeInferencePass()(exported)


@dataclass(frozen=True)
class _Step:
    """A node as autograd shows one: its name, and those before it."""

    node: ir.Node | None

    def name(self) -> str:
        return "" if self.node is None else self.node.op_type

    @property
    def next_functions(self) -> list[tuple[_Step, int]]:
        inputs = [] if self.node is None else self.node.inputs
        return [(_Step(value.producer()), 0) for value in inputs if value is not None and not value.is_initializer()]


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]


class _Graphs:
    """The file's graph in the forms it is run and converted in; copies of the network share it.

    Attributes:
        source: as written.
        float_model: without its pairs, weights as these round them.
        pairs: taken out of it.
        marks: values of the float graph, and the pair that rounds each.
        classes: of its output, once it has run.
    """

    def __init__(self, path: Path) -> None:
        self.classes: int | None = None
        self._sessions: dict[tuple[bool, bool], GraphSession] = {}
        try:
            self.source = read_source(path)
            model = ir.serde.deserialize_model(self.source.model)
            self.pairs, self.marks = take_pairs(model, path.name)
            name_by_scope(model)
            self.float_model = ir.serde.serialize_model(model)
        except EdgesegError:
            raise
        except Exception as exc:  # onnx, onnx_ir and ONNX Runtime raise what they like of a damaged graph
            raise ArtifactError(f"{path} cannot be read: {first_line(exc)}; export it again") from exc

    def __deepcopy__(self, memo: object) -> _Graphs:
        return self

    def run(self, mode: Mode, optimized: bool, image: NDArray[np.float32]) -> NDArray[Any]:
        """The output for a batch. Raises :class:`BuildError`."""
        model = self.source.model if mode == "on" else self.float_model
        key = mode == "on", optimized
        if key not in self._sessions:
            self._sessions[key] = GraphSession(model, self.source.name, BuildError, optimized=optimized)
        (result,) = self._sessions[key].run(image).values()
        self.classes = result.shape[1] if result.ndim == 4 else None
        return result

    def in_own_opset(self) -> onnx.ModelProto:
        """The float graph in the opset of those that are made. Raises :class:`SpecError`."""
        model = self.float_model
        opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        if opset == OPSET:
            return model
        try:
            return version_converter.convert_version(model, OPSET)
        except Exception as exc:  # RuntimeError, and what its adapters raise
            raise SpecError(
                f"{self.source.name} has opset {opset}, which ONNX cannot convert ({first_line(exc)}); export it with "
                f"opset_version={OPSET}"
            ) from exc
