"""What edgeseg adds around the runtime: a call, an import, a load, a whole build.

- ``Segmenter`` against a bare ``session.run`` of the very same session, in turns, 352x480.
- ``import edgeseg``, ``edgeseg.load``, ``edgeseg --help`` and ``edgeseg run`` of one image in fresh processes, beside one that
  only imports ONNX Runtime.
- A full INT8 build of the demo fpn at 256x256 with 64 calibration images, nothing cached: where the time goes.
- What builds of small and large networks say after the export that the rest will take, and what it took.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

import edgeseg
from benchmarks.record import RESULTS, Record, ratios, this_machine, versions
from edgeseg.demo import sample_folder
from edgeseg.evaluate.latency.protocol import LatencyProtocol, LatencySamples, measure_interleaved
from edgeseg.images.decoding import list_images
from edgeseg.progress import SilentReporter
from edgeseg.store.engine import Engine

TIMED_IMPORT = "import time; t = time.perf_counter(); import edgeseg; print(time.perf_counter() - t)"
TIMED_LOAD = """
import sys, time
import edgeseg
start = time.perf_counter()
edgeseg.load(sys.argv[1])
print(time.perf_counter() - start)
"""

UNTRAINED: dict[str, Any] = {
    "weights": "random",
    "classes": 4,
    "size": (256, 256),
    "calibration": sample_folder() / "calib" / "images",
    "min_int8_share": 0.0,
}
ESTIMATED: dict[str, dict[str, Any]] = {
    "demo fpn, 64 images, auto": {"arch": "fpn"},
    "demo fpn at 512x512, 64 images, auto": {"arch": "fpn", "size": (512, 512)},
    "demo unet, 64 images, auto": {"arch": "unet"},
    "segformer mit_b0, 64 images, auto": {"arch": "segformer", "encoder": "mit_b0", **UNTRAINED},
    "unet resnet50, 8 images, auto": {"arch": "unet", "encoder": "resnet50", "calibration_limit": 8, **UNTRAINED},
    "unet resnet50, 64 images, auto": {"arch": "unet", "encoder": "resnet50", **UNTRAINED},
    "unetplusplus resnet18 at 512x512, 16 images, openvino": {
        "arch": "unetplusplus",
        "encoder": "resnet18",
        "calibration_limit": 16,
        "target": "openvino",
        **UNTRAINED,
        "size": (512, 512),
    },
}


def main() -> None:
    options = arguments()
    console, machine = Console(), this_machine()
    protocol = LatencyProtocol(
        warmup_ms=500.0, min_duration_ms=options.duration_ms, min_iterations=options.iterations, block=1, settle=0
    )
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["EDGESEG_CACHE"] = str(Path(scratch) / "cache")
        stages, total = timed_build(Path(scratch) / "small")
        estimates = [estimated_build(name, asked, Path(scratch) / name) for name, asked in ESTIMATED.items()]
        large = edgeseg.build(
            arch="fpn", precision="int8", size=(352, 480), target="onnxruntime", output=Path(scratch) / "large"
        )
        samples = call_overhead(large, protocol)
        first = list_images(sample_folder() / "val" / "images")[0]
        seconds = {
            "import edgeseg": fresh_process(TIMED_IMPORT, options.processes),
            "edgeseg.load": fresh_process(TIMED_LOAD, options.processes, str(large.folder)),
            "edgeseg --help": timed_command(options.processes, "-m", "edgeseg", "--help"),
            "edgeseg run, one image": timed_command(
                options.processes,
                "-m",
                "edgeseg",
                "run",
                large.folder,
                first,
                "--output",
                Path(scratch) / "masks",
                "--force",
            ),
            "python -c 'import onnxruntime'": timed_command(options.processes, "-c", "import onnxruntime"),
        }
    speed = ratios(samples, ("session.run",))
    overhead = 1.0 / speed["session.run"]["Segmenter"]["median"] - 1.0
    rows: list[dict[str, Any]] = [
        {"name": name, "median_ms": s.median_ms, "samples_ms": [round(ms, 4) for ms in s.samples_ms]}
        for name, s in samples.items()
    ]
    rows.append({"name": "Segmenter overhead", "share": overhead})
    rows += [{"name": name, "median_s": median(s), "samples_s": s} for name, s in seconds.items()]
    rows.append({"name": "int8 build of fpn 256x256, 64 calibration images", "total_s": total, "stages_s": stages})
    rows += estimates
    record = Record(
        benchmark="overhead",
        workload="demo fpn, int8, onnxruntime",
        machine=machine,
        versions=versions(),
        settings={
            "protocol": dataclasses.asdict(protocol),
            "processes": options.processes,
            # pip compiles what it installs; a checkout is compiled in every process where Python is told not to keep that.
            "keeps_bytecode": not sys.dont_write_bytecode,
        },
        rows=rows,
        ratios=speed,
    )
    record.write(options.output)
    console.print(f"Segmenter over session.run, 352x480: {overhead:+.2%}")
    for name, values in seconds.items():
        console.print(f"{name}: {median(values) * 1000:.0f} ms")
    listed = ", ".join(f"{stage} {s:.1f}" for stage, s in stages.items())
    console.print(f"int8 build of fpn 256x256 with 64 calibration images: {total:.1f} s ({listed})")
    for row in estimates:
        console.print(f"{row['name']}: {row['said']}; took {row['took_s']:.1f} s")
    console.print(f"raw samples: {options.output}")


def timed_build(folder: Path) -> tuple[dict[str, float], float]:
    reporter = SilentReporter()
    started = time.perf_counter()
    edgeseg.build(arch="fpn", precision="int8", size=(256, 256), target="onnxruntime", output=folder, reporter=reporter)
    return reporter.seconds, time.perf_counter() - started


class UntilTheEnd(SilentReporter):
    """Notes when a build said how long the rest takes, and what it said."""

    said = "less than 10 s to go"
    since = 0.0

    def finish(self, detail: str, seconds: float) -> None:
        if self._stage == "export":
            self.since = time.perf_counter()
        super().finish(detail, seconds)

    def note(self, text: str) -> None:
        if " to go: " in text:
            self.said, _, _ = text.partition(":")


def estimated_build(name: str, asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    reporter = UntilTheEnd()
    edgeseg.build(precision="int8", output=folder, reporter=reporter, **asked)
    return {"name": f"build of {name}", "said": reporter.said, "took_s": time.perf_counter() - reporter.since}


def call_overhead(engine: Engine, protocol: LatencyProtocol) -> dict[str, LatencySamples]:
    """Time the same ONNX Runtime session, called bare and through the Segmenter."""
    segmenter = edgeseg.load(engine)
    # The very session the Segmenter uses: another one would have other memory and other threads.
    bare = segmenter._session._session  # type: ignore[union-attr]
    spec = engine.manifest.spec.input
    image = np.random.default_rng(0).integers(0, 256, (spec.height, spec.width, spec.channels), dtype=np.uint8)
    batch, name = image[None], bare.get_inputs()[0].name
    calls = {"session.run": lambda: bare.run(None, {name: batch}), "Segmenter": lambda: segmenter(image)}
    return measure_interleaved(calls, protocol)


def fresh_process(code: str, count: int, *arguments: str) -> list[float]:
    """Seconds that ``code`` prints, from ``count`` fresh processes."""
    times = []
    for _ in range(count):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
        times.append(float(done.stdout))
    return times


def timed_command(count: int, *arguments: object) -> list[float]:
    """Seconds that fresh Python processes with these arguments take, from start to end; one more comes first."""
    times = []
    for _ in range(count + 1):
        started = time.perf_counter()
        subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return times[1:]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--duration-ms", type=float, default=10000.0, help="mean counted time of a contender")
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--processes", type=int, default=11, help="fresh processes for each start-up time")
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
