"""What people give a segmenter as images, and what it makes of that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from edgeseg.arguments import choice
from edgeseg.errors import InputError, SpecError, one_line
from edgeseg.images.decoding import is_picture, picture_pixels, read_image
from edgeseg.images.dtypes import in_dtype
from edgeseg.spec import ChannelOrder, InputSpec


class _Array(Protocol):
    """What turns into a numpy array: a torch tensor on the CPU, among others."""

    def __array__(self) -> NDArray[Any]: ...


class _Picture(Protocol):
    """A PIL image."""

    @property
    def __array_interface__(self) -> dict[str, Any]: ...


ImageLike: TypeAlias = (
    "NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.floating[Any]] | str | Path | _Array | _Picture"
)


@dataclass(frozen=True)
class Given:
    """Images as they came, in the engine's dtype, ``(N, H, W, C)``; one ``alone``; with channels to ``swap``."""

    batch: NDArray[Any]
    alone: bool
    swap: bool


def given_images(images: object, spec: InputSpec, *, swap: bool) -> Given:
    """Check one image or a batch, whatever form it has.

    Raises:
        InputError: no image, or not of the engine's channels or dtype.
    """
    channels, dtype = spec.channels, spec.dtype
    wanted = f"{dtype} (H, W, {channels}) or (N, H, W, {channels})"
    if images is None:
        raise InputError("the image is None, which cv2.imread returns for a file it cannot read; check the path")
    if isinstance(images, (str, Path)):
        return Given(read_image(images, channels, dtype)[None], True, False)
    if is_picture(images):
        return Given(picture_pixels(images, channels, dtype)[None], True, False)
    if not isinstance(images, np.ndarray) and hasattr(images, "__array__"):
        try:
            images = np.asarray(images.__array__())
        except (TypeError, RuntimeError, ValueError) as exc:
            raise InputError(
                f"images are a {type(images).__name__} ({one_line(exc)}); give {wanted} on the CPU"
            ) from exc
    if not isinstance(images, np.ndarray):
        raise InputError(
            f"images are a {type(images).__name__}; give a numpy array, {wanted}, a path, a PIL image or a list of them"
        )
    # A masked array's arithmetic is another; its values are an image like any.
    images = in_dtype(np.asarray(images), dtype, "images are")
    if channels == 1 and images.ndim == 2:
        images = images[..., None]
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise InputError(f"images have shape {images.shape}; give {wanted}")
    if images.shape[-1] != channels:
        axes = "(1, 2, 0)" if images.ndim == 3 else "(0, 2, 3, 1)"
        first = (
            f"; if channels come first: images.transpose{axes}, in torch permute{axes}"
            if images.shape[-3] == channels
            else ""
        )
        raise InputError(
            f"images have shape {images.shape}, so {images.shape[-1]} channels; this model takes {channels}: "
            f"give {wanted}{first}"
        )
    return Given(images[None], True, swap) if images.ndim == 3 else Given(images, False, swap)


def single_images(images: Sequence[object], spec: InputSpec, *, swap: bool) -> Iterator[Given]:
    """Check single images of a list, each as :func:`given_images` does; the message of an error counts them."""

    def single(index: int) -> Given:
        try:
            given = given_images(images[index], spec, swap=swap)
        except InputError as exc:
            raise InputError(f"image {index} of {len(images)}: {exc}") from exc
        if not given.alone:
            raise InputError(
                f"image {index} of {len(images)} has shape {given.batch.shape}; a list holds single images"
            )
        return given

    # Arrays are checked before the work; files are read when their turn comes.
    checked = {index: single(index) for index, image in enumerate(images) if not is_file(image)}
    for index in range(len(images)):
        yield checked.get(index) or single(index)


def is_file(image: object) -> bool:
    """Whether ``image`` still has to be read or decoded."""
    return isinstance(image, (str, Path)) or is_picture(image)


def reversed_channels(images: NDArray[Any]) -> NDArray[Any]:
    """A copy of ``(N, H, W, 3)`` with BGR turned into RGB."""
    # Channel by channel takes a third of the time of copying a view with a negative stride.
    swapped = np.empty(images.shape, images.dtype)
    for channel in range(3):
        swapped[..., channel] = images[..., 2 - channel]
    return swapped


def accepted_order(order: object, channels: int) -> ChannelOrder:
    """The channel order meant, in any case. Raises ``SpecError`` for one that is none, or none of this model."""
    accepted: ChannelOrder = choice(get_args(ChannelOrder)).accept("channel_order", order)
    if accepted == "bgr" and channels != 3:
        raise SpecError(f"channel order bgr means 3 channels, this model takes {channels}; leave it out")
    return accepted
