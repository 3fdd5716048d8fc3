"""Proof of precision: what each layer of a built engine computes in, from TensorRT's engine inspector.

The inspector's JSON is TensorRT's own and changes. A tensor has one ``Format/Datatype`` text up to 10: ``Row major linear
FP16 format``, or ``Half`` in what the Myelin compiler made; 11 has ``DataType`` beside ``Format``. With dynamic shapes it is
``N/A due to dynamic shapes`` up to 10. A layer names the ONNX nodes it was fused from in ``Metadata`` from 8.6 on, separated by
the control characters 1E and 1F; before that in its own name.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeseg.errors import BuildError
from edgeseg.graph.types import precision_report, shares
from edgeseg.spec import Precision
from edgeseg.store.manifest import PrecisionReport

MIN_DELIVERED_SHARE = 0.9
"""Of the multiply-accumulates the graph's types put into a precision, the engine must run at least this share in it. A
layer or two in another type is TensorRT finding that faster (a first convolution of three channels often is)."""

_WORDS: tuple[tuple[str, str], ...] = (
    (r"bf16|bfloat16", "bf16"),
    (r"uint8", "uint8"),
    (r"int8", "int8"),
    (r"fp8|float8", "fp8"),
    (r"fp16|half|float16", "fp16"),
    (r"fp32|float32|float", "fp32"),
    (r"int32", "int32"),
    (r"int64", "int64"),
    (r"bool", "bool"),
)
# What a kernel multiplies in is the first thing in the type part of its name:
# sm80_xmma_fprop_implicit_gemm_interleaved_i8f16_i8i32_f32_..., ampere_fp32_icudnn_int8x4_..., ..._f32f32_tf32f32_f32_...
_TACTICS: tuple[tuple[str, str], ...] = (
    (r"(?<![a-z0-9])i8(i8|i32|f16|f32)(?![a-z0-9])|int8|s8s8", "int8"),
    (r"(?<![a-z0-9])e4m3", "fp8"),
    (r"bf16bf16", "bf16"),
    (r"(?<![a-z0-9])f16f(16|32)(?![a-z0-9])|_f16_|h884|h1688|h16816|fp16|hgemm", "fp16"),
    (r"(?<![a-z0-9])f32f32(?![a-z0-9])|tf32|sgemm|scudnn|fp32", "fp32"),
)
_WIDTH = {"fp64": 64, "fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8}
# Layers that multiply, among those that carry a node's name: Myelin also names the node in what moves its data.
_MULTIPLYING_KINDS = re.compile(r"conv|gemm|matmul|matrix|fullyconnected|foreignnode|myelin|dla", re.IGNORECASE)
_MULTIPLYING_NAMES = re.compile(r"_gemm|\{?ForeignNode\[|.*_mha_")
_MOVES = re.compile(r"reformat|noop|copy|constant|shuffle|signal|wait|__myl_move", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLayer:
    """One layer of a built engine.

    Attributes:
        name: TensorRT's, often of several fused layers.
        kind: TensorRT's layer type, such as ``CaskConvolution``.
        dtype: what it computes in: ``int8``, ``fp16``, ``fp32``, ..., or ``unknown``. Of a layer that multiplies, by its
            kernel's name or else the wider one of its first input and its weights; of others, their first input's.
        nodes: names of the ONNX nodes it was made from, as far as it tells.
    """

    name: str
    kind: str
    dtype: str
    nodes: tuple[str, ...]

    @property
    def moves(self) -> bool:
        """Whether it only moves or reformats data."""
        return bool(_MOVES.search(self.kind) or _MOVES.match(self.name))


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
    data = _word(first.get("DataType") or first.get("Datatype") or first.get("Format/Datatype"))
    multiplied = _word(weights.get("Type")) if isinstance(weights, Mapping) else "unknown"
    tactic = str(layer.get("TacticName", ""))
    kernel = next((dtype for pattern, dtype in _TACTICS if re.search(pattern, tactic, re.IGNORECASE)), "unknown")
    if multiplied == "unknown" and not _multiplies(str(layer.get("LayerType", "")), str(layer.get("Name", ""))):
        return data if data != "unknown" else kernel
    if kernel != "unknown":
        return kernel
    # int8 in and float weights, or the other way round, is float work: the integers are converted on the way.
    known = [dtype for dtype in (multiplied, data) if dtype != "unknown"]
    return max(known, key=lambda dtype: _WIDTH.get(dtype, 0)) if known else "unknown"


def _multiplies(kind: str, name: str) -> bool:
    return bool(_MULTIPLYING_KINDS.search(kind) or _MULTIPLYING_NAMES.match(name))


def _word(text: object) -> str:
    """``int8`` of ``Thirty-two wide channel vectorized row major Int8 format``."""
    return next((dtype for pattern, dtype in _WORDS if re.search(pattern, str(text or ""), re.IGNORECASE)), "unknown")


def executed_dtypes(layers: Collection[EngineLayer], nodes: Collection[str]) -> dict[str, str]:
    """By ONNX node: the dtype of the layer that holds it; nodes that no layer names are left out.

    A block TensorRT compiled as a whole is called ``{ForeignNode[first...last]}`` by versions that list no members: the
    nodes from ``first`` to ``last``, in the graph's order, are in it.
    """
    order = {name: index for index, name in enumerate(nodes)}
    holders: dict[str, list[EngineLayer]] = {}
    for layer in layers:
        members = list(layer.nodes)
        block = re.search(r"\{?ForeignNode\[(.+?)\.\.\.(.+?)\]", layer.name)
        if block and block[1] in order and block[2] in order:
            members += list(nodes)[order[block[1]] : order[block[2]] + 1]
        for member in dict.fromkeys(members):
            if member in order:
                holders.setdefault(member, []).append(layer)
    return {name: _ran_in(named) for name, named in holders.items()}


def _ran_in(layers: list[EngineLayer]) -> str:
    """The dtype a node ran in, of the layers that name it: of those that multiply, else that do more than move data."""
    multiply = [layer for layer in layers if _multiplies(layer.kind, layer.name) and not layer.moves]
    chosen = multiply or [layer for layer in layers if not layer.moves] or layers
    # Two that do not agree: the proof is of the less favourable one.
    return max((layer.dtype for layer in chosen), key=lambda dtype: _WIDTH.get(dtype, 99 if dtype == "unknown" else 0))


def time_share(layers: Collection[EngineLayer], times: Collection[tuple[str, float]]) -> dict[str, float] | None:
    """Share of the engine's time in layers of each dtype.

    Args:
        layers: of the engine.
        times: (layer name, milliseconds) as ``IProfiler`` reports them, over any number of runs.

    Returns:
        by dtype, in alphabetical order; ``unknown`` is the time of names the inspector does not have, or has twice with
        different dtypes. ``None`` when nothing was reported or no time passed.
    """
    dtypes: dict[str, set[str]] = {}
    for layer in layers:
        dtypes.setdefault(layer.name, set()).add(layer.dtype)
    spent: defaultdict[str, float] = defaultdict(float)
    for name, ms in times:
        told = dtypes.get(name, set())
        spent[next(iter(told)) if len(told) == 1 else "unknown"] += ms
    return shares(spent) or None


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
    return replace(report, node_share=shares(Counter(layer.dtype for layer in layers)), evidence="inspected")


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
    unknown = report.mac_share.get("unknown", 0.0)
    hint = (
        "; if the layers' names are new to edgeseg, prove_precision=false builds it unproven" if unknown > 0.1 else ""
    )
    raise BuildError(
        f"{report.requested} was asked for, but TensorRT {version} runs {got:.1%} of the multiply-accumulates in it, the "
        f"graph asks for {wanted:.1%}: {listed}{more}{hint}"
    )
