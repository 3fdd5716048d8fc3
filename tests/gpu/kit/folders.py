"""Build what a GPU machine is to compile: portable folders of every architecture in every precision, and the images.

    python tests/gpu/kit/folders.py OUTPUT_FOLDER [--arch NAME ...] [--size HxW] [--weights DIR]

OUTPUT_FOLDER/engines gets ``<arch>-<precision>``, OUTPUT_FOLDER/images the held-out demo images. With ``--weights DIR`` an
architecture that has ``DIR/<arch>.safetensors`` (or .pt) is built from that, so that its masks mean something; the demo's
four have trained weights of their own, the others random ones, whose masks say whether the engine computes the same and no
more. Folders that are there stay. Needs PyTorch; takes some minutes, and a core.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from edgeseg.demo import demo_models, sample_folder
from edgeseg.spec import ARCHITECTURES

PRECISIONS = ("fp32", "fp16", "int8")
ENCODERS = {"dpt": "tu-vit_tiny_patch16_224", "segformer": "mit_b0"}


def build_command(arch: str, precision: str, size: str, weights: Path | None, output: Path) -> list[str]:
    """What is typed for one folder."""
    calibration = sample_folder() / "calib"
    command = ["build", "--arch", arch, "--precision", precision, "--target", "tensorrt", "--output", str(output)]
    given = (
        []
        if weights is None
        else [path for path in weights.glob(f"{arch}.*") if path.suffix in (".safetensors", ".pt")]
    )
    if given:
        return [*command, "--weights", str(given[0]), "--size", size]
    if arch in demo_models():
        return command
    encoder = ENCODERS.get(arch, "resnet18")
    return [
        *command,
        *("--encoder", encoder, "--weights", "random", "--classes", "11", "--size", size),
        *("--calibration", str(calibration)),
    ]


def main(arguments: list[str]) -> int:
    """Build; returns how many folders could not be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES)
    parser.add_argument("--size", default="256x256")
    parser.add_argument("--weights", type=Path)
    asked = parser.parse_args(arguments)
    engines, images = asked.output / "engines", asked.output / "images"
    engines.mkdir(parents=True, exist_ok=True)
    if not images.exists():
        shutil.copytree(sample_folder() / "val", images)
    failed = []
    for arch in asked.arch or ARCHITECTURES:
        for precision in PRECISIONS:
            folder = engines / f"{arch}-{precision}"
            if (folder / "manifest.json").is_file():
                continue
            command = build_command(arch, precision, asked.size, asked.weights, folder)
            print("edgeseg", *command, flush=True)
            if subprocess.run([sys.executable, "-m", "edgeseg", *command]).returncode:
                failed.append(folder.name)
    print(f"{len(failed)} folders could not be built{': ' if failed else ''}{', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
