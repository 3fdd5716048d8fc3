"""Write the Q/DQ graph of a scheme from the float graph and calibrated ranges.

The order of work: graph passes that prepare the graph for the target, the placement decision, insertion, and the linter
over the result. Everything is decided by operator types, shapes and ranges, nothing by layer names.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import LiftConstantsToInitializersPass

from edgeseg.errors import QuantizationError
from edgeseg.graph.editing import remove_unread_constants
from edgeseg.quantize.insertion import insert_pairs
from edgeseg.quantize.lint import lint
from edgeseg.quantize.observed import Observed
from edgeseg.quantize.passes import PASSES
from edgeseg.quantize.placement import Role, place, propagate_ranges
from edgeseg.quantize.schemes import QuantScheme
from edgeseg.quantize.table import CalibrationTable
from edgeseg.store.artifacts import OnnxGraph, sha256_file
from edgeseg.store.onnx_file import read_onnx, write_onnx


def write_qdq(graph: OnnxGraph, table: CalibrationTable, scheme: QuantScheme, path: Path) -> OnnxGraph:
    """Write ``graph`` with Q/DQ pairs placed for ``scheme``.

    Args:
        graph: the float graph the table was made from.
        table: calibrated ranges by tensor name.
        scheme: types and placement rules of the target.
        path: where the quantized ONNX file goes.

    Returns:
        the written graph, precision ``int8``.

    Raises:
        QuantizationError: a needed range is missing, nothing can be quantized, or the result breaks the scheme's rules.
        ArtifactError: ``graph`` cannot be read.
    """
    model = ir.serde.deserialize_model(read_onnx(graph.path))
    quantize_model(model, table, scheme)
    proto = ir.serde.serialize_model(model)
    if problems := lint(proto, scheme):
        raise QuantizationError(
            f"the quantized graph breaks {len(problems)} rules of scheme {scheme.name}: {'; '.join(problems[:3])}; "
            "please report the model"
        )
    write_onnx(proto, path)
    return replace(graph, path=path, sha256=sha256_file(path), precision="int8", scheme=scheme.name)


def quantize_model(model: ir.Model, table: CalibrationTable, scheme: QuantScheme) -> int:
    """Run the scheme's passes on ``model`` in place and insert its Q/DQ pairs; returns how many biases were corrected.

    Raises:
        QuantizationError: see :func:`write_qdq`.
    """
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    observed = Observed.of(table)
    for name in scheme.passes:
        PASSES[name](model, observed)
    propagate_ranges(model.graph, observed.ranges)
    placement = place(model.graph, observed.ranges, scheme)
    if Role.WEIGHTED not in placement.roles.values():
        raise QuantizationError(
            "no convolution or matrix product of the graph can be quantized: the calibration table covers none of their "
            "inputs; calibrate this graph again"
        )
    corrected = insert_pairs(model.graph, observed, placement, scheme)
    remove_unread_constants(model.graph)
    return corrected
