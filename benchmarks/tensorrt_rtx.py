"""Every architecture through TensorRT-RTX, ahead of time and without a GPU: what parses, what builds, how large it gets.

Twelve architectures, three precisions, three kinds of shape and four compute capabilities. Engines are built, not run: this says
nothing about speed or accuracy. A cell that does not build is recorded with TensorRT-RTX's reason. For SM 75 matrix products
of float32 graphs are other operators (``edgeseg/backends/tensorrt/turing.py``), so its network has other layers.

    python -m benchmarks.tensorrt_rtx            # results/tensorrt-rtx.json after every architecture, tensorrt-rtx.md at the end
    python -m benchmarks.tensorrt_rtx --table    # tensorrt-rtx.md from that JSON alone
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.architectures import CLASSES, ENCODERS
from benchmarks.record import RESULTS, Record, read_record, this_machine, versions
from edgeseg.backends.tensorrt.graph import ParsedGraph
from edgeseg.backends.tensorrt.module import TENSORRT_RTX
from edgeseg.backends.tensorrt.options import RtxOptions
from edgeseg.backends.tensorrt.rtx import configure, network_precision, parse_network, refused
from edgeseg.backends.tensorrt.turing import TURING, for_turing
from edgeseg.convert.export import export_onnx
from edgeseg.convert.load import load_model
from edgeseg.demo import sample_folder
from edgeseg.errors import EdgesegError
from edgeseg.quantize.calibration import calibrate
from edgeseg.quantize.fp16 import write_fp16
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.spec import ARCHITECTURES, PRECISIONS, BatchRange, InputSpec, ModelRequest, PipelineSpec
from edgeseg.store.documents import write_text
from edgeseg.store.manifest import OnnxGraph

OUTPUT = RESULTS / "tensorrt-rtx.json"
SIDE = 256
SMS = (75, 86, 89, 120)
SHOWN = 86
IMAGES = 8
SHAPES: dict[str, dict[str, Any]] = {
    "static": {},
    "dynamic batch": {"batch": BatchRange(1, 2, 4)},
    "dynamic size": {"dynamic_size": True},
}


def main() -> None:
    options = arguments()
    if options.table:
        write_table(options.output)
        return
    rows: list[dict[str, Any]] = []
    machine = this_machine()
    for arch in options.architectures:
        with tempfile.TemporaryDirectory() as scratch:
            rows += architecture_rows(arch, Path(scratch))
        record = Record(
            benchmark="tensorrt_rtx",
            workload=f"{SIDE}x{SIDE}, {CLASSES} classes, untrained; built, not run",
            machine=machine,
            versions={**versions(), "tensorrt-rtx": str(TENSORRT_RTX.load().__version__)},
            settings={"sms": SMS, "shapes": tuple(SHAPES), "calibration_images": IMAGES},
            rows=rows,
        )
        record.write(options.output)
        built = sum(row["reason"] is None for row in rows)
        print(f"{arch}: {built} of {len(rows)} cells so far built", flush=True)
    write_table(options.output)


def write_table(results: Path) -> None:
    write_text(results.with_suffix(".md"), markdown(read_record(results)) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--table", action="store_true", help="write the JSON as Markdown beside it; measure nothing")
    return parser.parse_args()


def architecture_rows(arch: str, folder: Path, shapes: tuple[str, ...] = tuple(SHAPES)) -> list[dict[str, Any]]:
    """All cells of one architecture; each graph is exported once."""
    encoder, model_args = ENCODERS.get(arch, ("resnet18", {}))
    request = ModelRequest(arch=arch, encoder=encoder, weights="random", classes=CLASSES, model_args=model_args)
    loaded = load_model(request)
    rows = []
    for shape in shapes:
        cell = {"arch": arch, "encoder": encoder, "shape": shape}
        try:
            size = InputSpec(SIDE, SIDE, stride=loaded.stride, **SHAPES[shape])
            loaded.check_size(SIDE, SIDE)
            spec = PipelineSpec(loaded.model, size, loaded.preprocess)
            graph, _ = export_onnx(loaded, spec, folder / f"{shape}.onnx")
            graphs = typed_graphs(graph, folder, shape)
        except EdgesegError as exc:
            rows += [failed(cell, p, sm, f"export: {exc}") for p in PRECISIONS for sm in SMS]
            continue
        for precision in PRECISIONS:
            rows += precision_rows(cell, graphs[precision])
    return rows


def typed_graphs(graph: OnnxGraph, folder: Path, name: str) -> dict[str, OnnxGraph]:
    """The three precisions of one graph, typed as edgeseg ships them for TensorRT."""
    samples = CalibrationSet.open(sample_folder() / "calib", limit=IMAGES)
    table = calibrate(graph, samples)
    return {
        "fp32": graph,
        "fp16": write_fp16(graph, table, folder / f"{name}-fp16.onnx"),
        "int8": write_qdq(graph, table, SCHEMES["tensorrt"], folder / f"{name}-int8.onnx"),
    }


def precision_rows(cell: dict[str, Any], graph: OnnxGraph) -> list[dict[str, Any]]:
    """One graph, built for each compute capability; parsed once, and once more if SM 75 needs another."""
    parsed = ParsedGraph.read(graph, graph.precision)
    rows = []
    for sms, variant in ((tuple(sm for sm in SMS if sm != TURING), parsed), ((TURING,), for_turing(parsed))):
        rows += variant_rows(cell, variant, sms)
    return sorted(rows, key=lambda row: SMS.index(row["sm"]))


def variant_rows(cell: dict[str, Any], parsed: ParsedGraph, sms: tuple[int, ...]) -> list[dict[str, Any]]:
    trt = TENSORRT_RTX.load()
    precision = parsed.requested
    rows = []
    with TENSORRT_RTX.heard(trt) as library:
        builder = library.made(trt.Builder)
        try:
            network = parse_network(library, builder, parsed)
        except EdgesegError as exc:
            return [failed(cell, precision, sm, str(exc)) for sm in sms]
        share = network_precision(trt, network, parsed).mac_share
        for sm in sms:
            library.log.lines.clear()
            config = builder.create_builder_config()
            configure(library, builder, config, RtxOptions(sm=(sm,)), parsed)
            begin = time.perf_counter()
            plan = builder.build_serialized_network(network, config)
            seconds = time.perf_counter() - begin
            if plan is None:
                reason = str(refused(library, parsed))
                rows.append({**failed(cell, precision, sm, reason), "layers": network.num_layers})
                continue
            rows.append(
                {
                    **cell,
                    "precision": precision,
                    "sm": sm,
                    "layers": int(network.num_layers),
                    "onnx_nodes": len(parsed.nodes),
                    "engine_bytes": int(plan.nbytes),
                    "build_s": round(seconds, 3),
                    "mac_share": share,
                    "reason": None,
                }
            )
    return rows


def failed(cell: dict[str, Any], precision: str, sm: int, reason: str) -> dict[str, Any]:
    return {**cell, "precision": precision, "sm": sm, "layers": None, "engine_bytes": None, "build_s": None} | {
        "reason": reason
    }


def markdown(record: Record) -> str:
    """A line per architecture and precision; ``-`` where nothing was built."""
    shapes = list(SHAPES)
    lines = [
        f"| model | precision | layers: static | dynamic batch | dynamic size | for SM {TURING} "
        f"| engine MB (SM {SHOWN}): static | dynamic batch | dynamic size | build s | cells built |",
        "|---|---|" + "--:|" * 9,
    ]
    keys = list(dict.fromkeys((row["arch"], row["precision"]) for row in record.rows))
    for arch, precision in sorted(keys, key=lambda key: (list(ARCHITECTURES).index(key[0]), PRECISIONS.index(key[1]))):
        rows = [row for row in record.rows if (row["arch"], row["precision"]) == (arch, precision)]
        by_cell = {(r["shape"], r["sm"]): r for r in rows}
        layers = [by_cell.get((shape, SHOWN), {}).get("layers") for shape in shapes]
        sizes = [by_cell.get((shape, SHOWN), {}).get("engine_bytes") for shape in shapes]
        turing = [by_cell.get((shape, TURING), {}).get("layers") for shape in shapes]
        seconds = [r["build_s"] for r in rows if r["build_s"] is not None]
        built = sum(r["reason"] is None for r in rows)
        took = f"{min(seconds):.2f}-{max(seconds):.2f}" if seconds else "-"
        cells = [
            arch,
            precision,
            *("-" if count is None else str(count) for count in layers),
            "same" if turing == layers else ", ".join("-" if count is None else str(count) for count in turing),
            *("-" if size is None else f"{size / 1e6:.1f}" for size in sizes),
            took,
            f"{built}/{len(rows)}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    reasons: dict[str, list[str]] = {}
    for row in record.rows:
        if row["reason"] is not None:
            where = f"{row['arch']} {row['precision']} {row['shape']} SM {row['sm']}"
            reasons.setdefault(row["reason"], []).append(where)
    if reasons:
        lines += ["", "Not built:", ""]
        lines += [f"- {'; '.join(where)}: {reason}" for reason, where in reasons.items()]
    heading = f"Built, not run: TensorRT-RTX {record.versions['tensorrt-rtx']}, {record.workload.partition(';')[0]}."
    return "\n".join([heading, "", *lines])


if __name__ == "__main__":
    main()
