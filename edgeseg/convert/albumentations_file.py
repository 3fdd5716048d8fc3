"""``albumentations_config_eval.json``, read as data: nothing it names is imported or run.

What it says about pixel values becomes mean, std and scale, what it says about sizes :class:`SavedPreprocessing`. A transform
that an engine cannot hold is noted by name, with the user's flags that would take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from edgeseg.arguments import MOST
from edgeseg.convert.checkpoint import read_saved_json
from edgeseg.convert.saved_preprocessing import CONFIG_NAME, Canvas, Crop, SavedPreprocessing, Scaling, Unfit, both
from edgeseg.errors import CheckpointError, SpecError
from edgeseg.spec import FULL_SCALE, Border, InputDtype, Interpolation, Padding, PadPosition, Preprocess
from edgeseg.store.files import require_regular

_DEEPEST = 16

# OpenCV's numbers; LINEAR_EXACT (5) is LINEAR rounded otherwise.
_INTERPOLATIONS: dict[int, Interpolation] = {
    0: "nearest",
    1: "linear",
    2: "cubic",
    3: "area",
    4: "lanczos",
    5: "linear",
}
_BORDERS: dict[int, Border] = {0: "constant", 1: "replicate", 2: "reflect", 3: "wrap", 4: "reflect_101"}
_POSITIONS: dict[str, PadPosition] = {"center": "center", "top_left": "top_left"}

_VALUES = ("mean", "std")
_SIZES = ("size", "fit")


def saved_beside(weights: Path, dtype: InputDtype = "uint8") -> SavedPreprocessing | None:
    """Read the file beside a weights file, for images of ``dtype``; ``None`` where there is none.

    Raises:
        CheckpointError: it is damaged, too large, or no transform that albumentations saved.
    """
    path = weights.parent / CONFIG_NAME
    if not path.is_file():
        return None
    require_regular(path, "saved preprocessing", CheckpointError)
    advice = "save the transform again with save_pretrained, or move the file away"
    content = read_saved_json(path, "a saved transform", advice)
    transform = content.get("transform") if isinstance(content, dict) else None
    if not isinstance(transform, dict):
        raise CheckpointError(
            f"{path} holds no transform; save it again with albumentations' Compose.save_pretrained, or move the file away"
        )
    return _Reader(path, dtype).read(transform)


class _Reader:
    """Goes through the transforms in order, which matters: a colour given after Normalize is in its units."""

    def __init__(self, path: Path, dtype: InputDtype) -> None:
        self.path = path
        self.full_scale = FULL_SCALE[dtype]
        self.saved = SavedPreprocessing(dtype=dtype)

    def read(self, transform: Mapping[str, Any]) -> SavedPreprocessing:
        for name, step in self._flat(transform, 0):
            if name in ("NoOp", "ToTensorV2", "ToRGB"):
                # Layout is the graph's matter; a grey image is decoded to as many channels as the model takes.
                continue
            if not _is_certain(step):
                self._refuse(
                    f"{name} is applied to some images only (p={str(step.get('p'))[:20]})", (*_VALUES, *_SIZES)
                )
            elif name in _READERS:
                _READERS[name](self, step)
            else:
                self._refuse(f"{name[:80]} cannot be part of an engine", (*_VALUES, *_SIZES))
        return self.saved

    def _flat(self, step: object, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
        name = step.get("__class_fullname__") if isinstance(step, dict) else None
        if not isinstance(step, dict) or not isinstance(name, str) or depth > _DEEPEST:
            raise CheckpointError(
                f"{self.path} holds a transform without a name, or nested too deep; save it again with save_pretrained"
            )
        if name.startswith("albumentations."):
            name = name.rpartition(".")[2]
        inner = step.get("transforms")
        if name in ("Compose", "Sequential") and isinstance(inner, list) and _is_certain(step):
            for child in inner:
                yield from self._flat(child, depth + 1)
        else:
            yield name, step

    def _refuse(self, reason: str, instead: tuple[str, ...]) -> None:
        # Names are the file's: they stay on one line.
        self._add(unfit=(*self.saved.unfit, Unfit(" ".join(reason.split()), instead)))

    def _add(self, **changes: Any) -> None:
        self.saved = replace(self.saved, **changes)

    def _say(self, words: str) -> str:
        self._add(words=(*self.saved.words, words))
        return words

    def _number(self, step: Mapping[str, Any], key: str, value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9:
            return float(value)
        raise CheckpointError(
            f"{self.path}: {str(step['__class_fullname__'])[:80]!r} has {key} {str(value)[:40]!r}, which is no number; "
            "save it again"
        )

    def _pixels(self, step: Mapping[str, Any], *keys: str) -> tuple[int, ...]:
        """Sides of an image: whole numbers of a sensible size."""
        sides = tuple(self._number(step, key, step.get(key)) for key in keys)
        if not all(side == int(side) and 1 <= side <= MOST for side in sides):
            raise CheckpointError(f"{self.path}: {' and '.join(keys)} are {sides}; whole numbers from 1 to {MOST}")
        return tuple(int(side) for side in sides)

    def _optional_pixels(self, step: Mapping[str, Any], *keys: str) -> tuple[int | None, ...]:
        return tuple(None if step.get(key) is None else self._pixels(step, key)[0] for key in keys)

    def _numbers(self, step: Mapping[str, Any], key: str, value: object) -> tuple[float, ...]:
        values = value if isinstance(value, list) else [value]
        if not 1 <= len(values) <= 64:
            raise CheckpointError(f"{self.path}: {key} has {len(values)} values; give one per channel")
        return tuple(self._number(step, key, item) for item in values)

    # Pixel values

    def _normalize(self, step: Mapping[str, Any]) -> None:
        mode = step.get("normalization", "standard")
        if mode != "standard":
            self._refuse(f"Normalize(normalization={str(mode)[:40]!r}) takes mean and std from each image", _VALUES)
            return
        known = self.saved.normalization
        if known is not None and (set(known.mean), set(known.std)) != ({0.0}, {1.0}):
            self._refuse("Normalize is there twice", _VALUES)
            return
        before = 1.0 if known is None else known.scale
        top = self._top(step, "max_pixel_value", self.full_scale if known is None else 1, 255.0)
        mean = self._numbers(step, "mean", step.get("mean"))
        std = self._numbers(step, "std", step.get("std"))
        longest = max(len(mean), len(std))
        mean, std = (values * longest if len(values) == 1 else values for values in (mean, std))
        shown = [
            ",".join(f"{v:g}" for v in (values[:1] if len(set(values)) == 1 else values)) for values in (mean, std)
        ]
        self._say(f"Normalize(mean {shown[0]}, std {shown[1]}, max_pixel_value {top:g})")
        if known is None:
            self._doubt(f"Normalize(max_pixel_value={top:g})", top)
        self._add(normalization=self._preprocess(mean, std, before / top))

    def _to_float(self, step: Mapping[str, Any]) -> None:
        if self.saved.normalization is not None:
            self._refuse("ToFloat after Normalize or another ToFloat", _VALUES)
            return
        top = self._top(step, "max_value", self.full_scale)
        self._say(f"ToFloat(max_value {top:g})")
        self._doubt(f"ToFloat(max_value={top:g})", top)
        self._add(normalization=self._preprocess((0.0,), (1.0,), 1.0 / top))

    def _top(self, step: Mapping[str, Any], key: str, of_dtype: float, unsaid: float | None = None) -> float:
        """The largest pixel value: ``of_dtype`` where it is left to the image."""
        most = step.get(key, unsaid)
        top = self._number(step, key, of_dtype if most is None else most)
        if top <= 0:
            name = str(step["__class_fullname__"]).rpartition(".")[2]
            raise CheckpointError(f"{self.path}: {key} of {name} is {top:g}; it is above 0")
        return top

    def _doubt(self, what: str, top: float) -> None:
        if self.saved.dtype == "uint8" and top > self.full_scale:
            wanted = "uint16" if top <= FULL_SCALE["uint16"] else "float32"
            note = (
                f"the saved {what} is for images of more than 8 bits, the engine takes uint8: --input-dtype {wanted}?"
            )
            self._add(doubts=(*self.saved.doubts, note))

    def _preprocess(self, mean: tuple[float, ...], std: tuple[float, ...], scale: float) -> Preprocess:
        try:
            return Preprocess(mean, std, scale, "rgb", CONFIG_NAME)
        except SpecError as exc:
            raise CheckpointError(f"{self.path}: {exc}") from exc

    # Sizes

    def _scale(self, step: Mapping[str, Any], kind: Literal["resize", "longest", "smallest"]) -> None:
        name = {"resize": "Resize", "longest": "LongestMaxSize", "smallest": "SmallestMaxSize"}[kind]
        size: tuple[int | None, ...]
        if kind == "resize":
            size = self._pixels(step, "height", "width")
            words = f"Resize({size[0]}, {size[1]}"
        elif step.get("max_size") is not None:
            most = step["max_size"]
            if isinstance(most, list) and len(set(map(str, most))) > 1:
                self._refuse(f"{name} chooses among {len(most)} sizes", _SIZES)
                return
            step = {**step, "max_size": most[0] if isinstance(most, list) and most else most}
            size = self._pixels(step, "max_size") * 2
            words = f"{name}({size[0]}"
        else:
            limits = step.get("max_size_hw")
            pair = limits if isinstance(limits, list) and len(limits) == 2 else [None, None]
            size = self._optional_pixels({**step, "height": pair[0], "width": pair[1]}, "height", "width")
            if size == (None, None):
                raise CheckpointError(f"{self.path}: {name} has neither max_size nor max_size_hw; save it again")
            words = f"{name}(max_size_hw=({size[0]}, {size[1]})"
        interpolation = _INTERPOLATIONS.get(_code(step.get("interpolation", 1)))
        for_less = step.get("area_for_downscale")
        words = self._say(f"{words})" if interpolation in ("linear", None) else f"{words}, {interpolation})")
        if interpolation is None or (for_less is not None and interpolation != "area"):
            how = f"interpolation {step.get('interpolation')}" if interpolation is None else "area_for_downscale"
            self._refuse(f"{name} with {how}, which edgeseg has not", _SIZES)
        elif (self.saved.scaling, self.saved.canvas, self.saved.crop) != (None, None, None):
            self._refuse(f"{name} after another transform of the size", _SIZES)
        else:
            self._add(scaling=Scaling(kind, (size[0], size[1]), interpolation, words))

    def _pad(self, step: Mapping[str, Any]) -> None:
        minimum = self._optional_pixels(step, "min_height", "min_width")
        divisor = self._optional_pixels(step, "pad_height_divisor", "pad_width_divisor")
        sides = [
            f"{side}" if side else f"multiples of {multiple}" for side, multiple in zip(minimum, divisor, strict=True)
        ]
        words = self._say(f"PadIfNeeded({', '.join(dict.fromkeys(sides) if not any(minimum) else sides)})")
        canvas = Canvas((minimum[0], minimum[1]), (divisor[0], divisor[1]), Padding(), words)
        scaling = self.saved.scaling
        if scaling is not None and scaling.kind == "resize":
            if canvas.around(scaling.content((1, 1))) != scaling.size:
                self._refuse(f"{words} after {scaling.words}, which would leave a frame around every image", _SIZES)
            return
        if scaling is not None and scaling.kind == "longest" and canvas.minimum != scaling.size and both(minimum):  # type: ignore[arg-type]
            self._refuse(f"{words} after {scaling.words}, which leaves a frame around every image", _SIZES)
            return
        padding = self._padding_of(step, "PadIfNeeded", "position")
        if padding is None:
            return
        if self.saved.canvas is not None or self.saved.crop is not None:
            self._refuse(f"{words} after another transform of the size", _SIZES)
        else:
            self._add(canvas=replace(canvas, padding=padding))

    def _crop(self, step: Mapping[str, Any]) -> None:
        height, width = self._pixels(step, "height", "width")
        words = self._say(f"CenterCrop({height}, {width})")
        saved = self.saved
        if saved.scaling is not None:
            whole = saved.scaling.size if saved.canvas is None else saved.canvas.minimum
            if whole != (height, width) or saved.scaling.kind == "smallest":
                self._refuse(f"{words} after {saved.scaling.words}: what it cuts off would have no class", _SIZES)
            return
        if saved.crop is not None or (saved.canvas is not None and saved.canvas.minimum != (height, width)):
            self._refuse(f"{words} after another transform of the size", _SIZES)
            return
        padding = self._padding_of(step, "CenterCrop", "pad_position") if step.get("pad_if_needed") else None
        self._add(crop=Crop((height, width), padding, words))

    def _padding_of(self, step: Mapping[str, Any], name: str, position_key: str) -> Padding | None:
        """The padding a transform says; ``None``, and refused, where an engine cannot hold it."""
        said = step.get(position_key, "center")
        # Before 1.4 the enumeration's own name was written.
        word = str(said).rpartition(".")[2].lower()
        position, border = _POSITIONS.get(word), _BORDERS.get(_code(step.get("border_mode", 0)))
        fill = step.get("fill", step.get("value"))
        if position is None or border is None or isinstance(fill, str):
            what = f"{position_key} {word[:20]}" if position is None else "that border"
            self._refuse(f"{name} with {what}, which edgeseg has not", _SIZES)
            return None
        if border != "constant":
            return Padding(position, border)
        colour = self._numbers(step, "fill", 0 if fill is None else fill)
        known = self.saved.normalization
        if known is not None:
            colour = colour * len(known.mean) if len(colour) == 1 else colour
            if len(known.mean) not in (1, len(colour)):
                raise CheckpointError(
                    f"{self.path}: the fill of {name} has {len(colour)} values, Normalize {len(known.mean)}"
                )
            spread = zip(known.mean * len(colour), known.std * len(colour), strict=True)
            colour = tuple((v * s + m) / known.scale for v, (m, s) in zip(colour, spread, strict=False))
        top = self.full_scale
        levels = tuple(colour) if self.saved.dtype == "float32" else tuple(round(v) for v in colour)
        if self.saved.dtype != "float32" and not all(0 <= level <= top for level in levels):
            self._refuse(
                f"{name} fills with a colour that no image has ({', '.join(f'{v:g}' for v in colour)} of {top})", _SIZES
            )
            return None
        is_rounded = any(abs(v - level) > 1e-3 for v, level in zip(colour, levels, strict=True))
        levels = levels[:1] if len(set(levels)) == 1 else levels
        if is_rounded:
            shown = (",".join(f"{v:.4g}" for v in dict.fromkeys(vs)) for vs in (colour, levels))
            self._add(rounded=("the saved colour of padding, {} of {top}, is {} here".format(*shown, top=top),))
        return Padding(position, "constant", levels)


def _code(value: object) -> int:
    """One of OpenCV's numbers; -1, which is none, for what is no number."""
    return value if isinstance(value, int) else -1


def _is_certain(step: Mapping[str, Any]) -> bool:
    p = step.get("p", 1.0)
    return step.get("always_apply") is True or (isinstance(p, (int, float)) and p >= 1)


_READERS: dict[str, Callable[[_Reader, Mapping[str, Any]], None]] = {
    "Normalize": _Reader._normalize,
    "ToFloat": _Reader._to_float,
    "Resize": partial(_Reader._scale, kind="resize"),
    "LongestMaxSize": partial(_Reader._scale, kind="longest"),
    "SmallestMaxSize": partial(_Reader._scale, kind="smallest"),
    "PadIfNeeded": _Reader._pad,
    "CenterCrop": _Reader._crop,
}
