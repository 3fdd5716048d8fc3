"""From image files to mask files: ``edgeseg run`` beside what people write by hand around the same engine.

- ``loop``: PIL decodes and resizes, the session runs with a thread per core, PIL enlarges the mask and writes a PNG; one
  image after the other.
- ``pool``: the same function in a thread pool, a thread per core, and a session of one thread that they share.
- ``edgeseg run``: :func:`edgeseg.runtime.run.run_inputs` on the folder, loaded as the command does.

Each is timed on the same folder in turns, another one first in each round: images per second by the clock, milliseconds
of CPU time per image, bytes written. ``agreement`` is the share of pixels in which masks agree with those of the loop,
which differ by the resize alone: Pillow's is antialiased, edgeseg's is what models are trained with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import PIL
from PIL import Image
from rich.console import Console
from rich.table import Table

import edgeseg
from benchmarks.record import RESULTS, Record, ratios, this_machine, versions
from edgeseg.evaluate.latency.protocol import LatencySamples
from edgeseg.images.decoding import list_images
from edgeseg.runtime.overlap import parallel_threads
from edgeseg.runtime.run import run_inputs
from edgeseg.store.engine import Engine, open_engine

SIZES = ((256, 256), (512, 512), (1080, 1920))
"""Of the image files, ``(height, width)`` in pixels."""
SUFFIXES = ("jpg", "png")
ENGINE_SIZE = 256
SCENES = Path(__file__).resolve().parent.parent / "calibration" / "demo" / "calib" / "images"

Contender = Callable[[Path, Path], None]
"""Segments every file of a folder into another folder."""


@dataclass
class Samples:
    """One contender's rounds over one folder."""

    wall_ms: list[float]
    cpu_ms: list[float]


def main() -> None:
    options = arguments()
    console, machine = Console(), this_machine()
    rows: list[dict[str, Any]] = []
    speed: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        engine = open_engine(options.engine) if options.engine else built(folder / "engine")
        contenders = by_hand(engine)
        segmenter = edgeseg.load(engine, streams=parallel_threads())
        contenders["edgeseg run"] = lambda files, masks: _run(segmenter, files, masks)
        for height, width in SIZES:
            for suffix in SUFFIXES:
                name = f"{width}x{height} {suffix}"
                files = written_images(folder / name, (height, width), suffix, options.images)
                samples = in_turns(contenders, files, folder / "masks", options.rounds)
                rows += [_row(name, who, samples[who], folder / "masks", options.images) for who in contenders]
                for base in ("loop", "pool"):
                    faster = ratios({who: LatencySamples(tuple(s.wall_ms)) for who, s in samples.items()}, (base,))[
                        base
                    ]
                    speed.setdefault(base, {})[f"edgeseg run, {name}"] = faster["edgeseg run"]
    record = Record(
        benchmark="files_to_masks",
        workload=f"demo fpn, int8, onnxruntime, engine {ENGINE_SIZE}x{ENGINE_SIZE}, {options.images} files of each kind",
        machine=machine,
        versions={**versions(), "pillow": PIL.__version__},
        settings={"rounds": options.rounds, "images": options.images},
        rows=rows,
        ratios=speed,
    )
    record.write(options.output)
    _print(console, rows, speed)


def built(folder: Path) -> Engine:
    return edgeseg.build(arch="fpn", precision="int8", size=ENGINE_SIZE, target="onnxruntime", output=folder)


