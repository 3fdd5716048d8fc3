"""Exported graph -> the portable graph: onnxsim, then the segmentation-aware rewrites, then final names."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import onnxsim
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, DeduplicateInitializersPass

from edgeseg.convert.naming import adopt_names, normalize
from edgeseg.convert.rewrites import REWRITES
from edgeseg.errors import ExportError, first_line
from edgeseg.graph.editing import tidy
from edgeseg.graph.proto import copied
from edgeseg.silence import silenced

_COMPOSED = frozenset({"compose_concat", "compose_conv", "subpixel"})
"""Rewrites that make one weight of several: what each was rounded to in training would be lost."""


def simplify(model: onnx.ModelProto, *, keeps_weights: bool = False) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Simplify and rewrite ``model``; with ``keeps_weights`` every layer's weight stays its own.

    Returns:
        the new model, shapes inferred and names final; and how many times each rewrite applied, those at 0 left out.

    Raises:
        ExportError: onnxsim failed, or a rewrite comes to no end.
    """
    rewritable = ir.serde.deserialize_model(infer_shapes(run_onnxsim(model)))
    rewrites = [rewrite for rewrite in REWRITES if not (keeps_weights and rewrite.name in _COMPOSED)]
    applied = {rewrite.name: count for rewrite in rewrites if (count := rewrite.apply(rewritable))}
    # rewrites make parameters anew: equal ones become one, and so do nodes that then compute the same
    DeduplicateInitializersPass()(rewritable)
    CommonSubexpressionEliminationPass()(rewritable)
    tidy(rewritable)
    result = normalize(infer_shapes(normalize(ir.serde.serialize_model(rewritable))))
    return result, applied


_SKIPPED = ("fuse_matmul_add_bias_into_gemm", "fuse_matmul_add_bias_into_gemm_batched")
"""onnxsim's passes that hide linear layers of three axes between Reshapes; the ``tokens`` rewrite serves them better."""


def run_onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    """Run onnxsim; nodes it made anew are called after their neighbours. Raises :class:`ExportError`."""
    try:
        with silenced():
            # Equality is checked by the caller, on images: onnxsim's own check feeds uniform noise to every input.
            simplified, _ = onnxsim.simplify(model, check_n=0, include_subgraph=True, skipped_optimizers=list(_SKIPPED))
    except Exception as exc:
        raise ExportError(f"onnxsim could not simplify the exported graph: {first_line(exc)}") from exc
    assert isinstance(simplified, onnx.ModelProto)
    adopt_names(simplified, {node.name for node in model.graph.node})
    return simplified


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return ``model`` with every value's shape that ONNX can infer, old annotations dropped."""
    clean = copied(model)
    del clean.graph.value_info[:]
    try:
        return onnx.shape_inference.infer_shapes(clean, strict_mode=True, data_prop=True)
    except Exception as exc:
        raise ExportError(f"the graph has inconsistent shapes: {first_line(exc)}") from exc
