"""The images on which an engine differs most from its baseline, side by side."""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.evaluate.accuracy.dataset import ValidationSet
from edgeseg.evaluate.accuracy.judge import ImageRecord, Ledger, at_resolution
from edgeseg.evaluate.accuracy.scores import image_miou
from edgeseg.evaluate.contenders import Contender, Opener
from edgeseg.evaluate.results import Resolution, WorstImage
from edgeseg.runtime.outputs import write_picture
from edgeseg.runtime.overlay import shown_levels, spec_palette
from edgeseg.runtime.segmenter import Segmenter

GAP_PX = 4
DIFFERENT = (255, 255, 255)


def save_worst(
    contender: Contender,
    baseline: str,
    ledger: Ledger,
    data: ValidationSet,
    contenders: Sequence[Contender],
    opener: Opener,
    *,
    count: int,
    folder: Path | None,
    resolution: Resolution,
) -> tuple[WorstImage, ...]:
    """The images of lowest agreement, worst first, each as a PNG in ``folder`` if there is one.

    An image on which every pixel agrees is not among them: there is nothing to see. Multilabel masks have no one colour per
    pixel: they are listed without a picture.
    """
    known = ((r.agreement.equal / r.agreement.pixels, r) for r in ledger.records() if r.agreement is not None)
    chosen = heapq.nsmallest(count, (item for item in known if item[0] < 1.0), key=lambda item: item[0])
    paths: dict[int, str] = {}
    if folder is not None and chosen and contender.spec.model.task != "multilabel":
        reference = next(c for c in contenders if c.name == baseline)
        with (
            Segmenter(opener.open(reference, exact=reference.baseline == "pytorch"), reference.spec) as before,
            Segmenter(opener.open(contender), contender.spec) as after,
        ):
            for _, record in chosen:
                pair = data.read(record.index)
                image, _, _ = at_resolution(pair, contender.spec, resolution)
                picture = side_by_side(image, before(image), after(image), spec_palette(contender.spec))
                paths[record.index] = _save(picture, folder, contender.name, record)
    return tuple(WorstImage(r.name, share, image_miou(r), paths.get(r.index)) for share, r in chosen)


def side_by_side(
    image: NDArray[Any], reference: NDArray[Any], engine: NDArray[Any], palette: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Image, baseline's mask, engine's mask and difference (white on the darkened image), from left to right.

    Args:
        image: ``(H, W, C)``; seen as :func:`~edgeseg.runtime.overlay.shown_levels` shows it.
        reference: ``(H, W)`` class indices.
        engine: ``(H, W)`` class indices.
        palette: uint8 ``(values, 3)``.

    Returns:
        uint8 ``(H, 4 * W + 3 * GAP_PX, 3)``.
    """
    seen = shown_levels(image)
    difference = (seen // 4).astype(np.uint8)
    difference[reference != engine] = DIFFERENT
    gap = np.full((image.shape[0], GAP_PX, 3), 255, np.uint8)
    parts = [seen, gap, palette[reference], gap, palette[engine], gap, difference]
    return np.concatenate(parts, axis=1)


def _save(picture: NDArray[np.uint8], folder: Path, engine: str, record: ImageRecord) -> str:
    stem = re.sub(r"[^\w.-]+", "-", Path(record.name).stem)
    path = folder / re.sub(r"[^\w.-]+", "-", engine) / f"{record.index:05d}-{stem}.png"
    write_picture(path, picture, overwrite=True)
    # Relative to the report, which lies beside the folder.
    return path.relative_to(folder.parent).as_posix()
