"""Accuracy of several contenders on one data set: streaming, resumable, in several processes.

What is known of an image is a line of JSON, appended to a file whose name is the hash of everything it depends on (engine,
baseline, data, settings, software). An evaluation that was interrupted finds the lines of before and goes on
behind them; a changed input finds none.
"""

from __future__ import annotations

import hashlib
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
from numpy.typing import NDArray

from edgeseg.arguments import INT32, PATH, TEXT, argument, choice, settle, whole
from edgeseg.errors import InputError
from edgeseg.evaluate.accuracy.dataset import Pair, ValidationSet
from edgeseg.evaluate.accuracy.judge import ImageRecord, Ledger, at_resolution, judge, truth_of_scores
from edgeseg.evaluate.accuracy.layouts import LABEL_MAP, open_layout
from edgeseg.evaluate.accuracy.loss import LossSums, ScoreTap, loss_sums
from edgeseg.evaluate.accuracy.scores import accuracy_of, truth_counts
from edgeseg.evaluate.accuracy.worst import save_worst
from edgeseg.evaluate.contenders import Contender, Opener, first_baseline
from edgeseg.evaluate.intervals import MIN_IMAGES, Counts
from edgeseg.evaluate.results import Accuracy, Layout, Resolution, WorstImage
from edgeseg.evaluate.tables import counted
from edgeseg.images.decoding import file_digest
from edgeseg.machine.cpu import this_cpu
from edgeseg.machine.orphans import end_with_parent
from edgeseg.progress import Reporter, stage
from edgeseg.runtime.overlap import in_order
from edgeseg.runtime.segmenter import Segmenter
from edgeseg.spec import PipelineSpec
from edgeseg.store.cache import software, stage_folder, usable_cache
from edgeseg.store.hashing import sha256_json

# Images judged ahead of the one whose turn it is to be written, per process.
_AHEAD = 4


@dataclass(frozen=True)
class AccuracyRequest:
    """What ``edgeseg bench`` can be asked about accuracy.

    Attributes:
        data: the data set's folder (layout ``list``: file).
        layout, split, ignore_index, label_map, limit: see :func:`edgeseg.evaluate.accuracy.layouts.open_layout`.
        jobs: worker processes; each opens every contender.
        images_folder: where pictures of the worst go; ``None`` for no pictures.
        state_folder: where the lines are kept; ``None``: the cache.
    """

    data: Path = argument(PATH, positional=True, help="Labelled (or plain) images to judge accuracy on.")
    layout: str = argument(choice(get_args(Layout)), "images-masks", help="Of --data.")
    split: str = argument(TEXT, "val", help="Of --data, where the layout has splits.")
    ignore_index: int | None = argument(whole(-INT32, INT32, 255), help="Mask value that counts for nothing.")
    label_map: dict[int, int] | None = argument(LABEL_MAP, help="Mask value to class, such as 7=0,8=1,255=ignore.")
    resolution: Resolution = argument(choice(get_args(Resolution)), "source", help="Judge masks at this size.")
    limit: int | None = argument(whole(1, INT32, 100), help="Judge so many images, evenly spread.")
    jobs: int = argument(whole(1, 1024, 2), 1, help="Processes that judge images.")
    worst: int = argument(whole(0, INT32, 5), 5, help="Worst images to save beside the report.")
    images_folder: Path | None = None
    state_folder: Path | None = None

    def __post_init__(self) -> None:
        settle(self)

    def check(self, contenders: Sequence[Contender]) -> tuple[str, ...]:
        """Find the data as each model would; raises ``InputError`` or ``SpecError`` where that fails.

        Returns what cannot be judged on it, a sentence each.
        """
        specs = {_reads_alike(c): c.spec for c in contenders}
        sets = {reading: self.open(spec) for reading, spec in specs.items()}
        for reading, data in sets.items():
            # Other channels, another dtype, values that are no class, several tiles: said before the work.
            first = Pair(data.images[0].name, data.image(0), None)
            _ = data.labels
            for contender in contenders:
                if _reads_alike(contender) == reading:
                    at_resolution(first, contender.spec, self.resolution)
        sizes = {len(data) for data in sets.values() if data.masks}
        if not any(images < MIN_IMAGES for images in sizes):
            return ()
        return (
            f"{min(sizes)} images with masks: no drop against the baseline is judged, that needs at least {MIN_IMAGES}; "
            + ("raise --limit" if self.limit is not None else "give more with --data"),
        )

    def open(self, spec: PipelineSpec) -> ValidationSet:
        """The data set as an engine of ``spec`` is to be judged on it."""
        return open_layout(
            self.data,
            self.layout,
            spec.model,
            split=self.split,
            ignore_index=self.ignore_index,
            label_map=self.label_map,
            limit=self.limit,
            dtype=spec.input.dtype,
        )


