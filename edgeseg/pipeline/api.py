"""``edgeseg.build``: what can be asked for, checked before any work is done."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from edgeseg.arguments import (
    FLAG,
    INT32,
    PATH,
    SETTINGS,
    SIZE,
    TEXT,
    Kind,
    argument,
    arguments_of,
    choice,
    number,
    shortened,
    whole,
)
from edgeseg.backends import BACKENDS
from edgeseg.errors import ArtifactError, EdgesegError, SpecError, did_you_mean, refusals_as
from edgeseg.progress import Reporter, reporter_of
from edgeseg.spec import (
    BATCH,
    PRECISIONS,
    BatchRange,
    ChannelOrder,
    FitPolicy,
    ModelRequest,
    OutputKind,
    OutputSpec,
    Precision,
    Task,
)
from edgeseg.store.artifacts import Engine

if TYPE_CHECKING:
    import numpy as np
    import torch  # noqa: TID251  # the type only
    from numpy.typing import NDArray

    from edgeseg.quantize.table import CalibrationTable

# Below this share of int8 multiply-accumulates an engine is not what "int8" promises.
MIN_INT8_SHARE = 0.7


IMAGES = Kind(
    "a folder, a glob, a list, arrays or a table",
    lambda value: value,
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
    fit: FitPolicy = argument(
        choice(get_args(FitPolicy)), "resize", help="How images of another size are brought to the engine's."
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
    calibration_method: str | None = argument(TEXT, help="minmax, moving-average, percentile, entropy or mse.")
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
        help="auto measures the backends installed here and takes the fastest.",
    )
    scheme: str | None = argument(TEXT, help="Q/DQ scheme.  [default: what is fast on the target here]")
    backend_options: dict[str, Any] = argument(
        SETTINGS, dict, help="Setting of the backend, such as threads=2; repeatable."
    )
    max_drop: float | None = argument(
        number(0, 1, "a share of mIoU between 0 and 1, such as 0.01 for one point"),
        help="Exit 3 when more mIoU is lost (0.01 = one point).",
    )
    min_agreement: float | None = argument(
        number(0, 1, "a share of pixels between 0 and 1, such as 0.99"),
        help="Exit 3 when a smaller share of pixels agrees with PyTorch.",
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

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> BuildRequest:
        """The request of arguments by Python's names, whatever kind of value people wrote.

        Raises:
            SpecError: an argument there is not, or a value that is not allowed.
        """
        fields = {argument.name: argument.field for argument in arguments_of(cls).values()}
        for name in arguments:
            if name not in fields:
                raise SpecError(f"a build has no argument {name!r}{did_you_mean(name, fields)}")
        return cls(**{fields[name]: value for name, value in arguments.items()})

    @property
    def model(self) -> ModelRequest:
        """What was said about the model alone."""
        return ModelRequest(**{field.name: getattr(self, field.name) for field in dataclasses.fields(ModelRequest)})

    @property
    def output(self) -> OutputSpec:
        """What the engine is to return."""
        return OutputSpec(self.output_kind, self.confidence, self.threshold)


def build(
    arch: str | torch.nn.Module | None = None,
    *,
    precision: Precision = "int8",
    model: torch.nn.Module | None = None,
    encoder: str | None = None,
    weights: str | Path | torch.nn.Module | None = None,
    classes: int | None = None,
    class_names: str | Iterable[str] = (),
    task: Task | None = None,
    in_channels: int | None = None,
    activation: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    keep_aux: bool = False,
    mean: float | Iterable[float] | None = None,
    std: float | Iterable[float] | None = None,
    channel_order: ChannelOrder | None = None,
    size: int | str | Sequence[int] | None = None,
    batch: int | str | Sequence[int] = 1,
    dynamic_size: bool = False,
    fit: FitPolicy = "resize",
    output_kind: OutputKind = "mask",
    confidence: bool = False,
    threshold: float = 0.5,
    calibration: str | Path | Iterable[NDArray[np.uint8]] | CalibrationTable | None = None,
    calibration_method: str | None = None,
    calibration_limit: int | None = None,
    validation: str | Path | None = None,
    ignore_index: int | None = None,
    target: str = "auto",
    scheme: str | None = None,
    backend_options: Mapping[str, Any] | None = None,
    max_drop: float | None = None,
    min_agreement: float | None = None,
    min_int8_share: float = MIN_INT8_SHARE,
    output: str | Path | None = None,
    force: bool = False,
    reporter: Reporter | Callable[[str], object] | None = None,
) -> Engine:
    """Build a verified engine folder from an SMP model.

    Numbers may be numpy's or torch's, choices in any case, and ``None`` asks for the default.

    Args:
        arch: one of the twelve SMP architectures; may be left out when the checkpoint or ``model`` tells. Or the module
            itself, as ``model``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        model: an SMP module, a subclass or a wrapper of one, instead of ``arch`` and ``weights``.
        encoder: SMP's name, ``tu-`` names are timm's; default the checkpoint's, else ``resnet34``.
        weights: a checkpoint's path, ``"imagenet"``, ``"random"``, or ``None`` for the demo model of ``arch``.
        classes: output channels; default what the checkpoint says.
        class_names: one per class; a list, or one string of names separated by commas.
        task: ``multiclass``, ``binary`` or ``multilabel``; default by the number of classes.
        in_channels: image channels; default 3.
        activation: SMP's ``activation`` argument as trained.
        model_args: any other argument of the SMP constructor.
        keep_aux: keep the auxiliary classification head as a second output.
        mean: per channel, or one for all, of pixel values scaled to [0, 1]; default the checkpoint's or the encoder's.
        std: the same.
        channel_order: ``rgb`` or ``bgr``, as the network was trained; the engine's input is RGB either way.
        size: ``(height, width)`` in pixels, ``"HxW"`` or one number for a square; default the model's own.
        batch: ``N``, ``(MIN, OPT, MAX)`` or ``"MIN:OPT:MAX"``.
        dynamic_size: accept any size that is a multiple of the model's stride.
        fit: ``resize``, ``letterbox`` or ``tile``: how images of another size are brought to the engine's.
        output_kind: ``mask``, ``logits`` or ``probabilities``.
        confidence: also return each pixel's probability of its class.
        threshold: probability above which binary and multilabel pixels are 1.
        calibration: images an int8 engine is calibrated with (a folder, glob, list file, ``.npy``, or uint8 RGB arrays
            ``(H, W, 3)``), or a finished table (``.json`` path or object).
        calibration_method: ``minmax``, ``moving-average``, ``percentile``, ``entropy`` or ``mse``.
        calibration_limit: use at most so many images, a seeded subset.
        validation: folder with ``images/`` and, for mIoU, ``masks/``; default: images held out of ``calibration``.
        ignore_index: mask value that counts for nothing.
        target: a backend's name, or ``auto`` to measure those installed here and take the fastest.
        scheme: Q/DQ scheme; default what is fast on the target here.
        backend_options: settings of the backend, such as ``{"threads": 2}``; recorded in the manifest.
        max_drop: fail when more mIoU than this is lost (0.01 = one point). Needs masks.
        min_agreement: fail when a smaller share of pixels agrees with PyTorch.
        min_int8_share: fail when a smaller share of the multiply-accumulates runs in int8.
        output: the engine folder; default ``engines/<arch>-<encoder>-<precision>``.
        force: replace an existing engine folder.
        reporter: told about stages and progress; a callable, such as ``print``, gets a line per stage and note; default
            silent.

    Raises:
        SpecError, InputError, CheckpointError, ExportError, QuantizationError, BuildError, ArtifactError,
        MissingDependencyError: see :mod:`edgeseg.errors`; nothing is left behind.
        GateError: ``max_drop`` or ``min_agreement`` is not met; nothing is left behind.
    """
    given = dict(locals())
    del given["model"], given["reporter"]
    model, given = _module_of(model, given)
    from edgeseg.pipeline.stages import run_build

    try:
        with refusals_as(ArtifactError):
            return run_build(BuildRequest.of(given), model=model, reporter=reporter_of(reporter))
    except EdgesegError as exc:
        exc.args = tuple(_in_python_words(part) if isinstance(part, str) else part for part in exc.args)
        raise


def _module_of(model: torch.nn.Module | None, given: dict[str, Any]) -> tuple[torch.nn.Module | None, dict[str, Any]]:
    """The module, wherever it was given: as ``model``, first of all, or as ``weights``."""
    places = [name for name in ("arch", "weights") if _is_module(given[name])]
    if model is not None and not _is_module(model):
        raise SpecError(f"model is {shortened(model)}; give an SMP module, or name an architecture by arch")
    if len(places) + (model is not None) > 1:
        raise SpecError("two modules were given; give one, as model")
    if not places:
        return model, given
    return given[places[0]], {**given, places[0]: None}


def _is_module(value: object) -> bool:
    # Whoever has a module has imported torch; asking so does not import it here.
    return not isinstance(value, type) and callable(getattr(value, "state_dict", None)) and callable(value)


def _in_python_words(message: str) -> str:
    """The message with options called as :func:`build` calls them: ``calibration`` for ``--calibration``."""
    names = {argument.flag: argument.name for argument in arguments_of(BuildRequest).values()}
    return re.sub(r"--[a-z][a-z0-9-]*", lambda option: names.get(option[0], option[0]), message)
