"""The preprocessing saved beside a model as part of the engine's contract: its size, fit policy, padding and interpolation.

SMP's documentation tells people to save their inference transform with the model (``A.Compose.save_pretrained``), and the
models of its hub have one. :mod:`edgeseg.convert.albumentations_file` reads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from edgeseg.errors import SpecError
from edgeseg.images.placement import Placement, plan_fit
from edgeseg.spec import FitPolicy, InputDtype, InputSpec, Interpolation, Padding, Preprocess

CONFIG_NAME = "albumentations_config_eval.json"


@dataclass(frozen=True)
class Unfit:
    """A transform that no engine can hold: why, and the options that say all it would have said."""

    reason: str
    instead: tuple[str, ...]


@dataclass(frozen=True)
class Scaling:
    """``Resize``, ``LongestMaxSize`` or ``SmallestMaxSize``; ``size`` is ``(height, width)``, ``None`` where free."""

    kind: Literal["resize", "longest", "smallest"]
    size: tuple[int | None, int | None]
    interpolation: Interpolation
    words: str

    def content(self, image: tuple[int, int]) -> tuple[int, int]:
        """Size of an image after it, as albumentations rounds it."""
        if self.kind == "resize" and (whole := both(self.size)) is not None:
            return whole
        scales = [limit / side for limit, side in zip(self.size, image, strict=True) if limit is not None]
        scale = min(scales) if self.kind == "longest" else max(scales)
        return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))


@dataclass(frozen=True)
class Canvas:
    """``PadIfNeeded``: the least size, or what height and width must be multiples of, per axis."""

    minimum: tuple[int | None, int | None]
    divisor: tuple[int | None, int | None]
    padding: Padding
    words: str

    def around(self, content: tuple[int, int]) -> tuple[int, int]:
        """Size of an image after it."""
        height, width = (
            max(side, least) if least is not None else -(-side // (multiple or 1)) * (multiple or 1)
            for side, least, multiple in zip(content, self.minimum, self.divisor, strict=True)
        )
        return height, width


@dataclass(frozen=True)
class Crop:
    """``CenterCrop``; ``padding`` where it pads smaller images first."""

    size: tuple[int, int]
    padding: Padding | None
    words: str


@dataclass(frozen=True)
class Fitting:
    """How images meet the engine by the saved preprocessing; ``None`` where it says nothing."""

    size: tuple[int, int] | None = None
    fit: FitPolicy | None = None
    padding: Padding | None = None
    interpolation: Interpolation = "linear"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SavedPreprocessing:
    """What ``albumentations_config_eval.json`` says, transform by transform.

    Attributes:
        words: the transforms, for people.
        normalization: mean, std and scale; ``None`` where pixel values are not touched.
        scaling, canvas, crop: what it does to sizes, in this order.
        unfit: transforms that no engine can hold.
        rounded: a note on a colour of padding that is between two levels.
        doubts: notes on pixel values that the images' dtype does not have.
        dtype: of the images.
    """

    words: tuple[str, ...] = ()
    normalization: Preprocess | None = None
    scaling: Scaling | None = None
    canvas: Canvas | None = None
    crop: Crop | None = None
    unfit: tuple[Unfit, ...] = ()
    rounded: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()
    dtype: InputDtype = "uint8"

    @property
    def note(self) -> str:
        """What was read, for the user."""
        return f"preprocessing saved with the model ({CONFIG_NAME}): {', '.join(self.words) or 'nothing'}"

    def for_channels(self, channels: int) -> Preprocess | None:
        """The normalization with one mean and std per channel."""
        known = self.normalization
        if known is None or len(known.mean) != 1:
            return known
        return replace(known, mean=known.mean * channels, std=known.std * channels)

    def require_fit(self, given: Iterable[str]) -> None:
        """Raise :class:`SpecError` for a transform no engine can hold, unless the options ``given`` take its place."""
        for unfit in self.unfit:
            missing = [name for name in unfit.instead if name not in given]
            if missing:
                *first, last = (f"--{name}" for name in missing)
                options = f"{', '.join(first)} and {last}" if first else last
                raise SpecError(f"{CONFIG_NAME}: {unfit.reason}; give {options} to build without it")

    def fitting(
        self,
        size: tuple[int, int] | None,
        fit: FitPolicy | None,
        images: Iterable[tuple[int, int]],
        channels: int,
    ) -> Fitting:
        """Say size, fit policy, padding and interpolation; what the user gave wins, and the notes say over what.

        Args:
            size: the user's, ``(height, width)`` in pixels.
            fit: the user's.
            images: sizes of images like those to come; asked for where the transform gives each shape a size of its own.
            channels: of the images.

        Raises:
            SpecError: the transform gives images different sizes and none can be chosen for them.
        """
        policy = self._policy
        if policy is None:
            return Fitting(notes=self.rounded)
        padding = self._padding
        notes = list(self.rounded if (fit or policy) != "resize" else ())
        steps = " and ".join(step.words for step in (self.scaling, self.canvas, self.crop) if step is not None)
        if size is not None and size != (self.scaling.size if self.scaling and policy == "resize" else None):
            notes.append(f"--size {size[0]}x{size[1]} overrides the saved {steps}")
        if fit is not None and fit != policy:
            notes.append(f"--fit {fit} overrides the saved {steps}")
        chosen = None
        if size is None:
            chosen, note = self._size(tuple(dict.fromkeys(images)), policy, channels)
            notes += [note] if note else []
        interpolation = self.scaling.interpolation if self.scaling is not None else "linear"
        return Fitting(chosen, policy, padding, interpolation, tuple(notes))

    @property
    def _padding(self) -> Padding | None:
        if self.canvas is not None:
            return self.canvas.padding
        return self.crop.padding if self.crop is not None else None

    @property
    def _policy(self) -> FitPolicy | None:
        if self.scaling is None:
            return None if self.canvas is None and self.crop is None else "tile"
        if self.scaling.kind == "longest" or self.canvas is not None:
            return "letterbox"
        return "resize"

    def _after(self, image: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """(size of the image, size of the whole) once it went through scaling and padding."""
        content = image if self.scaling is None else self.scaling.content(image)
        return content, content if self.canvas is None else self.canvas.around(content)

    def _size(
        self, images: tuple[tuple[int, int], ...], policy: FitPolicy, channels: int
    ) -> tuple[tuple[int, int] | None, str | None]:
        """The engine's size, and a note where images of other shapes will differ from the saved preprocessing."""
        if self.crop is not None:
            return self.crop.size, (
                f"the saved {self.crop.words} sees the middle of an image only; the engine covers all of it with windows "
                "of that size at the same scale (--fit tile)"
            )
        if self.scaling is not None and self.scaling.kind == "resize":
            return self.scaling.content((1, 1)), None
        limit = None if self.scaling is None else self.scaling.size
        least = (None, None) if self.canvas is None else self.canvas.minimum
        if limit is not None and least == limit and self.scaling is not None and self.scaling.kind == "longest":
            return both(limit), None
        canvases = {self._after(image)[1] for image in images}
        if len(canvases) == 1 and (common := canvases.pop()) and self._is_exact(images, common, policy, channels):
            if common == both(least):
                return common, None
            return common, (
                f"size {common[0]}x{common[1]}: what the saved preprocessing makes of the images given; images of another "
                "shape get the same size here (--size says another)"
            )
        if self.scaling is None:
            size = both(least)
            return (
                size,
                None if size else "the saved preprocessing pads images at their own scale to a size of their own",
            )
        whole = both(self.scaling.size)
        divides = self.canvas is None or self._after(whole or (1, 1))[1] == whole
        if self.scaling.kind == "smallest" or whole is None or not divides:
            what = self.scaling.words if self.canvas is None else f"{self.scaling.words} with {self.canvas.words}"
            raise SpecError(
                f"{CONFIG_NAME}: {what} gives images of each shape a size of its own, an engine has one; give --size HxW "
                "(or --calibration with images of the one shape you have)"
            )
        return whole, (
            f"the saved {self.scaling.words} gives images of each shape a size of its own; the engine has one, "
            f"{whole[0]}x{whole[1]}, with more padding (--size says another)"
        )

    def _is_exact(
        self, images: tuple[tuple[int, int], ...], canvas: tuple[int, int], policy: FitPolicy, channels: int
    ) -> bool:
        """Whether the policy places every image in the canvas just as the saved preprocessing does."""
        spec = InputSpec(*canvas, channels=channels, stride=1, fit=policy, padding=self._padding, dtype=self.dtype)
        for image in images:
            plan = plan_fit(*image, spec)
            if not isinstance(plan, Placement) or plan.content != self._after(image)[0]:
                return False
        return True


def both(sides: tuple[int | None, int | None]) -> tuple[int, int] | None:
    """Height and width where both are known."""
    height, width = sides
    return None if height is None or width is None else (height, width)
