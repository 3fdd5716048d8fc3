"""Accuracy through the harness, with engines whose errors are known to the pixel."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_backend import MemorySession, write_memory_engine
from numpy.typing import NDArray
from PIL import Image

from edgeseg.backends import BACKENDS
from edgeseg.errors import ArtifactError, InputError, SpecError
from edgeseg.evaluate.accuracy import evaluation
from edgeseg.evaluate.accuracy.counts import TruthCounts, count_agreement, count_truth
from edgeseg.evaluate.accuracy.dataset import Pair
from edgeseg.evaluate.accuracy.evaluation import AccuracyRequest, evaluate
from edgeseg.evaluate.accuracy.judge import ImageRecord, Ledger, at_resolution, truth_of_scores
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.evaluate.contenders import Contender, Opener, engine_contenders
from edgeseg.evaluate.intervals import METRICS, Counts, drops, figure, interval
from edgeseg.evaluate.results import Accuracy
from edgeseg.progress import SilentReporter
from edgeseg.spec import InputSpec, ModelSpec, OutputSpec, PipelineSpec

SPEC = PipelineSpec(ModelSpec("custom", classes=4), InputSpec(32, 32))
SIZE = (32, 32)
# The four brightness bands of the memory engine, by class.
BRIGHTNESS = np.array([32, 96, 160, 224], np.uint8)


class Wrong(MemorySession):
    """Says class 0 where the truth is 3, on the first ``pixels`` such pixels of each image."""

    def __init__(self, pixels: int) -> None:
        super().__init__(SPEC)
        self.pixels = pixels

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        outputs = super().run(images)
        for mask in outputs["mask"]:
            rows, columns = np.nonzero(mask == 3)
            mask[rows[: self.pixels], columns[: self.pixels]] = 0
        return outputs


class Fakes(Opener):
    """Opens what the test made instead of folders."""

    def __init__(self, sessions: Mapping[str, Callable[[], MemorySession]]) -> None:
        super().__init__()
        self.sessions = sessions
        self.opened: list[str] = []

    def open(
        self, contender: Contender, threads: int | None = None, *, with_scores: bool = False, exact: bool = False
    ) -> Any:
        assert exact == (contender.baseline == "pytorch"), "accuracy is judged beside exact float32"
        self.opened.append(contender.name)
        return self.sessions[contender.name]()


BASELINE = Contender("pytorch", SPEC, baseline="pytorch", weights_sha256="w")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Contender:
    monkeypatch.setitem(BACKENDS, "memory", "memory_backend")
    write_memory_engine(tmp_path / "int8", SPEC)
    return replace(engine_contenders([tmp_path / "int8"])[0][0], weights_sha256="w")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "data"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for index in range(6):
        mask = rng.integers(0, 4, (8, 8)).repeat(4, axis=0).repeat(4, axis=1).astype(np.uint8)
        Image.fromarray(BRIGHTNESS[mask][..., None].repeat(3, axis=2)).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    return folder


def run(
    tmp_path: Path, data: Path, engine: Contender, pixels: int, **options: Any
) -> tuple[dict[str, Accuracy], Fakes]:
    request = AccuracyRequest(data, state_folder=tmp_path / "state", **options)
    opener = Fakes({"pytorch": lambda: MemorySession(SPEC), "int8": lambda: Wrong(pixels)})
    return evaluate(request, [BASELINE, engine], opener, SilentReporter()), opener


def test_a_drop_of_exactly_k_pixels_is_found(tmp_path: Path, data: Path, engine: Contender) -> None:
    accuracy, _ = run(tmp_path, data, engine, pixels=7)
    perfect, wrong = accuracy["pytorch"], accuracy["int8"]
    assert perfect.truth is not None and wrong.truth is not None and wrong.agreement is not None
    assert perfect.truth.miou is not None and perfect.truth.miou.value == 1.0
    assert (perfect.truth.dice, perfect.truth.boundary_iou, perfect.truth.boundary_f) == (1.0, 1.0, 1.0)
    assert (wrong.images, wrong.resolution, wrong.ignored_share) == (6, "source", 0.0)
    # 6 images x 7 pixels of 32 x 32
    assert wrong.truth.pixel_accuracy == pytest.approx(1 - 42 / 6144, abs=1e-12)
    assert wrong.agreement.overall.value == pytest.approx(1 - 42 / 6144, abs=1e-12)
    masks = np.stack([np.asarray(Image.open(p)) for p in sorted((data / "masks").iterdir())])
    pixels = np.bincount(masks.ravel(), minlength=4)
    expected = [pixels[0] / (pixels[0] + 42), 1.0, 1.0, (pixels[3] - 42) / pixels[3]]
    assert wrong.truth.per_class_iou == pytest.approx(expected, abs=1e-12)
    assert wrong.agreement.per_class == pytest.approx([1.0, 1.0, 1.0, (pixels[3] - 42) / pixels[3]], abs=1e-12)
    confusion = np.diag(pixels)
    confusion[3, 3], confusion[3, 0] = pixels[3] - 42, 42
    assert np.array_equal(wrong.truth.confusion, confusion)
    (miou,) = [d for d in wrong.truth.drops if d.metric == "miou"]
    assert miou.drop.value == pytest.approx(1 - np.mean(expected), abs=1e-12)
    assert miou.verdict == "loss"
    assert miou.drop.low > 0


def test_without_an_error_there_is_no_difference(tmp_path: Path, data: Path, engine: Contender) -> None:
    accuracy, _ = run(tmp_path, data, engine, pixels=0)
    truth = accuracy["int8"].truth
    assert truth is not None
    assert {d.metric: d.verdict for d in truth.drops} == dict.fromkeys(METRICS, "no difference")


def test_images_without_masks_give_agreement_alone(tmp_path: Path, data: Path, engine: Contender) -> None:
    accuracy, _ = run(tmp_path, data / "images", engine, pixels=3)
    assert accuracy["int8"].truth is None
    assert accuracy["int8"].agreement is not None
    assert accuracy["int8"].agreement.overall.value == pytest.approx(1 - 18 / 6144)


def test_worst_images_are_saved_side_by_side(tmp_path: Path, data: Path, engine: Contender) -> None:
    accuracy, _ = run(tmp_path, data, engine, pixels=7, worst=2, images_folder=tmp_path / "report-images")
    worst = accuracy["int8"].worst
    assert [w.agreement for w in worst] == [1 - 7 / 1024] * 2
    picture = np.asarray(Image.open(tmp_path / str(worst[0].side_by_side)))
    assert picture.shape == (32, 4 * 32 + 3 * 4, 3)
    assert int((picture[:, -32:] == 255).all(axis=-1).sum()) == 7  # the difference is white
    assert worst[0].miou is not None and worst[0].miou < 1.0


def test_equal_masks_have_no_worst_image(tmp_path: Path, data: Path, engine: Contender) -> None:
    accuracy, _ = run(tmp_path, data, engine, pixels=0, worst=2, images_folder=tmp_path / "report-images")
    assert accuracy["int8"].agreement is not None and accuracy["int8"].agreement.overall.value == 1.0
    assert accuracy["int8"].worst == ()
    assert not (tmp_path / "report-images").exists()


def test_an_interrupted_evaluation_goes_on(
    tmp_path: Path, data: Path, engine: Contender, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[int] = []
    real = evaluation.judge

    def stop_after_seven(index: int, *rest: Any) -> ImageRecord:
        if len(judged) == 7:
            raise KeyboardInterrupt
        judged.append(index)
        return real(index, *rest)

    monkeypatch.setattr(evaluation, "judge", stop_after_seven)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data, engine, pixels=7)
    lines = [p.read_text().splitlines() for p in (tmp_path / "state").rglob("images.jsonl")]
    assert sorted(map(len, lines)) == [3, 3]  # three images of both; the fourth was half done
    for path in (tmp_path / "state").rglob("images.jsonl"):
        with path.open("a") as file:
            file.write('{"index":3,"na')  # killed while writing
    judged.clear()
    monkeypatch.setattr(evaluation, "judge", lambda index, *rest: judged.append(index) or real(index, *rest))
    resumed, _ = run(tmp_path, data, engine, pixels=7)
    assert sorted(judged) == [3, 3, 4, 4, 5, 5]
    fresh, _ = run(tmp_path / "other", data, engine, pixels=7)
    assert resumed == fresh


def test_a_finished_evaluation_is_not_repeated_and_changed_data_is(
    tmp_path: Path, data: Path, engine: Contender
) -> None:
    run(tmp_path, data, engine, pixels=7)
    _, opener = run(tmp_path, data, engine, pixels=7)
    assert opener.opened == []
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(data / "masks" / "0.png")
    accuracy, opener = run(tmp_path, data, engine, pixels=7)
    assert opener.opened == ["pytorch", "int8"]
    assert accuracy["pytorch"].truth is not None and accuracy["pytorch"].truth.pixel_accuracy != 1.0


def test_the_limit_spreads_over_the_set(tmp_path: Path, data: Path, engine: Contender) -> None:
    accuracy, _ = run(tmp_path, data, engine, pixels=7, limit=3)
    assert accuracy["int8"].images == 3
    assert accuracy["int8"].truth is not None
    assert accuracy["int8"].truth.drops == ()  # three images say nothing about the next one


def test_engine_resolution_moves_the_mask_to_the_engine() -> None:
    image = np.zeros((64, 48, 3), np.uint8)
    mask = np.arange(64 * 48, dtype=np.int32).reshape(64, 48) % 4
    spec = replace(SPEC, input=InputSpec(32, 32, fit="letterbox"))
    fitted, moved, cropped = at_resolution(Pair("a", image, mask), spec, "engine")
    assert fitted.shape == (32, 32, 3)
    assert np.array_equal(moved, mask[1::2, 1::2])  # the centre of each 2 x 2 block, half-pixel rule
    assert cropped(fitted[..., 0]).shape == (32, 24)
    # Where scores are judged, padding is there and counts for nothing.
    of_scores = truth_of_scores(Pair("a", image, mask), spec)
    assert np.array_equal(of_scores[:, :24], moved) and (of_scores[:, 24:] == IGNORED).all()
    with pytest.raises(SpecError, match="several tiles"):
        at_resolution(Pair("a", image, mask), replace(SPEC, input=InputSpec(32, 32, fit="tile")), "engine")


def test_tiles_at_engine_resolution_are_refused_before_the_work(data: Path) -> None:
    tiles = Contender("tiles", replace(SPEC, input=InputSpec(16, 16, stride=1, fit="tile")))
    with pytest.raises(SpecError, match="several tiles"):
        AccuracyRequest(data, resolution="engine").check([BASELINE, tiles])


def loop_contour_f(
    prediction: NDArray[Any], truth: NDArray[Any], valid: NDArray[Any], value: int, reach: int
) -> list[int]:
    """Contour counts by brute force over pixels."""

    def contour(mask: NDArray[Any]) -> set[tuple[int, int]]:
        points = set()
        height, width = mask.shape
        for y in range(height):
            for x in range(width):
                if mask[y, x] != value or not valid[y, x]:
                    continue
                around = [
                    (v, u)
                    for v in range(max(0, y - 1), min(height, y + 2))
                    for u in range(max(0, x - 1), min(width, x + 2))
                ]
                if any(valid[p] and mask[p] != value for p in around):
                    points.add((y, x))
        return points

    predicted, wanted = contour(prediction), contour(truth)

    def near(point: tuple[int, int], others: set[tuple[int, int]]) -> bool:
        return any(max(abs(point[0] - o[0]), abs(point[1] - o[1])) <= reach for o in others)

    return [
        len(predicted),
        sum(near(p, wanted) for p in predicted),
        len(wanted),
        sum(near(p, predicted) for p in wanted),
    ]


@pytest.mark.parametrize("seed", range(3))
def test_contours_equal_a_loop_over_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 3, (5, 6)).repeat(4, axis=0).repeat(3, axis=1).astype(np.int32)
    prediction = np.roll(truth, 3, axis=1)
    truth[rng.random(truth.shape) < 0.05] = IGNORED
    counts = count_truth(prediction, truth, 3)
    for value, row in zip(counts.classes, counts.counts, strict=True):
        assert list(row[5:]) == loop_contour_f(prediction, truth, truth != IGNORED, value, 2)


def test_agreement_counts_of_planes() -> None:
    reference = np.zeros((2, 8, 8), np.uint8)
    reference[0, :4], reference[1, :, :2] = 1, 1
    prediction = reference.copy()
    prediction[0, 0, 0] = 0
    counts = count_agreement(prediction, reference, 2, "multilabel")
    assert (counts.equal, counts.pixels, counts.classes) == (127, 128, ((0, 31, 32), (1, 16, 16)))


def counts_of(rows: NDArray[Any]) -> Counts:
    """One class whose IoU is right / 100 in each image."""
    classes = np.zeros((len(rows), 1, 9), np.int64)
    classes[:, 0, 0], classes[:, 0, 2] = rows, 100 - rows
    return Counts(classes, rows.astype(np.int64), np.full(len(rows), 100))


def test_a_drop_inside_the_noise_says_so() -> None:
    rng = np.random.default_rng(0)
    before = rng.integers(50, 90, 40)
    for reach, verdict in ((1, "no difference"), (6, "cannot tell")):
        noisy = before + rng.integers(-reach, reach + 1, 40)
        (miou, *_) = drops("pytorch", counts_of(before), counts_of(noisy))
        assert miou.drop.low <= 0 <= miou.drop.high
        assert miou.verdict == verdict and (max(-miou.drop.low, miou.drop.high) > 0.01) == (verdict == "cannot tell")
    worse = before - 3 + rng.integers(-2, 3, 40)
    (miou, *_) = drops("pytorch", counts_of(before), counts_of(worse))
    assert miou.verdict == "loss"
    assert miou.drop.value == pytest.approx((before.sum() - worse.sum()) / 4000)
    assert miou.drop.low < 0.03 < miou.drop.high
    assert drops("pytorch", counts_of(before), counts_of(before + 2))[0].verdict == "gain"


def test_the_interval_over_images_is_the_binomial_one() -> None:
    """Half of 400 images wholly right: the interval of the mean is 0.5 +- 1.96 * sqrt(0.25 / 400)."""
    counts = counts_of(np.tile([0, 100], 200))
    bounds = interval(400, lambda weights: figure("miou", counts.totals(weights)))
    assert bounds is not None
    assert bounds.value == 0.5
    assert bounds.low == pytest.approx(0.451, abs=0.008)
    assert bounds.high == pytest.approx(0.549, abs=0.008)
    assert interval(3, lambda weights: np.full(len(weights), np.nan)) is None


def test_masks_that_mark_unlabelled_pixels_differently_are_refused(
    tmp_path: Path, data: Path, engine: Contender
) -> None:
    ledgers = tmp_path / "state"
    run(tmp_path, data, engine, pixels=0)
    for path in ledgers.rglob("images.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[0]["ignore_index"], lines[1]["ignore_index"] = 255, 4
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="--ignore-index"):
        run(tmp_path, data, engine, pixels=0)


def test_a_ledger_survives_half_a_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x" / "images.jsonl")
    ledger.append(ImageRecord(0, "a", ignore_index=255))
    with ledger.path.open("ab") as file:
        file.write(b'{"index":1')
    again = Ledger(ledger.path)
    again.append(ImageRecord(2, "c"))
    again.append(ImageRecord(1, "b"))
    reopened = Ledger(ledger.path)
    assert [record.name for record in reopened.records()] == ["a", "b", "c"]
    assert (len(reopened), 1 in reopened, 3 in reopened, reopened.ignore_values) == (3, True, False, {255})


@pytest.mark.parametrize("line", [b"nonsense", b"\xff", b'{"index": 1, "name": "\xcf"}', b"[" * 100_000, b"{}"])
def test_a_damaged_ledger_says_what_to_do(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "images.jsonl"
    path.write_bytes(b'{"index":0,"name":"a"}\n' + line + b"\n")
    with pytest.raises(ArtifactError, match=r"^[^\n]* is damaged [^\n]*; remove it: [^\n]*$"):
        Ledger(path)


def test_memory_of_an_evaluation_does_not_grow_with_its_images(tmp_path: Path) -> None:
    """A thousand images as large as they get: 9000 numbers of 120 classes each. What stays is where their lines begin."""
    counts = tuple((k,) * 9 for k in range(120))
    truth = TruthCounts(1, 2, 0, tuple(range(120)), counts, tuple((k, k, 1) for k in range(120)))
    ledger = Ledger(tmp_path / "images.jsonl")
    tracemalloc.start()
    try:
        for index in range(1000):
            ledger.append(ImageRecord(index, f"{index}.png", truth))
        reopened = Ledger(ledger.path)
        assert sum(1 for _ in reopened.records()) == 1000
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert ledger.path.stat().st_size > 3_000_000
    assert held < 400_000
    assert peak < 1_000_000


def test_an_engine_that_tells_its_scores_has_a_loss(tmp_path: Path, data: Path, engine: Contender) -> None:
    """Logits that are 0 or, for the class the brightness says, 3: every pixel is right with the same probability."""
    spec = replace(SPEC, output=OutputSpec("logits"))

    def three(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        bands = images[..., 0] // 64
        return np.stack([np.where(bands == k, 3.0, 0.0) for k in range(4)], axis=1).astype(np.float32)

    accuracy = evaluate(
        AccuracyRequest(data, state_folder=tmp_path / "state"),
        [replace(engine, spec=spec, name="scores")],
        Fakes({"scores": lambda: MemorySession(spec, three)}),
        SilentReporter(),
    )["scores"].truth
    assert accuracy is not None
    right = np.exp(3) / (np.exp(3) + 3)
    assert accuracy.cross_entropy == pytest.approx(-np.log(right), abs=1e-6)
    masks = np.stack([np.asarray(Image.open(p)) for p in sorted((data / "masks").iterdir())])
    true = np.bincount(masks.ravel(), minlength=4)
    probability = true * right + (true.sum() - true) * (1 - right) / 3
    assert accuracy.loss == pytest.approx(np.mean(1 - 2 * true * right / (probability + true)), abs=1e-6)
    assert accuracy.miou is not None and accuracy.miou.value == 1.0


def test_an_engine_that_returns_masks_has_none(tmp_path: Path, data: Path, engine: Contender) -> None:
    truth = run(tmp_path, data, engine, pixels=7)[0]["int8"].truth
    assert truth is not None
    assert (truth.loss, truth.cross_entropy) == (None, None)
