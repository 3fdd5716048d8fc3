"""Verification against sessions whose masks and mistakes are known."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from memory_backend import MemorySession
from numpy.typing import NDArray
from rich.console import Console

from edgeseg.errors import BuildError, GateError, InputError
from edgeseg.evaluate.accuracy.dataset import Pair
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.evaluate.latency.protocol import LatencyProtocol, measure_interleaved, measure_sessions
from edgeseg.evaluate.summary import build_summary, class_table, noise_lines, speed_words, verification_table
from edgeseg.evaluate.verify import TIE, agreement_without_ties, check_fidelity, check_gates, compare_masks, verify
from edgeseg.images.placement import fit, fit_windows
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, OutputSpec, PipelineSpec
from edgeseg.store.engine import Engine
from edgeseg.store.hashing import FileRef
from edgeseg.store.manifest import (
    AccuracyFigures,
    LatencyFigures,
    Manifest,
    PrecisionReport,
    SpeedUp,
    Verification,
)

QUICK = LatencyProtocol(warmup_ms=0, min_iterations=2, min_duration_ms=0, max_iterations=2, block=1)
CLASSES = 5
Decide = Callable[[NDArray[np.uint8]], NDArray[Any]]


class Deciding(MemorySession):
    """Decides each pixel from its own red value; the winner's score leads by ``lead``."""

    def __init__(self, spec: PipelineSpec, decide: Decide, lead: float = 9.0) -> None:
        def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
            mask, classes = decide(images[..., 0])[:, None], spec.model.classes
            won = mask == np.arange(classes).reshape(1, -1, 1, 1) if classes > 1 else mask > 0
            return np.asarray(np.where(won, lead / 2, -lead / 2), np.float32)

        super().__init__(spec, logits)
        self.spec = spec


def pipeline(*, kind: str = "mask", size: tuple[int, int] = (32, 64), **changes: Any) -> PipelineSpec:
    return PipelineSpec(
        model=ModelSpec("fpn", "resnet18", classes=CLASSES),
        input=InputSpec(height=size[0], width=size[1], **changes),
        output=OutputSpec(kind=kind),  # type: ignore[arg-type]
    )


def right(red: NDArray[np.uint8]) -> NDArray[Any]:
    return red // 51 % CLASSES


def wrong_in_the_corner(red: NDArray[np.uint8]) -> NDArray[Any]:
    """Another class in the first 3 x 4 pixels of every image."""
    mask = right(red).copy()
    mask[..., :3, :4] = (mask[..., :3, :4] + 1) % CLASSES
    return mask


