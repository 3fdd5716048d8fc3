"""An engine against the PyTorch model it came from: the same images into both, and what came out of each."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.base import Session
from edgeseg.closing import Closing
from edgeseg.errors import BuildError, GateError, InputError
from edgeseg.evaluate.accuracy.counts import AccuracyMeter, AgreementMeter
from edgeseg.evaluate.accuracy.dataset import Pair
from edgeseg.evaluate.accuracy.labels import IGNORED
from edgeseg.evaluate.latency.protocol import SHORT, LatencyProtocol, LatencySamples, measure_interleaved
from edgeseg.evaluate.latency.statistics import noise_flags, speed_comparison
from edgeseg.evaluate.tables import counted
from edgeseg.images.placement import fit_windows, plan_fit
from edgeseg.machine.state import MachineWatch
from edgeseg.runtime.scores import ScoreRule
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.spec import OutputKind, PipelineSpec
from edgeseg.store.manifest import LatencyFigures, SpeedUp, Verification

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare_masks` counted.

    Attributes:
        agreement: engine against PyTorch, pixel by pixel, on the masks as they leave the engine, without padding.
        fidelity: the same class by class, PyTorch's masks taken as truth.
        reference, engine: PyTorch and the engine against the ground truth, at the size of the source images, as a user
            of :class:`~edgeseg.runtime.segmenter.Segmenter` gets the masks. Empty without ground truth.
        images: how many were compared.
        sample: one image (or as many as the smallest batch) at the engine's size, ``(N, H, W, C)``, to time with.
        unlabelled: what was not judged, in words, or ``""``.
    """

    agreement: AgreementMeter
    fidelity: AccuracyMeter
    reference: AccuracyMeter
    engine: AccuracyMeter
    images: int
    sample: NDArray[Any]
    unlabelled: str


