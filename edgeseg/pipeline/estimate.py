"""How long the rest of a build takes: the runs its stages will make, times what a run of the graph takes here.

The factors were fitted to builds of networks of 3 to 130 MB with 8 and 64 calibration images; ``python -m
benchmarks.overhead`` says how far off they are. A machine that is busier later than now takes longer.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeseg.backends import GPU_TARGETS, get_backend
from edgeseg.backends.portable import builds_here
from edgeseg.errors import ExportError
from edgeseg.evaluate.latency.protocol import noise_image
from edgeseg.evaluate.tables import counted
from edgeseg.graph.running import GraphSession
from edgeseg.pipeline.goal import has_goal
from edgeseg.quantize.calibration import AUTO, method_or_default
from edgeseg.quantize.ranges import METHODS
from edgeseg.quantize.repair.equalization import IMAGES
from edgeseg.quantize.repair.fidelity import hold_out, judging_images
from edgeseg.quantize.repair.range_choice import TRIAL_PIXELS
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.spec import InputSpec
from edgeseg.store.manifest import OnnxGraph
from edgeseg.store.onnx_file import read_onnx

if TYPE_CHECKING:
    from edgeseg.pipeline.plan import BuildPlan
    from edgeseg.pipeline.request import BuildRequest

WORTH_SAYING_S = 10.0

OBSERVED, AS_WRITTEN, PYTORCH = 2.2, 1.6, 1.5
"""What an image takes, in optimized runs of the fp32 graph: with every activation returned and counted; through a Q/DQ graph
run as it is written; through PyTorch, besides what each module and the weights take it."""
PYTORCH_PER_NODE_S, PYTORCH_PER_MB_S = 0.0001, 0.0007

PER_NODE_S, PER_MB_S = 0.001, 0.01
"""To write, check and load a Q/DQ graph: by nodes of the fp32 graph, by MB of its weights."""

TIMED_S, TIMED_CALLS = 2.0, 16
"""To time two engines in turns: so many seconds, and so many calls of the slower one."""


@dataclass(frozen=True)
class TimeToGo:
    """Seconds at least and at most, and what they are spent on."""

    low_s: float
    high_s: float
    work: tuple[str, ...]

    @property
    def words(self) -> str:
        """In steps of five seconds, from three minutes on in minutes."""
        in_minutes = self.high_s >= 180
        step, unit = (60, "minutes") if in_minutes else (5, "s")
        low, high = (max(1, round(s / step)) * (1 if in_minutes else step) for s in (self.low_s, self.high_s))
        return f"about {high if low == high else f'{low} to {high}'} {unit} to go: {', '.join(self.work)}"


@dataclass(frozen=True)
class CalibrationRuns:
    """What :func:`~edgeseg.quantize.repair.repaired.calibrate_repaired` sends through the graph.

    Attributes:
        observed: batches whose activations are counted.
        judging: images that judge a Q/DQ graph.
        evaluations: Q/DQ graphs that are judged in any case, a scheme.
        trials: most that are judged besides.
    """

    observed: float
    judging: int = 0
    evaluations: int = 0
    trials: int = 0

    @classmethod
    def of(cls, request: BuildRequest, samples: CalibrationSet, size: InputSpec) -> CalibrationRuns:
        """Of the images as they are cut for a graph of this size."""
        _, windows = next(samples.named_windows(size))
        batches = len(windows) / size.batch.minimum
        if request.precision != "int8":
            return cls(len(samples) * batches)
        kept, held = hold_out(samples)
        judging = judging_images(len(held or samples), size)
        chooses = method_or_default(request.calibration_method) == AUTO and held is not None
        return cls(
            observed=(len(samples) + (min(IMAGES, len(kept)) if request.equalize else 0)) * batches,
            judging=judging,
            evaluations=2 + request.equalize + (len(METHODS) if chooses else 0),
            trials=TRIAL_PIXELS // (judging * size.height * size.width) if chooses else 0,
        )


def time_to_go(
    request: BuildRequest, plan: BuildPlan, graph: OnnxGraph, nodes: int, judges: int, *, calibrates: bool
) -> TimeToGo:
    """Estimate what comes after the export; the graph is run twice for it.

    Args:
        request: of the build.
        plan: its targets and images.
        graph: the fp32 graph.
        nodes: how many it has.
        judges: schemes that repairs are judged in.
        calibrates: whether ranges are to be found: none were given, and none are kept from another build.
    """
    run_s = seconds_of_a_run(graph)
    size_mb = graph.path.stat().st_size / 1e6
    writes_s = PER_NODE_S * nodes + PER_MB_S * size_mb
    low = high = 0.0
    work = []
    if calibrates and isinstance(plan.samples, CalibrationSet):
        runs = CalibrationRuns.of(request, plan.samples, graph.spec.input)
        evaluation_s = judges * (AS_WRITTEN * runs.judging * run_s + writes_s)
        low = OBSERVED * run_s * runs.observed + runs.evaluations * evaluation_s
        high = low + runs.trials * evaluation_s
        work.append(f"calibration on {counted(len(plan.samples), 'image')}")
    backends = [get_backend(target) for target in plan.targets]
    is_int8 = request.precision == "int8"
    schemes = [(request.scheme or backend.scheme) if is_int8 else None for backend in backends]
    built = [backend.name for backend, scheme in zip(backends, schemes, strict=True) if builds_here(backend, scheme)]
    engines_s = writes_s * len(backends)
    if len(built) > 1:
        engines_s += TIMED_S
        work.append(f"{' and '.join(built)} timed in turns")
    if plan.held_out is not None:
        images = len(plan.held_out.pairs)
        pytorch_s = PYTORCH * run_s + PYTORCH_PER_NODE_S * nodes + PYTORCH_PER_MB_S * size_mb
        engines_s += images * (pytorch_s + run_s) + (TIMED_S + TIMED_CALLS * pytorch_s if built else 0.0)
        work.append(f"verification on {counted(images, 'image')}")
    if has_goal(request):
        work.append("a search not counted, should INT8 miss the goal")
    if any(name in GPU_TARGETS for name in built):
        work.append("TensorRT's compilation not counted")
    return TimeToGo(low + engines_s, high + engines_s, tuple(work))


def seconds_of_a_run(graph: OnnxGraph) -> float:
    """Of the smallest batch through the fp32 graph in ONNX Runtime, optimized, the first run left out.

    Raises:
        ExportError: ONNX Runtime fails on the graph.
    """
    session = GraphSession(read_onnx(graph.path), "the exported graph", ExportError, optimized=True)
    images = noise_image(graph.spec)
    session.run(images)
    begin = time.perf_counter()
    session.run(images)
    return time.perf_counter() - begin
