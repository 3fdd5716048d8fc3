"""Which images a build calibrates on and which it is judged on; never the same ones without saying so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from edgeseg.demo import sample_folder
from edgeseg.errors import InputError
from edgeseg.evaluate.accuracy.dataset import Pair, ValidationSet
from edgeseg.quantize.calibration import CalibrationSet
from edgeseg.quantize.table import CalibrationTable

if TYPE_CHECKING:
    from edgeseg.convert.load import LoadedModel
    from edgeseg.pipeline.request import BuildRequest

# Without --validation, every n-th calibration image is kept for verification, if that leaves enough to calibrate on.
HELD_OUT_EVERY = 5
MIN_TO_HOLD_OUT = 20
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

    int8 has to be calibrated; fp16 is where there are images, to find what leaves its range; fp32 never is.

    Raises:
        InputError: int8 without calibration images for a model that is no demo model; unusable folders.
    """
    wanted = request.precision == "int8" or (request.precision == "fp16" and _has_calibration(request, loaded))
    samples = calibration_source(request, loaded) if wanted else None
    if request.validation is not None:
        pairs = ValidationSet.open(request.validation, loaded.model, ignore_index=request.ignore_index)
        return samples, _unseen(pairs, samples)
    if loaded.is_demo and request.calibration is None:
        pairs = ValidationSet.open(sample_folder() / "val", loaded.model)
        return samples, VerificationData(pairs, "the demo validation images (generated street scenes)")
    if isinstance(samples, CalibrationSet):
        return _split(request, loaded, samples)
    if loaded.model.in_channels != 3:
        return samples, None
    stand_in = ValidationSet.open(sample_folder() / "val" / "images", loaded.model).limited(STAND_INS)
    return samples, VerificationData(
        stand_in,
        "generated street scenes for want of your own images (--validation DIR): fidelity, not accuracy",
    )


def _has_calibration(request: BuildRequest, loaded: LoadedModel) -> bool:
    return request.calibration is not None or loaded.is_demo


def calibration_source(request: BuildRequest, loaded: LoadedModel) -> CalibrationSet | CalibrationTable | Path:
    """Open what ``--calibration`` names: images, or a finished table.

    Raises:
        InputError: nothing was given and the model is no demo model, or the images cannot be used.
    """
    source = request.calibration
    if isinstance(source, CalibrationTable):
        return source
    if isinstance(source, (str, Path)) and str(source).lower().endswith(".json"):
        return Path(source)
    if source is None:
        if not loaded.is_demo:
            raise InputError(
                "int8 needs calibration images and none were given; put a few dozen images like those the model will see "
                "in a folder and give --calibration DIR"
            )
        source = sample_folder() / "calib"
    return CalibrationSet.open(source, limit=request.calibration_limit, channels=loaded.model.in_channels)


def _unseen(pairs: ValidationSet, samples: Samples) -> VerificationData:
    """The validation images that were not calibrated on; all of them, saying so, if none is left."""
    description = str(pairs.source)
    if isinstance(samples, CalibrationSet):
        rest = pairs.without(set(samples.content))
        seen = len(pairs) - len(rest)
        if not len(rest):
            return VerificationData(pairs, f"{description}, all of which were also calibrated on")
        if seen:
            return VerificationData(rest, f"{description} without {seen} images that were calibrated on")
    return VerificationData(pairs, description)


def _split(
    request: BuildRequest, loaded: LoadedModel, samples: CalibrationSet
) -> tuple[CalibrationSet, VerificationData]:
    """Keep part of the calibration images for verification; with few images, use them for both and say so."""
    enough = len(samples) >= MIN_TO_HOLD_OUT
    kept, held = samples.hold_out(HELD_OUT_EVERY) if enough else (samples, samples)
    words = "held out of" if enough else "the same as for calibration, too few to hold some out of"
    description = f"{len(held)} images {words} {samples.source}"
    source = request.calibration
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        pairs = ValidationSet.open(source, loaded.model, ignore_index=request.ignore_index)
        return kept, VerificationData(pairs.only(set(held.content)), description)
    return kept, VerificationData(ImagesWithoutMasks(held, loaded.model.in_channels), description)
