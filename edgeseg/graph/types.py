"""What an ONNX graph's own types ask for: the dtype every multiplying node is to compute in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx

from edgeseg.graph.macs import count_macs
from edgeseg.graph.proto import maker_behind_moves, makers, value_infos
from edgeseg.spec import InputSpec, Precision
from edgeseg.store.manifest import PrecisionReport
from edgeseg.store.onnx_file import read_onnx

FLOATS: Mapping[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
    onnx.TensorProto.DOUBLE: "fp64",
}


def graph_macs(model: onnx.ModelProto, spec: InputSpec) -> dict[str, int]:
    """Multiply-accumulates of one image, by node name."""
    batch = 1 if spec.batch.is_dynamic else spec.batch.minimum
    sizes = {"height": spec.height, "width": spec.width}
    return {name: macs // batch for name, macs in count_macs(model, sizes).items()}


def node_dtypes(model: onnx.ModelProto) -> dict[str, str]:
    """By node name: ``int8`` for a node whose operands are all dequantized, else the float type of its data."""
    made_by = makers(model.graph)
    types = {t.name: t.data_type for t in model.graph.initializer}
    types.update({name: value.type.tensor_type.elem_type for name, value in value_infos(model).items()})
    constants = {t.name for t in model.graph.initializer}
    dtypes = {}
    for node in model.graph.node:
        operands = [made_by.get(name) for name in node.input[:2]]
        if any(pair is not None and constants.intersection(pair.input[:1]) for pair in operands[1:]):
            # Integers of a layer with weights are moved as integers; of a product of two activations that is not sure.
            operands[0] = maker_behind_moves(made_by, node.input[0])
        if operands and all(maker is not None and maker.op_type == "DequantizeLinear" for maker in operands):
            dtypes[node.name] = "int8"
        else:
            known = [types[name] for name in (*node.output[:1], *node.input[:1]) if name in types]
            dtypes[node.name] = next((FLOATS[kind] for kind in known if kind in FLOATS), "other")
    return dtypes


def shares(totals: Mapping[str, float]) -> dict[str, float]:
    """Each one's part of the sum, in alphabetical order; empty when that is 0."""
    total = sum(totals.values())
    return {name: value / total for name, value in sorted(totals.items())} if total else {}


def precision_report(requested: Precision, dtypes: Mapping[str, str], macs: Mapping[str, int]) -> PrecisionReport:
    """Shares per dtype, by types: nothing was run.

    Args:
        requested: the precision asked for.
        dtypes: by node or layer name; a node with MACs that is not in it counts as ``unknown``.
        macs: by node name, of one image.
    """
    totals: Counter[str] = Counter()
    float_layers = {}
    for name, count in macs.items():
        dtype = dtypes.get(name, "unknown")
        totals[dtype] += count
        if dtype != requested:
            float_layers[name] = f"runs in {dtype}" if dtype != "unknown" else "not found among the engine's layers"
    return PrecisionReport(
        requested=requested,
        mac_share=shares(totals),
        node_share=shares(Counter(dtypes.values())),
        macs=sum(totals.values()),
        float_layers=float_layers,
        evidence="typed",
    )


def typed_precision(path: Path, requested: Precision, spec: InputSpec) -> PrecisionReport:
    """The report of a graph no engine was built from yet: what its types ask for. Raises ``ArtifactError``."""
    model = read_onnx(path)
    return precision_report(requested, node_dtypes(model), graph_macs(model, spec))
