"""INT8 against fp32 in one backend for all twelve SMP architectures, 256x256, untrained (speed needs no training).

Both engines are edgeseg's own: the same simplified graph, runtime and threads; only the precision differs.
Agreement of untrained networks says little (their classes are nearly tied) and is recorded for completeness only.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import edgeseg
from benchmarks.record import RESULTS, Record, ratios, this_machine, versions
from edgeseg.backends import get_backend
from edgeseg.demo import sample_folder
from edgeseg.errors import EdgesegError
from edgeseg.evaluate.latency.protocol import LatencyProtocol, measure_interleaved
from edgeseg.images.decoding import list_images, read_image
from edgeseg.images.placement import fit
from edgeseg.spec import ARCHITECTURES, Precision
from edgeseg.store.engine import Engine

CLASSES = 11
SIZE = (256, 256)
# What an architecture needs beyond resnet18 and the constructor's defaults.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {"dpt": ("tu-vit_tiny_patch16_224", {"dynamic_img_size": True})}


def main() -> None:
    options = arguments()
    console, machine = Console(), this_machine()
    protocol = LatencyProtocol(warmup_ms=300.0, min_duration_ms=options.duration_ms, min_iterations=options.iterations)
    rows, speeds = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for arch in options.architectures:
            try:
                row, speed = measure(arch, Path(scratch) / arch, options.target, protocol)
            except EdgesegError as exc:
                row, speed = {"name": arch, "failed": str(exc)}, None
            rows.append(row)
            if speed is not None:
                speeds[arch] = speed
            console.print(line(row, speed), markup=False, highlight=False)
    record = Record(
        benchmark="architectures",
        workload=f"{SIZE[0]}x{SIZE[1]}, {CLASSES} classes, {options.target}, untrained",
        machine=machine,
        versions=versions(),
        settings={"protocol": dataclasses.asdict(protocol)},
        rows=rows,
        ratios={"fp32": speeds},
    )
    record.write(options.output)
    console.print(table(record))
    console.print(f"raw samples: {options.output}")


def measure(
    arch: str, folder: Path, target: str, protocol: LatencyProtocol
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Build both precisions, time them in turns; (row, ratio)."""
    folder.mkdir()
    engines: dict[str, Engine] = {p: build(arch, p, folder / p, target) for p in ("fp32", "int8")}
    sessions = {p: get_backend(target).load(engine) for p, engine in engines.items()}
    first = list_images(sample_folder() / "val" / "images")[0]
    image, _ = fit(read_image(first), engines["int8"].manifest.spec.input)
    batch = np.ascontiguousarray(image[None])
    samples = measure_interleaved({p: partial(s.run, batch) for p, s in sessions.items()}, protocol)
    for session in sessions.values():
        session.close()
    manifest = engines["int8"].manifest
    row = {
        "name": arch,
        "encoder": manifest.spec.model.encoder,
        "macs": manifest.precision.macs,
        "mac_share": manifest.precision.mac_share,
        "agreement": manifest.verification.agreement if manifest.verification else None,
        "latency": {p: dataclasses.asdict(s.figures()) for p, s in samples.items()},
        "samples_ms": {p: [round(ms, 4) for ms in s.samples_ms] for p, s in samples.items()},
        "size_bytes": {p: e.engine_path.stat().st_size for p, e in engines.items()},
    }
    return row, ratios(samples, ("fp32",))["fp32"]["int8"]


def build(arch: str, precision: Precision, folder: Path, target: str) -> Engine:
    encoder, model_args = ENCODERS.get(arch, ("resnet18", {}))
    return edgeseg.build(
        arch=arch,
        encoder=encoder,
        model_args=model_args,
        weights="random",
        classes=CLASSES,
        size=SIZE,
        precision=precision,
        calibration=sample_folder() / "calib" / "images" if precision == "int8" else None,
        calibration_limit=16 if precision == "int8" else None,
        # A share below the usual limit is a finding here, not a failure.
        min_int8_share=0.0,
        target=target,
        output=folder,
    )


def line(row: dict[str, Any], speed: dict[str, Any] | None) -> str:
    if speed is None:
        return f"{row['name']}: {row['failed']}"
    return f"{row['name']}: {speed['median']:.2f}x [{speed['low']:.2f}, {speed['high']:.2f}]"


def table(record: Record) -> Table:
    shown = Table(title=f"INT8 against fp32, {record.workload}", box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("architecture", no_wrap=True)
    for column in ("GMAC", "in int8", "fp32 ms", "int8 ms", "faster by", "95 %"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in record.rows:
        if "failed" in row:
            shown.add_row(row["name"], "failed")
            continue
        speed = record.ratios["fp32"][row["name"]]
        shown.add_row(
            row["name"],
            f"{row['macs'] / 1e9:.2f}",
            f"{row['mac_share'].get('int8', 0.0):.1%}",
            f"{row['latency']['fp32']['median_ms']:.2f}",
            f"{row['latency']['int8']['median_ms']:.2f}",
            f"{speed['median']:.2f}",
            f"{speed['low']:.2f}-{speed['high']:.2f}",
        )
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--architectures", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES, metavar="ARCH"
    )
    parser.add_argument("--target", default="onnxruntime")
    parser.add_argument("--duration-ms", type=float, default=3000.0, help="mean counted time of an engine")
    parser.add_argument("--iterations", type=int, default=60, help="counted calls of each engine, at least")
    parser.add_argument("--output", type=Path, default=RESULTS / "architectures.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
