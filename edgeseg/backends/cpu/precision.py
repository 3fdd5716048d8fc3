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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeseg.errors import BuildError
from edgeseg.spec import InputSpec, Precision
from edgeseg.store.artifacts import PrecisionReport

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
        index: in the optimized file's node list.
        op_type: of the kernel.
        dtype: ``int8``, ``fp16``, ``fp32``, ...: type of its first input, or ``other`` for index arithmetic.
        output_shapes: of its outputs.
    """

    index: int
    op_type: str
    dtype: str
    output_shapes: tuple[tuple[int, ...], ...]


def run_profiled(ort: Any, path: Path, settings: Any, spec: InputSpec) -> list[ExecutedNode]:
    """Run the graph once on a grey image and return what was executed, in the order of the file's nodes.

    Arguments and errors are those of :func:`profiled_events`.
    """
    nodes = {}
    for event in profiled_events(ort, path, settings, spec, runs=1):
        node = _executed(event["args"])
        nodes[node.index] = node
    return [nodes[index] for index in sorted(nodes)]


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
        BuildError: ONNX Runtime wrote no profile.
    """
    image = np.full((spec.batch.minimum, spec.height, spec.width, spec.channels), 127, np.uint8)
    with tempfile.TemporaryDirectory(prefix="edgeseg-profile-") as folder:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(folder) / "run")
        session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for _ in range(runs if runs == 1 else runs + 1):
            session.run(None, {name: image})
        events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
    if not kernels:
        raise BuildError(f"ONNX Runtime {ort.__version__} profiled no node of {path}; report its version")
    kernels.sort(key=lambda event: event["ts"])
    return kernels if runs == 1 else kernels[len(kernels) // (runs + 1) :]


def node_times(events: list[dict[str, Any]], runs: int) -> list[tuple[str, float, str]]:
    """(node name, milliseconds in one run, dtype) of events from :func:`profiled_events`, in the order they ran."""
    total: dict[str, float] = {}
    dtypes: dict[str, str] = {}
    for event in events:
        name = event["name"].removesuffix(_KERNEL)
        total[name] = total.get(name, 0.0) + event["dur"] / 1000
        dtypes[name] = _executed(event["args"]).dtype
    return [(name, ms / runs, dtypes[name]) for name, ms in total.items()]


def executed_precision(path: Path, requested: Precision, executed: list[ExecutedNode], batch: int) -> PrecisionReport:
    """Count what was executed.

    Args:
        path: the optimized ONNX file that was run.
        requested: the precision asked for.
        executed: from :func:`run_profiled` on that file.
        batch: the batch size it was run with; MACs are reported for one image.
    """
    import onnx

    from edgeseg.graph.macs import count_macs

    model = onnx.load(str(path))
    nodes = model.graph.node
    shapes = {}
    for node in executed:
        for name, shape in zip(nodes[node.index].output, node.output_shapes, strict=False):
            shapes[name] = shape
    names = [node.name or f"node {index}" for index, node in enumerate(nodes)]
    for node, name in zip(nodes, names, strict=True):
        node.name = name
    macs = count_macs(model, shapes=shapes)
    dtype_of = {names[node.index]: node.dtype for node in executed}
    mac_totals: Counter[str] = Counter()
    float_layers: dict[str, str] = {}
    for node, name in zip(nodes, names, strict=True):
        if name not in macs:
            continue
        dtype = dtype_of[name]
        mac_totals[dtype] += macs[name] // batch
        if dtype != requested:
            float_layers[name] = f"{node.op_type} runs in {dtype}"
    node_totals = Counter(node.dtype for node in executed)
    total = sum(mac_totals.values())
    return PrecisionReport(
        requested=requested,
        mac_share={k: v / total for k, v in sorted(mac_totals.items())} if total else {},
        node_share={k: v / len(executed) for k, v in sorted(node_totals.items())},
        macs=total,
        evidence="executed",
        float_layers=float_layers,
    )


def _executed(args: dict[str, Any]) -> ExecutedNode:
    inputs = [next(iter(entry.items())) for entry in args.get("input_type_shape", [])]
    outputs = [next(iter(entry.items())) for entry in args.get("output_type_shape", [])]
    op_type = str(args["op_name"])
    dtype = DTYPE_NAMES.get(inputs[0][0], "other") if inputs else "other"
    return ExecutedNode(
        index=int(args["node_index"]),
        op_type=op_type,
        dtype="int8" if op_type in _QUANTIZING else dtype,
        output_shapes=tuple(tuple(int(d) for d in shape) for _, shape in outputs if math.prod(shape) >= 0),
    )
