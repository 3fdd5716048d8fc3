"""What ``edgeseg bench`` measured, as it is written to JSON: schema version 1.

``docs/bench-report.md`` describes the file for readers of other languages; this module decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from edgeseg.errors import ArtifactError
from edgeseg.machine.record import Count, Environment, Finite, NoiseFlag, Power
from edgeseg.store.documents import read_versioned, write_json
from edgeseg.store.manifest import Repair
from edgeseg.store.search import Search

# What a report from elsewhere may say: figures are divided by, and their logarithms taken.
Milliseconds: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-6, le=1e12)]
Ratio: TypeAlias = Annotated[float, msgspec.Meta(ge=1e-12, le=1e12)]
Share: TypeAlias = Annotated[float, msgspec.Meta(ge=-1.000001, le=1.000001)]
Bound: TypeAlias = Annotated[float, msgspec.Meta(ge=-2, le=2)]  # of an interval that was made symmetrical
Positive: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=2**31)]
Classes: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=65536)]

AccuracyVerdict: TypeAlias = Literal["loss", "gain", "no difference", "cannot tell"]
Resolution: TypeAlias = Literal["source", "engine"]
Layout: TypeAlias = Literal["images-masks", "list", "voc", "cityscapes", "camvid", "coco-stuff", "ade20k"]

BASELINES = (
    "pytorch",
    "pytorch-channels-last",
    "pytorch-compile",
    "pytorch-bf16",
    "pytorch-fp16",
    "pytorch-cpu",
)
"""PyTorch on the device of the engine, in several ways; ``pytorch-cpu`` on the CPU in any case."""


@dataclass(frozen=True)
class Identity:
    """Which engine a row is about.

    Attributes:
        name: unique among the engines of a report: the folder's name, ``pytorch``, ``pytorch-channels-last``, ...
        backend: ``onnxruntime``, ``openvino``, ``tensorrt``, ..., or ``pytorch``.
        is_baseline: what the others are compared with.
        arch, encoder, task, classes, class_names: of the model.
        height, width: the engine's input, pixels.
        fit: ``resize``, ``letterbox`` or ``tile``.
        precision: asked for.
        mac_share: delivered: share of multiply-accumulates per dtype of the executed graph; empty when not known.
        macs: multiply-accumulates of one image, ``None`` when not known.
        scheme: Q/DQ scheme of an int8 engine.
        size_bytes: of the engine file (baseline: of the parameters).
        weights: where the weights came from, in words.
        engine_sha256, graph_sha256, weights_sha256: ``None`` where there is no such file.
        folder: as given on the command line.
        build_command: what makes the engine's folder again; ``None`` for a baseline, or when no command line says it.
        options: backend settings.
        versions: of the packages the engine was built with and runs on.
        repairs: what was done so that INT8 keeps its accuracy, as in the manifest.
        search: how the precision of each module was chosen; ``None`` where no search was.
    """

    name: str
    backend: str
    arch: str
    encoder: str
    task: str
    classes: Classes
    height: Positive
    width: Positive
    precision: str
    size_bytes: Count
    class_names: tuple[str, ...] = ()
    is_baseline: bool = False
    fit: str = "resize"
    mac_share: dict[str, Share] = field(default_factory=dict)
    macs: Count | None = None
    scheme: str | None = None
    weights: str = ""
    engine_sha256: str | None = None
    graph_sha256: str | None = None
    weights_sha256: str | None = None
    folder: str | None = None
    build_command: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    repairs: tuple[Repair, ...] = ()
    search: Search | None = None

    @property
    def precision_words(self) -> str:
        """``int8``, or ``int8, mixed`` of an engine some of whose modules stayed float for its accuracy."""
        is_mixed = self.search is not None and bool(self.search.float_modules)
        return f"{self.precision}, mixed" if is_mixed else self.precision


@dataclass(frozen=True)
class Setting:
    """How the engine was driven.

    Attributes:
        batch: images of one call.
        threads: of one inference; ``None``: the engine's own setting.
        streams: callers at the same time.
        source_height, source_width: of the images given; the engine's own size unless asked otherwise.
    """

    batch: Positive = 1
    threads: Positive | None = None
    streams: Positive = 1
    source_height: Positive | None = None
    source_width: Positive | None = None


@dataclass(frozen=True)
class Distribution:
    """A sample of durations, milliseconds.

    Percentiles are trtexec's (an observed sample). ``median_low_ms`` and ``median_high_ms``: 95 % interval of the
    median, a bootstrap over up to ten stretches of the run. ``std_ms``: sample standard deviation, ``None`` of a single sample.
    """

    count: Count
    min_ms: Milliseconds
    mean_ms: Milliseconds
    median_ms: Milliseconds
    p90_ms: Milliseconds
    p95_ms: Milliseconds
    p99_ms: Milliseconds
    max_ms: Milliseconds
    median_low_ms: Milliseconds
    median_high_ms: Milliseconds
    std_ms: Finite | None = None


@dataclass(frozen=True)
class StageSplit:
    """Medians of the parts of one call, milliseconds, taken in a run of their own: they add up to about the median.

    ``pre``: what the runtime does to the image before the engine; ``h2d``, ``compute``, ``d2h``: as trtexec, from device
    events; a CPU engine has only ``compute``, pre- and post-processing inside the graph included; ``post``: from the
    engine's output to the mask. ``enqueue``: host time of the call that hands the work to a GPU; it overlaps the others.
    """

    pre_ms: Finite | None = None
    h2d_ms: Finite | None = None
    compute_ms: Finite | None = None
    d2h_ms: Finite | None = None
    post_ms: Finite | None = None
    enqueue_ms: Finite | None = None


@dataclass(frozen=True)
class Latency:
    """Times of one row.

    Attributes:
        end_to_end: decoded image(s) in host memory -> mask(s) in host memory, per call.
        stages: where they go.
        images_per_s: images over wall-clock time of all callers.
        warmup_iterations: calls made before counting.
        warmup_stable: whether the warm-up ended because the times were stable (else: at its limit).
        flags: empty for a quiet run.
        samples_ms: raw, per call, in the order taken. Rows of one ``round_group`` were measured in turns, so that sample
            ``i`` of one belongs to sample ``i`` of the other.
        round_group: see ``samples_ms``.
    """

    end_to_end: Distribution
    stages: StageSplit
    images_per_s: Finite
    warmup_iterations: Count
    warmup_stable: bool | None = None
    flags: tuple[NoiseFlag, ...] = ()
    samples_ms: tuple[Milliseconds, ...] = ()
    round_group: str = ""


@dataclass(frozen=True)
class ColdStart:
    """A fresh process, files in the page cache: medians over ``processes``, milliseconds.

    ``import_ms``: Python packages; ``load_ms``: engine folder (hashes checked) -> session; ``first_mask_ms``: the first
    call; ``total_ms``: load to first mask, imports not included; ``totals_ms``: that of each process.
    """

    import_ms: Milliseconds
    load_ms: Milliseconds
    first_mask_ms: Milliseconds
    total_ms: Milliseconds
    processes: Count
    totals_ms: tuple[Milliseconds, ...] = ()


@dataclass(frozen=True)
class Memory:
    """Bytes, of a process that runs this engine alone.

    ``peak_rss``: most resident memory, interpreter and packages included; ``base_rss``: resident before the engine was
    loaded; ``activation``: growth of the peak from "loaded" to "ran"; ``gpu``: device memory the process held.
    """

    peak_rss_bytes: Count | None = None
    base_rss_bytes: Count | None = None
    activation_bytes: Count | None = None
    gpu_bytes: Count | None = None


@dataclass(frozen=True)
class ModuleTime:
    """Time in one SMP module (``encoder.layer3``, ``decoder.p4``, ``segmentation_head``), of one image batch.

    ``share``: of all node time; ``dtypes``: share of this module's time per dtype.
    """

    module: str
    nodes: Count
    time_ms: Finite
    share: Share
    dtypes: dict[str, Share] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """Per-module times, in the order of the graph. Profiling slows a run: read the shares, not the sum.

    ``source``: ``onnxruntime profiler``, ``openvino profiling_info``, ``tensorrt IProfiler``.
    """

    source: str
    runs: Count
    total_ms: Finite
    modules: tuple[ModuleTime, ...]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % bootstrap interval over images."""

    value: Share
    low: Bound
    high: Bound


