"""An engine without a network, for tests: a plain function stands in for the model.

It needs numpy alone and is as strict about its input as a real engine, so code around a :class:`~edgeseg.Segmenter` can
be tested without ONNX Runtime, a GPU or weights::

    spec = PipelineSpec(ModelSpec("custom", classes=4), InputSpec(64, 64))
    segmenter = Segmenter(MemorySession(spec))

or, with an engine folder, for code that calls :func:`edgeseg.load`::

    write_memory_engine(folder, spec)
    BACKENDS["memory"] = "memory_backend"

Without a function of your own, :func:`brightness_logits` decides: each pixel by itself, so a mask can be predicted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from engine_folders import write_manifest
from numpy.typing import NDArray

import edgeseg
from edgeseg.backends.base import ALONE, BackendStatus, BuildContext, BuiltEngine, Options
from edgeseg.closing import Closing
from edgeseg.errors import InputError, SpecError
from edgeseg.runtime.scores import ScoreRule
from edgeseg.spec import OutputSpec, PipelineSpec
from edgeseg.store.documents import write_json
from edgeseg.store.engine import Engine
from edgeseg.store.hashing import FileRef
from edgeseg.store.manifest import OnnxGraph, PrecisionReport

LogitsFunction = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""uint8 ``(N, H, W, C)`` -> float32 ``(N, classes, H, W)``."""

ENGINE_NAME = "engine.json"


