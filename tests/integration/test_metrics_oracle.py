"""Our figures against ``segmentation_models_pytorch``'s metrics and losses, and boundary IoU against OpenCV's erosion."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeseg.evaluate.accuracy.counts import AccuracyMeter, count_truth
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.evaluate.accuracy.loss import ScoreTap, loss_sums, losses
from edgeseg.evaluate.intervals import COLUMNS, per_class
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec, Task
from edgeseg.store.manifest import AccuracyFigures

torch = pytest.importorskip("torch")
smp = pytest.importorskip("segmentation_models_pytorch")
metrics = smp.metrics
PyTorchSession = pytest.importorskip("edgeseg.backends.pytorch").PyTorchSession

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
    meter = AccuracyMeter(classes)
    for p, t in zip(prediction, truth, strict=True):
        meter.update(p.astype(np.uint8), np.where(t == 255, IGNORED, t))
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
    assert meter.figures().per_class_iou[3:] == (None, None)
    assert meter.figures().miou == pytest.approx(float(known.mean()), abs=TOLERANCE)


def test_boundary_iou_equals_the_papers_definition_by_erosion() -> None:
    """Cheng et al. 2021: a mask minus its erosion by ``d`` steps of 3x3; what lies beyond the image is outside."""
    cv2 = pytest.importorskip("cv2")
    classes, d = 5, 2
    prediction, truth = pair(np.random.default_rng(1), classes, (3, 64, 96))
    counts = np.zeros((classes, COLUMNS), np.int64)
    inter, union = np.zeros(classes), np.zeros(classes)

    def boundary(mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
        padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=d)[1:-1, 1:-1]
        return (mask - eroded).astype(bool)

    for p, t in zip(prediction, truth, strict=True):
        counted = count_truth(p, t, classes, boundary_px=d)
        counts[list(counted.classes)] += counted.counts
        for c in range(classes):
            edge_p, edge_t = boundary((p == c).astype(np.uint8)), boundary((t == c).astype(np.uint8))
            inter[c] += (edge_p & edge_t).sum()
            union[c] += (edge_p | edge_t).sum()
    assert per_class("boundary_iou", counts) == pytest.approx(inter / union)


def smp_losses(logits: NDArray[np.float32], truth: NDArray[np.int32], task: Task) -> tuple[float, float]:
    """SMP's DiceLoss and torch's cross-entropy of ``(N, C, H, W)`` logits; -1 is unlabelled."""
    functional = torch.nn.functional
    # In double: of many pixels SMP's float32 sums are off by more than a millionth.
    scores, labels = torch.from_numpy(logits).double(), torch.from_numpy(truth).long()
    valid = labels != -1
    if task == "multiclass":
        # SMP counts the unlabelled to class 0 before it masks them, so its index must be no class.
        dice = smp.losses.DiceLoss(mode=task, ignore_index=-1)(scores, labels)
        return float(dice), float(functional.cross_entropy(scores, labels, ignore_index=-1))
    shaped = labels.reshape(scores.shape)
    dice = smp.losses.DiceLoss(mode=task, ignore_index=-1)(scores, shaped)
    kept = valid.reshape(scores.shape)
    return float(dice), float(functional.binary_cross_entropy_with_logits(scores[kept], shaped[kept].double()))


@pytest.mark.parametrize("kind", ["logits", "probabilities"])
@pytest.mark.parametrize(("task", "classes"), [("multiclass", 7), ("binary", 1), ("multilabel", 4)])
def test_losses_equal_smp_and_torch(task: Task, classes: int, kind: str) -> None:
    rng = np.random.default_rng(classes)
    shape = (5, 32, 48) if task != "multilabel" else (5, classes, 32, 48)
    # The last class is never true: SMP lets it add nothing and counts it all the same.
    truth = blobs(rng, max(2, classes - 1), shape) if task == "multiclass" else blobs(rng, 2, shape)
    if task == "multilabel":
        truth[:, -1] = 0
    truth = truth.astype(np.int32)
    truth[rng.random(truth.shape) < 0.1] = IGNORED
    logits = rng.normal(0, 4, (5, classes, 32, 48)).astype(np.float32)
    expected = smp_losses(logits, truth, task)
    scores = logits
    if kind == "probabilities":
        whole = torch.from_numpy(logits)
        scores = (whole.softmax(1) if task == "multiclass" else whole.sigmoid()).numpy()
    ours = losses(loss_sums(kind, image, mask, task) for image, mask in zip(scores, truth, strict=True))
    assert ours is not None
    assert ours.dice_loss == pytest.approx(expected[0], abs=TOLERANCE)
    # A float32 probability next to 1 has forgotten how far from 1 it is, and the logarithm asks.
    assert ours.cross_entropy == pytest.approx(expected[1], abs=1e-5 if kind == "logits" else 1e-3)


def test_losses_of_what_has_none() -> None:
    truth = np.zeros((4, 4), np.int32)
    assert loss_sums("logits", np.zeros((2, 8, 8), np.float32), truth, "multiclass") is None
    some = loss_sums("logits", np.zeros((2, 4, 4), np.float32), truth, "multiclass")
    assert losses([some, None]) is None
    unlabelled = loss_sums("logits", np.zeros((2, 4, 4), np.float32), np.full((4, 4), IGNORED, np.int32), "multiclass")
    assert unlabelled is not None and unlabelled.pixels == 0
    assert losses([unlabelled]) is None


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_pytorch_s_own_scores_give_its_loss(task: Task) -> None:
    """Through the session of the baseline: the mask stays the same, and the loss is that of the module's output."""
    classes = 5 if task == "multiclass" else 1
    torch.manual_seed(0)
    module = torch.nn.Conv2d(3, classes, 3, padding=1).eval()
    spec = PipelineSpec(ModelSpec("fpn", classes=classes, task=task), InputSpec(32, 64))
    rng = np.random.default_rng(2)
    images = rng.integers(0, 256, (1, 32, 64, 3), dtype=np.uint8)
    plain = PyTorchSession(SimpleNamespace(module=module), spec)
    telling = ScoreTap(PyTorchSession(SimpleNamespace(module=module), spec, with_scores=True))
    assert set(plain.run(images)) == {"mask"}
    assert np.array_equal(telling.run(images)["mask"], plain.run(images)["mask"])
    scores = telling.scores()
    assert scores is not None and scores[0] == "logits"
    truth = blobs(rng, max(2, classes), (1, 32, 64)).astype(np.int32)
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (spec.preprocess.mean, spec.preprocess.std))
        expected = smp_losses(module((x - mean) / std).numpy(), truth, task)
    ours = losses([loss_sums(*scores, truth[0], task)])
    assert ours is not None
    assert (ours.dice_loss, ours.cross_entropy) == pytest.approx(expected, abs=1e-5)