@dataclass(frozen=True)
class Drop:
    """What is lost against the baseline on the same images: baseline minus engine, so positive is worse.

    ``verdict`` is ``no difference`` when the interval holds 0 and nothing beyond a point (0.01), ``cannot tell`` when it holds
    both: the images are too few.
    """

    baseline: str
    metric: str
    drop: Interval
    verdict: AccuracyVerdict


@dataclass(frozen=True)
class Truth:
    """Accuracy against masks. Scores are shares (0..1), counts summed over all images first, as SMP does.

    Attributes:
        miou: mean over the classes that occur, with its interval.
        dice, pixel_accuracy, boundary_iou, boundary_f: means over classes (pixel accuracy: over pixels).
        per_class_*: one per class, ``None`` for a class that occurs in neither masks nor predictions.
        confusion: row = truth, column = prediction, pixels; ``None`` unless multiclass.
        drops: against the baseline; empty without one and for the baseline itself.
        loss: SMP's ``DiceLoss`` of the probabilities, all images as one batch, at the engine's size; ``None`` of an engine
            that returns masks.
        cross_entropy: mean over labelled pixels, nats; ``None`` as ``loss``.
    """

    miou: Interval | None
    dice: Share | None
    pixel_accuracy: Share | None
    boundary_iou: Share | None
    boundary_f: Share | None
    per_class_iou: tuple[Share | None, ...]
    per_class_dice: tuple[Share | None, ...]
    per_class_boundary_iou: tuple[Share | None, ...]
    per_class_boundary_f: tuple[Share | None, ...]
    confusion: tuple[tuple[Count, ...], ...] | None = None
    drops: tuple[Drop, ...] = ()
    loss: Finite | None = None
    cross_entropy: Finite | None = None

    def __post_init__(self) -> None:
        if self.confusion is not None and any(len(row) != len(self.confusion) for row in self.confusion):
            raise ValueError("the confusion matrix is not square")


