"""Which calibration method for which tensor: decided by what the network's output loses, not by a tensor's own error.

First each method has the whole network. Where even the best leaves too many pixels decided otherwise, the next best methods
compete with it module by module, if they would give the module other ranges at all. A change is kept when it lowers the
divergence from the float graph by more than twice its standard error over the images that judge, none of which the competing
ranges were taken from; and a method that cuts more has to beat one that cuts less: on a handful of images the bold look good,
until one comes that they cut to pieces.

It costs five Q/DQ graphs a scheme, each with a few images through it (:data:`edgeseg.quantize.repair.fidelity.IMAGES`), and one
more a trial, of which there are fewer the larger the input is: it grows with the network, little with the input's size, and not
with the number of calibration images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from edgeseg.graph.modules import module_group
from edgeseg.graph.proto import makers
from edgeseg.quantize.calibration import DEFAULT_METHOD
from edgeseg.quantize.ranges import METHODS
from edgeseg.quantize.repair.fidelity import Fidelity, Judge
from edgeseg.quantize.table import CalibrationTable, TensorRange
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import read_onnx

BY_CAUTION = ("minmax", "percentile", "mse", "entropy", "moving-average")
"""The methods, those first that cut least of what a single image may need."""

GOOD_AGREEMENT = 0.995
"""Where the schemes agree so well, no module is tried by itself: on networks like the demo's the trials gained a twentieth of
what the choice for the whole network had gained, for three times its cost."""

MATERIAL = 0.05
"""Ranges that differ by less than this share of their width compete for nothing."""

CONTENDERS = 2
"""Methods tried in a module beside the one it has."""

TRIAL_PIXELS = 32 * 8 * 256 * 256
"""Pixels that all trials together send through the graph, a scheme: 16 trials at 256x256, 12 at 352x480, 2 at 1024x2048. Those
whose ranges differ most come first."""


def choose_methods(
    graph: OnnxGraph,
    tables: Mapping[str, CalibrationTable],
    sources: Mapping[str, str],
    judge: Judge,
    schemes: Sequence[str],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, str], dict[str, Fidelity]]:
    """Let the methods compete.

    Args:
        graph: the float graph.
        tables: by method, all of :data:`edgeseg.quantize.ranges.METHODS`; from the same images.
        sources: by tensor, the one whose values it has, whose module it belongs to.
        judge: with other images.
        schemes: to judge in; at least one.
        progress: called with trials done and trials in all.

    Returns:
        what won by tensor of the graph, and the fidelity of that choice by scheme.

    Raises:
        QuantizationError: the graph cannot be quantized.
    """
    seen = {name: judge.fidelities(graph, tables[name], schemes) for name in METHODS}
    unit = seen[DEFAULT_METHOD]
    losses = {name: relative_loss(fidelity, unit) for name, fidelity in seen.items()}
    ranking = sorted(METHODS, key=lambda name: float(losses[name].mean()))
    best, *bolder = BY_CAUTION
    for name in bolder:
        if is_gain(losses[best], losses[name]):
            best = name
    table, fidelity, loss = tables[best], seen[best], losses[best]
    methods = dict.fromkeys(table.ranges, best)
    good = all(f.agreement >= GOOD_AGREEMENT for f in fidelity.values())
    others = [name for name in ranking if name != best]
    pairs = [] if good else _pairs(graph, tables, sources, best, others)[: TRIAL_PIXELS // judge.pixels]
    for number, (tensors, method) in enumerate(pairs):
        if progress is not None:
            progress(number, len(pairs))
        changed = replace(table, ranges=table.ranges | {name: tables[method].ranges[name] for name in tensors})
        challenger = judge.fidelities(graph, changed, schemes)
        if is_gain(loss, challenged := relative_loss(challenger, unit)):
            table, fidelity, loss = changed, challenger, challenged
            methods |= dict.fromkeys(tensors, method)
    return methods, fidelity


def relative_loss(fidelity: Mapping[str, Fidelity], unit: Mapping[str, Fidelity]) -> NDArray[np.float64]:
    """Divergence by image, ``(images,)``, relative to the mean of ``unit``'s; mean over the schemes."""
    # A network that INT8 does not hurt at all has nothing to choose by.
    least = 1e-9
    shares = [f.divergence / max(float(unit[scheme].divergence.mean()), least) for scheme, f in fidelity.items()]
    return np.asarray(np.mean(shares, axis=0), np.float64)


def is_gain(before: NDArray[np.float64], after: NDArray[np.float64], errors: float = 2.0) -> bool:
    """Whether losses by image, ``(images,)``, fell by more than so many standard errors of their mean difference."""
    gain = before - after
    error = gain.std(ddof=1) / np.sqrt(gain.size) if gain.size > 1 else 0.0
    return bool(gain.mean() > errors * error)


def _pairs(
    graph: OnnxGraph,
    tables: Mapping[str, CalibrationTable],
    sources: Mapping[str, str],
    best: str,
    others: Sequence[str],
) -> list[tuple[list[str], str]]:
    """Tensors of a module, and a method that would give them other ranges than ``best``; the largest difference first."""
    module = {name: module_group(node.name) for name, node in makers(read_onnx(graph.path).graph).items()}
    members: dict[str | None, list[str]] = {}
    for name in tables[best].ranges:
        members.setdefault(module.get(sources[name]), []).append(name)
    pairs: list[tuple[float, list[str], str]] = []
    for tensors in members.values():
        differences = [(_difference(tables[method], tables[best], tensors), method) for method in others]
        differing = [(difference, method) for difference, method in differences if difference > MATERIAL]
        pairs += [(difference, tensors, method) for difference, method in differing[:CONTENDERS]]
    pairs.sort(key=lambda pair: -pair[0])
    return [(tensors, method) for _, tensors, method in pairs]


def _difference(one: CalibrationTable, other: CalibrationTable, tensors: Sequence[str]) -> float:
    """Largest difference of a range's ends, relative to its width."""

    def of(a: TensorRange, b: TensorRange) -> float:
        return max(abs(a.low - b.low), abs(a.high - b.high)) / (b.high - b.low)

    return max(of(one.ranges[name], other.ranges[name]) for name in tensors)
