"""Most memory that ``edgeseg run`` takes for a raster, which is not to grow with it: a one-layer network of 8 classes.

Each run in a process of its own, as the kernel counts its resident memory (``ru_maxrss``), interpreter and packages included.
Memory does not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rich.console import Console

import edgeseg
from benchmarks.memory import peak_bytes
from benchmarks.record import RESULTS, Record, this_machine, versions

CLASSES, WINDOW, BLOCK = 8, 512, 512
PIECES = {"scores": "probabilities", "masks": "mask"}


def main() -> None:
    options = arguments()
    console, machine = Console(), this_machine()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for side in options.sides:
            raster = written(folder / f"{side}.tif", side)
            for name, kind in PIECES.items():
                if not (engine := folder / name).is_dir():
                    built(engine, kind)
                command = [sys.executable, "-m", "edgeseg", "run", str(engine), str(raster)]
                peak = peak_bytes([*command, "--output", str(folder / f"out-{name}")])
                rows.append(
                    {
                        "name": f"{name}, {side}x{side}",
                        "peak_bytes": peak,
                        "raster_bytes": raster.stat().st_size,
                    }
                )
                console.print(rows[-1], highlight=False)
            raster.unlink()
    Record(
        benchmark="rasters",
        workload=f"one layer, {CLASSES} classes, {WINDOW}x{WINDOW}, fp32, onnxruntime; uint8 RGB GeoTIFF",
        machine=machine,
        versions={**versions(), "rasterio": rasterio.__version__, "gdal": rasterio.__gdal_version__},
        settings={"sides": options.sides},
        rows=rows,
    ).write(options.output)


def built(folder: Path, kind: Any) -> None:
    torch.manual_seed(0)
    network = torch.nn.Conv2d(3, CLASSES, 3, padding=1)
    edgeseg.build(network, precision="fp32", size=WINDOW, output_kind=kind, target="onnxruntime", output=folder)


def written(path: Path, side: int) -> Path:
    """Noise in tiles, as it comes: nothing is won by reading a block twice."""
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(0.1, 0, 500_000, 0, -0.1, 4_600_000)}
    tiles = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK}
    noise = np.random.default_rng(0)
    with rasterio.open(
        path, "w", driver="GTiff", height=side, width=side, count=3, dtype="uint8", **place, **tiles
    ) as file:
        for _, window in file.block_windows(1):
            file.write(noise.integers(0, 256, (3, window.height, window.width), dtype=np.uint8), window=window)
    return path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[5_000, 10_000, 20_000], help="of the rasters, pixels")
    parser.add_argument("--output", type=Path, default=RESULTS / "rasters.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
