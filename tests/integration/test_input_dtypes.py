"""Engines that take 16-bit and float images, beside the torch model on the very same files.

Oracles: OpenCV reads and resizes, albumentations normalizes, torch runs the network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import edgeseg
from edgeseg.cli.app import cli
from edgeseg.errors import InputError
from edgeseg.runtime.run import RunSettings, run_inputs
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.store.engine import Engine

pytestmark = pytest.mark.integration
albumentations = pytest.importorskip("albumentations")
cv2 = pytest.importorskip("cv2")

HEIGHT, WIDTH = 32, 64
MEAN, STD = 0.38, 0.04  # of values / 65535: 20000 to 32000 is what the camera gives
AIR, SPREAD = -100.0, 800.0  # Hounsfield units, as they are


def network(channels: int, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    convolution = torch.nn.Conv2d
    layers = (convolution(channels, 8, 3, padding=1), torch.nn.ReLU(), convolution(8, 8, 3, padding=1), torch.nn.ReLU())
    return torch.nn.Sequential(*layers, convolution(8, 3, 1)).eval()


def thermal(seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    warm = 26000 + 4000 * np.sin(x / 7 + seed) * np.cos(y / 5) + rng.normal(0, 300, size)
    return np.clip(warm, 20000, 32000).astype(np.uint16)


def hounsfield(seed: int, size: tuple[int, int] = (HEIGHT, WIDTH)) -> np.ndarray:
    return ((thermal(seed, size).astype(np.float32) - 26000) / 3).astype(np.float32)


def scores(module: torch.nn.Module, image: np.ndarray, mean: float, std: float, top: float) -> np.ndarray:
    """What a training script computes: (classes, H, W)."""
    normalize = albumentations.Normalize(mean=(mean,), std=(std,), max_pixel_value=top)
    normalized = normalize(image=image if image.ndim == 3 else image[..., None])["image"]
    with torch.inference_mode():
        return module(torch.from_numpy(normalized.astype(np.float32)).permute(2, 0, 1)[None])[0].numpy()


def thermal_scores(module: torch.nn.Module, image: np.ndarray) -> np.ndarray:
    return scores(module, image, MEAN, STD, 65535.0)


def agrees(mask: np.ndarray, expected: np.ndarray, slack: float = 1e-3) -> None:
    """Equal to the argmax of ``expected``, but where two classes are closer than rounding."""
    top = np.sort(expected, axis=0)
    differs = mask != expected.argmax(axis=0)
    assert not (differs & (top[-1] - top[-2] > slack)).any()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thermal")
    for seed in range(24):
        assert cv2.imwrite(str(folder / f"{seed:02}.png"), thermal(seed, (HEIGHT + seed % 2, WIDTH)))
    return folder


@pytest.fixture(scope="module")
def warm() -> torch.nn.Module:
    return network(1, 3)


def engine_of(module: torch.nn.Module, output: Path, precision: Any = "fp32", **options: Any) -> Engine:
    return edgeseg.build(
        model=module,
        output=output,
        precision=precision,
        **{
            "size": (HEIGHT, WIDTH),
            "target": "onnxruntime",
            "mean": MEAN,
            "std": STD,
            "input_dtype": "uint16",
            **options,
        },
    )


@pytest.fixture(scope="module")
def engine16(warm: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return engine_of(warm, tmp_path_factory.mktemp("engines") / "fp32", batch="1:2:4")


def test_the_engine_sees_all_16_bits(warm: torch.nn.Module, engine16: Engine, images: Path) -> None:
    assert engine16.manifest.spec.input.dtype == "uint16"
    assert engine16.manifest.spec.preprocess.scale == 1 / 65535
    with edgeseg.load(engine16) as segmenter:
        image = thermal(50)
        expected = thermal_scores(warm, image)
        mask = segmenter(image)
        agrees(mask, expected)
        # Values that differ in the low byte only.
        low = (25600 + np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 256).astype(np.uint16)
        agrees(segmenter(low), thermal_scores(warm, low))
        for same in (image[..., None], torch.from_numpy(image), image.astype(">u2"), [image], image[None, ..., None]):
            np.testing.assert_array_equal(np.squeeze(segmenter(same)), mask)
        path = images / "00.png"
        from_file = segmenter(path)
        agrees(from_file, thermal_scores(warm, cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))
        batch = np.stack([thermal(seed) for seed in range(5)])[..., None]
        singles = [segmenter(one) for one in batch]
        np.testing.assert_array_equal(segmenter(batch), singles)
        np.testing.assert_array_equal(list(segmenter.many(batch)), singles)
        np.testing.assert_array_equal([frame.mask for frame in edgeseg.stream(list(batch), segmenter)], singles)
        frames = list(edgeseg.stream(images, segmenter))
        assert len(frames) == 24
        np.testing.assert_array_equal(frames[0].mask, from_file)
        assert frames[0].image.dtype == np.uint16


@pytest.mark.parametrize("size", [(50, 90), (20, 40), (64, 64)])
def test_other_sizes_are_resized_as_in_training(warm: torch.nn.Module, engine16: Engine, size: tuple[int, int]) -> None:
    image = thermal(7, size)
    resized = albumentations.Resize(HEIGHT, WIDTH)(image=image)["image"]
    assert resized.dtype == np.uint16
    with edgeseg.load(engine16) as segmenter:
        mask = segmenter(image)
        rows = ((np.arange(size[0]) + 0.5) * HEIGHT / size[0]).astype(int)
        columns = ((np.arange(size[1]) + 0.5) * WIDTH / size[1]).astype(int)
        expected = thermal_scores(warm, resized)[:, rows][:, :, columns]
        agrees(mask, expected, slack=0.02)  # of one level of 65536


def test_tiles_of_the_native_scale(warm: torch.nn.Module, engine16: Engine) -> None:
    image = thermal(8, (60, 100))
    with edgeseg.load(engine16, fit="tile") as segmenter:
        mask = segmenter(image)
    whole = thermal_scores(warm, image)
    # A window's border sees zeros where the whole image goes on: two pixels of two 3x3 convolutions.
    differs = mask != whole.argmax(axis=0)
    assert differs.mean() < 0.1
    agrees(mask[:24, :40], whole[:, :24, :40])


REFUSED = [
    (thermal(0).astype(np.uint8), "images are uint8, the engine takes uint16: "),
    (thermal(0).astype(np.float32), "images are float32, the engine takes uint16: np.rint"),
    (thermal(0).astype(np.int32), "images are int32, the engine takes uint16: "),
]


@pytest.mark.parametrize(("image", "words"), REFUSED, ids=["uint8", "float32", "int32"])
def test_other_dtypes_are_never_scaled_silently(engine16: Engine, image: np.ndarray, words: str) -> None:
    with edgeseg.load(engine16) as segmenter:
        with pytest.raises(InputError, match=words):
            segmenter(image)
        with pytest.raises(InputError, match=words):
            list(segmenter.many([image]))
        with pytest.raises(InputError, match="videos and cameras have 3 channels of uint8"):
            edgeseg.stream("0", segmenter)


def test_run_says_how_overlays_are_scaled(
    engine16: Engine, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cv2.imwrite(str(tmp_path / "eight.png"), np.zeros((HEIGHT, WIDTH), np.uint8))
    with edgeseg.load(engine16) as segmenter:
        inputs = [images / "00.png", tmp_path / "eight.png"]
        summary = run_inputs(segmenter, inputs, tmp_path / "out", RunSettings(overlay=True))
        mask = segmenter(images / "00.png")
    assert summary.images == 1
    assert "holds uint8, the engine takes uint16" in summary.failed[0].reason
    assert "overlays show uint16 images from percentile 1 (black) to 99 (white)" in capsys.readouterr().err
    drawn = cv2.imread(str(tmp_path / "out" / "masks" / "00.png"), cv2.IMREAD_UNCHANGED)
    assert drawn.shape[:2] == mask.shape
    shown = CliRunner().invoke(cli, ["inspect", str(engine16.folder)])
    assert "image uint16 (1:2:4, 32x64, 1)" in " ".join(shown.output.split())


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_int8_is_calibrated_and_verified_on_16_bits(
    warm: torch.nn.Module, images: Path, tmp_path: Path, target: str
) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    engine = engine_of(warm, tmp_path / "int8", "int8", calibration=images, calibration_method="minmax", target=target)
    verification = engine.manifest.verification
    assert verification is not None
    assert verification.agreement > 0.97
    assert engine.manifest.precision.mac_share["int8"] > 0.6
    with edgeseg.load(engine) as segmenter:
        for seed in (60, 61):
            image = thermal(seed)
            assert (segmenter(image) == thermal_scores(warm, image).argmax(axis=0)).mean() > 0.95


@pytest.fixture(scope="module")
def scanner() -> torch.nn.Module:
    return network(1, 5)


@pytest.fixture(scope="module")
def float_engine(scanner: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    values = {"input_dtype": "float32", "mean": AIR, "std": SPREAD}
    return engine_of(
        scanner, tmp_path_factory.mktemp("engines") / "ct", **values, dynamic_size=True, output_kind="logits"
    )


KINDS: list[Callable[[np.ndarray], Any]] = [
    lambda x: x,
    lambda x: x.astype(np.float64),
    lambda x: torch.from_numpy(x),
    lambda x: np.rint(x).astype(np.int16),
]


@pytest.mark.parametrize("kind", KINDS, ids=["float32", "float64", "torch", "int16"])
@pytest.mark.parametrize("size", [(HEIGHT, WIDTH), (48, 80)])
def test_physical_values_go_in_as_they_are(
    scanner: torch.nn.Module, float_engine: Engine, kind: Callable[[np.ndarray], Any], size: tuple[int, int]
) -> None:
    assert float_engine.manifest.spec.preprocess.scale == 1.0
    image = kind(hounsfield(9, size))
    expected = scores(scanner, np.asarray(image).astype(np.float32), AIR, SPREAD, 1.0)
    with edgeseg.load(float_engine) as segmenter:
        prediction = segmenter.predict(image)
        assert prediction.logits is not None
        np.testing.assert_allclose(prediction.logits, expected, atol=1e-4)
        agrees(segmenter(image), expected)


@pytest.mark.parametrize(("dtype", "precision"), [("float32", "fp16"), ("float32", "int8"), ("uint16", "fp32")])
def test_a_window_of_values_is_clipped_in_the_graph(
    scanner: torch.nn.Module, dtype: Any, precision: Any, tmp_path: Path
) -> None:
    """numpy's clip, then what MONAI's ``ScaleIntensityRange(low, high, 0, 1, clip=True)`` does, then torch."""
    low, high, beyond = (-160.0, 240.0, -2000.0) if dtype == "float32" else (25000.0, 27000.0, 0.0)
    made = hounsfield if dtype == "float32" else thermal
    for seed in range(12):
        np.save(tmp_path / f"{seed}.npy", made(seed))
    values = {"input_dtype": dtype, "clip": (low, high), "mean": low, "std": high - low, "scale": 1}
    engine = engine_of(
        scanner,
        tmp_path / "engine",
        precision,
        **values,
        output_kind="logits",
        calibration=tmp_path,
    )
    assert engine.manifest.spec.preprocess.clip == (low, high)
    assert engine.manifest.command is None or "--clip" in engine.manifest.command
    verification = engine.manifest.verification
    assert verification is not None
    assert verification.agreement > (0.97 if precision == "int8" else 0.999)
    image = made(40)
    image[:8], image[8:16] = beyond, high
    assert (image < low).any()
    assert (image > high).any()
    unit = (np.clip(image.astype(np.float32), low, high) - low) / (high - low)
    with torch.inference_mode():
        expected = scanner(torch.from_numpy(unit.astype(np.float32))[None, None])[0].numpy()
    with edgeseg.load(engine) as segmenter:
        logits = segmenter.predict(image).logits
    assert logits is not None
    tolerance = {"fp32": 1e-4, "fp16": 5e-3, "int8": 0.05}[precision] * np.ptp(expected)
    np.testing.assert_allclose(logits, expected, atol=tolerance)


def test_what_is_not_finite_or_not_a_value_is_refused(float_engine: Engine, tmp_path: Path) -> None:
    image = hounsfield(1)
    image[3, 4] = np.nan
    np.save(tmp_path / "a.npy", image)
    with edgeseg.load(float_engine) as segmenter:
        for given in (image, tmp_path / "a.npy", [image]):
            with pytest.raises(InputError, match="1 NaN or infinite values of 2048"):
                segmenter(given)
        with pytest.raises(InputError, match=r"uint16, the engine takes float32: x.astype\(np.float32\)"):
            segmenter(thermal(1))
        own = segmenter._open()
        with pytest.raises(InputError, match="this engine takes float32"):
            own.run(np.zeros((1, HEIGHT, WIDTH, 1), np.float64))


def test_colours_in_the_networks_order(tmp_path: Path) -> None:
    module = network(3, 8)
    # Of blue, green, red.
    engine = engine_of(module, tmp_path / "bgr", mean=(0.3, 0.4, 0.5), std=(0.1, 0.2, 0.3), channel_order="bgr")
    bgr = np.random.default_rng(2).integers(0, 65536, (HEIGHT, WIDTH, 3), dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / "a.png"), bgr)
    normalize = albumentations.Normalize(mean=(0.3, 0.4, 0.5), std=(0.1, 0.2, 0.3), max_pixel_value=65535.0)
    given = torch.from_numpy(normalize(image=bgr)["image"].astype(np.float32)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        expected = module(given)[0].numpy()
    with edgeseg.load(engine) as segmenter:
        agrees(segmenter(tmp_path / "a.png"), expected)
        np.testing.assert_array_equal(segmenter(bgr, channel_order="bgr"), segmenter(tmp_path / "a.png"))


def test_the_reference_is_the_same_model(warm: torch.nn.Module, engine16: Engine) -> None:
    """What verification and bench compare with leaves the caller's image alone."""
    from edgeseg.backends.pytorch import PyTorchSession
    from edgeseg.convert.load import wrap_module
    from edgeseg.spec import ModelRequest

    spec = engine16.manifest.spec
    loaded = wrap_module(warm, ModelRequest(input_dtype="uint16", mean=(MEAN,), std=(STD,)))
    image = thermal(70)[None, ..., None]
    before = image.copy()
    with PyTorchSession(loaded, spec) as session, Segmenter(PyTorchSession(loaded, spec), spec) as segmenter:
        np.testing.assert_array_equal(session.run(image)["mask"][0], thermal_scores(warm, image[0]).argmax(axis=0))
        np.testing.assert_array_equal(segmenter(image[0]), session.run(image)["mask"][0])
        with pytest.raises(InputError, match="the model takes uint16"):
            session.run(image.astype(np.uint8))
    np.testing.assert_array_equal(image, before)
