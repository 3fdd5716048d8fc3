"""mIoU and end-to-end latency of edgeseg and its peers, all contenders of a network in one interleaved run.

End to end is from a decoded uint8 image in memory to a uint8 mask in memory. The protocol is in README.md. Measured are
the four demo models, which need nothing but the repository, and the CamVid network where that data is present:

    python -m benchmarks.end_to_end [--workload demo] [--models fpn unet] [--peers pytorch-eager edgeseg-onnxruntime] ...
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.peers import PEERS, Contender, NotInstalledError, prepare
from benchmarks.record import RESULTS, Machine, Record, ratios, this_machine, versions
from benchmarks.workload import Workload, camvid, camvid_folder, demo
from edgeseg.demo import demo_models
from edgeseg.evaluate.accuracy.counts import AccuracyMeter, AgreementMeter
from edgeseg.evaluate.latency.protocol import LatencyProtocol, LatencySamples, measure_interleaved

REFERENCE = "pytorch-eager"
BASELINES = (REFERENCE, "edgeseg-onnxruntime", "edgeseg-openvino")
WORKLOADS = {"camvid": "end_to_end.json", "demo": "end_to_end_demo.json"}
"""Names of workloads, and the file of each in ``results/``."""


def main() -> None:
    options = arguments()
    # Eight columns of figures; a log has no width of its own.
    console = Console(width=120)
    machine = this_machine()
    for name in options.workload or present(console):
        record = combined([measured(work, options, console) for work in networks(name, options)], machine, options)
        output = options.output or RESULTS / WORKLOADS[name]
        record.write(output)
        console.print(f"raw samples: {output}")


def present(console: Console) -> list[str]:
    """The workloads that this machine has the data of."""
    if camvid_folder() is not None:
        return list(WORKLOADS)
    console.print("camvid: left out, there is no such data here (EDGESEG_CAMVID); the demo models are measured")
    return ["demo"]


def networks(name: str, options: argparse.Namespace) -> Iterator[Workload]:
    """Loaded one after the other: each is measured before the next one takes memory."""
    if name == "camvid":
        yield camvid(options.limit, options.calibration_limit)
    else:
        for arch in options.models:
            yield demo(arch, options.limit, options.calibration_limit)


@dataclass(frozen=True)
class Measured:
    """One network with all its contenders."""

    workload: str
    rows: list[dict[str, Any]]
    ratios: dict[str, dict[str, Any]]
    versions: dict[str, str]


def measured(work: Workload, options: argparse.Namespace, console: Console) -> Measured:
    """Prepare every peer, judge the masks, then measure all in turns."""
    contenders: dict[str, Contender] = {}
    missing: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        root = options.keep / work.name.replace(" ", "-") if options.keep else Path(scratch)
        for name in options.peers:
            started = time.perf_counter()
            try:
                contender = prepare(name, work, root / name)
                contender.call(work.images[0])  # some runtimes refuse a graph only when it runs
            except NotInstalledError as exc:
                missing.append({"name": name, "left_out": str(exc)})
                console.print(f"{name}: left out: {exc}", markup=False)
                continue
            except Exception as exc:
                if options.strict:
                    raise
                missing.append({"name": name, "failed": f"{type(exc).__name__}: {exc}"})
                console.print(f"{name}: failed: {missing[-1]['failed']}", markup=False)
                continue
            contenders[name] = contender
            console.print(f"{name}: ready after {time.perf_counter() - started:.0f} s")
        accuracy = judge(work, contenders)
        samples = measure_interleaved({n: rotating(c, work) for n, c in contenders.items()}, protocol(options))
    results = Measured(
        workload=f"{work.name}, {len(work.images)} images, {len(work.calibration)} calibration images",
        rows=[*(row(name, contenders[name], accuracy[name], samples[name]) for name in contenders), *missing],
        ratios=ratios(samples, BASELINES),
        versions={package: version for c in contenders.values() for package, version in c.versions.items()},
    )
    console.print(table(results))
    return results


def protocol(options: argparse.Namespace) -> LatencyProtocol:
    return LatencyProtocol(
        warmup_ms=options.warmup_ms, min_duration_ms=options.duration_ms, min_iterations=options.iterations
    )


def combined(runs: Iterable[Measured], machine: Machine, options: argparse.Namespace) -> Record:
    """One record of all networks; of several, a row or a baseline bears the name of its network."""
    every = list(runs)
    rows, against = [], {}
    for run in every:
        label = "" if len(every) == 1 else " ".join(run.workload.split()[:2]) + ": "
        rows += [{**entry, "name": label + entry["name"]} for entry in run.rows]
        against.update({label + base: of for base, of in run.ratios.items()})
    return Record(
        benchmark="end_to_end",
        workload="; ".join(run.workload for run in every),
        machine=machine,
        versions={**versions(), **{package: version for run in every for package, version in run.versions.items()}},
        settings={"protocol": dataclasses.asdict(protocol(options))},
        rows=rows,
        ratios=against,
    )


def rotating(contender: Contender, work: Workload) -> Callable[[], Any]:
    """Call with one image after the other, so that no contender profits from one that stays in the cache."""
    images = itertools.cycle(work.images)
    return lambda: contender.call(next(images))


def judge(work: Workload, contenders: dict[str, Contender]) -> dict[str, dict[str, Any]]:
    """Accuracy of every contender on all images, and its agreement with the reference's masks."""
    classes = work.spec.model.classes
    expected = [contenders[REFERENCE].call(image) for image in work.images] if REFERENCE in contenders else None
    scores = {}
    for name, contender in contenders.items():
        truth, agreement = AccuracyMeter(classes), AgreementMeter(classes)
        for k, image in enumerate(work.images):
            mask = contender.call(image)
            truth.update(mask, work.masks[k])
            if expected is not None:
                agreement.update(mask, expected[k])
        figures = truth.figures()
        scores[name] = {
            "miou": figures.miou,
            "dice": figures.dice,
            "pixel_accuracy": figures.pixel_accuracy,
            "per_class_iou": figures.per_class_iou,
            "agreement": agreement.agreement,
            "boundary_agreement": agreement.boundary,
        }
    return scores


