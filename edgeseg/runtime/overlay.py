"""Pictures for people: masks as colours, over the image, with a legend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError
from edgeseg.spec import PipelineSpec

# 256 RGB colours. The first seven are Okabe and Ito's (2008), made to be told apart by people with a colour vision
# deficiency; each further one is the farthest from all before it among a grid of clear colours, in CIELAB, seen with
# normal vision, protanopia and deuteranopia (Machado, Oliveira, Fernandes 2009). Fixed here so that a class keeps its
# colour; tests/unit/test_runtime_overlay.py measures the distances.
_COLOURS = bytes.fromhex(
    "E69F0056B4E9009E73F0E4420072B2D55E00CC79A70000FF4B3C0FFF1EFF00FF87002DA5FFE1C3D2004B00FFFF0F9600"
    "780069004B4B7887FFA5A55AFF96FFFF8787E11EB40FFFC3FFD2F05A4BFF00FF3C87C3B496695A780F3C96D24B4B690F"
    "FFD278695A78F00F87B400000096A5FF0F3C003C87A5E196963CD2C3693C00C369005A2D960F1EFFB487A578D2A5B4D2"
    "3CE1FFB4A587FF964B007869A5871E4B963C2D00C378A5FF783CA500C300A54B96A51E69F0A5B45A69FF87FF69005AC3"
    "FF695AFF69FF873C3CFF699687E1001E3C69874B0FD2C3FF4BD296B44B69F069C369693C87A50069F0D269A569E1F096"
    "B4788700C3C3A587C3FFA5E1B40FB4A500E11E3CD21E7896C3008778D2692D78D2FFC300B4875AB4D2A5E100005A4B87"
    "699696E1F0694B3C2D6900B4B44B3C87782D5A3C4B69008787A53CC369FFFFC34BFF2D78C34B1E3C694BB4C300F000D2"
    "F05A69B4E1E1C3B43C5AFFA5A55AD2FFB4A5005A00FFD2D2F0E1A57887695A2D5AFF693C5A2DFF2D874BC3F000787800"
    "FF6900FF9669FF69E100C34B784B2DB496A55A7887C31E2DFF1E5AFF00A50096E100E14B5AB4967878A5C3005AA51E96"
    "FF87C3A54BFF2DB4D2A5C378C387FFC37869C3F07878D2E1FF5AA587002D3C5A1EC35AC3B4A5F0005AA5785A5A2D5A69"
    "782D00C3E1FFD20FE10078F0B4C35AE1871E967896B4F0C3D2873C6996D25A3CB47896B496FF968700A5C34B5AC34B87"
    "D200FF5A1E78F0B469873C5A5AB41ED287E1C3A54B00871ED296D2A58778E1876978874BB4F04B005AE100E1783C782D"
    "2D4B69A5691E0000E15A4B002D4B3CD2965A785AA51E6969FF3C00005A87965A7800E1B400A55AA5694B69D22D7800E1"
    "D26978D2A5C3873C78E1C3969600000096877869E1FF3C2D78004B6978C3D24BE1B49600D296965A5AB4D2692DD2D287"
    "D2D24BE1C3D20F4B2DE1C3B400E1D23C87B496FF1EA52D4BF0A53C96C3F0D2A578B469B40F4B0F69B45AE14B4B87C387"
    "2DF0FFE187A53C78004B4B2D3C2D96783CE178F078FF4BE1A500C33C784BD23C7878B4FF0087695A87787896FFFFE15A"
)

NOT_A_CLASS = (128, 128, 128)
# Laid over at a time: the six copies that takes are of a band, not of a picture of 100 megapixels.
BAND_PIXELS = 1 << 22
SHOWN_PERCENTILES = (1.0, 99.0)
BACKGROUND_NAMES = frozenset({"background", "bg", "void", "unlabeled", "unlabelled", "ignore"})


@dataclass(frozen=True)
class LegendEntry:
    """One line of a legend: a class, its RGB colour and, where known, its share of the pixels from 0 to 1."""

    name: str
    colour: tuple[int, int, int]
    share: float | None = None


def class_palette(count: int) -> NDArray[np.uint8]:
    """Colours for ``count`` classes, uint8 ``(count, 3)`` RGB: the same class index always gets the same colour.

    Distinct up to 256 classes; beyond, colours repeat.
    """
    return np.resize(np.frombuffer(_COLOURS, np.uint8).reshape(256, 3), (count, 3))


def spec_palette(spec: PipelineSpec) -> NDArray[np.uint8]:
    """Colours for each value of an engine's mask; see :func:`mask_palette`."""
    return mask_palette(spec.model.task, spec.model.classes, spec.model.class_names)


