"""Where the time of an INT8 engine goes: ONNX Runtime's kernels by operator, the rate each reaches, and what is only memory.

Engines as ``edgeseg build --target onnxruntime`` makes them, of a trained network (CamVid's, where its data is present, else the
demo's) and of untrained ones whose speed needs no training. ONNX Runtime's profiler times every kernel of ``--runs`` runs; a
node's time is its median over them. The rate to compare with is that of the largest integer matrix product this CPU is asked
for here, measured in the same process: the time all multiply-accumulates would take at that rate is the roofline. The
profiler itself costs time: the sum is above what ``edgeseg bench`` measures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper
from rich import box
from rich.console import Console
from rich.table import Table

import edgeseg
from benchmarks.architectures import build
from benchmarks.record import RESULTS, Record, this_machine, versions
from benchmarks.workload import CAMVID_WEIGHTS, camvid, camvid_folder
from edgeseg.backends import get_backend
from edgeseg.backends.cpu.onnxruntime import OnnxRuntimeBackend
from edgeseg.backends.cpu.precision import ExecutedNode, executed_macs, executed_node, profiled_events
from edgeseg.store.engine import Engine

ARCHITECTURES = ("fpn", "unet", "pspnet", "segformer", "dpt")
PEAK_SIDE = 1536
"""Of the square matrices whose product tells the CPU's rate: INT8 operands of 2.4 MB each."""


@dataclass
class Kernels:
    """All nodes of one operator and dtype in an engine.

    Attributes:
        ms: of one run.
        macs: multiply-accumulates of one run.
        moved_bytes: read and written by one run, weights included.
    """

    nodes: int = 0
    ms: float = 0.0
    macs: int = 0
    moved_bytes: int = 0


def main() -> None:
    options = arguments()
    console, machine = Console(), this_machine()
    rows: list[dict[str, Any]] = []
    peak = matrix_rate(options.runs)
    console.print(f"u8 x s8 matrix product of {PEAK_SIDE}: {peak / 1e9:.0f} GMAC/s")
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.names:
            engine = engine_of(name, Path(scratch) / name)
            kernels = kernels_of(engine, options.runs)
            rows += table_rows(name, kernels, peak)
            console.print(table(name, [row for row in rows if row["name"].startswith(f"{name},")]))
    Record(
        benchmark="nodes",
        workload="INT8 engines of onnxruntime, CamVid's network 352x480, others 256x256",
        machine=machine,
        versions=versions(),
        settings={"runs": options.runs, "matrix_gmac_per_s": peak / 1e9, "shared_machine": options.shared_machine},
        rows=rows,
    ).write(options.output)


def engine_of(name: str, folder: Path) -> Engine:
    """Build ``camvid`` or an untrained network of an architecture."""
    root = camvid_folder()
    if name != "camvid" or root is None:
        return build("fpn" if name == "camvid" else name, "int8", folder, "onnxruntime")
    spec = camvid(limit=1, calibration_limit=1).spec
    return edgeseg.build(
        arch="fpn",
        weights=root / CAMVID_WEIGHTS,
        size=(spec.input.height, spec.input.width),
        calibration=root / "calib",
        calibration_limit=32,
        target="onnxruntime",
        output=folder,
    )


def matrix_rate(runs: int) -> float:
    """Multiply-accumulates a second of ONNX Runtime's integer matrix product on all cores, in the best of ``runs`` products."""
    side, random = PEAK_SIDE, np.random.default_rng(0)
    weights = helper.make_tensor("w", TensorProto.INT8, (side, side), random.integers(-127, 128, side * side).tolist())
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, (side, side))],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (side, side))],
        [weights],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"x": random.integers(0, 256, (side, side), dtype=np.uint8)}
    session.run(None, given)
    taken = []
    for _ in range(runs):
        begin = time.perf_counter()
        session.run(None, given)
        taken.append(time.perf_counter() - begin)
    return side**3 / min(taken)


def kernels_of(engine: Engine, runs: int) -> dict[tuple[str, str], Kernels]:
    """By operator and the dtype of its first input."""
    backend = get_backend("onnxruntime")
    assert isinstance(backend, OnnxRuntimeBackend)
    settings = backend.load_settings(onnxruntime, engine)
    events = profiled_events(onnxruntime, engine.engine_path, settings, engine.manifest.spec.input, runs)
    by_node: dict[str, list[dict[str, Any]]] = defaultdict(list)
    ran: dict[str, ExecutedNode] = {}
    for event in events:
        node = executed_node(event)
        ran[node.name] = node
        by_node[node.name].append(event)
    macs = executed_macs(onnx.load(str(engine.engine_path)), ran, engine.engine_path)
    kernels: dict[tuple[str, str], Kernels] = defaultdict(Kernels)
    for name, seen in by_node.items():
        args = seen[0]["args"]
        dtype = next(iter(args["input_type_shape"][0])) if args["input_type_shape"] else "-"
        kind = kernels[args["op_name"], dtype]
        kind.nodes += 1
        kind.ms += median([event["dur"] / 1000 for event in seen])
        kind.macs += macs.get(name, 0)
        kind.moved_bytes += sum(int(args[f"{what}_size"]) for what in ("activation", "parameter", "output"))
    return kernels


def table_rows(name: str, kernels: dict[tuple[str, str], Kernels], peak: float) -> list[dict[str, Any]]:
    """A row for each operator, the slowest first, and one for the whole engine."""
    whole = Kernels(
        *(sum(getattr(kind, what) for kind in kernels.values()) for what in ("nodes", "ms", "macs", "moved_bytes"))
    )
    ordered = sorted(kernels.items(), key=lambda item: -item[1].ms)
    named = [(f"{name}, {op} of {dtype}", kind) for (op, dtype), kind in ordered]
    return [
        {
            "name": what,
            "nodes": kind.nodes,
            "ms": kind.ms,
            "share": kind.ms / whole.ms,
            "macs": kind.macs,
            "gmac_per_s": kind.macs / kind.ms / 1e6 if kind.macs else None,
            "moved_bytes": kind.moved_bytes,
            "moved_gb_per_s": kind.moved_bytes / kind.ms / 1e6,
            "times_roofline": kind.ms / (kind.macs / peak * 1e3) if kind.macs else None,
        }
        for what, kind in ((f"{name}, all", whole), *named)
    ]


def table(name: str, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=name, box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("operator")
    for column in ("nodes", "ms", "share", "GMAC", "GMAC/s", "MB", "GB/s", "x roofline"):
        shown.add_column(column, justify="right")
    for row in rows:
        rate, roofline = row["gmac_per_s"], row["times_roofline"]
        shown.add_row(
            row["name"].removeprefix(f"{name}, "),
            str(row["nodes"]),
            f"{row['ms']:.2f}",
            f"{row['share']:.1%}",
            f"{row['macs'] / 1e9:.2f}" if row["macs"] else "-",
            "-" if rate is None else f"{rate:.0f}",
            f"{row['moved_bytes'] / 1e6:.1f}",
            f"{row['moved_gb_per_s']:.1f}",
            "-" if roofline is None else f"{roofline:.2f}",
        )
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=("camvid", *ARCHITECTURES), default=["camvid", *ARCHITECTURES])
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--shared-machine", action="store_true", help="record that other programs ran beside")
    parser.add_argument("--output", type=Path, default=RESULTS / "nodes.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
