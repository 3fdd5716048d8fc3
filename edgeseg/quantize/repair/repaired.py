"""Calibration with all that keeps INT8's accuracy before any layer gives INT8 up: in order, and each measured.

Of the images a part judges (:mod:`edgeseg.quantize.repair.fidelity`): the competing ranges come from the others, and only
when all is decided do those of the judging images widen them. The graph runs once over all images, whatever the number of
methods.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx_ir as ir

from edgeseg.errors import QuantizationError
from edgeseg.quantize.calibration import AUTO, DEFAULT_METHOD, Observation, table_key
from edgeseg.quantize.qdq import quantize_model
from edgeseg.quantize.ranges import METHODS, range_method
from edgeseg.quantize.repair.equalization import IMAGES, channel_axes, require_equal, write_equalized
from edgeseg.quantize.repair.fidelity import JUDGES, Fidelity, Judge, hold_out
from edgeseg.quantize.repair.range_choice import choose_methods
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.quantize.table import CalibrationTable
from edgeseg.store.artifacts import OnnxGraph, Repair, RepairName
from edgeseg.store.onnx_file import read_onnx


def calibrate_repaired(
    graph: OnnxGraph,
    samples: CalibrationSet,
    equalized: Path | None,
    *,
    method: str = DEFAULT_METHOD,
    judges: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[OnnxGraph, CalibrationTable]:
    """Equalize the channels, choose the ranges, correct the biases, and measure what each gains.

    Args:
        graph: the fp32 graph, input ``(N, H, W, C)``.
        samples: the images.
        equalized: where the graph with equalized channels goes; ``None`` leaves them as they are.
        method: a key of :data:`edgeseg.quantize.ranges.METHODS`, or ``auto``. With fewer than
            :data:`edgeseg.quantize.repair.fidelity.MIN_TO_HOLD_OUT` images none are left to judge, and ``auto`` is the default
            method.
        judges: the schemes to judge in, of :data:`edgeseg.quantize.repair.fidelity.JUDGES`; ``None``: those that the graph can be
            written in.
        progress: called with steps done and steps in all, of one piece of work after the other.

    Returns:
        the graph to quantize, and its table.

    Raises:
        SpecError: unknown method.
        QuantizationError: see :meth:`edgeseg.quantize.calibration.Observation.add`; or equalization changed the scores.
        InputError: an image changed or vanished since the set was opened.
    """
    kept, held = hold_out(samples)
    if method == AUTO and held is None:
        method = DEFAULT_METHOD
    rule = range_method(DEFAULT_METHOD if method == AUTO else method)
    judge = Judge(graph, held or samples)
    original, magnitudes, course = graph, {}, None
    if equalized is not None:
        axes = channel_axes(ir.serde.deserialize_model(read_onnx(graph.path)))
        seen = Observation(graph, histograms=rule.needs_histogram, magnitudes_of=axes)
        seen.add(kept.take(range(IMAGES)), progress)
        magnitudes = seen.magnitudes()
        graph, report = write_equalized(original, magnitudes, equalized)
        require_equal(original, graph, samples)
        course = _Course.started(judge, judges, original, seen.table(samples, rule))
    observation = Observation(graph, histograms=rule.needs_histogram or method == AUTO)
    observation.add(kept, progress)
    table = observation.table(samples, rule)
    if course is None:
        course = _Course.started(judge, judges, graph, table)
    else:
        course.went_on("equalization", judge.fidelities(graph, table, course.schemes), {"channels": report.channels})
    methods = dict.fromkeys(table.ranges, rule.name)
    if method == AUTO and course.schemes:
        tables = {name: observation.table(samples, range_method(name)) for name in METHODS}
        choice = choose_methods(graph, tables, observation.sources, judge, course.schemes, progress)
        methods = choice.methods
        course.went_on("calibration-method", choice.fidelity, dict(Counter(methods.values())))
    if held is not None:
        observation.add(held, progress)
    final = observation.table(samples, rule)
    if method == AUTO:
        chosen = observation.ranges({name: range_method(methods[name]) for name in methods})
        chosen = {name: replace(limits, method=methods[name]) for name, limits in chosen.items()}
        final = replace(final, method=AUTO, options={}, key=table_key(graph, samples, AUTO), ranges=chosen)
    return graph, replace(final, equalization=magnitudes, repairs=tuple(course.repairs))


@dataclass
class _Course:
    """One repair after the other, and what each gained on top of those before."""

    images: int
    reached: dict[str, float]
    repairs: list[Repair] = field(default_factory=list)

    @classmethod
    def started(cls, judge: Judge, judges: Sequence[str] | None, graph: OnnxGraph, table: CalibrationTable) -> _Course:
        """From the graph as it was exported; the first repair is that of its biases."""
        plain = {name: replace(limits, channel_mean=None, channel_axis=None) for name, limits in table.ranges.items()}
        schemes = _writable(graph, table) if judges is None else judges
        before = judge.fidelities(graph, replace(table, ranges=plain), schemes)
        course = cls(judge.images, {scheme: f.agreement for scheme, f in before.items()})
        course.went_on("bias-correction", judge.fidelities(graph, table, schemes))
        return course

    @property
    def schemes(self) -> tuple[str, ...]:
        return tuple(self.reached)

    def went_on(
        self, name: RepairName, fidelities: Mapping[str, Fidelity], changed: dict[str, int] | None = None
    ) -> None:
        for scheme, fidelity in fidelities.items():
            counts = {"biases": fidelity.corrected} if changed is None else changed
            self.repairs.append(Repair(name, counts, scheme, self.images, self.reached[scheme], fidelity.agreement))
            self.reached[scheme] = fidelity.agreement


def _writable(graph: OnnxGraph, table: CalibrationTable) -> tuple[str, ...]:
    """Which of the judges the graph can be written for."""
    schemes = []
    for scheme in JUDGES:
        try:
            quantize_model(ir.serde.deserialize_model(read_onnx(graph.path)), table, SCHEMES[scheme])
        except QuantizationError:
            # Said by the build for such a target; a table is for the others, too.
            continue
        schemes.append(scheme)
    return tuple(schemes)