def mask_palette(task: str, classes: int, class_names: Sequence[str]) -> NDArray[np.uint8]:
    """Colours for each value of a mask, uint8 ``(values, 3)``. Black means "leave the image as it is".

    Binary: black and one colour. Multiclass: black for a class named background, void, unlabeled or ignore. Multilabel:
    a colour per class plane.
    """
    if task == "binary":
        return np.concatenate((np.zeros((1, 3), np.uint8), class_palette(1)))
    palette = class_palette(classes)
    if task == "multiclass":
        for index, name in enumerate(class_names):
            if name.strip().lower() in BACKGROUND_NAMES:
                palette[index] = 0
    return palette


def colorize(mask: NDArray[Any], palette: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Paint a mask.

    Args:
        mask: integers ``(H, W)``, class indices; or ``(C, H, W)``, 0/1 planes of a multilabel model, which are painted
            in the mean colour of the classes present, black where there is none.
        palette: uint8 ``(classes, 3)`` RGB; ``None`` for :func:`class_palette`. Values beyond it (an "ignore" label)
            turn grey.

    Returns:
        uint8 ``(H, W, 3)`` RGB.

    Raises:
        InputError: another dtype or shape.
    """
    if mask.dtype.kind not in "iub" or mask.ndim not in (2, 3):
        raise InputError(f"a mask is integer (H, W) or (C, H, W), got {mask.dtype} {mask.shape}")
    if mask.ndim == 3:
        return _mix_planes(mask, class_palette(len(mask)) if palette is None else palette)
    if mask.size and int(mask.min()) < 0:
        raise InputError(f"a mask holds class indices from 0 up, got {int(mask.min())}")
    values = max(256, int(mask.max(initial=0)) + 1)
    colours = np.full((values, 3), NOT_A_CLASS, np.uint8)
    known = class_palette(256) if palette is None else palette
    colours[: len(known)] = known[:values]
    if mask.dtype == np.uint8:
        # Pillow's palette lookup is several times as fast as numpy's gather of three-byte rows.
        from PIL import Image

        picture = Image.fromarray(np.ascontiguousarray(mask))
        picture.putpalette(colours.tobytes())
        return np.array(picture.convert("RGB"))
    return np.asarray(colours[mask])


def shown_levels(image: NDArray[Any]) -> NDArray[np.uint8]:
    """An image ``(H, W, C)`` as people see it, ``(H, W, 3)``: its first three channels, or grey.

    Uint8 as it is, of other dtypes the values between the 1st and the 99th percentile of the whole image as 0..255, those
    beyond as 0 and 255.
    """
    shown = image[..., : 3 if image.shape[2] >= 3 else 1]
    if image.dtype != np.uint8:
        # Of a large image every n-th row says as much.
        low, high = np.percentile(image[:: max(1, image.size // BAND_PIXELS)], SHOWN_PERCENTILES)
        levels = (shown - np.float32(low)) * np.float32(255 / max(high - low, 1e-9))
        shown = levels.clip(0, 255).round().astype(np.uint8)
    return np.broadcast_to(shown, (*image.shape[:2], 3))


def overlay(
    image: NDArray[Any], mask: NDArray[Any], *, alpha: float = 0.5, palette: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """Lay the colours of a mask over its image. Where the colour is black the image stays as it is.

    Args:
        image: ``(H, W, C)`` RGB or grey; of more than three channels the first three are shown. Of other dtypes than
            uint8 as :func:`shown_levels` scales it.
        mask: as for :func:`colorize`, of the image's size.
        alpha: opacity of the colours, from 0 to 1.
        palette: as for :func:`colorize`.

    Returns:
        uint8 ``(H, W, 3)`` RGB.

    Raises:
        InputError: sizes that differ, another dtype or shape, or alpha out of range.
    """
    if not 0.0 <= alpha <= 1.0:
        raise InputError(f"alpha is {alpha}; give an opacity from 0 to 1")
    if image.dtype.kind not in "iuf" or image.ndim != 3:
        raise InputError(f"an image is numbers (H, W, C), got {image.dtype} {image.shape}")
    if image.shape[:2] != mask.shape[-2:]:
        (height, width), (mask_height, mask_width) = image.shape[:2], mask.shape[-2:]
        raise InputError(f"the image has {height}x{width} pixels and the mask {mask_height}x{mask_width}")
    image = shown_levels(image)
    height, width = image.shape[:2]
    laid = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = slice(top, top + rows)
        laid[band] = _laid_over(image[band], mask[..., band, :], alpha, palette)
    return laid


def _laid_over(
    image: NDArray[np.uint8], mask: NDArray[Any], alpha: float, palette: NDArray[np.uint8] | None
) -> NDArray[np.uint8]:
    from PIL import Image

    colours = colorize(mask, palette)
    below = Image.fromarray(np.ascontiguousarray(image))
    blended = Image.blend(below, Image.fromarray(colours), alpha)
    painted = Image.fromarray(colours.any(axis=2).view(np.uint8) * np.uint8(255))
    return np.array(Image.composite(blended, below, painted))


def legend_entries(
    mask: NDArray[Any] | None, names: Sequence[str], palette: NDArray[np.uint8], *, binary: bool = False
) -> list[LegendEntry]:
    """List the classes of a mask with their share of its pixels, largest first; classes that are absent are left out.

    Args:
        mask: as for :func:`colorize`; ``None`` lists every class, without shares.
        names: one per class.
        palette: as for :func:`colorize`.
        binary: ``names`` holds the one name of value 1.
    """
    labels = ["background", *names] if binary else list(names)
    colours = [tuple(int(v) for v in colour) for colour in palette[: len(labels)]]
    shares: list[float | None] = [None] * len(labels)
    if mask is not None:
        if mask.ndim == 3:
            counts = np.count_nonzero(mask, axis=(1, 2))
        else:
            counts = np.zeros(len(labels), np.int64)
            pixels = mask.ravel()
            # numpy counts in 64 bits: of all pixels at once that is eight times the mask.
            for start in range(0, pixels.size, BAND_PIXELS):
                counts += np.bincount(pixels[start : start + BAND_PIXELS], minlength=len(labels))[: len(labels)]
        area = mask.shape[-2] * mask.shape[-1]
        shares = [float(count) / area for count in counts]
    entries = [LegendEntry(n, c, s) for n, c, s in zip(labels, colours, shares, strict=True) if s is None or s > 0]  # type: ignore[arg-type]
    return entries if mask is None else sorted(entries, key=lambda entry: -(entry.share or 0.0))


def add_legend(picture: NDArray[np.uint8], entries: Sequence[LegendEntry]) -> NDArray[np.uint8]:
    """Return ``picture``, uint8 ``(H, W, 3)``, with a legend to its right, on a higher canvas if it is very small."""
    panel = legend_panel(picture.shape[0], tuple(entries))
    height = max(picture.shape[0], panel.shape[0])
    canvas = np.full((height, picture.shape[1] + panel.shape[1], 3), 255, np.uint8)
    canvas[: picture.shape[0], : picture.shape[1]] = picture
    canvas[: panel.shape[0], picture.shape[1] :] = panel
    return canvas


@lru_cache(maxsize=8)
def legend_panel(height: int, entries: tuple[LegendEntry, ...]) -> NDArray[np.uint8]:
    """Draw a legend of at least ``height`` pixels, uint8 ``(>= height, W, 3)``, in as many columns as it needs."""
    from PIL import Image, ImageDraw, ImageFont

    size = min(max(height // 32, 11), 28)
    font = ImageFont.load_default(size)
    line, gap = size * 3 // 2, size // 2
    texts = [_line_text(entry, font) for entry in entries]
    rows = max(height // line, min(len(entries), 12), 1)
    columns = max(1, -(-len(entries) // rows))
    column_width = line + gap + max((int(font.getlength(text)) + 1 for text in texts), default=0) + gap
    panel = Image.new("RGB", (columns * column_width, max(height, rows * line)), "white")
    draw = ImageDraw.Draw(panel)
    for index, (entry, text) in enumerate(zip(entries, texts, strict=True)):
        x, y = index // rows * column_width + gap, index % rows * line + gap // 2
        draw.rectangle((x, y, x + size, y + size), fill=entry.colour, outline="black")
        draw.text((x + line, y), text, fill="black", font=font)
    return np.array(panel)


def _line_text(entry: LegendEntry, font: Any) -> str:
    text = entry.name if entry.share is None else f"{entry.name}  {entry.share:.1%}"
    try:
        font.getlength(text)
    except UnicodeEncodeError:
        # Without FreeType, Pillow falls back to a bitmap font that knows Latin-1 only.
        return text.encode("latin-1", "replace").decode("latin-1")
    return text


def _mix_planes(planes: NDArray[Any], palette: NDArray[np.uint8]) -> NDArray[np.uint8]:
    total = np.zeros((*planes.shape[1:], 3), np.uint32)
    present = np.zeros(planes.shape[1:], np.uint32)
    for plane, colour in zip(planes != 0, palette, strict=False):
        total[plane] += colour
        present += plane
    return (total // np.maximum(present, 1)[..., None]).astype(np.uint8)
