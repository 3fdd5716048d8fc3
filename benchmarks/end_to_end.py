"""mIoU and end-to-end latency of edgeseg and its peers on one workload, in one interleaved run.

End to end is from a decoded uint8 image in memory to a uint8 mask in memory. The protocol is in README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.peers import PEERS, Contender, prepare
from benchmarks.record import RESULTS, Record, ratios, this_machine, versions
from benchmarks.workload import Workload, camvid
from edgeseg.evaluate.accuracy import AccuracyMeter, AgreementMeter
from edgeseg.evaluate.dataset import IGNORED
from edgeseg.evaluate.latency import LatencyProtocol, LatencySamples, measure_interleaved

REFERENCE = "pytorch-eager"
BASELINES = (REFERENCE, "edgeseg-onnxruntime", "edgeseg-openvino")


def main() -> None:
    options = arguments()
    # Eight columns of figures; a log has no width of its own.
    console = Console(width=120)
    machine = this_machine()
    work = camvid(options.limit, options.calibration_limit)
    contenders: dict[str, Contender] = {}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep or Path(scratch)
        for name in options.peers:
            started = time.perf_counter()
            try:
                contenders[name] = prepare(name, work, root / name)
            except Exception as exc:
                if options.strict:
                    raise
                failed[name] = f"{type(exc).__name__}: {exc}"
                console.print(f"{name}: failed: {failed[name]}", markup=False)
                continue
            console.print(f"{name}: ready after {time.perf_counter() - started:.0f} s")
        accuracy = judge(work, contenders)
        protocol = LatencyProtocol(
            warmup_ms=options.warmup_ms, min_duration_ms=options.duration_ms, min_iterations=options.iterations
        )
        samples = measure_interleaved({n: rotating(c, work) for n, c in contenders.items()}, protocol)
    rows = [row(name, contenders[name], accuracy[name], samples[name]) for name in contenders]
    rows += [{"name": name, "failed": reason} for name, reason in failed.items()]
    record = Record(
        benchmark="end_to_end",
        workload=f"{work.name}, {len(work.images)} images, {len(work.calibration)} calibration images",
        machine=machine,
        versions=versions(),
        settings={"protocol": dataclasses.asdict(protocol)},
        rows=rows,
        ratios=ratios(samples, BASELINES),
    )
    record.write(options.output)
    console.print(table(record))
    console.print(f"raw samples: {options.output}")


def rotating(contender: Contender, work: Workload) -> Callable[[], Any]:
    """Call with one image after the other, so that no contender profits from one that stays in the cache."""
    images = itertools.cycle(work.images)
    return lambda: contender.call(next(images))


def judge(work: Workload, contenders: dict[str, Contender]) -> dict[str, dict[str, Any]]:
    """Accuracy of every contender on all images, and its agreement with the reference's masks."""
    classes = work.spec.model.classes
    expected = [contenders[REFERENCE].call(image) for image in work.images] if REFERENCE in contenders else None
    found = {}
    for name, contender in contenders.items():
        truth, agreement = AccuracyMeter(classes, ignore_index=IGNORED), AgreementMeter()
        for k, image in enumerate(work.images):
            mask = contender.call(image)
            truth.update(mask, work.masks[k])
            if expected is not None:
                agreement.update(mask, expected[k])
        figures = truth.figures()
        found[name] = {
            "miou": figures.miou,
            "dice": figures.dice,
            "pixel_accuracy": figures.pixel_accuracy,
            "per_class_iou": figures.per_class_iou,
            "agreement": agreement.agreement,
            "boundary_agreement": agreement.boundary_agreement,
        }
    return found


def row(name: str, contender: Contender, accuracy: dict[str, Any], samples: LatencySamples) -> dict[str, Any]:
    return {
        "name": name,
        **accuracy,
        "latency": dataclasses.asdict(samples.figures()),
        "samples_ms": [round(ms, 4) for ms in samples.samples_ms],
        "size_bytes": contender.size_bytes,
        "settings": contender.settings,
    }


def table(record: Record) -> Table:
    against = record.ratios.get(REFERENCE, {})
    shown = Table(title=record.workload, box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("contender", no_wrap=True)
    for column in ("mIoU", "agree", "median ms", "times eager", "95 %"):
        shown.add_column(column, justify="right", no_wrap=True)
    for entry in record.rows:
        if "failed" in entry:
            shown.add_row(entry["name"], "failed")
            continue
        ratio, agreement = against.get(entry["name"]), entry["agreement"]
        shown.add_row(
            entry["name"],
            f"{entry['miou']:.4f}",
            f"{agreement:.4f}" if agreement is not None else "-",
            f"{entry['latency']['median_ms']:.1f}",
            f"{ratio['median']:.2f}" if ratio else "-",
            f"{ratio['low']:.2f}-{ratio['high']:.2f}" if ratio else "-",
        )
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    parser.add_argument("--limit", type=int, help="validation images (default: all)")
    parser.add_argument("--calibration-limit", type=int, help="calibration images (default: all)")
    parser.add_argument("--duration-ms", type=float, default=10000.0, help="mean counted time of a contender")
    parser.add_argument("--warmup-ms", type=float, default=500.0)
    parser.add_argument("--iterations", type=int, default=60, help="counted calls of each contender, at least")
    parser.add_argument("--keep", type=Path, help="folder for the converted models (default: a temporary one)")
    parser.add_argument("--strict", action="store_true", help="stop when a peer cannot be prepared")
    parser.add_argument("--output", type=Path, default=RESULTS / "end_to_end.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
