"""The folders of ``--scheme onnxruntime-arm`` on ARM's own INT8 kernels, emulated: accuracy and delivered precision, no times.

``make arm``; not part of ``make test``. Skipped with the reason where the machine cannot be made.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated.emulated_machine import ROOT, ArmMachine, CannotEmulateError, for_arm, prepare
from numpy.typing import NDArray
from PIL import Image

import edgeseg
from edgeseg.backends.portable import open_graph
from edgeseg.backends.pytorch import PyTorchSession
from edgeseg.convert.load import load_model
from edgeseg.demo import demo_models
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.spec import ARCHITECTURES
from edgeseg.store.engine import Engine

pytestmark = [pytest.mark.emulated, pytest.mark.timeout(2400)]

CALIB = ROOT / "calibration" / "demo" / "calib" / "images"
VAL = ROOT / "calibration" / "demo" / "val"
SIZES = {"pan": 128}
ENCODERS = {"dpt": "tu-vit_tiny_patch16_224", "segformer": "mit_b0"}
IMAGES = 12
NAMES = (*(f"demo-{arch}" for arch in demo_models()), *ARCHITECTURES)
Engines = Callable[[str], Engine]


@pytest.fixture(scope="session")
def machine() -> ArmMachine:
    try:
        return prepare(Path(os.environ.get("EDGESEG_ARM_MACHINE") or ROOT / ".arm"))
    except CannotEmulateError as exc:
        pytest.skip(f"no emulated ARM machine: {exc}")


@pytest.fixture(scope="session")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """By name, built when it is asked for: a demo model, or an architecture with random weights and a small encoder."""
    root = tmp_path_factory.mktemp("portable")

    @functools.cache
    def build(name: str) -> Engine:
        how: dict[str, Any] = {"target": "onnxruntime", "scheme": "onnxruntime-arm", "calibration": CALIB}
        if not name.startswith("demo-"):
            side = SIZES.get(name, 64)
            how |= {
                "encoder": ENCODERS.get(name, "resnet18"),
                "weights": "random",
                "classes": 4,
                "calibration_limit": 16,
            }
            how["size"] = (side, side)
        return edgeseg.build(name.removeprefix("demo-"), output=root / name, **how)

    return build


@pytest.fixture(scope="session")
def images(engines: Engines) -> dict[str, NDArray[np.uint8]]:
    """Validation images, uint8 ``(N, H, W, 3)``: of the demo models as they are, of the others at the engine's size."""
    paths = sorted((VAL / "images").iterdir())[:IMAGES]
    given = {}
    for name in NAMES:
        engine = engines(name)
        size = (engine.manifest.spec.input.width, engine.manifest.spec.input.height)
        read = (Image.open(path).convert("RGB") for path in paths)
        given[name] = np.stack([np.asarray(i if name.startswith("demo-") else i.resize(size)) for i in read])
    return given


@pytest.fixture(scope="session")
def on_arm(
    machine: ArmMachine,
    engines: Engines,
    images: dict[str, NDArray[np.uint8]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[dict[str, Any], NDArray[np.uint8]]]:
    """By engine: what its compiled folder says, and its masks."""
    folder = tmp_path_factory.mktemp("board")
    for name in NAMES:
        shutil.copytree(engines(name).folder, folder / name)
    np.savez(folder / "images.npz", **images)
    script = Path(__file__).with_name("on_machine.py")
    done = machine.python(script, "images.npz", *NAMES, folder=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = json.loads(done.stdout)
    return {name: (facts[name], np.load(folder / f"{name}.npy")) for name in NAMES}


@pytest.fixture
def masks_here(engines: Engines, images: dict[str, NDArray[np.uint8]], name: str) -> Iterator[Any]:
    """The same graph, by its own semantics, on this machine."""
    engine = engines(name)
    with open_graph(engine) as session:
        segmenter = Segmenter(session, engine.manifest.spec)
        yield np.stack([segmenter(image) for image in images[name]])


@pytest.mark.parametrize("name", NAMES)
def test_all_that_was_promised_runs_in_int8(
    on_arm: dict[str, tuple[dict[str, Any], NDArray[np.uint8]]], engines: Engines, name: str
) -> None:
    facts, _ = on_arm[name]
    promised = engines(name).manifest.precision.mac_share["int8"]
    assert facts["int8_share"] == pytest.approx(promised, abs=1e-9)
    assert "aarch64, emulated" in facts["device"]["cpu"]


@pytest.mark.parametrize("name", NAMES)
def test_masks_are_as_near_to_pytorch_as_here(
    on_arm: dict[str, tuple[dict[str, Any], NDArray[np.uint8]]],
    engines: Engines,
    images: dict[str, NDArray[np.uint8]],
    masks_here: NDArray[np.uint8],
    name: str,
) -> None:
    request, spec = engines(name).manifest.model_request, engines(name).manifest.spec
    assert request is not None
    with PyTorchSession(load_model(request), spec) as session:
        segmenter = Segmenter(session, spec)
        expected = np.stack([segmenter(image) for image in images[name]])
    on_board = float((on_arm[name][1] == expected).mean())
    here = float((masks_here == expected).mean())
    print(f"{name}: agreement with PyTorch {on_board:.4f} on ARM, {here:.4f} here")
    assert on_board >= here - 0.01


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("demo-")])
def test_accuracy_is_that_of_the_graph(
    on_arm: dict[str, tuple[dict[str, Any], NDArray[np.uint8]]], masks_here: NDArray[np.uint8], name: str
) -> None:
    paths = sorted((VAL / "masks").iterdir())[:IMAGES]
    truth = np.stack([np.asarray(Image.open(path)) for path in paths])
    on_board, here = mean_iou(on_arm[name][1], truth), mean_iou(masks_here, truth)
    print(f"{name}: mIoU {on_board:.4f} on ARM, {here:.4f} here")
    assert on_board == pytest.approx(here, abs=0.002)


