"""``edgeseg build`` from the outside: demo models, own models, gates, bad input, interruption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from command_line import typed
from PIL import Image

import edgeseg
from edgeseg.demo import demo_models, sample_folder
from edgeseg.errors import InputError
from edgeseg.machine.cpu import this_cpu
from edgeseg.quantize.table import load_table
from edgeseg.store.engine import open_engine

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def demo_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines") / "fpn"
    edgeseg.build(arch="fpn", precision="int8", target="onnxruntime", output=folder)
    return folder


@pytest.fixture
def few(small_demo: Path) -> tuple[str, Path]:
    return "--validation", small_demo / "val"


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "edgeseg", *map(str, arguments)]


def test_demo_engine_is_int8_and_verified(demo_engine: Path) -> None:
    manifest = open_engine(demo_engine).manifest
    assert manifest.precision.mac_share["int8"] >= 0.8
    verification = manifest.verification
    assert verification is not None
    assert verification.images == 48
    assert verification.agreement > 0.95
    assert verification.miou_drop is not None
    assert verification.miou_drop <= 0.01
    assert verification.pytorch_latency is not None
    assert manifest.precision.evidence == "executed"
    assert set(manifest.inputs_sha256) >= {"weights", "spec", "calibration_images", "calibration_graph"}
    # Only what rounds as the engine does counts; the demo networks are hurt so little that no repair can take much from them.
    assert [repair.name for repair in manifest.repairs] == ["bias-correction", "equalization", "calibration-method"]
    assert {repair.scheme for repair in manifest.repairs} == {"onnxruntime-vnni"}
    assert all((repair.agreement_after or 0) > 0.95 for repair in manifest.repairs)


def test_reported_accuracy_is_what_the_runtime_gives(demo_engine: Path) -> None:
    """An independent count over the committed masks gives the manifest's mIoU."""
    verification = open_engine(demo_engine).manifest.verification
    assert verification is not None
    folder = sample_folder() / "val"
    confusion = np.zeros((8, 8), np.int64)
    with edgeseg.load(demo_engine) as segmenter:
        for path in sorted((folder / "images").iterdir()):
            truth = np.asarray(Image.open(folder / "masks" / f"{path.stem}.png"))
            mask = segmenter(np.asarray(Image.open(path).convert("RGB")))
            np.add.at(confusion, (truth.ravel(), mask.ravel()), 1)
    hit = np.diag(confusion)
    iou = hit / (confusion.sum(0) + confusion.sum(1) - hit)
    assert iou.mean() == pytest.approx(verification.engine_accuracy.miou, abs=1e-9)


def test_second_build_reuses_what_is_unchanged(demo_engine: Path, tmp_path: Path) -> None:
    done = typed("build", "--arch", "fpn", "--target", "onnxruntime", "--output", tmp_path / "e", "--json")
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stderr.splitlines()[0]
    reused = [line.split()[0] for line in done.stderr.splitlines() if line.endswith("; reused")]
    assert reused == ["export", "calibrate"], done.stderr
    first, second = open_engine(demo_engine).manifest, json.loads(done.stdout)
    assert second["graph"]["sha256"] == first.graph.sha256
    words = f"edgeseg build --arch fpn --precision int8 --target onnxruntime --output {tmp_path / 'e'}"
    assert second["command"] == words
    assert second["verification"]["agreement"] == first.verification.agreement  # type: ignore[union-attr]


def test_gate_not_met_exits_3_and_leaves_nothing(few: tuple[str, Path], tmp_path: Path) -> None:
    gate = ("--min-agreement", "1.0", "--no-search", *few)
    done = typed("build", "--arch", "fpn", "--target", "onnxruntime", *gate, "--output", tmp_path / "e")
    assert done.returncode == 3, done.stderr
    assert "--min-agreement" in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_own_checkpoint_with_held_out_calibration_images(tmp_path: Path) -> None:
    """A checkpoint, a folder of photos, nothing else: the common first try."""
    import segmentation_models_pytorch as smp
    import torch

    torch.manual_seed(0)
    model = smp.create_model("linknet", encoder_name="resnet18", encoder_weights=None, classes=3)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted((sample_folder() / "calib" / "images").iterdir())[:25]:
        shutil.copy(path, photos)
    said: list[str] = []
    engines = {
        precision: edgeseg.build(
            arch="linknet",
            encoder="resnet18",
            weights=tmp_path / "model.pth",
            precision=precision,
            calibration=photos,
            size=(64, 96),
            target="onnxruntime",
            output=tmp_path / precision,
            reporter=said.append,
        )
        for precision in ("int8", "fp32")
    }
    manifest = engines["int8"].manifest
    assert manifest.spec.model.classes == 3
    assert manifest.verification is not None
    assert manifest.verification.images == 5
    assert "held out" in manifest.verification.data
    assert manifest.verification.pytorch_accuracy.miou is None
    # fp32 takes no ranges from them, and is judged on the same.
    assert (exact := engines["fp32"].manifest.verification) is not None
    assert (exact.images, exact.data) == (manifest.verification.images, manifest.verification.data)
    assert [line for line in said if "--calibration is" in line] == [
        "note: --calibration is used to verify on only: an fp32 engine has no ranges"
    ]


