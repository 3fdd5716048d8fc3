"""Networks INT8 is known to dislike: what it loses plainly, after repair, and as mixed precision that meets a goal.

    python -m benchmarks.hard_networks --folder /tmp/hard [--names segformer ...] [--targets openvino ...]

Each is trained for a few CPU minutes on generated scenes and kept as ``<folder>/<name>.safetensors``; the weights are not
committed. They are good enough to have class boundaries where the scenes have them, and no better: what INT8 loses of them is
compared with themselves in PyTorch, on the validation scenes of the demo. ``plain`` is INT8 of per-tensor ranges from minimum to
maximum; ``repaired`` what ``edgeseg build`` makes without a limit; ``goal`` what it delivers with ``--max-drop``. Graphs for
TensorRT are executed in ONNX Runtime as they are written; nothing is said about a GPU. Rows that the output holds are kept.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file, save_file

import edgeseg
from benchmarks.badly_scaled import scaled_badly
from benchmarks.record import RESULTS, Record, ratios, read_record, this_commit, this_machine, versions
from edgeseg.demo import sample_folder
from edgeseg.evaluate.latency.protocol import LatencyProtocol, LatencySamples, measure_interleaved
from edgeseg.images.decoding import list_images, read_image
from edgeseg.spec import Precision
from edgeseg.store.engine import Engine, open_engine
from edgeseg.store.manifest import Verification

# A folder of scripts, whose recipe this is.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibration"))
train_demo: Any = importlib.import_module("train_demo")


@dataclass(frozen=True)
class Network:
    """What ``smp.create_model`` is told, beside the classes, and how many minutes of processor time it is trained."""

    arch: str
    encoder: str
    model_args: dict[str, Any] = field(default_factory=dict)
    minutes: float = 4.0


NETWORKS = {
    "segformer": Network("segformer", "mit_b0"),
    "dpt": Network("dpt", "tu-vit_tiny_patch16_224", {"dynamic_img_size": True}, minutes=6.0),
    "upernet": Network("upernet", "tu-convnext_atto", {"decoder_channels": 64}),
    "unet": Network("unet", "efficientnet-b0"),
    "fpn": Network("fpn", "mobilenet_v2", minutes=3.0),
    "manet": Network("manet", "tu-mobilenetv3_small_100"),
}
"""By architecture: layer normalization with GELU thrice (attention in the first two), SiLU with squeeze-and-excite, clips at 6,
hard-swish."""

SCENES = 600
CROP = 128
SIZE = 256
DEMO = sample_folder()
BADLY_SCALED = "badly scaled"
SCALINGS = ("as trained", BADLY_SCALED)
TARGETS = ("onnxruntime", "openvino", "tensorrt")


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


def train(name: str, folder: Path, threads: int, rate: float = 1e-3) -> None:
    """Train for the network's minutes of processor time a thread."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    images, masks = train_demo.training_scenes(SCENES, folder / "scenes", threads)
    model = build(name).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-3)
    loss_of = torch.nn.CrossEntropyLoss(torch.tensor(train_demo.CLASS_WEIGHTS))
    stream, started, steps = train_demo.batches(images, masks, 0, CROP), time.process_time(), 0
    while (progress := (time.process_time() - started) / threads / (60 * NETWORKS[name].minutes)) < 1:
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


