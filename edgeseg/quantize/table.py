"""The calibration table: one range per activation tensor, as readable JSON, for every target alike.

A table says what the fp32 graph's activations do on the calibration images. It knows nothing of a target: a Q/DQ writer
turns a range into a scale and zero point by the rules of its own scheme. It is keyed on everything it was made
from, so a stale one is recognised, and the message says which input changed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgeseg.errors import ArtifactError
from edgeseg.graph.grid import Grid
from edgeseg.store.documents import read_versioned, write_json
from edgeseg.store.manifest import Repair

TABLE_SCHEMA_VERSION = 1

KEY_CAUSES: dict[str, str] = {
    "weights": "the model weights",
    "graph": "the fp32 graph",
    "images": "the calibration images",
    "preprocess": "the preprocessing or input size",
    "method": "the calibration method or its options",
}
"""The parts of a table's key, and how a message names them."""


@dataclass(frozen=True)
class TensorRange:
    """What one activation tensor does on the calibration images, in the tensor's own units.

    Attributes:
        low, high: the range to quantize, chosen by the method. ``low <= 0 <= high`` (padding and ReLU need an exact
            zero) and ``low < high``, also for a tensor that is constant or all zero.
        minimum, maximum: the exact extremes over all images; zero may lie outside them.
        channel_mean: mean over images and positions per channel, for tensors that feed a Conv, ConvTranspose, Gemm or
            MatMul: what analytic bias correction needs (Nagel et al., "Data-Free Quantization Through Weight
            Equalization and Bias Correction", ICCV 2019, section 4.2). ``None`` for other tensors.
        channel_axis: the axis ``channel_mean`` runs along (1 for Conv, the last for MatMul), ``None`` without it.
        method: what chose the range, where it was chosen by tensor; ``None``: the table's.
        grid: the integers training rounded the tensor to, of which ``low`` and ``high`` are the ends.
    """

    low: float
    high: float
    minimum: float
    maximum: float
    channel_mean: tuple[float, ...] | None = None
    channel_axis: int | None = None
    method: str | None = None
    grid: Grid | None = None

    def __post_init__(self) -> None:
        numbers = (self.low, self.high, self.minimum, self.maximum, *(self.channel_mean or ()))
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError("a range must hold finite numbers only")
        if not self.low <= 0.0 <= self.high or self.low == self.high:
            raise ValueError(f"range [{self.low}, {self.high}] is empty or does not include 0")
        if self.minimum > self.maximum:
            raise ValueError(f"observed minimum {self.minimum} is above maximum {self.maximum}")
        if (self.channel_mean is None) != (self.channel_axis is None):
            raise ValueError("channel_mean and channel_axis must be given together")

    @property
    def magnitude(self) -> float:
        """Largest absolute value of the chosen range: TensorRT's ``amax``."""
        return max(-self.low, self.high)


@dataclass(frozen=True)
class Trained:
    """What quantization-aware training left of one network.

    Attributes:
        tools: what it was trained with.
        activations: tensors of the graph that have its scales, as they are.
        derived: tensors whose values are those of such a tensor, clipped, moved or repeated.
        ambiguous: of ``activations``, those that several readers rounded each in its own way; the first is taken.
        lost: fake-quantizers that stood where the graph has no tensor, between a convolution and its normalization.
        calibrated: tensors it left in float, with ranges from calibration images.
    """

    tools: tuple[str, ...]
    activations: int
    derived: int
    ambiguous: int
    lost: int
    calibrated: int


@dataclass(frozen=True)
class CalibrationTable:
    """Ranges of every float activation of one fp32 graph.

    Attributes:
        schema_version: of this layout; another one is refused.
        method: how ``low`` and ``high`` were chosen: a key of :data:`edgeseg.quantize.ranges.METHODS`, ``auto``, or
            ``trained``: by the fake-quantizers of the module.
        options: the method's numbers, such as ``{"percentile": 99.99}``.
        key: SHA-256 per cause in :data:`KEY_CAUSES`.
        images: how many images were used; 0 of a network whose scales were trained.
        ranges: by tensor name of the fp32 graph, in the graph's order.
        equalization: what the channels of that graph were scaled by before (see
            :mod:`edgeseg.quantize.repair.equalization`): magnitudes per channel by tensor name of the exported graph; empty
            when they were left as they are.
        repairs: what was done for INT8's accuracy and what it gained, in each scheme it was judged in.
        trained: of a network trained with fake-quantizers, whose weights are rounded already.
    """

    schema_version: int
    method: str
    options: dict[str, float]
    key: dict[str, str]
    images: int
    ranges: dict[str, TensorRange] = field(default_factory=dict)
    equalization: dict[str, tuple[float, ...]] = field(default_factory=dict)
    repairs: tuple[Repair, ...] = ()
    trained: Trained | None = None

    def __post_init__(self) -> None:
        if self.images < (1 if self.trained is None else 0):
            raise ValueError(f"a table of {self.images} images says nothing")
        if set(self.key) != set(KEY_CAUSES):
            raise ValueError(f"key has {sorted(self.key)}, must have {sorted(KEY_CAUSES)}")
        if not all(math.isfinite(value) for value in self.options.values()):
            raise ValueError("options must be finite numbers")

    def save(self, path: Path) -> None:
        """Write the table as indented JSON, atomically.

        Raises:
            ArtifactError: the place is read-only or full.
        """
        try:
            write_json(path, self)
        except OSError as exc:
            raise ArtifactError(f"cannot write calibration table {path}: {exc.strerror}") from exc


def load_table(path: Path) -> CalibrationTable:
    """Read a table that :meth:`CalibrationTable.save` wrote; floats come back exactly.

    Raises:
        ArtifactError: missing, unreadable, damaged (NaN, infinite, empty or inverted ranges included), or of another
            schema version.
    """
    return read_versioned(
        path, CalibrationTable, "calibration table", version=TABLE_SCHEMA_VERSION, again="calibrate again"
    )


def check_fresh(table: CalibrationTable, expected_key: Mapping[str, str]) -> None:
    """Check that a table was made from the inputs ``expected_key`` stands for.

    Args:
        table: the table at hand.
        expected_key: from :func:`edgeseg.quantize.calibration.table_key`. A cause left out is not checked: a table
            handed to a build without the images it was made from is checked for weights, graph and preprocessing
            only.

    Raises:
        ArtifactError: some part differs; the message says which.
    """
    causes = [cause for cause in KEY_CAUSES if cause in expected_key and table.key[cause] != expected_key[cause]]
    changed = [KEY_CAUSES[cause] for cause in causes]
    if changed:
        raise ArtifactError(
            f"the calibration table is stale: {_join(changed)} changed since it was made; calibrate again, "
            "or leave the table out to let the build do it"
        )


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
