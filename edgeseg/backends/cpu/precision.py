"""Which precision an engine really executes in: shares of multiply-accumulates and of nodes per dtype.

ONNX Runtime chooses kernels, layouts and fusions when it loads a graph, and the file it saves knows no shapes for its own
operators. So the optimized graph is run once with ONNX Runtime's profiler on, and what the profiler says of each executed
node (its input types and output shapes) is counted.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.backends.base import grey_batch
from edgeseg.errors import BuildError, one_line
from edgeseg.spec import InputSpec, Precision
from edgeseg.store.manifest import PrecisionReport

if TYPE_CHECKING:
    import onnx

DTYPE_NAMES = {
    "float": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "uint8": "int8",
    "int8": "int8",
    "double": "fp64",
}
# Take float inputs, quantize them on the fly and multiply in integers.
_QUANTIZING = frozenset({"DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})
_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class ExecutedNode:
    """A node as ONNX Runtime ran it.

    Attributes:
        name: as ONNX Runtime calls it. On loading it adds nodes of its own (a DequantizeLinear for each reader), which the file
            does not hold.
        op_type: of the kernel.
        dtype: ``int8``, ``fp16``, ``fp32``, ...: type of its first input, or ``other`` for index arithmetic.
        output_shapes: of its outputs.
    """

    name: str
    op_type: str
    dtype: str
    output_shapes: tuple[tuple[int, ...], ...]


def profiled_events(ort: Any, path: Path, settings: Any, spec: InputSpec, runs: int) -> list[dict[str, Any]]:
    """Run the graph on a grey image with ONNX Runtime's profiler on.

    The first run, which allocates, is not among the events unless it is the only one.

    Args:
        ort: the onnxruntime module.
        path: an optimized graph.
        settings: session options to run it with; its profiling fields are overwritten.
        spec: input size.
        runs: how often to run it.

    Returns:
        the kernel events as the profiler wrote them, in the order they ran: ``name``, ``dur`` in microseconds, ``args``.

    Raises:
        BuildError: ONNX Runtime cannot run the graph, or wrote no profile.
    """
    image = grey_batch(spec)
    with tempfile.TemporaryDirectory(prefix="edgeseg-profile-") as folder:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "run")
        session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"], enable_fallback=0)
        name = session.get_inputs()[0].name
        try:
            for _ in range(runs if runs == 1 else runs + 1):
                session.run(None, {name: image})
        except Exception as exc:  # pybind maps ORT's status codes to classes that share no base but Exception
            raise BuildError(f"ONNX Runtime failed to run the engine: {one_line(exc)}") from exc
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
    if not kernels:
        raise BuildError(f"ONNX Runtime {ort.__version__} profiled no node of {path}; report its version")
    kernels.sort(key=lambda event: event["ts"])
    return kernels if runs == 1 else kernels[len(kernels) // (runs + 1) :]


def executed_precision(path: Path, requested: Precision, executed: list[ExecutedNode], batch: int) -> PrecisionReport:
    """Count what was executed.

    Raises:
        BuildError: a node that multiplies was not executed under its name.
    """
    import onnx

    from edgeseg.graph.types import precision_report, shares

    model = onnx.load(str(path))
    ran = {node.name: node for node in executed}
    counts = executed_macs(model, ran, path)
    op_types = {node.name: node.op_type for node in model.graph.node}
    macs = {name: count // batch for name, count in counts.items()}
    report = precision_report(requested, {name: node.dtype for name, node in ran.items()}, macs)
    return replace(
        report,
        node_share=shares(Counter(node.dtype for node in executed)),
        evidence="executed",
        float_layers={name: f"{op_types[name]} {why}" for name, why in report.float_layers.items()},
    )


def executed_macs(model: onnx.ModelProto, ran: Mapping[str, ExecutedNode], path: Path) -> dict[str, int]:
    """Multiply-accumulates by node of a saved graph, from the shapes that were seen; its nodes get the profiler's names.

    Raises:
        BuildError: a node that multiplies was not executed under its name.
    """
    from edgeseg.graph.macs import CONV_WEIGHT, MATMUL_OPERANDS, count_macs

    shapes: dict[str, tuple[int, ...]] = {}
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"  # what ONNX Runtime's profiler calls a node without a name
        if node.name in ran:
            shapes.update(zip(node.output, ran[node.name].output_shapes, strict=False))
        elif node.op_type in {*CONV_WEIGHT, *MATMUL_OPERANDS, "ConvTranspose"}:
            raise BuildError(f"ONNX Runtime's profile of {path} holds no node {node.name!r}; please report the model")
    return count_macs(model, shapes=shapes)


def executed_node(event: dict[str, Any]) -> ExecutedNode:
    """A kernel event of the profiler, without its times."""
    args = event["args"]
    inputs = [next(iter(entry.items())) for entry in args.get("input_type_shape", [])]
    outputs = [next(iter(entry.items())) for entry in args.get("output_type_shape", [])]
    op_type = str(args["op_name"])
    dtype = DTYPE_NAMES.get(inputs[0][0], "other") if inputs else "other"
    return ExecutedNode(
        name=event["name"].removesuffix(_KERNEL),
        op_type=op_type,
        dtype="int8" if op_type in _QUANTIZING else dtype,
        output_shapes=tuple(tuple(int(d) for d in shape) for _, shape in outputs if math.prod(shape) >= 0),
    )