def verify(
    reference: Session,
    engine: Session,
    spec: PipelineSpec,
    pairs: Iterable[Pair],
    *,
    data: str,
    reference_name: str = "PyTorch",
    reference_size_bytes: int,
    engine_size_bytes: int,
    protocol: LatencyProtocol | None = SHORT,
    timed_reference: Session | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Compare an engine with the model it came from, and time both in turns.

    Args:
        reference: the PyTorch model as a session; see :class:`edgeseg.backends.pytorch.PyTorchSession`.
        engine: the engine's session. Both stay open.
        spec: the contract both fulfil.
        pairs: held-out images, with or without masks; read one at a time.
        data: where they came from, in words.
        reference_name: what the reference is, in words.
        reference_size_bytes: of the model's parameters.
        engine_size_bytes: of the engine file.
        protocol: how long to time both; ``None`` not to.
        timed_reference: the PyTorch model as it is timed, where ``reference`` is not that: exact, or one that remembers.
        progress: called with (images done, images in all or 0 when unknown).

    Raises:
        InputError: no images, or one that cannot be used.
    """
    compared = compare_masks(reference, engine, spec, pairs, progress)
    agreement = compared.agreement.agreement
    assert agreement is not None  # compare_masks saw at least one image
    latency: tuple[LatencyFigures, LatencyFigures, SpeedUp] | tuple[None, None, None] = (None, None, None)
    if protocol:
        latency = latency_figures(timed_reference or reference, engine, spec, compared.sample, protocol)
    return Verification(
        agreement=agreement,
        boundary_agreement=compared.agreement.boundary,
        miou_vs_pytorch=compared.fidelity.figures().miou,
        images=compared.images,
        data=data + compared.unlabelled,
        pytorch_accuracy=compared.reference.figures(),
        engine_accuracy=compared.engine.figures(),
        pytorch_latency=latency[0],
        engine_latency=latency[1],
        pytorch_size_bytes=reference_size_bytes,
        engine_size_bytes=engine_size_bytes,
        speedup=latency[2],
        reference=reference_name,
    )


AGREEMENT_FLOOR: Mapping[str, float] = {"fp32": 0.999, "fp16": 0.98, "int8": 0.9}
"""Least share of pixels expected to agree with PyTorch, by precision; of fp32, ties aside."""
TIE, TIE_TF32 = 2e-3, 1e-2
"""Scores closer than this share of the largest (at least 1) are a tie: twice the error that the graph itself may have,
and the more that TF32 rounds off."""


def check_fidelity(verification: Verification, precision: str, without_ties: Callable[[], float]) -> str | None:
    """Compare the agreement with what a precision promises; returns a note where it is less than that.

    Raises:
        BuildError: an fp32 engine that is another function than its model.
    """
    agreement, floor = verification.agreement, AGREEMENT_FLOOR[precision]
    agree = f"of pixels agree with {verification.reference}"
    if agreement >= floor:
        return None
    if precision != "fp32":
        return (
            f"{agreement:.4f} {agree}, less than the {floor:g} usual for {precision}: look at the "
            "masks before using it, or set --min-agreement"
        )
    untied = without_ties()
    if untied < floor:
        raise BuildError(
            f"the fp32 engine is not its model: {untied:.4f} {agree}, ties aside, at least {floor:g} "
            f"must ({counted(verification.images, 'image')}, {verification.data}); please report the model"
        )
    return (
        f"{agreement:.4f} {agree}; all but {1 - untied:.4f} of the others are ties, where "
        "its own scores differ by less than rounding"
    )


def agreement_without_ties(
    reference: Session, engine: Session, spec: PipelineSpec, pairs: Iterable[Pair], tie: float
) -> float:
    """Share of mask pixels that are equal, or that ``reference`` decides by less than ``tie`` of its largest score.

    ``reference`` returns its scores beside the mask; see :class:`edgeseg.backends.pytorch.PyTorchSession`.
    """
    wrong, pixels = 0, 0
    for pair in pairs:
        plan = plan_fit(*pair.image.shape[:2], spec.input)
        for window in fit_windows(pair.image, spec.input):
            batch = np.repeat(window[None], spec.input.batch.minimum, axis=0)
            expected, got = reference.run(batch), engine.run(batch)
            kind: OutputKind = "logits" if "logits" in expected else "probabilities"
            rule = ScoreRule.of(dataclasses.replace(spec, output=dataclasses.replace(spec.output, kind=kind)))
            scores = plan.crop(expected[kind][0])
            mine = rule.mask(scores)
            theirs = plan.crop(got["mask"][0]) if spec.output.kind == "mask" else rule.mask(plan.crop(got[kind][0]))
            tied = rule.margin(scores) <= tie * max(1.0, float(np.abs(scores).max()))
            wrong, pixels = wrong + int(np.count_nonzero((mine != theirs) & ~tied)), pixels + mine.size
    return 1.0 - wrong / pixels


def compare_masks(
    reference: Session, engine: Session, spec: PipelineSpec, pairs: Iterable[Pair], progress: Progress | None = None
) -> Comparison:
    """Run all images through both and count; memory does not grow with the number of images.

    Raises:
        InputError: no images, or one that cannot be used.
    """
    task, classes = spec.model.task, spec.model.classes
    agreement, fidelity = AgreementMeter(classes, task), AccuracyMeter(classes, task)
    truth_reference, truth_engine = (AccuracyMeter(classes, task) for _ in range(2))
    recorders = (_Recorder(reference, spec), _Recorder(engine, spec))
    expected, by_engine = (Segmenter(recorder, spec) for recorder in recorders)
    total, done, ignored = operator.length_hint(pairs), 0, 0
    sample: NDArray[Any] | None = None
    ignore_index: int | None = None
    for pair in pairs:
        true_to, answer = expected(pair.image), by_engine(pair.image)
        plan = expected.plan(*pair.image.shape[:2])
        for wanted, got in zip(recorders[0].take(), recorders[1].take(), strict=True):
            # What is said of padding nobody gets to see.
            seen = plan.crop(got), plan.crop(wanted)
            agreement.update(*seen)
            fidelity.update(*seen, pair.name)
        if pair.mask is not None:
            truth_reference.update(true_to, pair.mask, pair.name)
            truth_engine.update(answer, pair.mask, pair.name)
            ignored += int(np.count_nonzero(pair.mask == IGNORED))
            ignore_index = pair.ignore_index
        if sample is None:
            sample = np.repeat(fit_windows(pair.image, spec.input)[0][None], spec.input.batch.minimum, axis=0)
        done += 1
        if progress is not None:
            progress(done, total)
    if sample is None:
        raise InputError("no images to verify on; give a folder with images")
    pixels = ignored + truth_engine.pixels
    unlabelled = f"; mask value {ignore_index} not judged ({ignored / pixels:.1%} of pixels)" if ignored else ""
    return Comparison(agreement, fidelity, truth_reference, truth_engine, done, sample, unlabelled)


def latency_figures(
    reference: Session, engine: Session, spec: PipelineSpec, sample: NDArray[Any], protocol: LatencyProtocol
) -> tuple[LatencyFigures, LatencyFigures, SpeedUp]:
    """Time both in turns, image to mask, through the runtime's :class:`Segmenter`, with the doubts and the paired
    ratio that ``edgeseg bench`` has: (reference, engine, how many times faster the engine is)."""
    first, second = Segmenter(reference, spec), Segmenter(engine, spec)
    image = sample[0] if len(sample) == 1 else sample
    watch = MachineWatch()
    measured = measure_interleaved(
        {"reference": lambda: first(image), "engine": lambda: second(image)}, protocol, progress=lambda *_: watch.warm()
    )
    machine = watch.flags()

    def figures(samples: LatencySamples) -> LatencyFigures:
        flags = (*noise_flags(samples.samples_ms), *machine)
        return replace(samples.figures(), noise=tuple(flag.detail for flag in flags))

    ratio = speed_comparison("", "", measured["reference"], measured["engine"])
    return (
        figures(measured["reference"]),
        figures(measured["engine"]),
        SpeedUp(ratio.ratio, ratio.low, ratio.high, ratio.verdict),
    )


def check_gates(
    verification: Verification, *, max_drop: float | None = None, min_agreement: float | None = None
) -> None:
    """Raise unless the engine keeps the limits that were set. A limit that could not be checked is not kept.

    Raises:
        GateError: a limit is not met, or was not measured; names all that failed.
    """
    failed = missed_gates(verification, max_drop=max_drop, min_agreement=min_agreement)
    if failed:
        remedy = "more or better calibration images, another --calibration-method, or --precision fp16"
        raise GateError(f"{'; '.join(failed)} ({counted(verification.images, 'image')}); try {remedy}", verification)


def missed_gates(
    verification: Verification, *, max_drop: float | None = None, min_agreement: float | None = None
) -> list[str]:
    """What :func:`check_gates` would raise for, in words."""
    failed = []
    if max_drop is not None:
        drop = verification.miou_drop
        if drop is None:
            failed.append(
                "the mIoU drop was not measured, because there are no masks (give --validation DIR with masks/)"
            )
        elif not drop <= max_drop:
            failed.append(f"the engine loses {drop:.4f} mIoU, --max-drop allows {max_drop:g}")
    if min_agreement is not None and not verification.agreement >= min_agreement:
        failed.append(
            f"{verification.agreement:.4f} of pixels agree with {verification.reference}, --min-agreement wants {min_agreement:g}"
        )
    return failed


class _Recorder(Closing):
    """A session that keeps the masks, at the engine's size, of what it ran since they were last taken."""

    def __init__(self, session: Session, spec: PipelineSpec) -> None:
        self._session = session
        self._kind = spec.output.kind
        self._rule = None if self._kind == "mask" else ScoreRule.of(spec)
        self._masks: list[NDArray[Any]] = []

    def run(self, images: NDArray[Any]) -> Mapping[str, NDArray[Any]]:
        outputs = self._session.run(images)
        answers = outputs[self._kind]
        self._masks.extend(answers if self._rule is None else [self._rule.mask(scores) for scores in answers])
        return outputs

    def take(self) -> list[NDArray[Any]]:
        masks, self._masks = self._masks, []
        return masks

    def close(self) -> None:
        """The session belongs to the caller of :func:`verify`."""
