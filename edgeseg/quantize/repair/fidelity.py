"""How near a Q/DQ graph is to the float graph it was made from: what a repair is chosen and measured by, without labels.

Two schemes judge, because a calibration table is for every target: unsigned asymmetric integers with pairs around every
operator, and signed symmetric ones on the inputs of layers, where a range is spent on its larger side. Between them lie the
others: ARM's signed asymmetric integers round like the first, OpenVINO's pairs stand like the second's. Both run in ONNX
Runtime as they are written, with optimizations off: what is judged are the ranges, not one CPU's kernels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgeseg.errors import QuantizationError
from edgeseg.graph.proto import attribute, makers
from edgeseg.graph.running import GraphSession
from edgeseg.quantize.calibration import sample_stride
from edgeseg.quantize.qdq import quantize_model
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES, QuantScheme
from edgeseg.quantize.table import CalibrationTable
from edgeseg.spec import InputSpec
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import read_onnx

JUDGES = ("onnxruntime-vnni", "tensorrt")
"""The schemes that judge."""

HELD_OUT_EVERY = 4
MIN_TO_HOLD_OUT = 16

IMAGES = 16
"""Most images that judge: a repair is worth seconds, not minutes."""

FEWEST_IMAGES, PIXELS = 4, 8 * 352 * 480
"""Fewer judge where the input is large: as many as have so many pixels together, but four."""

_DECISIONS = frozenset({"ArgMax", "Cast", "Greater", "GreaterOrEqual", "Squeeze", "Softmax", "Sigmoid", "Identity"})


def judge_of(scheme: QuantScheme) -> str:
    """The judging scheme that rounds as ``scheme`` does."""
    return "tensorrt" if scheme.symmetric else "onnxruntime-vnni"


def hold_out(samples: CalibrationSet) -> tuple[CalibrationSet, CalibrationSet | None]:
    """Images to take ranges from, and others to judge them on; ``None`` where there are too few for both."""
    return samples.hold_out(HELD_OUT_EVERY) if len(samples) >= MIN_TO_HOLD_OUT else (samples, None)


def judging_images(images: int, spec: InputSpec) -> int:
    """How many of so many images judge."""
    return min(images, IMAGES, max(FEWEST_IMAGES, PIXELS // (spec.height * spec.width)))


def windows(samples: CalibrationSet, spec: InputSpec) -> Iterator[tuple[NDArray[Any], str]]:
    """Batches of the smallest size a graph takes, each of one image repeated, and the image's name."""
    for name, shown in samples.named_windows(spec):
        for window in shown:
            yield np.repeat(window, spec.batch.minimum, axis=0), name


def score_names(model: onnx.ModelProto) -> list[str]:
    """The float value each output of the graph is decided from: logits, where the graph goes through them."""
    ends = [(output.name, *(node.input[0] for node in _decisions(model, output.name))) for output in model.graph.output]
    return list(dict.fromkeys(end[-1] for end in ends))


def _decisions(model: onnx.ModelProto, name: str) -> list[onnx.NodeProto]:
    """The nodes between the scores and the output ``name`` that is decided from them, the last first."""
    made_by, nodes = makers(model.graph), []
    while name in made_by and made_by[name].op_type in _DECISIONS:
        nodes.append(made_by[name])
        name = nodes[-1].input[0]
    return nodes


@dataclass(frozen=True)
class Fidelity:
    """Of one Q/DQ graph, against the float graph.

    Attributes:
        agreement: share of the pixels decided alike, 0..1, mean over images.
        divergence: Kullback-Leibler divergence of the pixels' class probabilities from the float graph's, nats, float64
            ``(images,)``.
        corrected: layers whose bias was corrected.
    """

    agreement: float
    divergence: NDArray[np.float64]
    corrected: int


class Judge:
    """Runs Q/DQ graphs on images whose float scores it knows.

    Args:
        graph: the float graph; another that computes the same may be judged too.
        samples: the images, of which up to :data:`IMAGES` are taken, evenly; of one cut into tiles the middle one.

    Raises:
        QuantizationError: ONNX Runtime fails on the graph.
        InputError: an image changed or vanished since the set was opened.
    """

    def __init__(self, graph: OnnxGraph, samples: CalibrationSet) -> None:
        self._spec = graph.spec
        count = judging_images(len(samples), graph.spec.input)
        every = len(samples) // count
        chosen = samples.take(range(0, every * count, every))
        self._images = [(shown[len(shown) // 2], name) for name, shown in chosen.named_windows(graph.spec.input)]
        self._float = [self._log_probabilities(scores) for scores in self._scores(read_onnx(graph.path))]

    @property
    def images(self) -> int:
        """How many images judge."""
        return len(self._images)

    @property
    def pixels(self) -> int:
        """How many pixels they have together."""
        return sum(image.shape[1] * image.shape[2] for image, _ in self._images)

    def fidelity(self, graph: OnnxGraph, table: CalibrationTable, scheme: str) -> Fidelity:
        """Write ``graph`` with the ranges of ``table`` in ``scheme``, in memory, and compare.

        Raises:
            QuantizationError: the graph cannot be quantized, or ONNX Runtime fails on it.
        """
        model = ir.serde.deserialize_model(read_onnx(graph.path))
        corrected = quantize_model(model, table, SCHEMES[scheme])
        divergence, agreement = [], []
        for exact, scores in zip(self._float, self._scores(ir.serde.serialize_model(model)), strict=True):
            rounded = self._log_probabilities(scores)
            divergence.append(float((np.exp(exact) * (exact - rounded)).sum(axis=0, dtype=np.float64).mean()))
            agreement.append(float((exact.argmax(axis=0) == rounded.argmax(axis=0)).mean()))
        return Fidelity(float(np.mean(agreement)), np.array(divergence), corrected)

    def fidelities(self, graph: OnnxGraph, table: CalibrationTable, schemes: Iterable[str]) -> dict[str, Fidelity]:
        """By scheme; see :meth:`fidelity`."""
        return {scheme: self.fidelity(graph, table, scheme) for scheme in schemes}

    def _scores(self, model: onnx.ModelProto) -> Iterator[NDArray[np.float32]]:
        (name, *_), axis = score_names(model), _class_axis(model)
        session = GraphSession(model, "the quantized graph", QuantizationError, names=[name])
        for images, shown in self._images:
            scores = session.run(np.repeat(images, self._spec.input.batch.minimum, axis=0), shown)[name]
            # A pass may have added classes that never win.
            yield np.moveaxis(scores, axis, 1)[0][: self._spec.model.classes]

    def _log_probabilities(self, scores: NDArray[np.float32]) -> NDArray[np.float32]:
        """Scores ``(C, H, W)`` -> log probability of each class, ``(C, pixels)``, or of no and yes, ``(2, pixels)``."""
        classes = scores.reshape(len(scores), -1)
        if self._spec.model.task != "multiclass":
            classes = np.stack([np.zeros(classes.size, np.float32), classes.reshape(-1)])
        # Neighbouring pixels were made from the same features: a part of them tells as much.
        sparse = classes[:, :: sample_stride(scores.shape[1:])].astype(np.float32)
        shifted = sparse - sparse.max(axis=0)
        return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=0)))


def _class_axis(model: onnx.ModelProto) -> int:
    """Of the first output's scores: what the ArgMax is taken over, else that of images, 1."""
    decisions = _decisions(model, model.graph.output[0].name)
    return next((int(attribute(node, "axis", 0)) for node in decisions if node.op_type == "ArgMax"), 1)