@dataclass(frozen=True)
class Agreement:
    """Share of pixels on which engine and baseline say the same, whether right or not.

    ``boundary``: within ``boundary_px`` of a class boundary of the baseline's mask; ``interior``: elsewhere;
    ``per_class``: of the pixels to which the baseline gave the class.
    """

    baseline: str
    overall: Interval
    boundary: Share | None
    interior: Share | None
    per_class: tuple[Share | None, ...]
    boundary_px: Count


@dataclass(frozen=True)
class WorstImage:
    """An image on which engine and baseline differ most.

    ``side_by_side``: PNG with image, baseline, engine and difference from left to right, path relative to the JSON
    file; ``None`` when not saved. ``miou``: of the engine on this image, against its mask.
    """

    name: str
    agreement: Share
    miou: Share | None = None
    side_by_side: str | None = None


@dataclass(frozen=True)
class Accuracy:
    """What an engine's masks are worth on one data set.

    Attributes:
        data: folder and layout, in words.
        data_sha256: over the content of the images and masks, in order.
        images: how many were judged.
        resolution: ``source``: masks at the size of the image files; ``engine``: at the engine's size.
        ignored_share: share of pixels whose label counts for nothing; ``None`` without masks.
        truth: ``None`` without masks.
        agreement: ``None`` without a baseline, and for the baseline itself.
        worst: lowest agreement first.
    """

    data: str
    data_sha256: str
    images: Count
    resolution: Resolution
    ignored_share: Share | None = None
    truth: Truth | None = None
    agreement: Agreement | None = None
    worst: tuple[WorstImage, ...] = ()


