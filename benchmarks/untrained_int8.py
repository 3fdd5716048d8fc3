"""Untrained networks whose INT8 is far from PyTorch, beside what ONNX Runtime's own quantizer makes of the same graph.

    python -m benchmarks.untrained_int8 [--below 0.9] [--only tu-fbnetv3_b ...]

Of ``results/encoders.json``, those whose INT8 agrees with PyTorch on less than ``--below``: is it the quantizer, or the
network? Both get the same eight calibration images, evenly spread or the first eight of the demo's 64; masks are of the same
eight held-out images, against the float graph, run without optimization. Two more figures tell of the network:
``noise`` is how far the float graph agrees with itself when each pixel is changed by at most one level of 255, and
``spread`` how many times larger the logits of the most extreme calibration image are than of the median one: what must be
covered by one range.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

import edgeseg
from benchmarks.encoders import CLASSES, DEMO, FILE, SIDE, has_one_size
from benchmarks.record import RESULTS, Record, read_record, this_machine, versions
from edgeseg.images.decoding import list_images, read_image

IMAGES = 8
CALIBRATION = list_images(DEMO / "calib" / "images")
CHOICES = {"spread": CALIBRATION[:: len(CALIBRATION) // IMAGES], "first": CALIBRATION[:IMAGES]}


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds uint8 images to a graph that takes them as they are."""

    def __init__(self, images: list[NDArray[np.uint8]]) -> None:
        self._images = iter(images)

    def get_next(self) -> dict[str, Any] | None:
        image = next(self._images, None)
        return None if image is None else {"image": image}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--below", type=float, default=0.9, help="agreement of INT8 in results/encoders.json")
    parser.add_argument("--only", nargs="+", metavar="ENCODER")
    parser.add_argument("--output", type=Path, default=RESULTS / "untrained_int8.json")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for built in read_record(FILE).rows:
        agreement = built.get("int8", {}).get("agreement")
        chosen = built["name"] in options.only if options.only else agreement is not None and agreement < options.below
        if not chosen or has_one_size(built["name"]):
            continue
        for row in measure(built["arch"], built["name"]):
            rows.append(row)
            print(row, flush=True)
            Record(
                benchmark="untrained_int8",
                workload=f"{SIDE}x{SIDE}, {CLASSES} classes, random weights; agreement with the float graph's masks",
                machine=this_machine(),
                versions=versions(),
                settings={
                    "below": options.below,
                    "calibration_images": IMAGES,
                    "images": IMAGES,
                    "peer": "quantize_static",
                },
                rows=rows,
            ).write(options.output)


def measure(arch: str, encoder: str) -> Iterator[dict[str, Any]]:
    """A row for each choice of calibration images."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = [resized(path) for path in list_images(DEMO / "val" / "images")[:IMAGES]]
        arguments: dict[str, Any] = {
            "encoder": encoder,
            "weights": "random",
            "classes": CLASSES,
            "size": (SIDE, SIDE),
            "target": "onnxruntime",
        }
        plain = edgeseg.build(arch, precision="fp32", output=folder / "fp32", **arguments).folder / "model.onnx"
        reference = masks(plain, images)
        generator = np.random.default_rng(0)
        moved = [np.clip(i + generator.integers(-1, 2, i.shape), 0, 255).astype(np.uint8) for i in images]
        logits = edgeseg.build(
            arch, precision="fp32", output_kind="logits", output=folder / "logits", **arguments
        ).folder
        for choice, paths in CHOICES.items():
            calibration = [resized(path) for path in paths]
            largest = [float(np.abs(m).max()) for m in masks(logits / "model.onnx", calibration)]
            theirs = folder / f"{choice}.onnx"
            quantize_static(
                str(plain),
                str(theirs),
                Reader(calibration),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            (folder / choice).mkdir()
            for path in paths:
                shutil.copy(path, folder / choice)
            ours = edgeseg.build(
                arch, precision="int8", calibration=folder / choice, output=folder / f"int8-{choice}", **arguments
            )
            yield {
                "name": f"{arch} {encoder}, {choice} images",
                "edgeseg": agreement(reference, masks(ours.folder / "model.onnx", images)),
                "onnxruntime": agreement(reference, masks(theirs, images)),
                "noise": agreement(reference, masks(plain, moved)),
                "spread": round(max(largest) / float(np.median(largest)), 1),
            }


def resized(path: Path) -> NDArray[np.uint8]:
    from PIL import Image

    return np.asarray(Image.fromarray(read_image(path)).resize((SIDE, SIDE), Image.Resampling.BILINEAR))[None]


def masks(graph: Path, images: list[NDArray[np.uint8]]) -> list[NDArray[Any]]:
    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])
    return [session.run(None, {"image": image})[0] for image in images]


def agreement(reference: list[NDArray[Any]], others: list[NDArray[Any]]) -> float:
    return round(float(np.mean([np.mean(a == b) for a, b in zip(reference, others, strict=True)])), 4)


if __name__ == "__main__":
    main()
