"""Which images a build calibrates on and which it is judged on; never the same ones without saying so."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from numpy.typing import NDArray

from edgeseg.demo import sample_folder
from edgeseg.errors import InputError
from edgeseg.evaluate.accuracy.dataset import Pair, ValidationSet
from edgeseg.evaluate.tables import counted
from edgeseg.quantize.samples import MINIMUM_IMAGES, CalibrationSet, check_source
from edgeseg.quantize.table import CalibrationTable
from edgeseg.spec import ModelSpec

if TYPE_CHECKING:
    from edgeseg.convert.loaded import LoadedModel
    from edgeseg.pipeline.request import BuildRequest

# Without --validation, every n-th calibration image is kept for verification, if that leaves enough to calibrate on.
HELD_OUT_EVERY = 5
MIN_TO_HOLD_OUT = 20
# Enough to tell a network's normalization by.
SAMPLES = 8

NO_CALIBRATION = (
    "int8 needs calibration images and none were given; put a few dozen images like those the model will see in a folder "
    "and give --calibration DIR"
)

# Which files there are does not depend on the model that will be judged on them.
_ANY_MODEL = ModelSpec("custom", classes=2)
# Generated scenes that stand in for images of one's own show whether the engine is the model; a few do.
STAND_INS = 8

Samples: TypeAlias = "CalibrationSet | CalibrationTable | Path | None"


@dataclass(frozen=True)
class ImagesWithoutMasks:
    """Images of a calibration set as pairs to verify on."""

    samples: CalibrationSet
    channels: int

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Pair]:
        for (name, image), digest in zip(self.samples.named_images(self.channels), self.samples.content, strict=True):
            yield Pair(name, image, None, digest)


@dataclass(frozen=True)
class VerificationData:
    """Images, with masks where there are any, and where they came from in words."""

    pairs: ValidationSet | ImagesWithoutMasks
    description: str

    @property
    def has_masks(self) -> bool:
        return isinstance(self.pairs, ValidationSet) and self.pairs.has_masks


def calibration_and_held_out(request: BuildRequest, loaded: LoadedModel) -> tuple[Samples, VerificationData | None]:
    """Choose what to calibrate with and the images to verify on.

    int8 has to be calibrated, unless its scales were trained; fp16 is where there are images, to find what leaves its range;
    fp32 never is.

    Raises:
        InputError: int8 without calibration images for a model that is no demo model; unusable folders.
    """
    has_images = request.calibration is not None or loaded.is_demo
    wanted = has_images if request.precision == "fp16" or loaded.trained is not None else request.precision == "int8"
    samples = calibration_source(request, loaded) if wanted else None
    if request.validation is not None:
        pairs = _validation(request, loaded, request.validation)
        pairs.image(0)  # channels and dtype: what is wrong with them is said before the work
        return samples, _unseen(pairs, samples)
    if loaded.is_demo and request.calibration is None:
        pairs = ValidationSet.open(sample_folder() / "val", loaded.model)
        return samples, VerificationData(pairs, "the demo validation images (generated street scenes)")
    if isinstance(samples, CalibrationSet):
        return _split(request, loaded, samples)
    if verifies_on_calibration(request):
        # Nothing is calibrated on them here; the precisions of a sweep are judged on the same.
        images = calibration_source(request, loaded)
        assert isinstance(images, CalibrationSet)  # no table
        return samples, _split(request, loaded, images)[1]
    if loaded.model.in_channels != 3 or request.input_dtype != "uint8":
        return samples, None
    stand_in = ValidationSet.open(sample_folder() / "val" / "images", loaded.model).limited(STAND_INS)
    return samples, VerificationData(
        stand_in,
        "generated street scenes for want of your own images (--validation DIR): fidelity, not accuracy",
    )


def check_images(request: BuildRequest, *, is_demo: bool, is_module: bool) -> None:
    """Refuse, before the model is loaded, what a look at the files shows to be impossible.

    ``is_module``: a module may have scales of its own, from fake-quantizers.

    Raises:
        InputError: calibration or validation images that are missing or too few, or ``max_drop`` without masks.
    """
    source = request.calibration
    if request.precision == "int8" and source is None and not is_demo and not is_module:
        raise InputError(NO_CALIBRATION)
    if source is not None and (request.precision != "fp32" or verifies_on_calibration(request)):
        if _is_table(source):
            if not Path(source).is_file():
                raise InputError(f"calibration table {source} does not exist; edgeseg calibrate makes one")
        elif not isinstance(source, CalibrationTable):
            check_source(source, request.calibration_limit, request.input_dtype, fewest_images(request))
    has_masks = is_demo and source is None
    if request.validation is not None:
        has_masks = ValidationSet.open(request.validation, _ANY_MODEL).has_masks
    elif isinstance(source, (str, Path)) and Path(source).is_dir():
        has_masks = ValidationSet.open(source, _ANY_MODEL).has_masks
    if request.max_drop is not None and not has_masks:
        raise InputError("--max-drop needs masks: give --validation DIR with images/ and masks/")


def verifies_on_calibration(request: BuildRequest) -> bool:
    """Whether some of the images to calibrate on are those to verify on."""
    return request.calibration is not None and request.validation is None and not _is_table(request.calibration)


def _is_table(source: object) -> bool:
    return isinstance(source, CalibrationTable) or (
        isinstance(source, (str, Path)) and str(source).lower().endswith(".json")
    )


def calibration_source(request: BuildRequest, loaded: LoadedModel) -> CalibrationSet | CalibrationTable | Path:
    """Open what ``--calibration`` names: images, or a finished table.

    Raises:
        InputError: nothing was given and the model is no demo model, or the images cannot be used.
    """
    source = request.calibration
    if _is_table(source):
        return source if isinstance(source, CalibrationTable) else Path(source)
    if source is None:
        if not loaded.is_demo:
            raise InputError(NO_CALIBRATION)
        source = sample_folder() / "calib"
    return CalibrationSet.open(
        source,
        limit=request.calibration_limit,
        channels=loaded.model.in_channels,
        dtype=request.input_dtype,
        minimum=fewest_images(request),
    )


def fewest_images(request: BuildRequest) -> int:
    """That ``--calibration`` has to name: of an fp32 engine there are no ranges, and one is enough to verify on."""
    return 1 if request.precision == "fp32" else MINIMUM_IMAGES


def _validation(request: BuildRequest, loaded: LoadedModel, folder: str | Path) -> ValidationSet:
    return ValidationSet.open(folder, loaded.model, ignore_index=request.ignore_index, dtype=request.input_dtype)


def sample_images(request: BuildRequest, channels: int) -> list[NDArray[Any]]:
    """A few of the images given, ``(H, W, channels)``: what they show tells how the network wants them.

    Empty where none are given, or none can be read, which the stage that needs them refuses.
    """
    for source in (request.calibration, request.validation):
        if source is None or _is_table(source):
            continue
        try:
            samples = CalibrationSet.open(
                source, limit=SAMPLES, channels=channels, dtype=request.input_dtype, minimum=1
            )
            return [image for _, image in samples.named_images(channels)]
        except InputError:
            continue
    return []


def _unseen(pairs: ValidationSet, samples: Samples) -> VerificationData:
    """The validation images that were not calibrated on; all of them, saying so, if none is left."""
    description = _described(str(pairs.source), pairs, len(pairs.unpaired))
    if isinstance(samples, CalibrationSet):
        rest = pairs.without(set(samples.pixels))
        seen = len(pairs) - len(rest)
        if not len(rest):
            return VerificationData(pairs, f"{description}, all of which were also calibrated on")
        if seen:
            return VerificationData(rest, f"{description} without {seen} images that were calibrated on")
    return VerificationData(pairs, description)


def _described(description: str, pairs: ValidationSet, without_mask: int) -> str:
    """``description``, and what of the images and masks was left out or read in a way that is not plain."""
    # All masks are read here: what is wrong with them is said before the work.
    meaning = pairs.labels.meaning
    left_out = f", leaving out {counted(without_mask, 'image')} without a mask" if without_mask else ""
    return f"{description}{left_out}" + (f" ({meaning})" if meaning else "")


def _split(
    request: BuildRequest, loaded: LoadedModel, samples: CalibrationSet
) -> tuple[CalibrationSet, VerificationData]:
    """Keep part of the calibration images for verification; with few images, use them for both and say so."""
    enough = len(samples) >= MIN_TO_HOLD_OUT
    kept, held = samples.hold_out(HELD_OUT_EVERY) if enough else (samples, samples)
    words = "held out of"
    if not enough:
        words = "of" if request.precision == "fp32" else "the same as for calibration, too few to hold some out of"
    description = f"{len(held)} images {words} {samples.source}"
    source = request.calibration
    if isinstance(source, (str, Path)) and os.path.isdir(source):
        pairs = _validation(request, loaded, source).only(set(held.content))
        return kept, VerificationData(pairs, _described(description, pairs, len(held) - len(pairs)))
    return kept, VerificationData(ImagesWithoutMasks(held, loaded.model.in_channels), description)
