"""Networks INT8 is known to dislike: what equalization of channels recovers of them, as trained and badly scaled.

    python -m benchmarks.hard_networks --folder /tmp/hard [--names segformer] [--minutes 4]

Each is trained for a few CPU minutes on generated scenes and kept as ``<folder>/<name>.safetensors``; the weights are not
committed. They are good enough to have class boundaries where the scenes have them, and no better: what INT8 loses of them is
compared with themselves in float, on validation scenes. Q/DQ graphs run in ONNX Runtime as they are written, optimizations off,
TensorRT's too: nothing is said about a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file, save_file

from benchmarks.badly_scaled import scaled_badly
from benchmarks.range_methods import confusion, masks_of, miou
from benchmarks.record import RESULTS, Record, this_machine, versions
from benchmarks.workload import demo
from edgeseg.convert.export import export_onnx
from edgeseg.convert.load import wrap_module
from edgeseg.quantize.calibration import AUTO, CalibrationSet
from edgeseg.quantize.qdq import write_qdq
from edgeseg.quantize.repair.fidelity import JUDGES
from edgeseg.quantize.repair.repaired import calibrate_repaired
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.spec import ModelRequest

# A folder of scripts, whose recipe this is.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibration"))
train_demo: Any = importlib.import_module("train_demo")

@dataclass(frozen=True)
class Network:
    """What ``smp.create_model`` is told, beside the classes."""

    arch: str
    encoder: str
    model_args: dict[str, Any] = field(default_factory=dict)


NETWORKS = {
    "segformer": Network("segformer", "mit_b0"),
    "dpt": Network("dpt", "tu-vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "upernet": Network("upernet", "tu-convnext_atto", {"decoder_channels": 64}),
    "unet": Network("unet", "efficientnet-b0"),
    "fpn": Network("fpn", "mobilenet_v2"),
    "manet": Network("manet", "tu-mobilenetv3_small_100"),
}
"""By architecture: layer normalization with GELU thrice (attention in the first two), SiLU with squeeze-and-excite, clips at 6,
hard-swish."""

SCENES = 600
CROP = 128


def build(name: str) -> torch.nn.Module:
    """The network with random weights."""
    network, classes = NETWORKS[name], len(train_demo.CLASS_NAMES)
    model: torch.nn.Module = smp.create_model(
        network.arch, network.encoder, encoder_weights=None, classes=classes, **network.model_args
    )
    return model


def trained(name: str, folder: Path) -> torch.nn.Module:
    """The network with the weights of ``folder``, in evaluation mode."""
    model = build(name)
    model.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return model.eval()


def train(name: str, folder: Path, minutes: float, threads: int, rate: float = 1e-3) -> None:
    """Train for ``minutes`` of processor time a thread."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    images, masks = train_demo.training_scenes(SCENES, folder / "scenes", threads)
    model = build(name).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    loss_of = torch.nn.CrossEntropyLoss(torch.tensor(train_demo.CLASS_WEIGHTS))
    stream, started, steps = train_demo.batches(images, masks, 0, CROP), time.process_time(), 0
    while (progress := (time.process_time() - started) / threads / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * train_demo.learning_rate(progress) / train_demo.PEAK_RATE
        batch, truth = next(stream)
        loss = loss_of(model(batch), truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 20 == 0:
            print(f"{name} step {steps} {progress:.0%} loss {loss.item():.3f}", flush=True)
    train_demo.refresh_batch_norm(model, images, masks, 0)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / f"{name}.safetensors")


def measure(name: str, folder: Path, limit: int) -> Iterator[dict[str, Any]]:
    """Agreement with the float graph and mIoU, with and without equalization."""
    module = trained(name, folder)
    for scaling, network in (("as trained", module), ("badly scaled", scaled_badly(module))):
        loaded = wrap_module(network, ModelRequest(mean=train_demo.MEAN, std=train_demo.STD))
        work = replace(demo("fpn", limit), name=name, loaded=loaded)
        spec = replace(work.spec, model=loaded.model, preprocess=loaded.preprocess)
        spec = replace(spec, input=replace(spec.input, stride=loaded.stride))
        graph, _ = export_onnx(loaded, spec, folder / "fp32.onnx")
        reference = masks_of(graph, work.images)
        row = {"network": name, "scaling": scaling}
        yield row | {"scheme": "fp32", "miou": float(miou(confusion(reference, work).sum(axis=0)))}
        for equalized in (None, folder / "equalized.onnx"):
            calibrated, table = calibrate_repaired(
                graph, CalibrationSet.open(work.calibration), equalized, method=AUTO, judges=JUDGES
            )
            for scheme in JUDGES:
                masks = masks_of(write_qdq(calibrated, table, SCHEMES[scheme], folder / "int8.onnx"), work.images)
                agreement = [float((a == b).mean()) for a, b in zip(masks, reference, strict=True)]
                yield row | {
                    "scheme": scheme,
                    "equalized": equalized is not None,
                    "methods": dict(Counter(limits.method for limits in table.ranges.values())),
                    "agreement": float(np.mean(agreement)),
                    "agreement_by_image": [round(value, 5) for value in agreement],
                    "miou": float(miou(confusion(masks, work).sum(axis=0))),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4, help="of processor time a thread, for each network")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=24, help="validation images")
    parser.add_argument("--output", type=Path, default=RESULTS / "hard_networks.json")
    options = parser.parse_args()
    machine, rows = this_machine(), []
    for name in options.names:
        if not (options.folder / f"{name}.safetensors").is_file():
            train(name, options.folder, options.minutes, options.threads)
        for row in measure(name, options.folder, options.limit):
            rows.append(row)
            print(row, flush=True)
    Record(
        benchmark="hard_networks",
        workload="networks INT8 dislikes, trained for CPU minutes, as trained and badly scaled; Q/DQ graphs executed in ONNX "
        "Runtime, optimizations off",
        machine=machine,
        versions=versions(),
        settings={"names": options.names, "minutes": options.minutes, "limit": options.limit},
        rows=rows,
    ).write(options.output)


if __name__ == "__main__":
    main()
