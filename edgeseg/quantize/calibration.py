"""Collect the ranges of a graph's activations over calibration images: one pass, memory independent of their number.

Each image runs through the fp32 graph once, with its activations fetched; their extremes, channel means and a
sample for the histogram are taken and the activations dropped before the next image. The extremes are exact. The
histogram counts at most :data:`SAMPLE` values of a tensor per image, at a stride that shares no factor with the
tensor's dimensions and so visits all rows, columns and channels alike: over 64 images that is up to a million
values, of which 99.99 % leaves 52 beyond either end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.arguments import one_of
from edgeseg.errors import QuantizationError
from edgeseg.graph.running import GraphSession
from edgeseg.machine.cpu import this_cpu
from edgeseg.quantize.activations import Activation, find_activations, group_by_size
from edgeseg.quantize.ranges import METHODS, Histogram, RangeMethod, RangeStatistics, range_method
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.table import TABLE_SCHEMA_VERSION, CalibrationTable, TensorRange
from edgeseg.spec import InputSpec
from edgeseg.store.hashing import sha256_json
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import read_onnx

DEFAULT_METHOD = "minmax"
"""Needs no histogram and cuts nothing: what the others have to beat."""

AUTO = "auto"
"""Each tensor's method is chosen by what the network's output loses (:mod:`edgeseg.quantize.repair.range_choice`)."""

TRAINED = "trained"
"""The scales are those that the network's fake-quantizers were trained with (:mod:`edgeseg.quantize.trained`)."""

SAMPLE = 16384
"""Most values of one tensor that one image adds to its histogram."""

ACTIVATION_BUDGET_BYTES = 1 << 30
"""Activations fetched at once; a model with more (large images) takes several passes over the images."""

_STATISTICS_VERSION = 1


def method_or_default(name: str | None) -> str:
    """Return ``name`` if it is a calibration method or ``auto``, which ``None`` is. Raises ``SpecError`` for another."""
    method = name or AUTO
    one_of("calibration method", method, (AUTO, *METHODS))
    return method


def table_key(graph: OnnxGraph, samples: CalibrationSet | None, rule: RangeMethod) -> dict[str, str]:
    """Hash everything a calibration table depends on, one hash per cause (:data:`edgeseg.quantize.table.KEY_CAUSES`).

    Args:
        graph: the fp32 graph.
        samples: the images; ``None`` leaves their hash out, for a table whose images are not at hand.
        rule: with its options; its name may be :data:`AUTO` or :data:`TRAINED`, which have none.
    """
    key = {
        "weights": graph.weights_sha256,
        "graph": graph.sha256,
        # Where mean and std came from is words; only their values count.
        "preprocess": sha256_json([replace(graph.spec.preprocess, source=""), graph.spec.input]),
        "method": sha256_json([rule.name, rule.options, SAMPLE, _STATISTICS_VERSION]),
    }
    return key if samples is None else {**key, "images": samples.digest}