def test_a_board_without_dot_products_makes_the_same_masks(
    machine: ArmMachine, engines: Engines, images: dict[str, NDArray[np.uint8]], tmp_path: Path
) -> None:
    """Cortex-A72, of a Raspberry Pi 4: its kernels add two products in 16 bits."""
    names = [name for name in NAMES if name.startswith("demo-")]
    made = {}
    for cpu in ("max", "cortex-a72"):
        folder = tmp_path / cpu
        for name in names:
            shutil.copytree(engines(name).folder, folder / name)
        np.savez(folder / "images.npz", **{name: images[name][:2] for name in names})
        script = Path(__file__).with_name("on_machine.py")
        done = machine.python(script, "images.npz", *names, folder=folder, environment={"EDGESEG_ARM_CPU": cpu})
        assert done.returncode == 0, done.stderr[-2000:]
        facts = json.loads(done.stdout)
        assert all(("asimddp" in fact["device"]["isa"]) == (cpu == "max") for fact in facts.values())
        made[cpu] = [np.load(folder / f"{name}.npy") for name in names]
    for name, with_dot_products, without in zip(names, *made.values(), strict=True):
        assert (with_dot_products == without).mean() > 0.9999, name


def mean_iou(masks: NDArray[np.uint8], truth: NDArray[np.uint8]) -> float:
    """Over the classes that occur, 255 left out."""
    counted = truth != 255
    ious = []
    for value in np.unique(truth[counted]):
        both = (masks == value) & (truth == value)
        either = ((masks == value) | (truth == value)) & counted
        ious.append(both.sum() / either.sum())
    return float(np.mean(ious))


def test_the_command_line(machine: ArmMachine, engines: Engines, tmp_path: Path) -> None:
    """What the owner of a board types, from the folder that was copied there to a page of figures."""
    shutil.copytree(engines("demo-fpn").folder, tmp_path / "fpn")

    def edgeseg_cli(*arguments: str | Path) -> str:
        done = machine.python("-m", "edgeseg", *arguments, folder=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    doctor = json.loads(edgeseg_cli("doctor", "--json"))
    assert doctor["cpu"]["arch"] == "arm" and doctor["cpu"]["name"].startswith("aarch64, emulated")
    assert "asimddp" in doctor["cpu"]["flags"]
    edgeseg_cli("compile", "fpn")
    inspected = json.loads(edgeseg_cli("inspect", "fpn", "--json"))
    assert inspected["manifest"]["device"]["cpu"] == doctor["cpu"]["name"]
    edgeseg_cli("run", "fpn", VAL / "images", "--limit", "2", "--output", "masks")
    assert len(list((tmp_path / "masks").rglob("*.png"))) == 2
    edgeseg_cli(
        *("bench", "fpn", "--baseline", "none", "--duration-s", "0", "--fresh-processes", "1"),
        *("--data", VAL, "--limit", "6", "--json", "bench.json"),
    )
    bench = json.loads((tmp_path / "bench.json").read_text())
    assert bench["environment"]["cpu"] == doctor["cpu"]["name"]
    (row,) = bench["rows"]
    assert row["accuracy"]["truth"]["miou"]["value"] > 0.3
    edgeseg_cli("report", "bench.json", "--html", "report.html")
    assert "aarch64, emulated" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("python", ["python3.10", "python3.11", "python3.12", "python3.13"])
def test_the_runtime_installs_on_aarch64(python: str, machine: ArmMachine, tmp_path: Path) -> None:
    """Every package of the extra has a wheel for ARM: what pip would install, not installed."""
    (wheel,) = (machine.folder / "wheel").glob("edgeseg-*.whl")
    pip = (sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "report.json")
    done = subprocess.run(
        [*pip, "--target", "unused", *for_arm(python), f"{wheel}[onnxruntime]"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    chosen = json.loads((tmp_path / "report.json").read_text())["install"]
    assert {"edgeseg", "onnx", "onnxruntime", "numpy"} <= {package["metadata"]["name"] for package in chosen}