def measure(
    name: str, scaling: str, targets: list[str], options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """For each target a row, and how much faster than fp32 its engine is, where it runs here."""
    module, scratch = trained(name, options.folder), options.folder / "engines"
    if scaling == BADLY_SCALED:
        module = scaled_badly(module)
    for target in targets:

        def build(kind: str, precision: Precision = "int8", *, target: str = target, **settings: Any) -> Engine:
            return edgeseg.build(
                module,
                precision=precision,
                size=SIZE,
                mean=train_demo.MEAN,
                std=train_demo.STD,
                calibration=DEMO / "calib" / "images" if precision == "int8" else None,
                validation=DEMO / "val",
                target=target,
                # A low share is a finding here, not a failure.
                min_int8_share=0.0,
                output=scratch / kind,
                force=True,
                **settings,
            )

        row: dict[str, Any] = {"name": f"{name}, {scaling}, {target}", "commit": this_commit()}
        plain = build("plain", equalize=False, calibration_method="minmax")
        row["plain"] = figures(plain)
        row["pytorch_miou"] = verified(plain).pytorch_accuracy.miou
        row["repaired"] = figures(build("repaired"))
        started = time.process_time()
        engine = build("goal", max_drop=options.max_drop, search_minutes=options.search_minutes)
        row["goal"] = figures(engine) | {"build_cpu_s": round(time.process_time() - started, 1)}
        speed = None
        if target in ("onnxruntime", "openvino"):
            samples = in_turns(
                {"fp32": build("fp32", "fp32"), "goal": engine, "repaired": open_engine(scratch / "repaired")}
            )
            row["samples_ms"] = {kind: [round(ms, 4) for ms in s.samples_ms] for kind, s in samples.items()}
            speed = ratios(samples, ("fp32",))["fp32"]
        yield row, speed


def verified(engine: Engine) -> Verification:
    assert engine.manifest.verification is not None
    return engine.manifest.verification


def figures(engine: Engine) -> dict[str, Any]:
    verification, search = verified(engine), engine.manifest.search
    return {
        "miou_drop": verification.miou_drop,
        "agreement": verification.agreement,
        "mac_share": engine.manifest.precision.mac_share,
        "float_modules": None if search is None else search.float_modules,
        "candidates": None if search is None else len(search.candidates),
    }


def in_turns(engines: dict[str, Engine]) -> dict[str, LatencySamples]:
    """Samples of all engines on one image, taken in turns."""
    with ExitStack() as sessions:
        loaded = {kind: edgeseg.load(engine) for kind, engine in engines.items()}
        for segmenter in loaded.values():
            sessions.enter_context(segmenter)
        image = read_image(list_images(DEMO / "val" / "images")[0], 3)
        protocol = LatencyProtocol(warmup_ms=300.0, min_duration_ms=6000.0, min_iterations=100)
        return measure_interleaved({kind: partial(segmenter, image) for kind, segmenter in loaded.items()}, protocol)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scalings", nargs="+", choices=SCALINGS, default=list(SCALINGS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--max-drop", type=float, default=0.005, help="of the goal")
    parser.add_argument("--search-minutes", type=float, default=10.0, help="for one engine")
    parser.add_argument("--shared-machine", action="store_true", help="record that other programs ran beside")
    parser.add_argument("--output", type=Path, default=RESULTS / "hard_networks.json")
    options = parser.parse_args()
    before = read_record(options.output) if options.output.is_file() else None
    rows = {} if before is None else {row["name"]: row for row in before.rows}
    speeds = {} if before is None else before.ratios["fp32"]
    for name in options.names:
        if not (options.folder / f"{name}.safetensors").is_file():
            train(name, options.folder, options.threads)
        for scaling in options.scalings:
            targets = [target for target in options.targets if f"{name}, {scaling}, {target}" not in rows]
            for row, speed in measure(name, scaling, targets, options):
                rows[row["name"]] = row
                speeds |= {f"{row['name']}, {kind}": ratio for kind, ratio in (speed or {}).items()}
                print(*(f"{key}: {value}" for key, value in row.items() if key != "samples_ms"), speed, flush=True)
                # After each: a run takes hours.
                Record(
                    benchmark="hard_networks",
                    workload=f"networks INT8 dislikes, trained for CPU minutes, {SIZE}x{SIZE}, demo scenes; TensorRT's "
                    "graphs executed in ONNX Runtime, not run on a GPU",
                    machine=this_machine(),
                    versions=versions(),
                    settings={
                        "minutes": {name: network.minutes for name, network in NETWORKS.items()},
                        **{
                            key: vars(options)[key]
                            for key in ("threads", "max_drop", "search_minutes", "shared_machine")
                        },
                    },
                    rows=list(rows.values()),
                    ratios={"fp32": speeds},
                ).write(options.output)


if __name__ == "__main__":
    main()
