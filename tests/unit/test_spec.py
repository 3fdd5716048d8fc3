"""The specs validate themselves and say what would fit."""

from __future__ import annotations

import pytest

from edgeseg.arguments import one_of
from edgeseg.errors import SpecError
from edgeseg.spec import BATCH, BatchRange, InputSpec, ModelSpec, OutputSpec, PipelineSpec, Preprocess


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelSpec("fnp", classes=2), "did you mean 'fpn'"),
        (lambda: ModelSpec("fpn", classes=0), "at least 1"),
        (lambda: ModelSpec("fpn", classes=1), "--task binary"),
        (lambda: ModelSpec("fpn", classes=2, task="binary"), "has 1 class"),
        (lambda: ModelSpec("fpn", classes=70_000), "65536"),
        (lambda: ModelSpec("fpn", classes=3, class_names=("a", "b")), "2 class names for 3 classes"),
        (lambda: InputSpec(250, 256), "nearest is 256x256"),
        (lambda: InputSpec(5, 256), "nearest is 32x256"),
        (lambda: InputSpec(0, 256), "not positive"),
        (lambda: InputSpec(256, 256, min_size=(288, 64)), "not between the smallest 288x64 and the largest 256x256"),
        (lambda: InputSpec(256, 256, max_size=(128, 512)), "not between the smallest 1x1 and the largest 128x512"),
        (lambda: BATCH.accept("batch", "0"), "1 <= MIN"),
        (lambda: BATCH.accept("batch", "4:2:8"), "1 <= MIN"),
        (lambda: BATCH.accept("batch", "1:2"), "MIN:OPT:MAX"),
        (lambda: BATCH.accept("batch", "many"), "MIN:OPT:MAX"),
        (lambda: Preprocess((0.5,), (0.5, 0.5)), "one of each per channel"),
        (lambda: Preprocess((0.5,), (0.0,)), "> 0"),
        (lambda: Preprocess((float("nan"),), (1.0,)), "finite"),
        (lambda: OutputSpec("mask", threshold=1.0), "between 0 and 1"),
        (lambda: PipelineSpec(ModelSpec("fpn", classes=2, in_channels=4)), "4 channels"),
        (lambda: PipelineSpec(ModelSpec("fpn", classes=2, in_channels=4), InputSpec(channels=4)), "--mean and --std"),
    ],
)
def test_impossible_requests_say_what_fits(make: object, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        make()  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_batch_range() -> None:
    assert BATCH.accept("batch", "4") == BatchRange(4, 4, 4)
    assert not BATCH.accept("batch", "4").is_dynamic
    assert BATCH.accept("batch", "1:4:8").is_dynamic


@pytest.mark.parametrize(("classes", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16")])
def test_mask_dtype(classes: int, dtype: str) -> None:
    assert PipelineSpec(ModelSpec("fpn", classes=classes)).mask_dtype == dtype


def test_one_of_names_everything_allowed() -> None:
    with pytest.raises(SpecError, match=r"allowed: a, b"):
        one_of("letter", "zzz", ("a", "b"))
