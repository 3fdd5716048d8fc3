"""What the graphs for TensorRT lose: symmetric INT8 and FP16, executed in ONNX Runtime, against PyTorch.

On a CPU: the S8 Q/DQ graphs as they are written; the FP16 graphs with FP16 weights, and values in FP16 where ONNX Runtime
does not keep them in float32 between two operators it has no FP16 kernel for. Nothing is said about a GPU or its speed.
The demo models are judged on the demo's validation images, the CamVid model where that data is present.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

import edgeseg
from benchmarks.record import RESULTS, Record, this_machine, versions
from benchmarks.workload import camvid, camvid_folder
from edgeseg.backends.portable import open_graph
from edgeseg.demo import demo_models
from edgeseg.evaluate.accuracy.counts import AccuracyMeter, AgreementMeter
from edgeseg.spec import Precision
from edgeseg.store.manifest import Verification

PRECISIONS: tuple[Precision, ...] = ("fp16", "int8")


def main() -> None:
    options = arguments()
    machine = this_machine()
    with_camvid = not options.skip_camvid and camvid_folder() is not None
    if not with_camvid:
        print("camvid: left out; the demo models are judged")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for precision in PRECISIONS:
            for arch in demo_models():
                engine = edgeseg.build(
                    arch=arch, precision=precision, target="tensorrt", output=Path(scratch) / f"{arch}-{precision}"
                )
                assert engine.manifest.verification is not None
                rows.append(row(f"{arch} demo", precision, engine.manifest.verification))
                print(rows[-1], flush=True)
            if with_camvid:
                rows.append(camvid_row(precision, Path(scratch) / f"camvid-{precision}", options.limit))
                print(rows[-1], flush=True)
    record = Record(
        benchmark="tensorrt_accuracy",
        workload="graphs for TensorRT executed in ONNX Runtime, accuracy against PyTorch; not run on a GPU",
        machine=machine,
        versions=versions(),
        settings={},
        rows=rows,
    )
    record.write(options.output)
    Console(width=100).print(table(rows))


def row(name: str, precision: str, verification: Verification) -> dict[str, Any]:
    return {
        "name": f"{name}, {precision}",
        "miou_pytorch": verification.pytorch_accuracy.miou,
        "miou": verification.engine_accuracy.miou,
        "miou_drop": verification.miou_drop,
        "agreement": verification.agreement,
        "images": verification.images,
    }


def camvid_row(precision: Precision, folder: Path, limit: int | None) -> dict[str, Any]:
    """The CamVid network on cropped images, as the other benchmarks use them."""
    from benchmarks.peers.edgeseg_onnxruntime import build
    from edgeseg.backends.pytorch import PyTorchSession

    work = camvid(limit)
    engine = build(work, folder, "tensorrt", precision)
    classes = work.spec.model.classes
    meters = [AccuracyMeter(classes) for _ in range(2)]
    agreement = AgreementMeter(classes)
    with PyTorchSession(work.loaded, engine.manifest.spec) as reference, open_graph(engine) as session:
        for image, truth in zip(work.images, work.masks, strict=True):
            masks = [each.run(image[None])["mask"][0] for each in (reference, session)]
            for meter, mask in zip(meters, masks, strict=True):
                meter.update(mask, truth)
            agreement.update(masks[1], masks[0])
    before, after = (meter.figures() for meter in meters)
    assert before.miou is not None
    assert after.miou is not None
    return {
        "name": f"{work.name}, {precision}",
        "miou_pytorch": before.miou,
        "miou": after.miou,
        "miou_drop": before.miou - after.miou,
        "agreement": agreement.agreement,
        "images": len(work.images),
    }


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table("model", box=box.SIMPLE_HEAD)
    for column in ("mIoU PyTorch", "mIoU", "drop", "agreement"):
        shown.add_column(column, justify="right")
    for entry in rows:
        shown.add_row(
            entry["name"], *(f"{entry[key]:.4f}" for key in ("miou_pytorch", "miou", "miou_drop", "agreement"))
        )
    return shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip-camvid", action="store_true")
    parser.add_argument("--limit", type=int, help="CamVid images (default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS / "tensorrt_accuracy.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
