"""Most memory that a build, a load and a call take: the twelve SMP architectures in INT8 at 512x512, untrained.

Each in a process of its own, as the kernel counts its resident memory (``ru_maxrss``, ``VmHWM``), interpreter and packages
included: the build with PyTorch, the load and the calls without. ``import`` is what packages alone take. Memory depends on the
number of threads, not on how busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.architectures import CLASSES, ENCODERS
from benchmarks.record import RESULTS, Record, this_machine, versions
from edgeseg.demo import sample_folder
from edgeseg.evaluate.contenders import engine_contenders
from edgeseg.evaluate.latency.fresh import measure_fresh
from edgeseg.spec import ARCHITECTURES
from edgeseg.store.engine import open_engine

SIZE = "512x512"
PACKAGES = "import torch, segmentation_models_pytorch, onnx, onnxsim, onnxscript, onnxruntime"
"""What a build imports of others, all of them."""


def main() -> None:
    options = arguments()
    console, machine = Console(), this_machine()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for arch in options.architectures:
            rows.append(measured(arch, Path(scratch) / arch, options.images))
            console.print(rows[-1], highlight=False)
    Record(
        benchmark="memory",
        workload=f"INT8, {SIZE}, {CLASSES} classes, onnxruntime, untrained, {options.images} calibration images",
        machine=machine,
        versions=versions(),
        settings={"images": options.images},
        rows=rows,
    ).write(options.output)
    console.print(table(rows))


def measured(arch: str, folder: Path, images: int) -> dict[str, Any]:
    encoder, model_args = ENCODERS.get(arch, ("resnet18", {}))
    build = [
        *(sys.executable, "-m", "edgeseg", "build", "--arch", arch, "--encoder", encoder, "--weights", "random"),
        *("--classes", str(CLASSES), "--size", SIZE, "--target", "onnxruntime", "--min-int8-share", "0"),
        *("--calibration", str(sample_folder() / "calib" / "images"), "--calibration-limit", str(images)),
        *(f"--model-arg={name}={json.dumps(value)}" for name, value in model_args.items()),
        *("--output", str(folder)),
    ]
    peaks = {"build": peak_bytes(build), "import": peak_bytes([sys.executable, "-c", PACKAGES])}
    (contender,), _ = engine_contenders([folder])
    _, memory = measure_fresh(contender, 1)
    return {
        "name": arch,
        "engine_bytes": open_engine(folder).engine_path.stat().st_size,
        "build_peak_bytes": peaks["build"],
        "build_import_bytes": peaks["import"],
        "run_peak_bytes": memory.peak_rss_bytes,
        "run_import_bytes": memory.base_rss_bytes,
        "run_activation_bytes": memory.activation_bytes,
    }


def peak_bytes(command: list[str]) -> int:
    """Largest resident memory of a process (one of its own waits for it, so that no other child is counted)."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, "
        "stderr=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)"
    )
    return int(subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True).stdout)


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"Memory in MB, INT8, {SIZE}", box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [column for column in rows[0] if column != "name"]
    shown.add_column("architecture")
    for column in columns:
        shown.add_column(column.removesuffix("_bytes").replace("_", " "), justify="right")
    for row in rows:
        shown.add_row(row["name"], *(f"{row[column] / 1e6:.0f}" for column in columns))
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--images", type=int, default=16, help="for calibration")
    parser.add_argument("--output", type=Path, default=RESULTS / "memory.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
