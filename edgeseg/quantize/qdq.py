"""Write the Q/DQ graph of a scheme from the float graph and calibrated ranges.

The order of work: graph passes that prepare the graph for the target, the placement decision, insertion, and the linter
over the result. Everything is decided by operator types, shapes and ranges, nothing by layer names, but for the modules
that were asked to stay float.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from edgeseg.errors import QuantizationError
from edgeseg.graph.editing import remove_unread_constants
from edgeseg.quantize.fp16 import fp16_model, magnitudes
from edgeseg.quantize.insertion import insert_pairs
from edgeseg.quantize.lint import lint
from edgeseg.quantize.modules import Modules
from edgeseg.quantize.observed import Observed
from edgeseg.quantize.passes import PASSES
from edgeseg.quantize.placement import Role, is_weighted, place, propagate_ranges
from edgeseg.quantize.schemes import QuantScheme
from edgeseg.quantize.table import CalibrationTable
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import read_onnx, write_onnx

_PAIR = frozenset({"QuantizeLinear", "DequantizeLinear"})


def write_qdq(
    graph: OnnxGraph,
    table: CalibrationTable,
    scheme: QuantScheme,
    path: Path,
    float_modules: Collection[str] = (),
) -> OnnxGraph:
    """Write ``graph`` with Q/DQ pairs placed for ``scheme``.

    Args:
        graph: the float graph the table was made from.
        table: calibrated ranges by tensor name.
        scheme: types and placement rules of the target.
        path: where the quantized ONNX file goes.
        float_modules: those of :class:`~edgeseg.quantize.modules.Modules` that get no pairs: FP16 where the scheme has it,
            else fp32.

    Returns:
        the written graph, precision ``int8``.

    Raises:
        QuantizationError: a needed range is missing, nothing can be quantized, or the result breaks the scheme's rules.
        ArtifactError: ``graph`` cannot be read.
    """
    model = ir.serde.deserialize_model(read_onnx(graph.path))
    stays_float = Modules.of(model.graph).holds(float_modules)
    quantize_model(model, table, scheme, stays_float)
    floats = {str(node.name) for node in model.graph if stays_float(node)}
    if table.trained is not None:
        # Training may have left a layer in float, whose input another layer reads as integers.
        floats |= {str(node.name) for node in model.graph if is_weighted(node)}
    proto = ir.serde.serialize_model(model)
    if problems := lint(proto, scheme, floats):
        raise QuantizationError(
            f"the quantized graph breaks {len(problems)} rules of scheme {scheme.name}: {'; '.join(problems[:3])}; "
            "please report the model"
        )
    if floats and scheme.half:
        proto = fp16_model(proto, magnitudes(table), lambda node: node.name in floats and node.op_type not in _PAIR)
    write_onnx(proto, path)
    return replace(graph, path=path, sha256=sha256_file(path), precision="int8", scheme=scheme.name)


def quantize_model(
    model: ir.Model,
    table: CalibrationTable,
    scheme: QuantScheme,
    stays_float: Callable[[ir.Node], bool] = lambda node: False,
) -> int:
    """Run the scheme's passes on ``model`` in place and insert its Q/DQ pairs; returns how many biases were corrected.

    ``stays_float``: of a node: whether it is to take no part.

    Raises:
        QuantizationError: see :func:`write_qdq`.
    """
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    observed = Observed.of(table, stays_float)
    for name in scheme.passes:
        PASSES[name](model, observed)
    propagate_ranges(model.graph, observed)
    placement = place(model.graph, observed, scheme)
    if Role.WEIGHTED not in placement.roles.values():
        raise QuantizationError(
            "no convolution or matrix product of the graph can be quantized: the calibration table covers none of their "
            "inputs; calibrate this graph again"
        )
    corrected = insert_pairs(model.graph, observed, placement, scheme)
    remove_unread_constants(model.graph)
    return corrected
