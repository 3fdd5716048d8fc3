"""Train the demo networks that edgeseg ships, from scratch, on rendered scenes, on a CPU.

    python calibration/train_demo.py [--arch fpn ...] [--minutes 8] [--seed 0]

For every architecture this writes `edgeseg/demo/<arch>.safetensors` (fp16) and `edgeseg/demo/<arch>.json`, then
`calibration/demo/RESULTS.md`. What is reported is what is shipped: the weights are measured after the round trip
through fp16, on the committed validation set. The learning rate follows the processor time spent, so a slow machine
makes fewer steps of the same schedule, and a busy one takes longer for the same result; the seed fixes initialization
and sampling, not the last digit of the result.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from demo_canvas import CLASS_NAMES
from generate_demo import TRAINING_SEEDS, encode_image, render_scene
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "edgeseg" / "demo"
DATA = ROOT / "calibration" / "demo"

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 256
CROP = 160  # crops cost 0.4 of a full image, and shift what stands where
BATCH = 12
PEAK_RATE = 3e-3
WARM_UP = 0.08  # share of the time
SCENES = 2400
MAX_BYTES = 3_000_000
# Of sky road building vegetation car person pole sign in the cross entropy: the thin ones have 2 % of the pixels, and
# without this a short training leaves them out.
CLASS_WEIGHTS = (1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 3.0, 2.5)

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Recipe:
    """One demo network: everything `smp.create_model` is told."""

    encoder: str
    model_args: dict[str, Any] = field(default_factory=dict)


# Encoders of plain convolutions and ReLU: no squeeze-and-excite, no hard-swish, nothing INT8 is known to dislike.
# fpn comes first because other work waits for it.
RECIPES: dict[str, Recipe] = {
    "fpn": Recipe(
        "tu-mobilenetv4_conv_small_050",
        {"decoder_pyramid_channels": 96, "decoder_segmentation_channels": 64, "decoder_dropout": 0.0},
    ),
    "unet": Recipe("tu-mobilenetv4_conv_small_050", {"decoder_channels": [64, 48, 32, 24, 16]}),
    "deeplabv3plus": Recipe("tu-mobilenetv4_conv_small_050", {"decoder_channels": 96}),
    "pspnet": Recipe("tu-mobilenetv4_conv_small", {"psp_out_channels": 128}),
}


def build(arch: str) -> torch.nn.Module:
    """The architecture with random weights."""
    recipe = RECIPES[arch]
    model: torch.nn.Module = smp.create_model(
        arch, recipe.encoder, encoder_weights=None, classes=len(CLASS_NAMES), **recipe.model_args
    )
    return model


def render_training_scene(seed: int) -> tuple[Images, Images]:
    """A scene after JPEG, since that is how users' images come."""
    image, mask = render_scene(seed, SIZE, SIZE)
    with Image.open(io.BytesIO(encode_image(image))) as picture:
        return np.asarray(picture), mask


def training_scenes(count: int, cache: Path, processes: int) -> tuple[Images, Images]:
    """Images and masks of the first `count` training seeds, rendered once and memory-mapped afterwards."""
    images_file, masks_file = cache / f"images-{count}.npy", cache / f"masks-{count}.npy"
    if not (images_file.exists() and masks_file.exists()):
        cache.mkdir(parents=True, exist_ok=True)
        images = np.empty((count, SIZE, SIZE, 3), np.uint8)
        masks = np.empty((count, SIZE, SIZE), np.uint8)
        started = time.monotonic()
        with ProcessPoolExecutor(processes) as pool:
            seeds = TRAINING_SEEDS[:count]
            for index, (image, mask) in enumerate(pool.map(render_training_scene, seeds, chunksize=16)):
                images[index], masks[index] = image, mask
        for file, array in ((masks_file, masks), (images_file, images)):
            part = file.with_name(f"{file.stem}.{os.getpid()}.part.npy")
            np.save(part, array)
            part.replace(file)
        print(f"rendered {count} scenes in {time.monotonic() - started:.0f} s", flush=True)
    return np.load(images_file, mmap_mode="r"), np.load(masks_file, mmap_mode="r")


def normalized(images: Images) -> torch.Tensor:
    """(n, h, w, 3) uint8 -> what the networks take."""
    scaled = (images.astype(np.float32) / 255 - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2)  # channels-last in memory as it comes