def _reads_alike(contender: Contender) -> str:
    """Of contenders that read a data set alike the same."""
    return sha256_json([contender.spec.model, contender.spec.input.dtype])


@dataclass(frozen=True)
class _Group:
    """Contenders of one model specification and input dtype, which read the data alike."""

    data: ValidationSet
    digest: str
    contenders: tuple[Contender, ...]
    baseline_of: dict[str, str]
    resolution: Resolution


def evaluate(
    request: AccuracyRequest, contenders: Sequence[Contender], opener: Opener, reporter: Reporter
) -> dict[str, Accuracy]:
    """Judge every contender on every image that is not judged yet, and return the figures by name.

    Raises:
        InputError, SpecError: the data cannot be used with the model; see :mod:`edgeseg.evaluate.accuracy.layouts`.
        ArtifactError: the state folder cannot be written.
    """
    by_model: dict[str, list[Contender]] = {}
    for contender in contenders:
        by_model.setdefault(_reads_alike(contender), []).append(contender)
    by_name: dict[str, Accuracy] = {}
    for members in by_model.values():
        data = request.open(members[0].spec)
        pairs = {c.name: b.name for c in members if (b := first_baseline(c, members)) is not None}
        # Decided here, before the work, and carried to every process: none of them decides for itself.
        meaning = data.labels.meaning
        group = _Group(data, data_digest(data), tuple(members), pairs, request.resolution)
        with nullcontext() if request.state_folder else usable_cache(reporter.note):
            with stage(reporter, "accuracy") as said:
                ledgers, reused = _records(group, request, opener, reporter)
                said.append(f"{counted(len(data), 'image')}, {counted(len(members), 'engine')}")
                if meaning:
                    said.append(meaning)
                if reused:
                    said.append(f"{reused} results of an earlier run reused")
            by_name |= _figures(group, request, ledgers, opener)
    return by_name


def data_digest(data: ValidationSet) -> str:
    """SHA-256 over the content of all images and masks, in order, and how masks are read."""
    digest = hashlib.sha256(msgspec.json.encode([data.ignore_index, sorted(data.coding.values.items())]))
    digest.update(repr(sorted(data.coding.colours.items())).encode())
    for path in (*data.images, *data.masks):
        digest.update(file_digest(path).encode())
    return digest.hexdigest()


def state_key(contender: Contender, group: _Group, opener: Opener) -> str:
    """Hash of everything a contender's lines depend on."""
    by_name = {c.name: c for c in group.contenders}
    baseline = by_name.get(group.baseline_of.get(contender.name, ""))
    engine = None if contender.is_baseline else opener.engine(contender).manifest
    return sha256_json(
        [
            contender.baseline,
            contender.weights_sha256,
            # What one file computes depends on how it is run, and by which version of what.
            None if engine is None else [engine.target, engine.engine, engine.graph, engine.options],
            contender.spec,
            None if baseline is None else [baseline.baseline, baseline.weights_sha256],
            group.digest,
            group.resolution,
            software(),
        ]
    )


def _records(
    group: _Group, request: AccuracyRequest, opener: Opener, reporter: Reporter
) -> tuple[dict[str, Ledger], int]:
    folder = request.state_folder or stage_folder("accuracy")
    ledgers = {c.name: Ledger(folder / state_key(c, group, opener) / "images.jsonl") for c in group.contenders}
    reused = sum(len(ledger) for ledger in ledgers.values())
    todo = [
        (index, missing)
        for index in range(len(group.data))
        if (missing := tuple(name for name, ledger in ledgers.items() if index not in ledger))
    ]
    done = len(group.data) - len(todo)
    try:
        for records in _judged(group, todo, request.jobs, opener):
            for name, record in records:
                ledgers[name].append(record)
            done += 1
            reporter.progress(done, len(group.data))
    except KeyboardInterrupt:
        reporter.note(
            f"{done} of {len(group.data)} images are judged and kept: the same command goes on with the others"
        )
        raise
    values = {value for ledger in ledgers.values() for value in ledger.ignore_values}
    if len(values) > 1:
        raise InputError(f"masks of {request.data} mark unlabelled pixels by {sorted(values)}; give --ignore-index")
    return ledgers, reused