def test_model_object_and_arrays(tmp_path: Path) -> None:
    import segmentation_models_pytorch as smp

    model = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(32, 16, 16), classes=2)
    model.train()
    photos = [np.asarray(Image.open(p)) for p in sorted((sample_folder() / "calib" / "images").iterdir())[:8]]
    engine = edgeseg.build(model=model, calibration=photos, size=(64, 64), target="onnxruntime", output=tmp_path / "e")
    assert engine.manifest.spec.model.arch == "unet"
    assert model.training, "the user's module must not be changed"
    with edgeseg.load(engine.folder) as segmenter:
        assert segmenter(photos[0]).shape == photos[0].shape[:2]
    # Of an fp32 engine there are no ranges, so any number of images will do.
    given = {"model": model, "size": (64, 64), "target": "onnxruntime", "output": tmp_path / "exact"}
    exact = edgeseg.build(precision="fp32", calibration=photos[:2], **given)
    assert exact.manifest.verification is not None
    assert exact.manifest.verification.images == 2
    with pytest.raises(InputError, match="only 2 images .*needs at least 8"):
        edgeseg.build(precision="int8", calibration=photos[:2], force=True, **given)


def test_builds_of_two_threads_and_images_of_a_generator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's exporter is one for the process: threads wait for each other, and the program's own output is not lost."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    modules = [smp.Linknet("mobilenet_v2", encoder_weights=None, encoder_depth=3, classes=2 + k) for k in range(2)]

    def photos() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        yield from (rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(8))

    def build(k: int) -> edgeseg.Segmenter:
        engine = edgeseg.build(
            modules[k],
            precision=("fp32", "int8")[k],
            calibration=photos() if k else None,
            size=64,
            mean=0.5,
            std=0.5,
            target="onnxruntime",
            output=str(k),
        )
        assert engine.folder == tmp_path / str(k)  # wherever the program goes then
        return edgeseg.load(engine)

    monkeypatch.chdir(tmp_path)
    stdout, filters = sys.stdout, list(warnings.filters)
    with ThreadPoolExecutor(2) as threads:
        segmenters = list(threads.map(build, range(2)))
    assert [len(segmenter.class_names) for segmenter in segmenters] == [2, 3]
    assert sys.stdout is stdout and warnings.filters == filters
    print("the program's own")
    assert capsys.readouterr().out == "the program's own\n"
    with pytest.raises(edgeseg.SpecError, match="1 class names for 2 classes"):
        edgeseg.build(modules[0], precision="fp32", class_names=["road"], mean=0.5, std=0.5, output=tmp_path / "names")


