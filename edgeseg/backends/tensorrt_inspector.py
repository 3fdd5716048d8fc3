"""Proof of precision: what each layer of a built engine computes in, from TensorRT's engine inspector.

The inspector's JSON is TensorRT's own and changes: up to 10 a tensor has one ``Format/Datatype`` text, from 11 on the two are
fields of their own; with dynamic shapes formats are not known and the weights' type is what is left. A layer names the
ONNX nodes it was fused from in ``Metadata``, before that field existed in its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from edgeseg.artifacts import PrecisionReport
from edgeseg.backends.typed_graph import precision_report
from edgeseg.errors import BuildError
from edgeseg.spec import Precision

MIN_DELIVERED_SHARE = 0.9
"""Of the multiply-accumulates the graph's types put into a precision, the engine must run at least this share in it. A
layer or two in another type is TensorRT finding that faster (a first convolution of three channels often is)."""

_WORDS: tuple[tuple[str, str], ...] = (
    (r"bf16|bfloat16", "bf16"),
    (r"int8", "int8"),
    (r"fp8|float8", "fp8"),
    (r"fp16|half|float16", "fp16"),
    (r"fp32|float32|float", "fp32"),
    (r"int32", "int32"),
    (r"int64", "int64"),
    (r"bool", "bool"),
)
_TACTICS = ((r"i8i8|_i8_|int8|s8s8", "int8"), (r"f16f16|_f16_|h884|h1688|h16816|fp16|hgemm", "fp16"))


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a built engine.

    Attributes:
        name: TensorRT's, often of several fused layers.
        kind: TensorRT's layer type, such as ``CaskConvolution``.
        dtype: of its first input (what it multiplies in): ``int8``, ``fp16``, ``fp32``, ..., or ``unknown``.
        nodes: names of the ONNX nodes it was made from, as far as it tells.
    """

    name: str
    kind: str
    dtype: str
    nodes: tuple[str, ...]


def read_layers(information: str) -> list[EngineLayer]:
    """Read the inspector's JSON of a whole engine.

    Raises:
        BuildError: it is not JSON, or holds layer names only (built without detailed profiling verbosity).
    """
    try:
        layers = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError) as exc:
        raise BuildError(
            "TensorRT's engine inspector gave no list of layers; the precision is not proven, report the version"
        ) from exc
    if layers and not isinstance(layers[0], Mapping):
        raise BuildError(
            "the engine tells names of layers only, so its precision cannot be proven; "
            "build with profiling_verbosity=detailed"
        )
    return [_layer(layer) for layer in layers]


def _layer(layer: Mapping[str, Any]) -> EngineLayer:
    name = str(layer.get("Name", ""))
    marked = re.findall(r"\[ONNX Layer: ([^\]]*)\]", f"{layer.get('Metadata', '')} {name}")
    return EngineLayer(
        name=name,
        kind=str(layer.get("LayerType", "")),
        dtype=_layer_dtype(layer),
        nodes=tuple(dict.fromkeys(marked)) or tuple(part.strip() for part in name.split(" + ")),
    )


def _layer_dtype(layer: Mapping[str, Any]) -> str:
    inputs = layer.get("Inputs") or layer.get("Outputs") or []
    first = inputs[0] if inputs and isinstance(inputs[0], Mapping) else {}
    weights = layer.get("Weights")
    texts = (
        first.get("DataType") or first.get("Datatype") or first.get("Format/Datatype") or "",
        weights.get("Type", "") if isinstance(weights, Mapping) else "",
    )
    for text in texts:
        for pattern, dtype in _WORDS:
            if re.search(pattern, str(text), re.IGNORECASE):
                return dtype
    tactic = str(layer.get("TacticName", ""))
    return next((dtype for pattern, dtype in _TACTICS if re.search(pattern, tactic, re.IGNORECASE)), "unknown")


def executed_dtypes(layers: Collection[EngineLayer], nodes: Collection[str]) -> dict[str, str]:
    """By ONNX node: the dtype of the layer that holds it; nodes that no layer names are left out.

    A block TensorRT compiled as a whole is called ``{ForeignNode[first...last]}`` by versions that list no members: the
    nodes from ``first`` to ``last``, in the graph's order, are in it.
    """
    order = {name: index for index, name in enumerate(nodes)}
    found: dict[str, str] = {}
    for layer in layers:
        members = list(layer.nodes)
        block = re.search(r"\{?ForeignNode\[(.+?)\.\.\.(.+?)\]", layer.name)
        if block and block[1] in order and block[2] in order:
            members += list(nodes)[order[block[1]] : order[block[2]] + 1]
        for member in members:
            # A node may also stand in the name of a layer that only moves its result: the first is where it runs.
            if member in order:
                found.setdefault(member, layer.dtype)
    return found


def proven_precision(
    layers: Collection[EngineLayer], requested: Precision, macs: Mapping[str, int], nodes: Collection[str]
) -> PrecisionReport:
    """Shares of MACs by the nodes matched with layers, and shares of layers.

    Args:
        layers: of the built engine.
        requested: the precision asked for.
        macs: of one image, by ONNX node.
        nodes: names of all nodes of the graph, in order.
    """
    report = precision_report(requested, executed_dtypes(layers, nodes), macs)
    by_layer = precision_report(requested, {f"{i}": layer.dtype for i, layer in enumerate(layers)}, {})
    return PrecisionReport(
        requested, report.mac_share, by_layer.node_share, report.macs, float_layers=report.float_layers
    )


def require_delivered(report: PrecisionReport, expected: Mapping[str, float], version: str) -> None:
    """Raise :class:`BuildError` when the engine does not run in the precision its graph asks for.

    Args:
        report: what was built.
        expected: shares of MACs per dtype, by the graph's types (all of them, for implicit calibration).
        version: of TensorRT, for the message.
    """
    wanted, got = expected.get(report.requested, 0.0), report.mac_share.get(report.requested, 0.0)
    if report.requested == "fp32" or got >= MIN_DELIVERED_SHARE * wanted:
        return
    listed = "; ".join(f"{name} {why}" for name, why in list(report.float_layers.items())[:8])
    more = f"; and {len(report.float_layers) - 8} more" if len(report.float_layers) > 8 else ""
    raise BuildError(
        f"{report.requested} was asked for, but TensorRT {version} runs {got:.1%} of the multiply-accumulates in it, the "
        f"graph asks for {wanted:.1%}: {listed}{more}"
    )
