"""What a build can be asked for, checked before any work is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeseg.backends import BACKENDS
from edgeseg.errors import SpecError
from edgeseg.spec import PRECISIONS, BatchRange, FitPolicy, ModelRequest, OutputSpec, Precision, one_of
from edgeseg.store.artifacts import MIN_INT8_SHARE


@dataclass(frozen=True)
class BuildRequest:
    """Everything ``edgeseg build`` can be asked. See the command's help for the meaning of each option."""

    model: ModelRequest
    precision: Precision = "int8"
    size: tuple[int, int] | None = None
    batch: BatchRange = field(default_factory=BatchRange)
    dynamic_size: bool = False
    fit: FitPolicy = "resize"
    output: OutputSpec = field(default_factory=OutputSpec)
    calibration: Any = None
    calibration_method: str | None = None
    calibration_limit: int | None = None
    validation: Path | None = None
    ignore_index: int | None = None
    target: str = "auto"
    scheme: str | None = None
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    max_drop: float | None = None
    min_agreement: float | None = None
    min_int8_share: float = MIN_INT8_SHARE
    folder: Path | None = None
    force: bool = False

    def __post_init__(self) -> None:
        one_of("precision", self.precision, PRECISIONS)
        one_of("target", self.target, ("auto", *BACKENDS))
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise SpecError(
                f"max drop is {self.max_drop}; give a share of mIoU between 0 and 1, such as 0.01 for one point"
            )
        if self.min_agreement is not None and not 0 <= self.min_agreement <= 1:
            raise SpecError(
                f"min agreement is {self.min_agreement}; give a share of pixels between 0 and 1, such as 0.99"
            )
        if not 0 <= self.min_int8_share <= 1:
            raise SpecError(f"min int8 share is {self.min_int8_share}; give a share between 0 and 1")