def brightness_logits(classes: int) -> LogitsFunction:
    """Return a function whose class at each pixel is the brightness band it falls in: ``mean * classes // 256``.

    The logit of a class is minus the distance of the pixel's brightness from the middle of that class's band, in bands
    (a ten-thousandth below the middle, so that a brightness between two bands counts to the upper one). With one class:
    how far the brightness lies above 127.5, in units of 32.
    """

    def logits(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        brightness: NDArray[np.float32] = images.mean(axis=-1, dtype=np.float32)
        if classes == 1:
            return np.asarray((brightness - np.float32(127.5)) / np.float32(32.0))[:, None]
        band = np.arange(classes, dtype=np.float32).reshape(1, -1, 1, 1) + np.float32(0.4999)
        return np.asarray(-np.abs(brightness[:, None] * np.float32(classes / 256.0) - band))

    return logits


class MemorySession(Closing):
    """A loaded engine that calls a function.

    Args:
        spec: the contract it fulfils: sizes, batch and outputs.
        logits: stands in for the network; ``None`` for :func:`brightness_logits`.
        aux_logits: uint8 ``(N, H, W, C)`` -> float32 ``(N, K)``, for a model with a kept auxiliary head.

    Attributes:
        calls: shape of the images of every call so far, in order.
        closed: whether :meth:`close` was called.
    """

    def __init__(
        self, spec: PipelineSpec, logits: LogitsFunction | None = None, aux_logits: LogitsFunction | None = None
    ) -> None:
        self._spec = spec
        self._logits = logits or brightness_logits(spec.model.classes)
        self._aux_logits = aux_logits
        # The network's answer is always logits here, whatever is made of it.
        as_logits = PipelineSpec(
            spec.model, spec.input, spec.preprocess, OutputSpec("logits", threshold=spec.output.threshold)
        )
        self._rule = ScoreRule.of(as_logits)
        self.calls: list[tuple[int, ...]] = []
        self.closed = False

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        """Run one batch. Raises ``InputError`` for anything a real engine would not take."""
        self._check(images)
        self.calls.append(images.shape)
        logits = np.ascontiguousarray(self._logits(images), np.float32)
        wanted = (len(images), self._spec.model.classes, *images.shape[1:3])
        if logits.shape != wanted:
            raise InputError(f"the function returned logits of shape {logits.shape}, expected {wanted}")
        masks = [self._rule.mask(scores) for scores in logits]
        outputs: dict[str, NDArray[Any]] = {}
        if self._spec.output.kind == "mask":
            outputs["mask"] = np.stack(masks)
        elif self._spec.output.kind == "logits":
            outputs["logits"] = logits
        else:
            outputs["probabilities"] = np.stack([self._rule.probabilities(scores) for scores in logits])
        if self._spec.output.confidence:
            pairs = zip(logits, masks, strict=True)
            outputs["confidence"] = np.stack([self._rule.confidence(scores, mask) for scores, mask in pairs])
        if self._aux_logits is not None:
            outputs["aux_logits"] = self._aux_logits(images)
        return outputs

    def close(self) -> None:
        """Refuse further calls."""
        self.closed = True

    def _check(self, images: NDArray[np.uint8]) -> None:
        spec = self._spec.input
        if self.closed:
            raise InputError("this session is closed; load the engine again")
        if images.dtype != spec.dtype or images.ndim != 4 or images.shape[3] != spec.channels:
            raise InputError(
                f"images are {images.dtype} {images.shape}, this engine takes {spec.dtype} (N, H, W, {spec.channels})"
            )
        if not images.flags.c_contiguous:
            raise InputError("images are not C-contiguous; use np.ascontiguousarray")
        if not spec.batch.minimum <= len(images) <= spec.batch.maximum:
            raise InputError(f"batch of {len(images)}, this engine takes {spec.batch.minimum} to {spec.batch.maximum}")
        size = images.shape[1:3]
        if not spec.dynamic_size and size != (spec.height, spec.width):
            raise InputError(f"images have {size[0]}x{size[1]} pixels, this engine takes {spec.height}x{spec.width}")
        least, most = spec.min_size or (1, 1), spec.max_size or size
        if any(n % spec.stride or not low <= n <= high for n, low, high in zip(size, least, most, strict=True)):
            raise InputError(
                f"images have {size[0]}x{size[1]} pixels, this engine takes multiples of {spec.stride} from "
                f"{least[0]}x{least[1]} to {most[0]}x{most[1]}"
            )


class MemoryBackend:
    """Builds and loads engine folders without a network in them."""

    name = "memory"
    scheme = "onnxruntime-vnni"

    def status(self) -> BackendStatus:
        """It always works."""
        return BackendStatus(True, edgeseg.__version__, "no network, for tests")

    def build(self, graph: OnnxGraph, folder: Path, options: Options, context: BuildContext = ALONE) -> BuiltEngine:
        """Write an engine file that ignores the graph. Raises ``SpecError`` for any option."""
        if options:
            raise SpecError(f"target memory has no build option {next(iter(options))!r} (allowed: none)")
        return BuiltEngine(_write_engine(folder), _no_precision())

    def load(self, engine: Engine) -> MemorySession:
        """Load a folder made by :meth:`build` or :func:`write_memory_engine`."""
        engine.engine_path.read_bytes()
        return MemorySession(engine.manifest.spec)


def backend() -> MemoryBackend:
    """Return the backend."""
    return MemoryBackend()


def write_memory_engine(folder: Path, spec: PipelineSpec) -> Engine:
    """Write a complete engine folder whose masks come from :func:`brightness_logits`.

    Args:
        folder: made if it does not exist; files of the same names are replaced.
        spec: the contract of the engine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    engine = FileRef.of(_write_engine(folder))
    manifest = write_manifest(
        folder,
        spec,
        _no_precision(),
        MemoryBackend.name,
        graph=engine.name,
        engine=engine.name,
        weights="none: masks come from the brightness of each pixel",
        inputs_sha256={},
        versions={"edgeseg": edgeseg.__version__},
    )
    return Engine(folder, manifest)


def _write_engine(folder: Path) -> Path:
    path = folder / ENGINE_NAME
    write_json(path, {"engine": "memory"})
    return path


def _no_precision() -> PrecisionReport:
    return PrecisionReport("fp32", mac_share={}, node_share={}, macs=0, evidence="typed")
