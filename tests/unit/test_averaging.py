"""Test-time augmentation and ensembles: means of probabilities, of what the engine says of the turned image, turned back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_backend import LogitsFunction, MemorySession, write_memory_engine

import edgeseg
from edgeseg.backends import BACKENDS
from edgeseg.errors import SpecError
from edgeseg.runtime.averaging import AveragedSession, averaged_spec
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.spec import InputSpec, ModelSpec, OutputKind, OutputSpec, PipelineSpec, Task

RNG = np.random.default_rng(4)
IMAGES = RNG.integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)


def spec_of(
    kind: OutputKind = "logits",
    task: Task = "multiclass",
    classes: int = 3,
    size: tuple[int, int] = (16, 16),
    **given: Any,
) -> PipelineSpec:
    return PipelineSpec(
        ModelSpec("custom", classes=classes, task=task),
        InputSpec(*size, stride=1, fit="tile", **given),
        output=OutputSpec(kind),
    )


def lopsided(classes: int, seed: int = 0) -> LogitsFunction:
    """Looks at each pixel, its right and its lower neighbour: a turned image is another one."""
    weights = np.random.default_rng(seed).normal(size=(3, 3, classes)).astype(np.float32)

    def logits(images: np.ndarray) -> np.ndarray:
        pixels = images.astype(np.float32) / 64
        seen = (pixels, np.roll(pixels, -1, axis=2), np.roll(pixels, -1, axis=1))
        return np.asarray(sum(np.einsum("nhwc,ck->nkhw", p, w) for p, w in zip(seen, weights, strict=True)))

    return logits


def probabilities_of(logits: np.ndarray, task: Task) -> np.ndarray:
    if task != "multiclass":
        return np.asarray(1 / (1 + np.exp(-logits)))
    exponent = np.exp(logits)
    return np.asarray(exponent / exponent.sum(axis=1, keepdims=True))


def by_hand(network: LogitsFunction, images: np.ndarray, task: Task, tta: str) -> np.ndarray:
    """Every view written out, as pairs of what is done to ``(N, H, W, C)`` and undone on ``(N, C, H, W)``."""
    views = {
        "flips": [
            (lambda x: x, lambda y: y),
            (lambda x: x[:, :, ::-1], lambda y: y[..., ::-1]),
            (lambda x: x[:, ::-1], lambda y: y[:, :, ::-1]),
            (lambda x: x[:, ::-1, ::-1], lambda y: y[:, :, ::-1, ::-1]),
        ]
    }
    views["d4"] = [
        *views["flips"],
        (lambda x: x.transpose(0, 2, 1, 3), lambda y: y.transpose(0, 1, 3, 2)),
        (lambda x: x.transpose(0, 2, 1, 3)[:, ::-1], lambda y: y[:, :, ::-1].transpose(0, 1, 3, 2)),
        (lambda x: x.transpose(0, 2, 1, 3)[:, :, ::-1], lambda y: y[..., ::-1].transpose(0, 1, 3, 2)),
        (lambda x: x.transpose(0, 2, 1, 3)[:, ::-1, ::-1], lambda y: y[:, :, ::-1, ::-1].transpose(0, 1, 3, 2)),
    ]
    answers = [undo(probabilities_of(network(do(images)), task)) for do, undo in views[tta]]
    return np.asarray(np.mean(answers, axis=0))


@pytest.mark.parametrize("tta", ["flips", "d4"])
@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize(("task", "classes"), [("multiclass", 3), ("binary", 1), ("multilabel", 3)])
def test_probabilities_are_the_mean_over_all_views(tta: Any, kind: OutputKind, task: Task, classes: int) -> None:
    spec, network = spec_of(kind, task, classes), lopsided(classes)
    session = MemorySession(spec, network)
    segmenter = Segmenter(session, spec, tta=tta)
    prediction = segmenter.predict(IMAGES)
    expected = by_hand(network, IMAGES, task, tta)
    assert prediction.probabilities is not None
    assert prediction.logits is None
    np.testing.assert_allclose(prediction.probabilities, expected, atol=1e-5)
    if task == "multiclass":
        ranked = np.sort(expected, axis=1)
        mask, sure = expected.argmax(axis=1), ranked[:, -1] - ranked[:, -2] > 1e-4
    else:
        mask, sure = expected > 0.5, abs(expected - 0.5) > 1e-4
        mask, sure = (mask[:, 0], sure[:, 0]) if task == "binary" else (mask, sure)
    np.testing.assert_array_equal(prediction.mask[sure], mask[sure])
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(segmenter(IMAGES), prediction.mask)
    assert len(session.calls) == 2 * {"flips": 4, "d4": 8}[tta] * 2
    segmenter.close()
    assert session.closed


def test_an_engine_that_does_not_mind_says_the_same() -> None:
    """Each pixel by itself: turning changes nothing."""
    spec = spec_of()
    plain = Segmenter(MemorySession(spec), spec)
    for tta in ("flips", "d4"):
        np.testing.assert_array_equal(Segmenter(MemorySession(spec), spec, tta=tta)(IMAGES), plain(IMAGES))


def test_tiles_and_other_sizes_are_augmented_as_the_engine_takes_them() -> None:
    spec = spec_of()
    network = lopsided(3)

    def averaged(images: np.ndarray) -> np.ndarray:
        return by_hand(network, images, "multiclass", "flips").astype(np.float32)

    class Probabilities(MemorySession):
        def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
            return {"probabilities": averaged(images)}

    of_probabilities = spec_of("probabilities")
    expected = Segmenter(Probabilities(of_probabilities), of_probabilities)
    image = RNG.integers(0, 256, (30, 41, 3), dtype=np.uint8)
    answer = Segmenter(MemorySession(spec, network), spec, tta="flips").predict(image)
    assert answer.probabilities is not None
    np.testing.assert_allclose(answer.probabilities, expected.predict(image).probabilities, atol=1e-5)


def test_an_ensemble_is_the_mean_of_its_engines() -> None:
    specs = [spec_of("logits"), spec_of("probabilities")]
    networks = [lopsided(3, seed) for seed in (1, 2)]
    sessions = [MemorySession(spec, network) for spec, network in zip(specs, networks, strict=True)]
    averaged = AveragedSession(sessions, specs, ["a", "b"])
    with Segmenter(averaged, averaged.spec) as segmenter:
        probabilities = segmenter.predict(IMAGES).probabilities
    expected = np.mean([probabilities_of(network(IMAGES), "multiclass") for network in networks], axis=0)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert all(session.closed for session in sessions)


def test_folders_are_loaded_as_an_ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "memory", "memory_backend")
    for name, kind in (("a", "logits"), ("b", "logits"), ("m", "mask")):
        write_memory_engine(tmp_path / name, spec_of(kind))  # type: ignore[arg-type]
    alone = edgeseg.load(tmp_path / "a")
    both = edgeseg.load(tmp_path / "a", ensemble=[tmp_path / "b"], tta="d4")
    np.testing.assert_array_equal(both(IMAGES), alone(IMAGES))
    assert alone.identity != both.identity
    assert both.identity != edgeseg.load(tmp_path / "a", ensemble=[tmp_path / "b"]).identity
    with pytest.raises(SpecError, match="m returns masks, and only scores can be averaged; build it with output kind"):
        edgeseg.load(tmp_path / "a", ensemble=[tmp_path / "m"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (spec_of(classes=4), "engines differ in their classes: a has 3, b has 4"),
        (spec_of(size=(16, 32)), "engines differ in their width: a has 16, b has 32"),
        (
            spec_of("mask"),
            "b returns masks, and only scores can be averaged; build it with output kind probabilities",
        ),
    ],
)
def test_engines_that_cannot_be_averaged(other: PipelineSpec, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        averaged_spec([spec_of(), other], None, ["a", "b"])


def test_what_cannot_be_augmented() -> None:
    for kind, size, tta, message in (
        ("mask", (16, 16), "flips", "the engine returns masks"),
        ("logits", (16, 32), "d4", "an input of 16x32 does not take; use flips"),
        ("logits", (16, 16), "rotations", "tta"),
    ):
        spec = spec_of(kind, size=size)  # type: ignore[arg-type]
        with pytest.raises(SpecError, match=message):
            Segmenter(MemorySession(spec), spec, tta=tta)  # type: ignore[arg-type]
    spec = spec_of(size=(16, 32))
    assert Segmenter(MemorySession(spec), spec, tta="flips")(IMAGES[0].repeat(2, axis=1)).shape == (16, 32)