def row(name: str, contender: Contender, accuracy: dict[str, Any], samples: LatencySamples) -> dict[str, Any]:
    return {
        "name": name,
        **accuracy,
        "latency": dataclasses.asdict(samples.figures()),
        "samples_ms": [round(ms, 4) for ms in samples.samples_ms],
        "size_bytes": contender.size_bytes,
        "settings": contender.settings,
    }


def table(results: Measured) -> Table:
    against = results.ratios.get(REFERENCE, {})
    shown = Table(title=results.workload, box=box.SIMPLE_HEAD, pad_edge=False)
    shown.add_column("contender", no_wrap=True)
    for column in ("mIoU", "agree", "median ms", "times eager", "95 %"):
        shown.add_column(column, justify="right", no_wrap=True)
    for entry in results.rows:
        if "latency" not in entry:
            shown.add_row(entry["name"], "failed" if "failed" in entry else "-", *["-"] * 4)
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
    parser.add_argument(
        "--workload", nargs="+", choices=list(WORKLOADS), help="default: demo, and camvid where its data is present"
    )
    parser.add_argument("--models", nargs="+", default=list(demo_models()), choices=demo_models(), help="of demo")
    parser.add_argument("--peers", nargs="+", default=list(PEERS), choices=list(PEERS), metavar="NAME")
    parser.add_argument("--limit", type=int, help="validation images (default: all)")
    parser.add_argument("--calibration-limit", type=int, help="calibration images (default: all)")
    parser.add_argument("--duration-ms", type=float, default=10000.0, help="mean counted time of a contender")
    parser.add_argument("--warmup-ms", type=float, default=500.0)
    parser.add_argument("--iterations", type=int, default=60, help="counted calls of each contender, at least")
    parser.add_argument("--keep", type=Path, help="folder for the converted models (default: a temporary one)")
    parser.add_argument("--strict", action="store_true", help="stop when a peer cannot be prepared")
    parser.add_argument("--output", type=Path, help="of one --workload (default: its file in results/)")
    options = parser.parse_args()
    if options.output and len(options.workload or ()) != 1:
        parser.error("--output takes the results of one workload: give --workload camvid or --workload demo")
    return options


if __name__ == "__main__":
    main()