def calibrate(
    graph: OnnxGraph,
    samples: CalibrationSet,
    *,
    method: str = DEFAULT_METHOD,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationTable:
    """Run the images through the fp32 graph and choose a range for each of its float activations.

    Args:
        graph: the fp32 graph, input ``(N, H, W, C)``.
        samples: the images; brought to the engine's size as at run time.
        method: a key of :data:`edgeseg.quantize.ranges.METHODS`.
        progress: called with images done and images in all (times the passes, if one is not enough).

    Returns:
        a table of all float activations but those clipped in place (see :mod:`edgeseg.quantize.activations`).

    Raises:
        SpecError: unknown method.
        QuantizationError: not an fp32 graph, ONNX Runtime fails on it, or an activation is NaN or infinite.
        InputError: an image changed or vanished since the set was opened.
    """
    rule = range_method(method)
    observation = Observation(graph, histograms=rule.needs_histogram)
    observation.add(samples, progress)
    return observation.table(samples, rule)


class Observation:
    """What the float activations of a graph do on images, from which any method chooses its ranges.

    Args:
        graph: the fp32 graph, input ``(N, H, W, C)``.
        histograms: keep what methods other than ``minmax`` and ``moving-average`` need.
        magnitudes_of: by tensor, the axis of its channels, where the magnitude of each is kept, too.

    Raises:
        QuantizationError: not an fp32 graph, or one without float activations.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        *,
        histograms: bool,
        magnitudes_of: Mapping[str, int] | None = None,
    ) -> None:
        if graph.precision != "fp32":
            raise QuantizationError(
                f"{graph.path} is {graph.precision}; calibration needs the fp32 graph it was made from"
            )
        self._graph = graph
        self._spec = graph.spec.input
        self._model = read_onnx(graph.path)
        self._activations = find_activations(self._model, self._spec)
        self._groups = group_by_size(self._activations, ACTIVATION_BUDGET_BYTES)
        self._watches = {
            a.name: _Watch.of(a, histograms=histograms, magnitude_axis=(magnitudes_of or {}).get(a.name))
            for a in self._activations
            if a.is_fetched
        }

    def add(self, samples: CalibrationSet, progress: Callable[[int, int], None] | None = None) -> None:
        """Run more images through the graph; in whatever order they come, what is known after all of them is the same.

        Args:
            samples: the images; brought to the engine's size as at run time.
            progress: called with images done and images in all (times the passes, if one is not enough).

        Raises:
            QuantizationError: ONNX Runtime fails on the graph, or an activation is NaN or infinite.
            InputError: an image changed or vanished since the set was opened.
        """
        threads = this_cpu().cores
        with ThreadPoolExecutor(threads, "calibrate") as pool:
            for number, group in enumerate(self._groups):
                names = [activation.name for activation in group]
                session = GraphSession(
                    self._model, "the graph to calibrate", QuantizationError, names=names, optimized=True
                )
                shares = _shares([a.elements for a in group], threads)
                watched = [self._watches[a.name] for a in group]
                for batch in _one_ahead(pool, _batches(samples, self._spec)):
                    # No name here for the activations: they would stay while the next image makes its own.
                    _observe(pool, watched, shares, list(session.run(batch.images, batch.name).values()), batch.name)
                    if progress is not None:
                        progress(number * len(samples) + batch.done, len(self._groups) * len(samples))

    @property
    def sources(self) -> dict[str, str]:
        """By tensor, the one whose values it has: its own, or those of the one it rearranges."""
        return {activation.name: activation.values_of for activation in self._activations}

    def magnitudes(self) -> dict[str, tuple[float, ...]]:
        """Largest absolute value of each channel, of the tensors it was asked of that were computed."""
        seen = {name: watch.channel_magnitude for name, watch in self._watches.items()}
        return {name: tuple(map(float, values)) for name, values in seen.items() if values is not None}

    def ranges(self, methods: RangeMethod | Mapping[str, RangeMethod]) -> dict[str, TensorRange]:
        """By tensor, in the graph's order: what the method, or that of its name, chooses.

        What rearranges another tensor has that one's range.
        """
        chosen: dict[str, tuple[float, float]] = {}
        ranges = {}
        for activation in self._activations:
            source = activation.values_of
            statistics = self._watches[source].statistics
            if statistics is None or not statistics.images:
                raise QuantizationError(f"activation {activation.name!r} was never computed; export the model again")
            if source not in chosen:
                method = methods if isinstance(methods, RangeMethod) else methods[source]
                chosen[source] = method.choose(statistics)
            low, high = chosen[source]
            mean = self._watches[activation.name].channel_mean if activation.is_fetched else None
            axis = activation.channel_axis if mean is not None else None
            ranges[activation.name] = TensorRange(low, high, statistics.minimum, statistics.maximum, mean, axis)
        return ranges

    def table(self, samples: CalibrationSet, rule: RangeMethod) -> CalibrationTable:
        """All ranges by one method; the table is kept under ``samples``, which may be more than were added."""
        return CalibrationTable(
            schema_version=TABLE_SCHEMA_VERSION,
            method=rule.name,
            options=rule.options,
            key=table_key(self._graph, samples, rule),
            images=len(samples),
            ranges=self.ranges(rule),
        )


@dataclass
class _Watch:
    """What is kept of one fetched tensor."""

    activation: Activation
    statistics: RangeStatistics | None
    magnitude_axis: int | None = None
    channel_sum: NDArray[np.float64] | None = None
    per_channel: int = 0
    channel_magnitude: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, activation: Activation, *, histograms: bool, magnitude_axis: int | None) -> _Watch:
        is_source = activation.values_of == activation.name
        statistics = RangeStatistics(histogram=Histogram() if histograms else None) if is_source else None
        return cls(activation, statistics, magnitude_axis)

    def add(self, values: NDArray[np.float32]) -> bool:
        """Take in the tensor of one image; ``False``, and nothing is counted, when a value is NaN or infinite."""
        if self.statistics is not None:
            # NaN spreads through minimum and maximum, so these two tell about every value.
            low, high = float(values.min()), float(values.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                return False
            sample = values.reshape(-1)[:: sample_stride(values.shape)] if self.statistics.histogram else None
            self.statistics.add(low, high, sample)
        if self.magnitude_axis is not None:
            others = tuple(k for k in range(values.ndim) if k != self.magnitude_axis)
            # Two reductions without a copy of the tensor between them.
            seen = np.maximum(values.max(axis=others), -values.min(axis=others))
            before = self.channel_magnitude
            self.channel_magnitude = seen if before is None else np.maximum(before, seen)
        axis = self.activation.channel_axis
        if axis is not None:
            others = tuple(k for k in range(values.ndim) if k != axis)
            total = values.sum(axis=others).astype(np.float64)
            self.channel_sum = total if self.channel_sum is None else self.channel_sum + total
            self.per_channel += values.size // values.shape[axis]
        return True

    @property
    def channel_mean(self) -> tuple[float, ...] | None:
        return None if self.channel_sum is None else tuple((self.channel_sum / self.per_channel).tolist())


@dataclass(frozen=True)
class _Batch:
    """Images to run at once: their names, ``(N, H, W, C)``, and how many images of the set are then done."""

    name: str
    images: NDArray[Any]
    done: int

    @classmethod
    def of(cls, named: Sequence[tuple[str, NDArray[Any]]], size: int, done: int) -> _Batch:
        """``size`` of these windows, repeated when there are fewer."""
        names, windows = zip(*named, strict=True)
        images = windows[0] if size == 1 else np.concatenate([windows[k % len(windows)] for k in range(size)])
        return cls(", ".join(dict.fromkeys(names)), images, done)


def _batches(samples: CalibrationSet, spec: InputSpec) -> Iterator[_Batch]:
    """Group windows into the smallest batches the graph takes; a last one that is not full repeats its own windows."""
    size = spec.batch.minimum
    pending: list[tuple[str, NDArray[Any]]] = []
    for done, (name, windows) in enumerate(samples.named_windows(spec)):
        for window in windows:
            if pending and pending[0][1].shape != window.shape:
                yield _Batch.of(pending, size, done)
                pending = []
            pending.append((name, window))
            if len(pending) == size:
                yield _Batch.of(pending, size, done + (window is windows[-1]))
                pending = []
    if pending:
        yield _Batch.of(pending, size, len(samples))


def _one_ahead(pool: ThreadPoolExecutor, batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """Decode the next image while the current one runs."""
    following = pool.submit(next, batches, None)
    while (batch := following.result()) is not None:
        following = pool.submit(next, batches, None)
        yield batch


def _observe(
    pool: ThreadPoolExecutor,
    watches: Sequence[_Watch],
    shares: Sequence[Sequence[int]],
    outputs: Sequence[NDArray[np.float32]],
    what: str,
) -> None:
    def add(share: Sequence[int]) -> list[int]:
        return [k for k in share if not watches[k].add(outputs[k])]

    # Reductions of large arrays release the interpreter's lock, so threads share the work.
    bad = sorted(k for part in pool.map(add, shares) for k in part)
    if bad:
        word = "NaN" if np.isnan(outputs[bad[0]]).any() else "infinite"
        raise QuantizationError(
            f"activation {watches[bad[0]].activation.name!r} has {word} values on {what}; "
            "check that the weights are finite and that mean and std are those of training"
        )


def _shares(sizes: Sequence[int], parts: int) -> list[list[int]]:
    """Deal tensors into ``parts`` of about equal size, largest first."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    load = [0] * parts
    for index in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
        least = load.index(min(load))
        shares[least].append(index)
        load[least] += sizes[index]
    return shares


@lru_cache(maxsize=4096)
def sample_stride(shape: tuple[int, ...]) -> int:
    """Smallest stride over the flat tensor that takes at most :data:`SAMPLE` values and shares no factor with a
    dimension.

    With a common factor some rows, columns or channels would never be looked at.
    """
    stride = max(1, -(-math.prod(shape) // SAMPLE))
    while stride > 1 and any(math.gcd(stride, size) > 1 for size in shape):
        stride += 1
    return stride
