"""``edgeseg run --executor ray`` where workers, a node and the command itself are killed: nothing lost, nothing twice.

A cluster of two worker nodes of one processor each, on this machine, in processes of their own. The same images are segmented

- ``one machine``: by ``edgeseg run``, whose masks the others are compared with;
- ``cluster``: by the cluster, left alone;
- ``killed``: by the cluster, while a worker process (SIGKILL at a fifth of the images), then a node (its raylet, SIGKILL at two
  fifths; another one takes its place) and the command itself (SIGKILL at three fifths) are killed, and by a second command.

Of each: seconds, masks that are missing, masks with other bytes, files that are no mask of an image; of the last, how many images
the second command found done, and how often an image was recorded as done.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.record import RESULTS, Record, this_machine, versions


@dataclass(frozen=True)
class Row:
    """How one way of segmenting the images went; ``None`` is what it has not."""

    way: str
    images: int
    seconds: float | None
    missing: int
    different: int
    stray_files: int
    found_done: int | None = None
    recorded_twice: int | None = None


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="edgeseg-cluster-run-") as scratch:
        photos = Path(scratch, "photos")
        make_images(photos, options.images, options.size)
        rows = list(measured(options.engine, photos, Path(scratch)))
    for row in rows:
        print(json.dumps(asdict(row)))
    if options.output is not None:
        settings = {"images": options.images, "size": options.size, "nodes": "2 of one processor each, this machine"}
        if options.shared_machine:
            rows = [replace(row, seconds=None) for row in rows]
        record = Record(
            "cluster_run", "generated images", this_machine(), versions(), settings, [asdict(row) for row in rows]
        )
        record.write(options.output)
    if any(row.missing or row.different or row.stray_files or row.recorded_twice for row in rows):
        sys.exit("the masks are not those of one machine")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, help="engine folder for this machine's CPU")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=64, help="of the images, pixels a side, give or take some")
    parser.add_argument(
        "--shared-machine", action="store_true", help="other programs ran beside: no times are recorded"
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "cluster_run.json")
    return parser.parse_args()


def make_images(folder: Path, count: int, size: int) -> None:
    """Coloured noise of several sizes, so that images and masks are told apart."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        shape = (size + number % 9, size + number % 5)
        Image.fromarray(pixels).resize(shape, Image.Resampling.BILINEAR).save(folder / f"image{number}.png")


def measured(engine: Path, photos: Path, scratch: Path) -> Iterator[Row]:
    local = scratch / "one machine"
    yield row("one machine", run(engine, photos, local), photos, local, local)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        options = ("--executor", "ray", "--ray-address", cluster.address)
        output = scratch / "cluster"
        yield row("cluster", run(engine, photos, output, *options), photos, output, local)
        output = scratch / "killed"
        yield disturbed(engine, photos, output, local, options, cluster, nodes)
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def disturbed(
    engine: Path,
    photos: Path,
    output: Path,
    local: Path,
    options: tuple[str, ...],
    cluster: Any,
    nodes: list[Any],
) -> Row:
    total = sum(1 for _ in photos.iterdir())
    begin = time.perf_counter()
    with subprocess.Popen(command(engine, photos, output, *options), stdout=subprocess.PIPE) as process:
        wait_for(output, total // 5, process)
        os.kill(worker_processes(cluster.address)[0], signal.SIGKILL)
        wait_for(output, 2 * total // 5, process)
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        wait_for(output, 3 * total // 5, process)
        process.kill()
    first = time.perf_counter() - begin
    summary = run(engine, photos, output, *options)
    summary["seconds"] += first
    recorded = Counter(
        image
        for line in (output / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
        for image, *_ in json.loads(line).get("done", ())
    )
    return row(
        "killed",
        summary,
        photos,
        output,
        local,
        found_done=summary["reused"],
        recorded_twice=sum(1 for times in recorded.values() if times > 1),
    )


def command(engine: Path, photos: Path, output: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "edgeseg",
        "run",
        str(engine),
        str(photos),
        "--output",
        str(output),
        *options,
        "--json",
    ]


def run(engine: Path, photos: Path, output: Path, *options: str) -> dict[str, Any]:
    done = subprocess.run(command(engine, photos, output, *options), stdout=subprocess.PIPE, check=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def row(
    way: str,
    summary: dict[str, Any],
    photos: Path,
    output: Path,
    local: Path,
    found_done: int | None = None,
    recorded_twice: int | None = None,
) -> Row:
    wanted = {f"{path.stem}.png" for path in photos.iterdir()}
    there = {path.name for path in (output / "masks").iterdir()}
    different = sum(
        (output / "masks" / name).read_bytes() != (local / "masks" / name).read_bytes() for name in wanted & there
    )
    stray = len(there - wanted)
    return Row(way, len(wanted), summary["seconds"], len(wanted - there), different, stray, found_done, recorded_twice)


def wait_for(output: Path, masks: int, process: subprocess.Popen[bytes]) -> None:
    while not (output / "masks").is_dir() or sum(1 for _ in os.scandir(output / "masks")) < masks:
        if process.poll() is not None:
            sys.exit(f"the command ended with code {process.returncode} before it could be disturbed")
        time.sleep(0.05)


def worker_processes(address: str) -> list[int]:
    """The actors of the cluster at ``address``, by their parents: others may have a cluster on this machine."""
    processes = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "cmdline").read_bytes().startswith(b"ray::_Actor"):
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if f"={address}\0".encode() in Path("/proc", parent, "cmdline").read_bytes():
                    processes.append(int(folder.name))
        except OSError:
            continue  # gone this moment, or somebody else's
    return sorted(processes)


if __name__ == "__main__":
    main()