def test_int8_without_images_says_how_to_give_some(tmp_path: Path) -> None:
    done = typed("build", "--arch", "linknet", "--weights", "random", "--classes", "2", "--output", tmp_path / "e")
    assert done.returncode == 1, done.stderr
    assert "--calibration DIR" in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions(few: tuple[str, Path], tmp_path: Path, precision: str) -> None:
    arguments = ("--arch", "fpn", "--precision", precision, "--target", "onnxruntime", *few)
    done = typed("build", *arguments, "--output", tmp_path / "e", "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["precision"]["requested"] == precision
    assert manifest["verification"]["agreement"] > 0.999
    # FP16 is calibrated where there are images: ranges decide which layers stay in float32.
    assert (manifest["calibration"] is not None) == (precision == "fp16")
    assert ("no more speed" in done.stderr) == (precision == "fp16")
    # The size that is said is the file's, not what half-sized weights would make it.
    size = f"its file has {manifest['engine']['size_bytes'] / 1e6:.1f} MB where the fp32 graph has "
    assert (size in done.stderr) == (precision == "fp16")


def test_an_fp32_build_that_is_not_its_model_fails_and_leaves_nothing(
    few: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is made to see negatives: what stands for any difference between the two."""
    from edgeseg.backends.pytorch import PyTorchSession

    truth = PyTorchSession._normalize
    monkeypatch.setattr(PyTorchSession, "_normalize", lambda self, images: truth(self, 255 - images))
    arguments = ("--arch", "fpn", "--precision", "fp32", "--size", "64x64", "--target", "onnxruntime", *few)
    folder = tmp_path / "engines" / "e"
    done = typed("build", *arguments, "--output", folder, "--json")
    assert done.returncode == 1, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["kind"] == "BuildError"
    assert error["message"].startswith("the fp32 engine is not its model: 0.")
    assert done.stderr.splitlines()[-1] == f"edgeseg: {error['message']}"
    assert not folder.exists()


def test_a_graph_for_another_kind_of_cpu_is_a_portable_folder(tmp_path: Path) -> None:
    """README's command for a board: checked here, compiled there, refused where its kernels are not."""
    scheme = "onnxruntime-vnni" if this_cpu().arch == "arm" else "onnxruntime-arm"
    folder = tmp_path / "for-a-board"
    engine = edgeseg.build(arch="fpn", size=(64, 64), target="onnxruntime", scheme=scheme, output=folder)
    manifest = engine.manifest
    assert manifest.engine is None and manifest.scheme == scheme
    assert manifest.precision.mac_share["int8"] > 0.9 and manifest.precision.evidence == "typed"
    assert manifest.verification is not None and manifest.verification.agreement > 0.95
    assert manifest.verification.engine_latency is None
    for words in (
        ["compile", folder],
        ["run", folder, sample_folder() / "val" / "images", "--output", tmp_path / "out"],
    ):
        done = typed(*words)
        assert done.returncode == 1
        assert scheme in done.stderr and len(done.stderr.splitlines()) == 1
    assert sorted(path.name for path in folder.iterdir()) == ["calibration.json", "manifest.json", "model.onnx"]


def test_calibrate_then_build_and_stale_table(few: tuple[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    images = sample_folder() / "calib"
    done = typed("calibrate", images, "--arch", "fpn", "--limit", "16", "--output", table)
    assert done.returncode == 0, done.stderr
    arguments = ["--target", "onnxruntime", "--calibration", table, *few, "--output", tmp_path / "e"]
    done = typed("build", "--arch", "fpn", *arguments)
    assert done.returncode == 0, done.stderr
    # The table, made for no target, was judged for each, and brings what was done.
    made = load_table(table)
    assert {repair.scheme for repair in made.repairs} == {"onnxruntime-vnni", "tensorrt"}
    rounds_alike = tuple(repair for repair in made.repairs if repair.scheme == "onnxruntime-vnni")
    assert open_engine(tmp_path / "e").manifest.repairs == rounds_alike
    done = typed("build", "--arch", "fpn", "--size", "128x128", "--force", *arguments)
    assert done.returncode == 1
    assert "stale" in done.stderr
    assert "input size" in done.stderr
    open_engine(tmp_path / "e")


def test_compile_makes_the_engine_again(demo_engine: Path, tmp_path: Path) -> None:
    done = typed("compile", demo_engine, "--output", tmp_path / "e", "--backend-option", "threads=1")
    assert done.returncode == 0, done.stderr
    manifest = open_engine(tmp_path / "e").manifest
    assert manifest.options["threads"] == 1
    assert manifest.graph == open_engine(demo_engine).manifest.graph


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])  # SIGKILL: test_atomic.py
def test_interrupted_build_leaves_no_folder(tmp_path: Path, number: signal.Signals) -> None:
    target = tmp_path / "engines" / "e"
    arguments = command("build", "--arch", "fpn", "--target", "onnxruntime", "--output", target)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("engines/.edgeseg-partial-*")):
        assert process.poll() is None, "it ended before it began"
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == [], "the folder made to hold it goes as well"


@pytest.mark.parametrize("limit_bytes", [200_000, 1_500_000])
def test_files_that_cannot_be_written_are_one_clear_error(tmp_path: Path, limit_bytes: int) -> None:
    """A limit on the size of files stands in for a full disk; it strikes at the fp32 graph, or later at the engine."""
    import resource

    # ONNX Runtime optimizes a small graph into a small file: the larger limit needs an fp32 engine to strike there.
    arguments = command("build", "--arch", "fpn", "--precision", "fp32", "--target", "onnxruntime")
    cache = {"EDGESEG_CACHE": str(tmp_path / "cache")} if limit_bytes < 1_000_000 else {}
    done = subprocess.run(
        [*arguments, "--output", str(tmp_path / "engines" / "e")],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env={**os.environ, **cache},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert "write" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "engines").exists()


def test_every_demo_model_is_there() -> None:
    assert demo_models() == ("deeplabv3plus", "fpn", "pspnet", "unet")


@pytest.mark.parametrize("arch", ["pspnet", "deeplabv3plus"])  # unet: docs/tutorial.md
def test_demo_models_lose_at_most_one_point(tmp_path: Path, arch: str) -> None:
    engine = edgeseg.build(arch=arch, target="onnxruntime", output=tmp_path / arch, max_drop=0.01)
    assert engine.manifest.verification is not None


def test_run_writes_masks_and_overlays(demo_engine: Path, tmp_path: Path) -> None:
    images = sample_folder() / "val" / "images"
    done = typed("run", demo_engine, images, "--output", tmp_path / "out", "--overlay", "--limit", "3")
    assert done.returncode == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert len(paths) == 6
    assert all(path.is_file() for path in paths)
    with Image.open(next(p for p in paths if p.suffix == ".png")) as mask:
        assert mask.size == (256, 256)
