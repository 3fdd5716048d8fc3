"""What a build can be asked for, each argument defined once and checked before any work is done."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from edgeseg.arguments import (
    FLAG,
    INT32,
    PATH,
    SETTINGS,
    SIZE,
    TEXT,
    Kind,
    argument,
    choice,
    number,
    request_of,
    whole,
    words_of,
)
from edgeseg.backends import BACKENDS
from edgeseg.backends.cpu.options import CPU_OPTIONS
from edgeseg.errors import InputError, SpecError, typed
from edgeseg.spec import BATCH, PRECISIONS, BatchRange, FitPolicy, ModelRequest, OutputKind, OutputSpec, Precision
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import MIN_INT8_SHARE

OptimizeFor = Literal["latency", "throughput"]
OPTIMIZE_FOR: tuple[OptimizeFor, ...] = get_args(OptimizeFor)


def _images(value: Any) -> Any:
    if isinstance(value, (bytes, Mapping)) or (isinstance(value, str) and not value):
        raise TypeError
    if not isinstance(value, (str, Path, Iterable)):
        from edgeseg.quantize.table import CalibrationTable

        if not isinstance(value, CalibrationTable):
            raise TypeError
    return value


IMAGES = Kind(
    "a folder, a glob, a list, arrays or a table",
    _images,
    write=lambda value: [str(value)] if isinstance(value, (str, Path)) else None,
    metavar="DIR|GLOB|FILE",
)


@dataclass(frozen=True)
class BuildRequest(ModelRequest):
    """Everything ``edgeseg build`` can be asked, each argument defined here or in :class:`~edgeseg.spec.ModelRequest`.

    The command line's options, :func:`build`'s arguments, the command in a manifest and a sweep's cells come from these
    fields; an instance that exists is consistent.

    Raises:
        SpecError: a value that is not allowed; names the argument.
    """

    precision: Precision = argument(choice(PRECISIONS), "int8", repeated="always")
    size: tuple[int, int] | None = argument(SIZE, help="Engine input size.  [default: the model's, else 256x256]")
    batch: BatchRange = argument(BATCH, BatchRange, help="Batch size or range.")
    dynamic_size: bool = argument(FLAG, False, help="Accept any size that is a multiple of the model's stride.")
    fit: FitPolicy | None = argument(
        choice(get_args(FitPolicy)),
        help="How images of another size are brought to the engine's.  [default: as saved with the model, else resize]",
    )
    output_kind: OutputKind = argument(choice(get_args(OutputKind)), "mask")
    confidence: bool = argument(FLAG, False, help="Also return each pixel's probability of its class.")
    threshold: float = argument(
        number(0, 1, "a probability between 0 and 1, such as 0.5"), 0.5, help="For binary and multilabel masks."
    )
    calibration: Any = argument(
        IMAGES,
        help="Images for int8: a folder, glob, list file, .npy, or a finished table (.json).  "
        "[default: the demo set, for a demo model only]",
    )
    calibration_method: str | None = argument(
        TEXT, help="minmax, moving-average, percentile, entropy or mse.  [default: what the output loses least by]"
    )
    equalize: bool = argument(
        FLAG,
        True,
        help="Make the channels of int8's activations even first: exact, and recovers badly scaled channels.",
    )
    calibration_limit: int | None = argument(
        whole(1, INT32, 64), help="Use at most so many calibration images (a seeded subset)."
    )
    validation: Path | None = argument(
        PATH, help="Folder with images/ and, for mIoU, masks/.  [default: images held out of --calibration]"
    )
    ignore_index: int | None = argument(whole(-INT32, INT32, 255), help="Mask value that counts for nothing.")
    target: str = argument(
        choice(("auto", *BACKENDS)),
        "auto",
        help="auto measures the backends installed here and takes the fastest, onnxruntime where noise could turn it.",
    )
    scheme: str | None = argument(TEXT, help="Q/DQ scheme.  [default: what is fast on the target here]")
    backend_options: dict[str, Any] = argument(
        SETTINGS, dict, help="Setting of the backend, such as threads=2; repeatable."
    )
    optimize_for: OptimizeFor = argument(
        choice(OPTIMIZE_FOR),
        "latency",
        help="Of one image at a time, or images a second with a caller per thread: on the CPU.",
    )
    max_drop: float | None = argument(
        number(0, 1, "a share of mIoU between 0 and 1, such as 0.01 for one point"),
        help="Lose no more mIoU than this (0.01 = one point); what costs most stays float.  [exit 3 if that fails]",
    )
    min_agreement: float | None = argument(
        number(0, 1, "a share of pixels between 0 and 1, such as 0.99"),
        help="Agree with PyTorch on at least this share of pixels; as --max-drop, without masks.",
    )
    search: bool = argument(
        FLAG, True, help="Where plain int8 misses --max-drop or --min-agreement, find the fastest mix that meets it."
    )
    search_minutes: float = argument(
        number(0, 10000, "minutes, such as 20"), 20.0, help="End that search here, with the best engine so far."
    )
    latency_from: Path | None = argument(
        PATH,
        help="JSON of an `edgeseg bench --profile` of the device: milliseconds by module come from there.",
        metavar="FILE",
    )
    min_int8_share: float = argument(
        number(0, 1, "a share between 0 and 1, such as 0.7"),
        MIN_INT8_SHARE,
        help="Fail when less of the work runs in int8.",
    )
    folder: Path | None = argument(
        PATH, name="output", help="Engine folder.  [default: engines/ARCH-ENCODER-PRECISION]"
    )
    force: bool = argument(FLAG, False, help="Replace an existing engine folder.", repeated="never")

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.output

    def files(self) -> list[Path]:
        """The files it is known to read, before any is opened: what an output must not replace."""
        from edgeseg.images.decoding import IMAGE_SUFFIXES, list_images

        named = (self.weights, self.calibration, self.validation, self.latency_from)
        files = [Path(name) for name in named if isinstance(name, (str, Path))]
        if self.weights is not None and Path(self.weights).is_dir():
            files += Path(self.weights).iterdir()
        if isinstance(self.calibration, (str, Path)):
            with contextlib.suppress(InputError):  # said by who reads them
                files += list_images(self.calibration)
        if self.validation is not None:
            files += (path for path in self.validation.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        return files

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> BuildRequest:
        """The request of arguments by Python's names, whatever kind of value people wrote.

        Raises:
            SpecError: an argument there is not, or a value that is not allowed.
        """
        return request_of(cls, "a build", arguments)

    @classmethod
    def of_engine(cls, engine: Engine, **changes: Any) -> BuildRequest:
        """The request for the network of an engine folder, calibrated by the table in it; ``changes`` by field.

        Raises:
            SpecError: the folder does not say how to load its model, or holds no table.
        """
        manifest, spec = engine.manifest, engine.manifest.spec
        if manifest.model_request is None:
            raise SpecError(
                f"{engine.folder} was built from a module in Python; give its checkpoint with --weights instead"
            )
        if manifest.calibration is None:
            raise SpecError(
                f"{engine.folder} holds no calibration table; give an int8 engine, or the options of a build"
            )
        asked = {field.name: getattr(manifest.model_request, field.name) for field in dataclasses.fields(ModelRequest)}
        given = {
            "size": (spec.input.height, spec.input.width),
            "batch": spec.input.batch,
            "dynamic_size": spec.input.dynamic_size,
            "fit": spec.input.fit,
            "output_kind": spec.output.kind,
            "confidence": spec.output.confidence,
            "threshold": spec.output.threshold,
            "calibration": engine.folder / manifest.calibration.name,
            "target": manifest.target,
            "scheme": manifest.scheme,
        }
        return cls(**{**asked, **given, **changes})

    @property
    def command(self) -> str | None:
        """The ``edgeseg build`` for it; ``None`` where no command line can say it (images or a table given as objects).

        Only what differs from the defaults is named, so the command stays readable and means the same in later versions.
        """
        words = words_of(self)
        return None if words is None else typed("build", *words)

    @property
    def model(self) -> ModelRequest:
        """What was said about the model alone."""
        return ModelRequest(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ModelRequest)})

    def options_for(self, target: str) -> dict[str, Any]:
        """Settings of a backend, with what ``optimize_for`` adds to those given.

        Raises:
            SpecError: throughput of a GPU, where calls wait for each other.
        """
        if self.optimize_for == "latency":
            return self.backend_options
        if target not in CPU_OPTIONS:
            raise SpecError(
                f"optimize_for throughput divides a CPU's threads among callers, and {target} is for a GPU: build with --batch, "
                "and compare edgeseg bench --batch and --streams"
            )
        return {"streams": 0, **self.backend_options}

    @property
    def output(self) -> OutputSpec:
        """What the engine is to return."""
        return OutputSpec(self.output_kind, self.confidence, self.threshold)