def batches(images: Images, masks: Images, seed: int, crop: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless random crops, half of them mirrored; variety otherwise is the generator's business."""
    rng = np.random.default_rng(seed)
    while True:
        for chosen in np.array_split(rng.permutation(len(images)), len(images) // BATCH):
            pairs = []
            for index in chosen:
                y, x = rng.integers(0, SIZE - crop + 1, 2)
                step = -1 if rng.random() < 0.5 else 1
                window = (slice(y, y + crop), slice(x, x + crop))
                pairs.append((images[index][window][:, ::step], masks[index][window][:, ::step]))
            yield (
                normalized(np.stack([image for image, _ in pairs])),
                torch.from_numpy(np.stack([mask for _, mask in pairs]).astype(np.int64)),
            )


def learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine to nothing."""
    if progress < WARM_UP:
        return PEAK_RATE * (0.05 + 0.95 * progress / WARM_UP)
    return PEAK_RATE * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARM_UP) / (1 - WARM_UP))))


def refresh_batch_norm(model: torch.nn.Module, images: Images, masks: Images, seed: int) -> None:
    """Re-estimate the running statistics on whole images with the final weights.

    Those kept while training lag behind the weights and were taken on crops; quantization folds them into the
    convolutions, so they had better be right.
    """
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over what follows
    model.train()
    stream = batches(images, masks, seed + 1, SIZE)
    with torch.no_grad():
        for _ in range(20):
            model(next(stream)[0])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def save_weights(model: torch.nn.Module, file: Path) -> None:
    """Write fp16 safetensors, by rename so that nobody reads half a file."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stored = (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        if tensor.is_floating_point() and not bool(torch.isfinite(stored).all()):
            raise SystemExit(f"{name} is not finite in fp16: train again with another --seed")
        tensors[name] = stored
    part = file.with_suffix(".tmp")
    save_file(tensors, part, metadata={"format": "pt"})
    if part.stat().st_size >= MAX_BYTES:
        raise SystemExit(f"{file.name} has {part.stat().st_size} bytes, more than {MAX_BYTES}: shrink its recipe")
    part.chmod(0o644)  # safetensors makes files only their owner can read
    part.replace(file)


def load_weights(file: Path) -> dict[str, torch.Tensor]:
    """The state dict of a weights file, widened to fp32."""
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def validate(arch: str, file: Path) -> dict[str, Any]:
    """Accuracy of a weights file on the committed validation set, confusion summed over all images."""
    model = build(arch)
    model.load_state_dict(load_weights(file))
    model.eval()
    count = len(CLASS_NAMES)
    confusion = np.zeros((count, count), np.int64)
    for mask_file in sorted((DATA / "val" / "masks").glob("*.png")):
        with Image.open(DATA / "val" / "images" / f"{mask_file.stem}.jpg") as picture:
            image = np.asarray(picture.convert("RGB"))
        with Image.open(mask_file) as picture:
            truth = np.asarray(picture).astype(np.int64)
        with torch.no_grad():
            found = model(normalized(image[None])).argmax(1)[0].numpy()
        confusion += np.bincount((truth * count + found).ravel(), minlength=count * count).reshape(count, count)
    hit = np.diag(confusion)
    iou = hit / (confusion.sum(0) + confusion.sum(1) - hit)
    return {
        "miou": round(float(iou.mean()), 4),
        "per_class_iou": {name: round(float(value), 4) for name, value in zip(CLASS_NAMES, iou, strict=True)},
        "pixel_accuracy": round(float(hit.sum() / confusion.sum()), 4),
    }


def publish(arch: str, model: torch.nn.Module, trained_with: dict[str, Any]) -> None:
    """Write weights, config and the table of results."""
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    weights = WEIGHTS / f"{arch}.safetensors"
    save_weights(model, weights)
    config = {
        "arch": arch,
        "encoder": RECIPES[arch].encoder,
        "classes": len(CLASS_NAMES),
        "class_names": list(CLASS_NAMES),
        "task": "multiclass",
        "model_args": RECIPES[arch].model_args,
        "preprocess": {"mean": list(MEAN), "std": list(STD), "channel_order": "rgb"},
        "size": [SIZE, SIZE],
        "validation": validate(arch, weights),
        "trained_with": trained_with,
    }
    part = WEIGHTS / f"{arch}.json.tmp"
    part.write_text(json.dumps(config, indent=2) + "\n")
    part.replace(WEIGHTS / f"{arch}.json")
    table = results_table()
    (DATA / "RESULTS.md").write_text(table)
    print(table, flush=True)


def results_table() -> str:
    """The published networks as Markdown, in the order of RECIPES."""
    configs = [json.loads(file.read_text()) for arch in RECIPES if (file := WEIGHTS / f"{arch}.json").exists()]
    lines = [
        "<!-- Written by calibration/train_demo.py; do not edit. -->",
        "",
        "Validation of the fp16 demo weights on `calibration/demo/val` (48 images, 256x256, PyTorch fp32 arithmetic).",
        "",
        "| Architecture | Encoder | Parameters | File | mIoU | Pixel accuracy |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for config in configs:
        weights = WEIGHTS / f"{config['arch']}.safetensors"
        parameters = sum(parameter.numel() for parameter in build(config["arch"]).parameters())
        lines.append(
            f"| {config['arch']} | {config['encoder']} | {parameters / 1e6:.2f} M | "
            f"{weights.stat().st_size / 1e6:.2f} MB | {config['validation']['miou']:.3f} | "
            f"{config['validation']['pixel_accuracy']:.3f} |"
        )
    lines += ["", f"| IoU | {' | '.join(CLASS_NAMES)} |", "|---|" + "---:|" * len(CLASS_NAMES)]
    for config in configs:
        ious = config["validation"]["per_class_iou"]
        lines.append(f"| {config['arch']} | {' | '.join(f'{ious[name]:.3f}' for name in CLASS_NAMES)} |")
    return "\n".join(lines) + "\n"


def train(
    arch: str, images: Images, masks: Images, minutes: float, seed: int, preliminary: float, resume: bool
) -> None:
    """Train for `minutes` and publish; also publish a first version after `preliminary` minutes, if that is not 0."""
    torch.manual_seed(seed)
    model = build(arch).to(memory_format=torch.channels_last)
    spent = {"seconds": 0, "steps": 0}
    if resume and (config := WEIGHTS / f"{arch}.json").exists():
        model.load_state_dict(load_weights(WEIGHTS / f"{arch}.safetensors"))
        spent = json.loads(config.read_text())["trained_with"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=1e-3)
    cross_entropy = torch.nn.CrossEntropyLoss(torch.tensor(CLASS_WEIGHTS))
    dice = smp.losses.DiceLoss("multiclass")
    stream, started, steps, average = batches(images, masks, seed + spent["steps"], CROP), time.process_time(), 0, 0.0

    def seconds() -> float:
        return (time.process_time() - started) / torch.get_num_threads()

    def finish(candidate: torch.nn.Module) -> None:
        refresh_batch_norm(candidate, images, masks, seed)
        versions = {"torch": torch.__version__.split("+")[0], "segmentation_models_pytorch": smp.__version__}
        effort = {"seconds": spent["seconds"] + round(seconds()), "steps": spent["steps"] + steps, "seed": seed}
        publish(arch, candidate, {**versions, **effort})

    model.train()
    while (progress := seconds() / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress)
        batch, truth = next(stream)
        logits = model(batch)
        loss = cross_entropy(logits, truth) + dice(logits, truth)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        average += (loss.item() - average) * max(0.02, 1 / steps)
        if steps % 50 == 0:
            print(f"{arch} step {steps} {seconds():.0f} s loss {average:.3f}", flush=True)
        if preliminary and seconds() > 60 * preliminary:
            preliminary = 0
            finish(copy.deepcopy(model))
    finish(model)


def main() -> None:
    """Train the architectures asked for, one after the other."""
    parser = argparse.ArgumentParser(description="Train the demo networks.")
    parser.add_argument("--arch", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--minutes", type=float, default=8, help="of processor time a thread, for each architecture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="fewer on a machine busy with other work")
    parser.add_argument("--preliminary", type=float, default=0, metavar="MINUTES", help="publish a first version early")
    parser.add_argument("--resume", action="store_true", help="start from the published weights")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "edgeseg-demo-scenes")
    options = parser.parse_args()
    images, masks = training_scenes(SCENES, options.cache, options.threads)
    torch.set_num_threads(options.threads)
    for arch in options.arch:
        train(arch, images, masks, options.minutes, options.seed, options.preliminary, options.resume)


if __name__ == "__main__":
    main()