def scenes(count: int = 3, size: tuple[int, int] = (32, 64), masks: bool = True) -> list[Pair]:
    rng = np.random.default_rng(0)
    pairs = []
    for k in range(count):
        coarse = rng.integers(0, 256, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
        image = coarse.repeat(8, axis=0).repeat(8, axis=1)
        mask = right(image[..., 0]).astype(np.int32)
        mask[:, -2:] = IGNORED
        pairs.append(Pair(f"{k}.png", image, mask if masks else None, ignore_index=255))
    return pairs


def run(spec: PipelineSpec, engine: Decide, pairs: list[Pair], **options: Any) -> Verification:
    options = {"data": "test scenes", "reference_size_bytes": 40, "engine_size_bytes": 10, "protocol": QUICK, **options}
    return verify(Deciding(spec, right), Deciding(spec, engine), spec, pairs, **options)


def test_a_perfect_engine_agrees_in_everything() -> None:
    verified = run(pipeline(), right, scenes())
    assert (verified.agreement, verified.boundary_agreement, verified.miou_vs_pytorch) == (1.0, 1.0, 1.0)
    assert verified.pytorch_accuracy == verified.engine_accuracy
    assert verified.pytorch_accuracy.miou == verified.pytorch_accuracy.pixel_accuracy == 1.0
    assert verified.miou_drop == 0.0
    assert verified.images == 3
    assert (verified.pytorch_size_bytes, verified.engine_size_bytes) == (40, 10)
    assert verified.data == "test scenes; mask value 255 not judged (3.1% of pixels)"
    assert verified.engine_latency is not None
    assert verified.engine_latency.iterations == 2


@pytest.mark.parametrize("kind", ["mask", "logits", "probabilities"])
def test_exactly_the_wrong_pixels_are_counted(kind: str) -> None:
    spec = pipeline(kind=kind)
    verified = run(spec, wrong_in_the_corner, scenes())
    assert verified.agreement == 1 - 12 / (32 * 64)
    judged = 32 * 62
    assert verified.pytorch_accuracy.pixel_accuracy == 1.0
    assert verified.engine_accuracy.pixel_accuracy == pytest.approx(1 - 12 / judged)
    assert verified.miou_drop is not None
    assert verified.miou_drop > 0
    # By hand: per class over all scenes, truth taken from PyTorch's masks.
    hits, unions = np.zeros(CLASSES), np.zeros(CLASSES)
    for pair in scenes():
        a, b = right(pair.image[..., 0]), wrong_in_the_corner(pair.image[..., 0])
        hits += [np.sum((a == c) & (b == c)) for c in range(CLASSES)]
        unions += [np.sum((a == c) | (b == c)) for c in range(CLASSES)]
    assert verified.miou_vs_pytorch == pytest.approx(np.mean(hits / unions))


def test_without_masks_accuracy_is_not_measured_rather_than_zero() -> None:
    verified = run(pipeline(), wrong_in_the_corner, scenes(masks=False))
    assert verified.engine_accuracy == AccuracyFigures()
    assert verified.miou_drop is None
    assert verified.data == "test scenes"


def test_both_models_see_the_same_fitted_bytes() -> None:
    """Images of another size go through the runtime's own fit, for both, and accuracy is judged at source size."""
    spec = pipeline()
    pairs = scenes(size=(48, 48))
    reference, engine = Deciding(spec, right), Deciding(spec, right)
    compared = compare_masks(reference, engine, spec, pairs)
    assert set(reference.calls) == set(engine.calls) == {(1, 32, 64, 3)}
    assert compared.engine.pixels == sum(int((p.mask != IGNORED).sum()) for p in pairs if p.mask is not None)
    expected = []
    for pair in pairs:
        fitted, placement = fit(pair.image, spec.input)
        assert pair.mask is not None
        expected.append((placement.restore(right(fitted[..., 0]).astype(np.uint8)) == pair.mask).sum())
    assert compared.engine.right == sum(expected)
    np.testing.assert_array_equal(compared.sample[0], fit(pairs[0].image, spec.input)[0])


def test_tiles_are_compared_one_by_one_and_judged_as_the_runtime_stitches_them() -> None:
    spec = pipeline(fit="tile")
    pairs = scenes(1, size=(64, 96))
    compared = compare_masks(Deciding(spec, right), Deciding(spec, wrong_in_the_corner), spec, pairs)
    windows = fit_windows(pairs[0].image, spec.input)
    assert len(windows) > 1
    assert compared.agreement.agreement == 1 - 12 / (32 * 64)
    stitched = Segmenter(Deciding(spec, wrong_in_the_corner), spec)(pairs[0].image)
    assert pairs[0].mask is not None
    judged = pairs[0].mask != IGNORED
    assert compared.engine.right == int((stitched == pairs[0].mask)[judged].sum())


@pytest.mark.parametrize(("fit", "size"), [("letterbox", (32, 32)), ("letterbox", (16, 64)), ("tile", (16, 96))])
def test_padding_is_not_compared(fit: str, size: tuple[int, int]) -> None:
    """Right in what is seen, wrong beyond it; and the other way round."""
    height, width = (min(have, most) for have, most in zip(size, (32, 64), strict=True))

    def wrong(where: Any) -> Decide:
        def decide(red: NDArray[np.uint8]) -> NDArray[Any]:
            mask = right(red).copy()
            mask[where] = (mask[where] + 1) % CLASSES
            return mask

        return decide

    spec = pipeline(fit=fit)
    beyond = np.ones((32, 64), bool)
    beyond[:height, :width] = False
    assert run(spec, wrong((..., beyond)), scenes(size=size)).agreement == 1.0
    corner = run(spec, wrong((..., slice(3), slice(4))), scenes(size=size))
    assert corner.agreement == pytest.approx(1 - 12 / (height * width))
    engine = Deciding(spec, wrong((..., slice(3), slice(4))))
    share = agreement_without_ties(Telling(spec, right), engine, spec, scenes(1, size=size), TIE)
    assert share == pytest.approx(1 - 12 / (height * width))


def test_an_engine_with_a_smallest_batch_gets_it() -> None:
    spec = pipeline(batch=BatchRange(2, 2, 4))
    verified = run(spec, wrong_in_the_corner, scenes())
    assert verified.agreement == 1 - 12 / (32 * 64)
    assert verified.engine_latency is not None


def test_sessions_stay_open() -> None:
    spec = pipeline()
    reference, engine = Deciding(spec, right), Deciding(spec, right)
    verify(reference, engine, spec, scenes(1), data="", reference_size_bytes=1, engine_size_bytes=1, protocol=None)
    assert not reference.closed
    assert not engine.closed


def test_progress_counts_the_images() -> None:
    seen: list[tuple[int, int]] = []
    run(pipeline(), right, scenes(2), progress=lambda *p: seen.append(p))
    assert seen == [(1, 2), (2, 2)]


def test_pairs_are_read_one_at_a_time() -> None:
    alive = 0

    def stream() -> Iterator[Pair]:
        nonlocal alive
        for pair in scenes(3):
            alive += 1
            yield pair

    seen = []
    compare_masks(
        Deciding(pipeline(), right),
        Deciding(pipeline(), right),
        pipeline(),
        stream(),
        lambda d, t: seen.append((d, t, alive)),
    )
    assert seen == [(1, 0, 1), (2, 0, 2), (3, 0, 3)]


def test_no_images_is_an_error() -> None:
    with pytest.raises(InputError, match="no images to verify on"):
        run(pipeline(), right, [])


def test_binary_without_foreground_anywhere_has_no_iou_against_pytorch() -> None:
    spec = PipelineSpec(ModelSpec("fpn", "resnet18", classes=1, task="binary"), InputSpec(32, 32))
    verified = run(spec, np.zeros_like, [Pair("a", np.zeros((32, 32, 3), np.uint8), None)])
    assert verified.agreement == 1.0
    assert verified.miou_vs_pytorch is None
    assert verified.boundary_agreement is None


FIGURES = LatencyFigures(10.0, 12.0, 15.0, 100)
GOOD = Verification(
    agreement=0.99,
    boundary_agreement=0.9,
    miou_vs_pytorch=0.95,
    images=10,
    data="ten scenes",
    pytorch_accuracy=AccuracyFigures(0.70, 0.8, 0.9, (0.9, 0.5, None)),
    engine_accuracy=AccuracyFigures(0.69, 0.79, 0.89, (0.9, 0.48, None)),
    pytorch_latency=dataclasses.replace(FIGURES, median_ms=50.0),
    engine_latency=FIGURES,
    pytorch_size_bytes=20_000_000,
    engine_size_bytes=5_500_000,
    speedup=SpeedUp(5.0, 4.9, 5.1, "faster"),
)


class Telling(Deciding):
    """Returns scores beside the mask."""

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        return {**super().run(images), "logits": self._logits(images)}


@pytest.mark.parametrize(("lead", "share"), [(1.0, 1 - 12 / (32 * 64)), (TIE / 2, 1.0)])
def test_only_pixels_that_pytorch_is_sure_of_count_against_an_fp32_engine(lead: float, share: float) -> None:
    spec = pipeline()
    reference = Telling(spec, right, lead)
    engine = Deciding(spec, wrong_in_the_corner)
    assert agreement_without_ties(reference, engine, spec, scenes(), TIE) == pytest.approx(share)


def test_an_fp32_engine_that_is_not_its_model_is_an_error() -> None:
    def never() -> float:
        raise AssertionError

    equal = dataclasses.replace(GOOD, agreement=0.9995)
    for precision in ("fp32", "fp16", "int8"):
        assert check_fidelity(equal, precision, never) is None
    note = check_fidelity(GOOD, "fp32", lambda: 1.0)
    assert note is not None
    assert "0.9900 of pixels agree" in note
    assert "ties" in note
    with pytest.raises(
        BuildError, match=r"fp32 engine is not its model: 0\.9900 of pixels agree .* ties aside"
    ) as caught:
        check_fidelity(GOOD, "fp32", lambda: 0.99)
    assert "\n" not in str(caught.value)
    assert check_fidelity(GOOD, "int8", never) is None
    bad = check_fidelity(dataclasses.replace(GOOD, agreement=0.3), "int8", never)
    assert bad is not None
    assert "0.3000 of pixels agree with PyTorch, less than the 0.9 usual for int8" in bad


@pytest.mark.parametrize(("max_drop", "min_agreement"), [(None, None), (0.011, None), (None, 0.99), (0.02, 0.9)])
def test_limits_that_are_met_pass(max_drop: float | None, min_agreement: float | None) -> None:
    check_gates(GOOD, max_drop=max_drop, min_agreement=min_agreement)


@pytest.mark.parametrize(
    ("max_drop", "min_agreement", "message"),
    [
        (0.005, None, r"loses 0.0100 mIoU, --max-drop allows 0.005"),
        (None, 0.995, r"0.9900 of pixels agree with PyTorch, --min-agreement wants 0.995"),
        (0.005, 0.995, r"loses 0.0100 mIoU.*; 0.9900 of pixels"),
    ],
)
def test_limits_that_are_not_met_are_named(max_drop: float | None, min_agreement: float | None, message: str) -> None:
    with pytest.raises(GateError, match=message) as caught:
        check_gates(GOOD, max_drop=max_drop, min_agreement=min_agreement)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_a_gain_passes_a_limit_of_zero() -> None:
    better = dataclasses.replace(GOOD, engine_accuracy=AccuracyFigures(0.71))
    check_gates(better, max_drop=0.0)


def test_a_limit_that_was_not_measured_is_not_met() -> None:
    unmeasured = dataclasses.replace(GOOD, engine_accuracy=AccuracyFigures())
    with pytest.raises(GateError, match="not measured, because there are no masks"):
        check_gates(unmeasured, max_drop=0.5)
    with pytest.raises(GateError, match="mIoU"):
        check_gates(dataclasses.replace(GOOD, engine_accuracy=AccuracyFigures(math.nan)), max_drop=0.5)


def shown(renderable: Any, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def rows(renderable: Any, width: int = 80) -> dict[str, list[str]]:
    """The table's lines by their first cell; cells are at least two spaces apart."""
    lines = [re.split(r"\s{2,}", line.strip()) for line in shown(renderable, width).splitlines() if line.strip()]
    return {line[0]: line[1:] for line in lines}


def test_the_table_shows_both_and_their_difference() -> None:
    lines = rows(verification_table(GOOD, "fpn-int8"))
    assert lines["PyTorch"] == ["fpn-int8", "difference"]
    assert lines["mIoU"] == ["0.7000", "0.6900", "-0.0100"]
    assert lines["Dice"] == ["0.8000", "0.7900", "-0.0100"]
    assert lines["pixel accuracy"] == ["0.9000", "0.8900", "-0.0100"]
    assert lines["agreement with PyTorch"] == ["-", "0.9900"]
    assert lines["near class boundaries"] == ["-", "0.9000"]
    assert lines["mIoU, PyTorch's as truth"] == ["-", "0.9500"]
    assert lines["median ms"] == ["50.0", "10.0", "5.0x faster"]
    assert lines["size"] == ["20.0 MB", "5.5 MB", "0.28x"]


def test_a_slower_engine_is_called_slower() -> None:
    latency, speedup = dataclasses.replace(FIGURES, median_ms=100.0), SpeedUp(0.5, 0.4, 0.6, "slower")
    slow = dataclasses.replace(GOOD, engine_latency=latency, speedup=speedup)
    assert rows(verification_table(slow, "e"))["median ms"] == ["50.0", "100.0", "2.0x slower"]


def test_noise_is_said_where_the_speed_up_is() -> None:
    """As bench says it: a star, the reason, and no factor where the interval holds 1 and reaches far beyond."""
    varying = dataclasses.replace(FIGURES, median_ms=50.0, noise=("samples vary by 45% around the median",))
    flagged = dataclasses.replace(GOOD, pytorch_latency=varying, speedup=SpeedUp(4.8, 3.1, 6.0, "faster"))
    assert rows(verification_table(flagged, "e"))["median ms"] == ["50.0", "10.0", "4.8x faster *"]
    assert noise_lines(flagged)[1:] == [
        "  PyTorch: samples vary by 45% around the median",
        "  speed-up 4.8x (95 %: 3.1 to 6.0)",
    ]
    unclear = dataclasses.replace(flagged, speedup=SpeedUp(2.58, 0.74, 9.03, "cannot tell"))
    assert rows(verification_table(unclear, "e"))["median ms"][2] == "cannot tell *"


def test_a_build_on_a_busy_machine_has_the_flags_of_a_bench() -> None:
    """PyTorch takes 10 ms, now and then 300: the same samples through both commands' figures give the same doubts."""
    ticks = itertools.count()
    now_ns = [0]

    class Slow(Deciding):
        def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
            now_ns[0] += 300_000_000 if next(ticks) % 7 == 0 else 10_000_000
            return super().run(images)

    spec, protocol = pipeline(), LatencyProtocol(warmup_ms=0, min_iterations=40, min_duration_ms=0, max_iterations=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "edgeseg.evaluate.verify.measure_interleaved", partial(measure_interleaved, clock_ns=lambda: now_ns[0])
        )
        verified = verify(
            Slow(spec, right), Slow(spec, right), spec, scenes(), data="", reference_size_bytes=1, engine_size_bytes=1,
            protocol=protocol,
        )  # fmt: skip
    assert verified.pytorch_latency is not None and verified.speedup is not None
    assert any(
        "of 40 samples above 1.5 times the median, slowest 300.0 ms" in line for line in verified.pytorch_latency.noise
    )
    assert verified.speedup.low <= 1 <= verified.speedup.high


def test_what_was_not_measured_has_no_line_and_a_dash_beside_what_was() -> None:
    bare = dataclasses.replace(
        GOOD,
        boundary_agreement=None,
        miou_vs_pytorch=None,
        pytorch_accuracy=AccuracyFigures(),
        engine_accuracy=AccuracyFigures(),
        pytorch_latency=None,
        engine_latency=None,
        speedup=None,
    )
    lines = rows(verification_table(bare, "fpn-int8"))
    assert [name for name in lines if set(name) != {"\u2500"}] == ["PyTorch", "agreement with PyTorch", "size"]
    half = dataclasses.replace(GOOD, pytorch_latency=None, pytorch_accuracy=AccuracyFigures())
    assert rows(verification_table(half, "fpn-int8"))["mIoU"] == ["-", "0.6900", "-"]
    assert speed_words(bare) == "-" and noise_lines(bare) == []
    assert class_table(bare, ()) is None


def test_long_names_do_not_break_an_80_column_terminal() -> None:
    text = shown(verification_table(GOOD, "deeplabv3plus-tu-tf_efficientnet_lite0-int8 (onnxruntime)"), 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "0.6900" in text


def test_classes_are_listed_by_name_and_an_absent_one_has_no_line() -> None:
    table = class_table(GOOD, ("road", "car", "pole"))
    rows = [line.split() for line in shown(table).splitlines()]
    assert ["car", "0.5000", "0.4800", "-0.0200"] in rows
    assert not any("pole" in row for row in rows)


def engine_with(verification: Verification | None, **changes: Any) -> Engine:
    graph = FileRef("model.onnx", "0" * 64, 10)
    manifest = Manifest(
        schema_version=1,
        edgeseg_version="0.1.0",
        name="fpn-int8",
        spec=pipeline(),
        precision=PrecisionReport(
            "int8",
            {"fp32": 0.025, "int8": 0.975},
            {"int8": 1.0},
            6_380_000_000,
            "executed",
            {f"head.{k}/Conv": "float" for k in range(5)},
        ),
        target="onnxruntime",
        scheme="onnxruntime-vnni",
        graph=graph,
        engine=graph,
        calibration=None,
        weights="",
        inputs_sha256={},
        options={},
        versions={},
        device={},
        verification=verification,
    )
    return Engine(Path("engines/fpn-int8"), dataclasses.replace(manifest, **changes))


def test_the_summary_of_a_build_says_what_ran_and_on_what() -> None:
    text = " ".join(
        shown(build_summary(engine_with(GOOD, candidates={"onnxruntime": 28.04, "openvino": 31.0}))).split()
    )
    assert "measured on ten scenes" in text
    assert "6.38 GMAC, 97.5% in int8, 2.5% in fp32; float: head.0/Conv, head.1/Conv, head.2/Conv and 2 more" in text
    assert "target auto measured onnxruntime 28.0 ms, openvino 31.0 ms and took onnxruntime" in text


def test_the_summary_of_an_unverified_build_says_so() -> None:
    assert "not verified" in shown(build_summary(engine_with(None)))


def test_sessions_are_measured_in_turns() -> None:
    spec = pipeline(batch=BatchRange(2, 2, 4))
    sessions = {"a": Deciding(spec, right), "b": Deciding(spec, right)}
    measured = measure_sessions(sessions, spec, QUICK)
    assert list(measured) == ["a", "b"]
    assert all(samples.median_ms > 0 for samples in measured.values())
    assert set(sessions["a"].calls) == {(2, 32, 64, 3)}