def by_hand(engine: Engine) -> dict[str, Contender]:
    """The loop and the pool, around sessions of the engine's own file."""
    cores = len(os.sched_getaffinity(0))

    def session(threads: int) -> onnxruntime.InferenceSession:
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        # The file is optimized already.
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        return onnxruntime.InferenceSession(str(engine.engine_path), settings, providers=["CPUExecutionProvider"])

    wide, narrow = session(cores), session(1)
    palette = bytes(3 * engine.manifest.spec.model.classes)

    def segment(runner: onnxruntime.InferenceSession, path: Path, masks: Path) -> None:
        image = Image.open(path).convert("RGB")
        small = image.resize((ENGINE_SIZE, ENGINE_SIZE), Image.Resampling.BILINEAR)
        (mask, *_) = runner.run(["mask"], {runner.get_inputs()[0].name: np.asarray(small)[None]})
        picture = Image.fromarray(mask[0]).resize(image.size, Image.Resampling.NEAREST)
        picture.putpalette(palette)
        picture.save(masks / f"{path.stem}.png")

    def loop(files: Path, masks: Path) -> None:
        for path in list_images(files):
            segment(wide, path, masks)

    def pool(files: Path, masks: Path) -> None:
        with ThreadPoolExecutor(cores) as threads:
            for _ in threads.map(lambda path: segment(narrow, path, masks), list_images(files)):
                pass

    return {"loop": loop, "pool": pool}


def _run(segmenter: edgeseg.Segmenter, files: Path, masks: Path) -> None:
    run_inputs(segmenter, [files], masks, progress=False)


def written_images(folder: Path, size: tuple[int, int], suffix: str, count: int) -> Path:
    """Write street scenes at ``size``, with the noise of a camera so that they compress as photographs do."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    scenes = list_images(SCENES)
    for index in range(count):
        scene = Image.open(scenes[index % len(scenes)]).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC)
        pixels = np.asarray(scene) + noise.normal(0.0, 3.0, (*size, 3))
        picture = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
        picture.save(folder / f"{index:04d}.{suffix}", quality=90)
    return folder


def in_turns(contenders: dict[str, Contender], files: Path, masks: Path, rounds: int) -> dict[str, Samples]:
    """Time every contender on the folder, ``rounds`` times after one that is not counted."""
    samples = {name: Samples([], []) for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            target = masks / name
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir(parents=True)
            begin, begin_cpu = time.perf_counter(), time.process_time()
            contenders[name](files, target)
            wall, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
            if number:
                samples[name].wall_ms.append(wall * 1e3)
                samples[name].cpu_ms.append(cpu * 1e3)
    return samples


def _row(files: str, name: str, samples: Samples, masks: Path, count: int) -> dict[str, Any]:
    reference, own = ({path.stem: path for path in (masks / who).rglob("*.png")} for who in ("loop", name))
    same = [np.mean(np.asarray(Image.open(reference[stem])) == np.asarray(Image.open(own[stem]))) for stem in reference]
    return {
        "name": f"{name}, {files}",
        "images_per_second": count / median(samples.wall_ms) * 1e3,
        "cpu_ms_per_image": median(samples.cpu_ms) / count,
        "least_cpu_ms_per_image": min(samples.cpu_ms) / count,
        "mask_bytes": sum(path.stat().st_size for path in own.values()) / count,
        "agreement": float(np.mean(same)),
        "samples_wall_ms": [round(ms, 3) for ms in samples.wall_ms],
        "samples_cpu_ms": [round(ms, 3) for ms in samples.cpu_ms],
    }


def _print(console: Console, rows: list[dict[str, Any]], speed: dict[str, dict[str, Any]]) -> None:
    table = Table("files", "images/s", "CPU ms", "mask bytes", "agreement")
    for row in rows:
        figures = (f"{row[key]:.1f}" for key in ("images_per_second", "cpu_ms_per_image"))
        table.add_row(row["name"], *figures, f"{row['mask_bytes']:.0f}", f"{row['agreement']:.4f}")
    console.print(table)
    for base, against in speed.items():
        for name, ratio in against.items():
            console.print(f"{name} over {base}: {ratio['median']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, help="what this benchmark builds, from an earlier build")
    parser.add_argument("--images", type=int, default=48, help="files of each kind")
    parser.add_argument("--rounds", type=int, default=9, help="times each folder is segmented by each contender")
    parser.add_argument("--output", type=Path, default=RESULTS / "files_to_masks.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
