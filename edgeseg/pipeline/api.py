"""``edgeseg.build``: what can be asked for, checked before any work is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.backends import BACKENDS
from edgeseg.errors import SpecError
from edgeseg.progress import Reporter, SilentReporter
from edgeseg.spec import (
    PRECISIONS,
    BatchRange,
    ChannelOrder,
    FitPolicy,
    ModelRequest,
    OutputKind,
    OutputSpec,
    Precision,
    Task,
    one_of,
)
from edgeseg.store.artifacts import Engine

if TYPE_CHECKING:
    import numpy as np
    import torch  # noqa: TID251  # the type only
    from numpy.typing import NDArray

    from edgeseg.quantize.table import CalibrationTable

# Below this share of int8 multiply-accumulates an engine is not what "int8" promises.
MIN_INT8_SHARE = 0.7


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


def build(
    arch: str | None = None,
    *,
    precision: Precision = "int8",
    model: torch.nn.Module | None = None,
    encoder: str | None = None,
    weights: str | Path | None = None,
    weights_key: str | None = None,
    classes: int | None = None,
    class_names: Iterable[str] = (),
    task: Task | None = None,
    in_channels: int | None = None,
    activation: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    keep_aux: bool = False,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    channel_order: ChannelOrder | None = None,
    size: tuple[int, int] | None = None,
    batch: int | tuple[int, int, int] = 1,
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
    reporter: Reporter | None = None,
) -> Engine:
    """Build a verified engine folder from an SMP model.

    Args:
        arch: one of the twelve SMP architectures; may be left out when the checkpoint or ``model`` tells.
        precision: ``fp32``, ``fp16`` or ``int8``.
        model: an SMP module, a subclass or a wrapper of one, instead of ``arch`` and ``weights``.
        encoder: SMP's name, ``tu-`` names are timm's; default the checkpoint's, else ``resnet34``.
        weights: a checkpoint's path, ``"imagenet"``, ``"random"``, or ``None`` for the demo model of ``arch``.
        weights_key: where the state dict is in a checkpoint with several, such as ``"state_dict_ema"``.
        classes: output channels; default what the checkpoint says.
        class_names: one per class.
        task: ``multiclass``, ``binary`` or ``multilabel``; default by the number of classes.
        in_channels: image channels; default 3.
        activation: SMP's ``activation`` argument as trained.
        model_args: any other argument of the SMP constructor.
        keep_aux: keep the auxiliary classification head as a second output.
        mean: per channel, of pixel values scaled to [0, 1]; default the checkpoint's or the encoder's.
        std: the same.
        channel_order: ``rgb`` or ``bgr``, as the network was trained; the engine's input is RGB either way.
        size: ``(height, width)`` in pixels; default the model's own.
        batch: ``N`` or ``(MIN, OPT, MAX)``.
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
        reporter: told about stages and progress; default silent.

    Raises:
        SpecError, InputError, CheckpointError, ExportError, QuantizationError, BuildError, ArtifactError,
        MissingDependencyError: see :mod:`edgeseg.errors`; nothing is left behind.
        GateError: ``max_drop`` or ``min_agreement`` is not met; nothing is left behind.
    """
    batch_range = BatchRange(*batch) if isinstance(batch, tuple) else BatchRange(batch, batch, batch)
    request = BuildRequest(
        model=ModelRequest(
            arch=arch,
            encoder=encoder,
            weights=None if weights is None else str(weights),
            classes=classes,
            class_names=tuple(class_names),
            task=task,
            in_channels=in_channels,
            activation=activation,
            model_args=dict(model_args or {}),
            keep_aux=keep_aux,
            mean=None if mean is None else tuple(mean),
            std=None if std is None else tuple(std),
            channel_order=channel_order,
            weights_key=weights_key,
        ),
        precision=precision,
        size=size,
        batch=batch_range,
        dynamic_size=dynamic_size,
        fit=fit,
        output=OutputSpec(output_kind, confidence, threshold),
        calibration=calibration,
        calibration_method=calibration_method,
        calibration_limit=calibration_limit,
        validation=None if validation is None else Path(validation),
        ignore_index=ignore_index,
        target=target,
        scheme=scheme,
        backend_options=dict(backend_options or {}),
        max_drop=max_drop,
        min_agreement=min_agreement,
        min_int8_share=min_int8_share,
        folder=None if output is None else Path(output),
        force=force,
    )
    from edgeseg.pipeline.stages import run_build

    return run_build(request, model=model, reporter=reporter or SilentReporter())