@dataclass(frozen=True)
class Row:
    """One engine in one setting. Cold start, memory, profile and accuracy are the engine's: equal in all its rows.

    ``id`` is unique in the report: ``<engine name> b<batch> t<threads or -> s<streams>``.
    """

    id: str
    engine: Identity
    setting: Setting
    latency: Latency | None = None
    cold_start: ColdStart | None = None
    memory: Memory | None = None
    power: Power | None = None
    profile: Profile | None = None
    accuracy: Accuracy | None = None
    notes: tuple[str, ...] = ()


def at(value: Any, path: str) -> Any:
    """What is at ``latency.stages.pre_ms`` of a row; ``None`` where a part of the way was not measured."""
    for name in path.split("."):
        value = None if value is None else getattr(value, name)
    return value


SCHEMA_VERSION = 1

SpeedVerdict: TypeAlias = Literal["faster", "slower", "no difference", "cannot tell"]


@dataclass(frozen=True)
class SpeedComparison:
    """How many times faster ``row`` is than ``baseline`` (row ids) in the same setting.

    ``ratio``: median of the paired ratios; ``low``, ``high``: its 95 % interval, over up to ten stretches of the run;
    ``verdict`` is ``no difference`` when the interval holds 1 and no ratio beyond 1.1, ``cannot tell`` when it holds both.
    """

    baseline: str
    row: str
    ratio: Ratio
    low: Ratio
    high: Ratio
    pairs: Count
    verdict: SpeedVerdict


@dataclass(frozen=True)
class FailedMeasurement:
    """Something that was asked for and could not be measured, while the rest was.

    Attributes:
        engine: its name, as in the rows it would have had.
        folder: as given on the command line; ``None`` for a baseline.
        what: ``load``: it has no row; ``latency b<batch> t<threads or -> s<streams>``: that row is missing; ``accuracy``:
            its rows have none.
        reason: the error, one line.
    """

    engine: str
    folder: str | None
    what: str
    reason: str


@dataclass(frozen=True)
class BenchReport:
    """A whole run of ``edgeseg bench``.

    Attributes:
        created_at: ISO 8601, UTC.
        command: to repeat it, ``edgeseg bench ...``.
        protocol: settings of the latency protocol.
        comparisons: of every row with the baseline's row of the same setting.
        notes: what this machine or the request left unmeasured, and why.
        failed: what went wrong; empty when all is well.
    """

    schema_version: int
    edgeseg_version: str
    created_at: str
    command: str
    environment: Environment
    rows: tuple[Row, ...]
    comparisons: tuple[SpeedComparison, ...] = ()
    protocol: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failed: tuple[FailedMeasurement, ...] = ()


def write_report(path: Path, report: BenchReport) -> None:
    """Write a report as JSON, atomically. Raises ``ArtifactError`` when the place cannot be written."""
    try:
        write_json(path, report)
    except OSError as exc:
        raise ArtifactError(f"cannot write {path}: {exc.strerror}; give another --json FILE") from exc


def read_report(path: Path) -> BenchReport:
    """Read and check a report.

    Raises:
        ArtifactError: missing, damaged, of another schema version, no report at all, or one whose rows do not fit
            together; says which field.
    """
    report = read_versioned(
        path, BenchReport, "bench report", version=SCHEMA_VERSION, again="measure again with: edgeseg bench"
    )
    known = {row.id for row in report.rows}
    if len(known) != len(report.rows):
        raise ArtifactError(f"{path}: two rows have the same id; the file was edited or merged wrongly")
    for comparison in report.comparisons:
        if missing := {comparison.baseline, comparison.row} - known:
            raise ArtifactError(f"{path}: a comparison names {missing.pop()!r}, which is no row of the report")
    return report


def row_id(name: str, setting: Setting) -> str:
    """``fpn-int8 b1 t- s1``."""
    return f"{name} b{setting.batch} t{'-' if setting.threads is None else setting.threads} s{setting.streams}"
