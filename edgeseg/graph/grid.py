"""The integers a tensor is rounded to, by calibration or by a fake-quantizer of quantization-aware training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Grid:
    """``real = scale * (integer - zero_point)`` for the integers ``low <= integer <= high``; one for a whole tensor.

    Attributes:
        scale: > 0, real units per step; exactly a float32.
        zero_point: the integer that means 0; between ``low`` and ``high``.
        low, high: smallest and largest integer; training may use fewer than a type has.
    """

    scale: float
    zero_point: int
    low: int
    high: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0.0):
            raise ValueError(f"a scale of {self.scale} is not positive and finite")
        if not self.low <= self.zero_point <= self.high or self.low == self.high:
            raise ValueError(f"zero point {self.zero_point} is not among the integers {self.low} to {self.high}")

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest value it has."""
        return (self.low - self.zero_point) * self.scale, (self.high - self.zero_point) * self.scale

    @property
    def dtype(self) -> np.dtype[Any]:
        """int8 where there are negative integers, else uint8."""
        return np.dtype(np.int8 if self.low < 0 else np.uint8)

    def quantize(self, values: NDArray[Any]) -> NDArray[Any]:
        """Integers of ``values``: rounded to nearest even, saturated."""
        integers = np.clip(np.rint(values / self.scale) + self.zero_point, self.low, self.high)
        return np.asarray(integers, self.dtype)

    def without_negative(self) -> Grid:
        """The same steps for a tensor that has no negative values."""
        return Grid(self.scale, self.zero_point, self.zero_point, self.high)


@dataclass(frozen=True)
class Marks:
    """Where a network's fake-quantizers stand in its graph.

    Attributes:
        tools: what put them there.
        grids: by the name of a value; several where its readers rounded it each in its own way.
        lost: how many stood where the graph has no value any more.
    """

    tools: tuple[str, ...]
    grids: dict[str, tuple[Grid, ...]]
    lost: int
