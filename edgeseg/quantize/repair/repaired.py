"""Calibration with all that keeps INT8's accuracy before any layer gives INT8 up: in order, each measured, none kept that
loses.

Of the images a part judges (:mod:`edgeseg.quantize.repair.fidelity`): the competing ranges come from the others, and only
when all is decided do those of the judging images widen them. The graph runs once over all images, whatever the number of
methods.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from edgeseg.errors import QuantizationError
from edgeseg.quantize.calibration import AUTO, DEFAULT_METHOD, Observation, table_key
from edgeseg.quantize.qdq import quantize_model
from edgeseg.quantize.ranges import METHODS, RangeMethod, range_method
from edgeseg.quantize.repair.equalization import IMAGES, channel_axes, scores_are_equal, write_equalized
from edgeseg.quantize.repair.fidelity import JUDGES, Fidelity, Judge, hold_out
from edgeseg.quantize.repair.range_choice import choose_methods, is_gain, relative_loss
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.quantize.table import CalibrationTable
from edgeseg.store.manifest import OnnxGraph, Repair, RepairName
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
        equalized: where the graph with equalized channels goes, if they are; ``None`` leaves them as they are.
        method: a key of :data:`edgeseg.quantize.ranges.METHODS`, or ``auto``. With fewer than
            :data:`edgeseg.quantize.repair.fidelity.MIN_TO_HOLD_OUT` images none are left to judge, and ``auto`` is the default
            method.
        judges: the schemes to judge in, of :data:`edgeseg.quantize.repair.fidelity.JUDGES`; ``None``: those that the graph can be
            written in.
        progress: called with steps done and steps in all, of one piece of work after the other.

    Returns:
        the graph to quantize, and its table; in neither is a repair with which the output diverged further from the float
        graph's, by more than a standard error over the judging images, nor an equalization that changed the float scores.

    Raises:
        SpecError: unknown method.
        QuantizationError: see :meth:`edgeseg.quantize.calibration.Observation.add`.
        InputError: an image changed or vanished since the set was opened.
    """
    kept, held = hold_out(samples)
    if method == AUTO and held is None:
        method = DEFAULT_METHOD
    rule = range_method(DEFAULT_METHOD if method == AUTO else method)
    judge = Judge(graph, held or samples)
    histograms = rule.needs_histogram or method == AUTO
    original, magnitudes = graph, {}

    def observed(which: OnnxGraph) -> Observation:
        observation = Observation(which, histograms=histograms)
        observation.add(kept, progress)
        return observation

    if equalized is None:
        observation = observed(graph)
        course = _Course(judge, judges, graph, observation.table(samples, rule))
    else:
        axes = channel_axes(ir.serde.deserialize_model(read_onnx(graph.path)))
        seen = Observation(graph, histograms=rule.needs_histogram, magnitudes_of=axes)
        seen.add(kept.take(range(IMAGES)), progress)
        course = _Course(judge, judges, graph, seen.table(samples, rule))
        magnitudes = seen.magnitudes()
        graph, channels = write_equalized(original, magnitudes, equalized)
        observation = observed(graph)
        fidelities = course.fidelities(graph, observation.table(samples, rule))
        is_equal = scores_are_equal(original, graph, samples)
        if not (is_equal and course.tried("equalization", fidelities, {"channels": channels})):
            equalized.unlink()
            graph, magnitudes, observation = original, {}, observed(original)
    table = course.with_biases(observation.table(samples, rule))
    methods = dict.fromkeys(table.ranges, rule.name)
    if method == AUTO and course.schemes:
        tables = {name: course.with_biases(observation.table(samples, range_method(name))) for name in METHODS}
        chosen, fidelity = choose_methods(graph, tables, observation.sources, judge, course.schemes, progress)
        if course.tried("calibration-method", fidelity, dict(Counter(chosen.values()))):
            methods = chosen
    if held is not None:
        observation.add(held, progress)
    final = observation.table(samples, rule)
    if method == AUTO:
        ranges = observation.ranges({name: range_method(methods[name]) for name in methods})
        ranges = {name: replace(limits, method=methods[name]) for name, limits in ranges.items()}
        final = replace(final, method=AUTO, options={}, key=table_key(graph, samples, RangeMethod(AUTO)), ranges=ranges)
    final = course.with_biases(final)
    return graph, replace(final, equalization=magnitudes, repairs=tuple(course.repairs))


class _Course:
    """One repair after the other, and what each gained on top of those before.

    Begins with the graph as it was exported, and with the first repair, that of its biases.
    """

    def __init__(self, judge: Judge, judges: Sequence[str] | None, graph: OnnxGraph, table: CalibrationTable) -> None:
        self.repairs: list[Repair] = []
        self.schemes = _writable(graph, table) if judges is None else tuple(judges)
        self._judge = judge
        self._corrects_biases = True
        self._reached = judge.fidelities(graph, _without_means(table), self.schemes)
        self._corrects_biases = self.tried("bias-correction", self.fidelities(graph, table))

    def with_biases(self, table: CalibrationTable) -> CalibrationTable:
        """The table, with what biases are corrected by where that was kept."""
        return table if self._corrects_biases else _without_means(table)

    def fidelities(self, graph: OnnxGraph, table: CalibrationTable) -> dict[str, Fidelity]:
        return self._judge.fidelities(graph, self.with_biases(table), self.schemes)

    def tried(self, name: RepairName, reached: dict[str, Fidelity], changed: dict[str, int] | None = None) -> bool:
        """Note a repair and what it gained; ``False``, and it is not to be kept, where the output is further off with it."""
        before = self._reached
        if before and is_gain(relative_loss(reached, before), relative_loss(before, before), errors=1.0):
            return False
        for scheme, fidelity in reached.items():
            counts = {"biases": fidelity.corrected} if changed is None else changed
            agreements = before[scheme].agreement, fidelity.agreement
            self.repairs.append(Repair(name, counts, scheme, self._judge.images, *agreements))
        self._reached = reached
        return True


def _without_means(table: CalibrationTable) -> CalibrationTable:
    """Nothing that biases could be corrected by."""
    plain = {name: replace(limits, channel_mean=None, channel_axis=None) for name, limits in table.ranges.items()}
    return replace(table, ranges=plain)


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
