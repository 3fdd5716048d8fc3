"""``edgeseg.build``: what can be asked for, checked before any work is done."""

from __future__ import annotations

import dataclasses
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.arguments import arguments_of, shortened
from edgeseg.errors import ArtifactError, EdgesegError, SpecError, refusals_as
from edgeseg.pipeline.request import BuildRequest, OptimizeFor
from edgeseg.progress import Reporter, reporter_of
from edgeseg.spec import ChannelOrder, FitPolicy, InputDtype, OutputKind, Precision, Task
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import MIN_INT8_SHARE

if TYPE_CHECKING:
    import torch  # noqa: TID251  # the type only
    from numpy.typing import NDArray

    from edgeseg.quantize.table import CalibrationTable

_building = threading.RLock()


def build(
    arch: str | Path | torch.nn.Module | None = None,
    *,
    precision: Precision = "int8",
    model: torch.nn.Module | None = None,
    encoder: str | None = None,
    weights: str | Path | torch.nn.Module | None = None,
    weights_key: str | None = None,
    classes: int | None = None,
    class_names: str | Iterable[str] = (),
    task: Task | None = None,
    in_channels: int | None = None,
    activation: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    keep_aux: bool = False,
    input_dtype: InputDtype = "uint8",
    clip: Sequence[float] | None = None,
    mean: float | Iterable[float] | None = None,
    std: float | Iterable[float] | None = None,
    scale: float | None = None,
    channel_order: ChannelOrder | None = None,
    size: int | str | Sequence[int] | None = None,
    batch: int | str | Sequence[int] = 1,
    dynamic_size: bool = False,
    fit: FitPolicy | None = None,
    output_kind: OutputKind = "mask",
    confidence: bool = False,
    threshold: float = 0.5,
    calibration: str | Path | Iterable[NDArray[Any]] | CalibrationTable | None = None,
    calibration_method: str | None = None,
    equalize: bool = True,
    calibration_limit: int | None = None,
    validation: str | Path | None = None,
    ignore_index: int | None = None,
    target: str = "auto",
    scheme: str | None = None,
    backend_options: Mapping[str, Any] | None = None,
    optimize_for: OptimizeFor = "latency",
    max_drop: float | None = None,
    min_agreement: float | None = None,
    search: bool = True,
    search_minutes: float = 20.0,
    latency_from: str | Path | None = None,
    min_int8_share: float = MIN_INT8_SHARE,
    output: str | Path | None = None,
    force: bool = False,
    reporter: Reporter | Callable[[str], object] | None = None,
) -> Engine:
    """Build a verified engine folder from an SMP model.

    Numbers may be numpy's or torch's, choices in any case, and ``None`` asks for the default. Builds that several threads
    ask for are done one after the other, as torch's exporter takes the whole process.

    Args:
        arch: one of the twelve SMP architectures; may be left out when the checkpoint or ``model`` tells. Or the model
            itself: the path of an ``.onnx`` file, or a module, as ``model``.
        precision: ``fp32``, ``fp16`` or ``int8``.
        model: an SMP module, a subclass or a wrapper of one, instead of ``arch`` and ``weights``.
        encoder: SMP's name, ``tu-`` names are timm's; default the checkpoint's, else ``resnet34``.
        weights: a checkpoint's or ``.onnx`` file's path, ``"user/model[@revision]"`` of the Hugging Face hub, ``"imagenet"``,
            ``"random"``, or ``None`` for the demo model of ``arch``.
        weights_key: where the state dict is in a checkpoint with several, such as ``"state_dict_ema"``.
        classes: output channels; default what the checkpoint says.
        class_names: one per class; a list, or one string of names separated by commas.
        task: ``multiclass``, ``binary`` or ``multilabel``; default by the number of classes.
        in_channels: image channels; default 3.
        activation: SMP's ``activation`` argument as trained.
        model_args: any other argument of the SMP constructor.
        keep_aux: keep the auxiliary classification head as a second output.
        input_dtype: of the images the engine takes: ``uint8``, ``uint16`` (16-bit PNG, TIFF) or ``float32`` (physical values,
            such as reflectance or Hounsfield units). Images of another one are refused, never converted.
        clip: lowest and highest pixel value, which those beyond are held at before all else, in the graph: ``(-160, 240)`` for a
            window of Hounsfield units.
        mean: per channel, or one for all, of pixel values times ``scale``; default the checkpoint's or the encoder's.
        std: the same.
        scale: factor on pixel values before mean and std, whose units are then those; default 1/255, of uint16 1/65535, for
            mean and std up to 1, else 1; of float32 always 1.
        channel_order: ``rgb`` or ``bgr``, as the network was trained; the engine's input is RGB either way.
        size: ``(height, width)`` in pixels, ``"HxW"`` or one number for a square; default the model's own.
        batch: ``N``, ``(MIN, OPT, MAX)`` or ``"MIN:OPT:MAX"``.
        dynamic_size: accept any size that is a multiple of the model's stride.
        fit: ``resize``, ``letterbox`` or ``tile``: how images of another size are brought to the engine's; default as the
            preprocessing saved with the model says, else ``resize``.
        output_kind: ``mask``, ``logits`` or ``probabilities``.
        confidence: also return each pixel's probability of its class.
        threshold: probability above which binary and multilabel pixels are 1.
        calibration: images an int8 engine is calibrated with (a folder, glob, list file, ``.npy``, or RGB arrays
            ``(H, W, 3)``), or a finished table (``.json`` path or object).
        calibration_method: ``minmax``, ``moving-average``, ``percentile``, ``entropy``, ``mse``, or ``auto``, the
            default: by what the network's output loses.
        equalize: for int8, scale channels so that activations are even over them; the float graph computes the same. A
            finished table decides by itself.
        calibration_limit: use at most so many images, a seeded subset.
        validation: folder with ``images/`` and, for mIoU, ``masks/``; default: images held out of ``calibration``.
        ignore_index: mask value that counts for nothing.
        target: a backend's name, or ``auto`` to measure those installed here and take the fastest, the
            first of them where noise could turn it.
        scheme: Q/DQ scheme; default what is fast on the target here.
        backend_options: settings of the backend, such as ``{"threads": 2}``; recorded in the manifest.
        optimize_for: ``latency`` of one image at a time, or ``throughput``: images a second with a caller per thread
            (``streams`` of the CPU backends, which :func:`edgeseg.load` then keeps).
        max_drop: lose no more mIoU than this (0.01 = one point): where plain int8 does, the modules that cost most accuracy
            for the time they save stay float. Needs masks.
        min_agreement: agree with PyTorch on at least this share of pixels, in the same way.
        search: whether to look for such a mix; without, plain int8 that misses the goal is an error.
        search_minutes: after so long the best engine so far that meets the goal is taken.
        latency_from: JSON of an ``edgeseg bench --profile`` of the device, for its milliseconds by module.
        min_int8_share: fail when a smaller share of the multiply-accumulates runs in int8. The default does not bind a mix
            that was found for ``max_drop`` or ``min_agreement``.
        output: the engine folder; default ``engines/<arch>-<encoder>-<precision>``.
        force: replace an existing engine folder.
        reporter: told about stages and progress; a callable, such as ``print``, gets a line per stage and note; default
            silent.

    Returns:
        the engine; its ``folder`` is absolute.

    Raises:
        EdgesegError: the request, an input, or a step failed; see :mod:`edgeseg.errors` for which class says what. Nothing is
            left behind.
        GateError: no engine meets ``max_drop`` or ``min_agreement``, not even a float one, or, without ``search``, plain int8
            does not; nothing is left behind.
    """
    given = dict(locals())
    del given["model"], given["reporter"]
    model, given = _module_of(model, given)
    if isinstance(calibration, Iterable) and not isinstance(calibration, (str, Path, Sized)):
        given["calibration"] = list(calibration)  # a generator: images are looked at more than once
    from edgeseg.pipeline.build import run_build

    try:
        # torch's exporter changes torch for the whole process while it runs: of two at once, both fail.
        with _building, refusals_as(ArtifactError):
            engine = run_build(BuildRequest.of(given), model=model, reporter=reporter_of(reporter))
            # A program may go to another folder before it loads the engine.
            return dataclasses.replace(engine, folder=engine.folder.absolute())
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
    """The message with options called as :func:`build` calls them: ``calibration`` for ``--calibration``.

    Those of a command that is to be typed stay as they are.
    """
    names = {argument.flag: argument.name for argument in arguments_of(BuildRequest).values()}
    return re.sub(r"edgeseg [a-z]+ [^;,]*|--[a-z][a-z0-9-]*", lambda words: names.get(words[0], words[0]), message)
