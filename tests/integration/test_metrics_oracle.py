"""Our figures against ``segmentation_models_pytorch.metrics``, and boundary IoU against OpenCV's erosion."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.artifacts import AccuracyFigures
from edgeseg.evaluate.accuracy import AccuracyMeter
from edgeseg.spec import Task

torch = pytest.importorskip("torch")
metrics = pytest.importorskip("segmentation_models_pytorch").metrics

pytestmark = pytest.mark.integration
TOLERANCE = 1e-6


def blobs(rng: np.random.Generator, classes: int, shape: tuple[int, ...]) -> NDArray[np.int64]:
    coarse = rng.integers(0, classes, (*shape[:-2], shape[-2] // 8, shape[-1] // 8))
    return coarse.repeat(8, axis=-2).repeat(8, axis=-1)


def pair(rng: np.random.Generator, classes: int, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(prediction, truth) that agree on about three quarters."""
    truth = blobs(rng, classes, shape)
    return np.where(rng.random(truth.shape) < 0.25, blobs(rng, classes, shape), truth), truth


def smp_scores(
    prediction: NDArray[np.int64], truth: NDArray[np.int64], mode: str, classes: int, ignore: int | None
) -> dict[str, float]:
    options = {"num_classes": classes, "ignore_index": ignore} if mode == "multiclass" else {}
    stats = metrics.get_stats(torch.from_numpy(prediction), torch.from_numpy(truth), mode=mode, **options)
    tp, fp, fn, tn = stats
    per_class = [float(v) for v in metrics.iou_score(*(s.sum(0, keepdim=True) for s in stats), reduction=None)[0]]
    accuracy = (tp.sum() + tn.sum()) / (tp + fp + fn + tn).sum()
    return {
        "miou": float(metrics.iou_score(*stats, reduction="macro")),
        "dice": float(metrics.f1_score(*stats, reduction="macro")),
        # SMP's accuracy counts true negatives; a multiclass pixel is right when it is some class's true positive.
        "pixel_accuracy": float(tp.sum() / (tp + fn).sum()) if mode == "multiclass" else float(accuracy),
        **{f"iou {k}": v for k, v in enumerate(per_class)},
    }


def as_dict(figures: AccuracyFigures) -> dict[str, float | None]:
    scores = {f"iou {k}": v for k, v in enumerate(figures.per_class_iou)}
    return {"miou": figures.miou, "dice": figures.dice, "pixel_accuracy": figures.pixel_accuracy, **scores}


@pytest.mark.parametrize("ignore", [None, 255])
@pytest.mark.parametrize("classes", [2, 7, 21])
def test_multiclass_equals_smp(classes: int, ignore: int | None) -> None:
    rng = np.random.default_rng(classes)
    prediction, truth = pair(rng, classes, (6, 64, 96))
    if ignore is not None:
        truth[rng.random(truth.shape) < 0.1] = ignore
    meter = AccuracyMeter(classes, ignore_index=ignore)
    for p, t in zip(prediction, truth, strict=True):
        meter.update(p.astype(np.uint8), t.astype(np.uint8))
    expected = smp_scores(prediction, truth, "multiclass", classes, ignore)
    assert as_dict(meter.figures()) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("task", "classes"), [("binary", 1), ("multilabel", 4)])
def test_binary_and_multilabel_equal_smp(task: Task, classes: int) -> None:
    prediction, truth = pair(np.random.default_rng(classes), 2, (5, classes, 64, 96))
    meter = AccuracyMeter(classes, task)
    for p, t in zip(prediction, truth, strict=True):
        meter.update(*((p[0], t[0]) if task == "binary" else (p, t)))
    expected = smp_scores(prediction, truth, task, classes, None)
    assert as_dict(meter.figures()) == pytest.approx(expected, abs=TOLERANCE)


def test_a_class_in_neither_is_where_we_differ_from_smp_on_purpose() -> None:
    """SMP gives such a class 0 or 1 (``zero_division``) and averages over it; we leave it out."""
    prediction, truth = pair(np.random.default_rng(9), 3, (4, 64, 96))
    meter = AccuracyMeter(5)
    for p, t in zip(prediction, truth, strict=True):
        meter.update(p, t)
    stats = metrics.get_stats(torch.from_numpy(prediction), torch.from_numpy(truth), mode="multiclass", num_classes=5)
    known = metrics.iou_score(*(s.sum(0, keepdim=True) for s in stats), reduction=None, zero_division=0.0)[0, :3]
    assert meter.iou()[3:] == (None, None)
    assert meter.figures().miou == pytest.approx(float(known.mean()), abs=TOLERANCE)


def test_boundary_iou_equals_the_papers_definition_by_erosion() -> None:
    """Cheng et al. 2021: a mask minus its erosion by ``d`` steps of 3x3; what lies beyond the image is outside."""
    cv2 = pytest.importorskip("cv2")
    classes, d = 5, 2
    prediction, truth = pair(np.random.default_rng(1), classes, (3, 64, 96))
    meter = AccuracyMeter(classes, boundary_px=d)
    inter, union = np.zeros(classes), np.zeros(classes)

    def boundary(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
        padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=d)[1:-1, 1:-1]
        return (mask - eroded).astype(bool)

    for p, t in zip(prediction, truth, strict=True):
        meter.update(p, t)
        for c in range(classes):
            edge_p, edge_t = boundary((p == c).astype(np.uint8)), boundary((t == c).astype(np.uint8))
            inter[c] += (edge_p & edge_t).sum()
            union[c] += (edge_p | edge_t).sum()
    assert meter.boundary_iou() == pytest.approx(tuple(inter / union))
