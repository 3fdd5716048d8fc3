"""What calibration saw of a graph's values, kept up to date by the passes that add or replace values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.graph.editing import matched
from edgeseg.graph.grid import Grid
from edgeseg.quantize.table import CalibrationTable

Range = tuple[float, float]
Details = TypeVar("Details")


@dataclass
class Observed:
    """By value name.

    Attributes:
        ranges: low and high to quantize to.
        channel_means: mean per channel of layer inputs.
        grids: the integers that training rounded to.
        rounded_weights: whether training rounded the weights, too: their own scales are to be found again.
        stays_float: of a node: whether it was asked to run in float.
    """

    ranges: dict[str, Range] = field(default_factory=dict)
    channel_means: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    stays_float: Callable[[ir.Node], bool] = lambda node: False
    grids: dict[str, Grid] = field(default_factory=dict)
    rounded_weights: bool = False

    @classmethod
    def of(cls, table: CalibrationTable, stays_float: Callable[[ir.Node], bool] = lambda node: False) -> Observed:
        """What a calibration table says."""
        return cls(
            {name: (limits.low, limits.high) for name, limits in table.ranges.items()},
            {
                name: np.asarray(limits.channel_mean, np.float64)
                for name, limits in table.ranges.items()
                if limits.channel_mean is not None
            },
            stays_float,
            {name: limits.grid for name, limits in table.ranges.items() if limits.grid is not None},
            table.trained is not None,
        )

    def copy(self, value: ir.Value, to: ir.Value) -> None:
        """``to`` has the values of ``value`` and its channels."""
        self.copy_range(value.name, to)
        if value.name in self.channel_means:
            self.channel_means[str(to.name)] = self.channel_means[str(value.name)]

    def copy_range(self, name: str | None, to: ir.Value) -> None:
        """``to`` has the values of the one called ``name``, or some of them."""
        if name in self.ranges:
            self.ranges[str(to.name)] = self.ranges[name]
        if name in self.grids:
            self.grids[str(to.name)] = self.grids[name]


Pass = Callable[[ir.Model, Observed], int]
"""Changes the model in place, and adds what is known of values it makes; returns how often it applied."""


def each(
    match: Callable[[ir.Node], Details | None], rewrite: Callable[[ir.Graph, ir.Node, Details, Observed], None]
) -> Pass:
    """The pass that rewrites all that is :func:`~edgeseg.graph.editing.matched`."""

    def apply(model: ir.Model, observed: Observed) -> int:
        count = 0
        for node, details in matched(model, match):
            rewrite(model.graph, node, details, observed)
            count += 1
        return count

    return apply