def _judged(
    group: _Group, todo: list[tuple[int, tuple[str, ...]]], jobs: int, opener: Opener
) -> Iterator[list[tuple[str, ImageRecord]]]:
    if not todo:
        return
    if jobs == 1:
        with _bench(group, opener, None) as worker:
            for index, names in todo:
                yield worker.judge(index, names)
        return
    threads = max(1, this_cpu().cores // jobs)
    # Not forked: a fork of a process with a runtime's threads in it may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start_worker, (group, threads)) as pool:
        try:
            # A few tasks ahead keep all busy; a task of every image would fill memory with those that wait.
            yield from in_order(pool, todo, _judge_in_worker, _AHEAD * jobs)
        except BrokenProcessPool as exc:
            raise InputError(
                f"a process that judges images was killed (out of memory?); judged images are kept: go on with fewer "
                f"--jobs than {jobs}"
            ) from exc


@dataclass(frozen=True)
class _Worker:
    """All contenders of a group, opened."""

    group: _Group
    segmenters: dict[str, Segmenter]
    taps: dict[str, ScoreTap]

    def judge(self, index: int, names: Sequence[str]) -> list[tuple[str, ImageRecord]]:
        """Judge the contenders ``names`` on one image."""
        pair = self.group.data.read(index)
        masks: dict[str, NDArray[Any]] = {}
        sums: dict[str, LossSums | None] = {}
        by_name = {c.name: c for c in self.group.contenders}
        records = []
        for name in names:
            reference = self.group.baseline_of.get(name)
            spec = by_name[name].spec
            image, truth, cropped = at_resolution(pair, spec, self.group.resolution)
            for needed in (name, reference):
                if needed is not None and needed not in masks:
                    masks[needed] = cropped(self.segmenters[needed](image))
                    sums[needed] = self._loss(needed, pair, spec)
            compared = None if reference is None else masks[reference]
            records.append((name, judge(index, pair, masks[name], truth, compared, spec.model, sums[name])))
        return records

    def _loss(self, name: str, pair: Pair, spec: PipelineSpec) -> LossSums | None:
        """Of the image just segmented."""
        scores = self.taps[name].scores()
        truth = None if scores is None else truth_of_scores(pair, spec)
        if scores is None or truth is None:
            return None
        return loss_sums(*scores, truth, spec.model.task)


@contextmanager
def _bench(group: _Group, opener: Opener, threads: int | None) -> Iterator[_Worker]:
    with ExitStack() as stack:
        segmenters, taps = {}, {}
        for contender in group.contenders:
            known = contender.is_baseline or "threads" in opener.engine(contender).manifest.options
            session = opener.open(
                contender,
                threads if known else None,
                with_scores=group.data.has_masks,
                exact=contender.baseline == "pytorch",
            )
            tap = ScoreTap(session)
            taps[contender.name] = tap
            segmenters[contender.name] = stack.enter_context(Segmenter(tap, contender.spec))
        yield _Worker(group, segmenters, taps)


_worker: _Worker | None = None
_open_things = ExitStack()


def _start_worker(group: _Group, threads: int) -> None:
    global _worker
    end_with_parent()
    _worker = _open_things.enter_context(_bench(group, Opener(), threads))


def _judge_in_worker(task: tuple[int, tuple[str, ...]]) -> list[tuple[str, ImageRecord]]:
    assert _worker is not None  # the pool started it
    return _worker.judge(*task)


def _figures(
    group: _Group, request: AccuracyRequest, ledgers: dict[str, Ledger], opener: Opener
) -> dict[str, Accuracy]:
    model = group.contenders[0].spec.model
    words = (
        f"{request.data} (layout {request.layout}{'' if request.layout in _NO_SPLIT else ', split ' + request.split})"
    )
    if group.data.unpaired:
        words += f", without {len(group.data.unpaired)} images that have no mask"
    by_name: dict[str, Accuracy] = {}
    counts: dict[str, Counts | None] = {}
    for contender in group.contenders:
        baseline, ledger = group.baseline_of.get(contender.name), ledgers[contender.name]
        worst: tuple[WorstImage, ...] = ()
        if baseline is not None:
            worst = save_worst(
                contender,
                baseline,
                ledger,
                group.data,
                group.contenders,
                opener,
                count=request.worst,
                folder=request.images_folder,
                resolution=request.resolution,
            )
            if baseline not in counts:
                counts[baseline] = truth_counts(ledgers[baseline].records(), len(group.data), model.classes)
        by_name[contender.name] = accuracy_of(
            ledger.records,
            len(group.data),
            model,
            data=words,
            data_sha256=group.digest,
            resolution=request.resolution,
            baseline=None if baseline is None else (baseline, counts[baseline]),
            worst=worst,
        )
    return by_name


_NO_SPLIT = ("images-masks", "list")
