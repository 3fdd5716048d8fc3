"""The harness against a bare loop: does ``edgeseg bench`` report what ONNX Runtime takes, and split it rightly?

One session of the demo fpn at 352x480 (INT8). Measured in turns: a bare ``session.run`` of the engine's graph, timed by
nothing but two reads of the clock, and the harness's own call (Segmenter, stage clock). The harness is sound when its
median is within 3 % of the bare loop's.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console

import edgeseg
from benchmarks.record import RESULTS, Record, ratios, this_machine, versions
from edgeseg.backends import get_backend
from edgeseg.evaluate.latency.measure import StageClock
from edgeseg.evaluate.latency.protocol import LatencySamples
from edgeseg.runtime.segmenter import Segmenter

ALLOWED = 0.03


def main() -> None:
    options = arguments()
    machine = this_machine()
    with tempfile.TemporaryDirectory() as scratch:
        engine = edgeseg.build(
            arch="fpn", precision="int8", size=options.size, target="onnxruntime", output=Path(scratch) / "fpn"
        )
        session = get_backend("onnxruntime").load(engine)
        spec = engine.manifest.spec
        image = np.random.default_rng(0).integers(0, 256, (*options.size, 3), dtype=np.uint8)
        bare = session._session  # type: ignore[attr-defined]
        clock = StageClock(session)
        segmenter = Segmenter(clock, spec)
        name, batch = bare.get_inputs()[0].name, image[None]
        taken: dict[str, list[float]] = {"bare loop": [], "harness": []}
        for _ in range(20):
            bare.run(None, {name: batch})
        for index in range(options.rounds):
            # Whoever begins changes every round.
            for which in ("bare loop", "harness") if index % 2 else ("harness", "bare loop"):
                begin = time.perf_counter_ns()
                if which == "harness":
                    clock.timed(lambda: segmenter(image))
                else:
                    bare.run(None, {name: batch})
                taken[which].append((time.perf_counter_ns() - begin) / 1e6)
        split = clock.split()
        segmenter.close()
    samples = {which: LatencySamples(tuple(ms), 20) for which, ms in taken.items()}
    compared = ratios(samples, ("bare loop",))
    difference = 1 / compared["bare loop"]["harness"]["median"] - 1
    record = Record(
        benchmark="harness_check",
        workload=f"demo fpn, int8, onnxruntime, {options.size[0]}x{options.size[1]}",
        machine=machine,
        versions=versions(),
        settings={"rounds": options.rounds, "allowed": ALLOWED, "stages": dataclasses.asdict(split)},
        rows=[
            {"name": which, "median_ms": s.median_ms, "samples_ms": [round(ms, 4) for ms in s.samples_ms]}
            for which, s in samples.items()
        ],
        ratios=compared,
    )
    record.write(options.output)
    console = Console()
    for which, s in samples.items():
        console.print(f"{which}: median {s.median_ms:.3f} ms, p99 {s.percentile_ms(99):.3f} ms")
    console.print(f"harness over bare loop: {difference:+.2%} (median of {options.rounds} pairs), at most 3 % allowed")
    console.print(f"raw samples: {options.output}")
    sys.exit(0 if abs(difference) <= ALLOWED else 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=lambda text: tuple(int(n) for n in text.split("x")), default=(352, 480))
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--output", type=Path, default=RESULTS / "harness_check.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
