"""The pictures of README and docs, made from the demo model and its report: ``make pictures``. Needs Chromium."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import edgeseg
from edgeseg.runtime.overlay import colorize

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "calibration" / "demo" / "val"
IMAGES = ROOT / "docs" / "images"
SCENES = ("003", "017")
GAP_PX = 4


def masks(folder: Path) -> None:
    """A row a scene: the image, the mask of the float engine, the mask of the INT8 engine."""
    rows = []
    with edgeseg.load(folder / "fp32") as float32, edgeseg.load(folder / "int8") as int8:
        for scene in SCENES:
            image = np.asarray(Image.open(DEMO / "images" / f"{scene}.jpg").convert("RGB"))
            parts = [image, *(colorize(s(image), s.palette) for s in (float32, int8))]
            gap = np.full((image.shape[0], GAP_PX, 3), 255, np.uint8)
            rows.append(np.concatenate([parts[0], gap, parts[1], gap, parts[2]], axis=1))
    space = np.full((GAP_PX, rows[0].shape[1], 3), 255, np.uint8)
    Image.fromarray(np.concatenate([rows[0], space, rows[1]])).quantize(128).save(IMAGES / "masks.png", optimize=True)


def report(folder: Path) -> None:
    """The head of the HTML report of both engines, as a browser shows it."""
    chromium = next(
        (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None
    )
    if chromium is None:
        raise SystemExit("no Chromium on PATH: the picture of the report was not made")
    engines = [str(folder / "int8"), str(folder / "fp32")]
    verb("bench", *engines, "--data", str(DEMO), "--json", str(folder / "bench.json"))
    verb("report", str(folder / "bench.json"), "--html", str(folder / "report.html"))
    shot = folder / "report.png"
    subprocess.run(
        [
            *(
                chromium,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--hide-scrollbars",
                "--disable-background-networking",
            ),
            *(f"--user-data-dir={folder / 'profile'}", "--window-size=1100,860", f"--screenshot={shot}"),
            (folder / "report.html").as_uri(),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )
    Image.open(shot).convert("RGB").quantize(64).save(IMAGES / "report.png", optimize=True)


def verb(*arguments: str) -> None:
    """Run ``edgeseg ARGUMENTS``."""
    subprocess.run([sys.executable, "-m", "edgeseg", *arguments], check=True)


def main() -> None:
    """Build, draw, photograph."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for precision in ("fp32", "int8"):
            verb("build", "--arch", "fpn", "--precision", precision, "--output", f"{scratch}/{precision}")
        masks(Path(scratch))
        report(Path(scratch))


if __name__ == "__main__":
    main()
