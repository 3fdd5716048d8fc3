"""Pixels in an engine's dtype: what is taken as it is, and what is refused, because nobody said how to scale it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.errors import InputError
from edgeseg.spec import InputDtype, Preprocess


def in_dtype(array: NDArray[Any], dtype: InputDtype, what: str) -> NDArray[Any]:
    """Return ``array`` in the engine's ``dtype``, with the values it has.

    Unsigned integers are levels of their own range, so the dtype must be the engine's. Other floats and signed integers
    are values, which a float32 engine takes to the nearest float32, as ``tensor.float()`` would.

    Args:
        array: pixels of any dtype.
        dtype: the engine's.
        what: subject and verb of a message, such as ``a.png holds``.

    Raises:
        InputError: another dtype, or NaN or infinite values, which a network makes wrong masks of without a word.
    """
    if not takes(array.dtype, dtype):
        raise refusal(array.dtype, dtype, what)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if dtype != "float32":
        return array
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
        pixels = array.astype(np.float32, copy=False)
    finite = np.isfinite(pixels)
    if not finite.all():
        raise InputError(
            f"{what} {array.dtype} with {finite.size - np.count_nonzero(finite)} NaN or infinite values of {finite.size}; "
            "replace them as in training (np.nan_to_num)"
        )
    return pixels


def takes(has: np.dtype[Any], dtype: InputDtype) -> bool:
    """Whether an engine of ``dtype`` takes pixels of dtype ``has``; see :func:`in_dtype`."""
    return has.newbyteorder("=") == dtype or (dtype == "float32" and has.kind in "fi")


def usual_pixels(levels: NDArray[Any], preprocess: Preprocess, dtype: InputDtype) -> NDArray[Any]:
    """Made-up images ``(..., C)`` of levels 0..255 as pixels of ``dtype``, spread over the values usual in training."""
    if dtype == "uint8":
        return levels.astype(np.uint8)
    low, high = (np.array(values) for values in preprocess.usual_values(dtype))
    values = low + levels / 255 * (high - low)
    return np.asarray(values if dtype == "float32" else np.rint(values), dtype)


def refusal(has: np.dtype[Any], dtype: InputDtype, what: str) -> InputError:
    """That pixels are of dtype ``has`` and the engine takes ``dtype``, and what to do."""
    return InputError(f"{what} {has}, the engine takes {dtype}: {_advice(has, dtype)}")


def _advice(has: np.dtype[Any], dtype: InputDtype) -> str:
    build = f"build with input dtype {'float32' if has.kind == 'f' else has}"
    if dtype == "float32":
        return "x.astype(np.float32) keeps the values" + (f", or {build}" if has == np.uint16 else "")
    if dtype == "uint16":
        if has == np.uint8:
            return f"x * np.uint16(257) has the same brightness, x.astype(np.uint16) the same values, or {build}"
        values = "np.rint(x).clip(0, 65535).astype(np.uint16) for values in 0..65535"
        return f"{values}, or {build}" if has.kind == "f" else values
    if has.kind == "f":
        return f"(x * 255).round().clip(0, 255).astype(np.uint8) for values in [0, 1], or {build}"
    if has == np.uint16:
        return f"(x >> 8).astype(np.uint8) for the full 16-bit range, as cv2.imread reads it, or {build}"
    return "scale to 0..255, then .astype(np.uint8)"
