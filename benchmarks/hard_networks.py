"""Networks INT8 is known to dislike, trained for a few CPU minutes on generated scenes; the weights are not committed.

    python -m benchmarks.hard_networks --folder /tmp/hard [--names segformer fpn] [--minutes 4]

Each becomes ``<folder>/<name>.safetensors``, found again by whatever measures it. They are good enough to have class boundaries
where the scenes have them, and no better: what INT8 loses of them is compared with themselves in float.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file, save_file

# A folder of scripts, whose recipe this is.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "calibration"))
train_demo: Any = importlib.import_module("train_demo")

NETWORKS = {"segformer": ("segformer", "mit_b0"), "fpn": ("fpn", "mobilenet_v2")}
"""Name -> architecture and encoder: layer normalization and GELU, and clips at 6."""

SCENES = 600
CROP = 128


def build(name: str) -> torch.nn.Module:
    """The network with random weights."""
    arch, encoder = NETWORKS[name]
    model: torch.nn.Module = smp.create_model(
        arch, encoder, encoder_weights=None, classes=len(train_demo.CLASS_NAMES), in_channels=3
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    for name in options.names:
        train(name, options.folder, options.minutes, options.threads)


if __name__ == "__main__":
    main()
