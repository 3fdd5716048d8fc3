"""Which engine to deploy on each device, why, and which precision is not worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from edgeseg.decide.entries import DeviceGroup, Entry, MergedReport, paired_ratio, speed_ratio
from edgeseg.decide.metrics import METRICS, Metric, why_missing
from edgeseg.decide.requirement import Outcome, Requirement, Status, comparisons

DEFAULT_REQUIREMENT = "miou_drop <= 0.01"
DEFAULT_WITHOUT_MASKS = "agreement >= 0.99"
"""What counts as good enough when the user names no requirement: said in every verdict that uses one."""

_FLOAT_WIDTH = {"int8": 8, "fp16": 16, "fp32": 32}

Answer: TypeAlias = Literal["deploy", "none fits", "cannot tell", "not measured"]

MEASURE_LONGER = "measure longer (edgeseg bench --duration-s) on a quiet machine"


@dataclass(frozen=True)
class Judged:
    """One entry and how it fares.

    Attributes:
        entry: the row.
        outcome: against the requirement; ``None`` when there is none to judge by.
        is_on_front: no other engine of the device is at least as fast and as accurate and better in one.
    """

    entry: Entry
    outcome: Outcome | None
    is_on_front: bool

    @property
    def status(self) -> Status | None:
        return None if self.outcome is None else self.outcome.status


@dataclass(frozen=True)
class DeviceVerdict:
    """The decision for one device.

    Attributes:
        group: its rows.
        answer: whether there is an engine to deploy; ``cannot tell`` where another run could say something else.
        deploy: which.
        reason: one sentence.
        requirement: judged by; ``None`` when nothing was asked and accuracy was not measured.
        is_default: the requirement is edgeseg's, not the user's.
        judged: every row, in the group's order.
        accuracy_metric: what the Pareto front's second axis is: mIoU, else agreement; ``None`` when neither was measured.
        remarks: what else to know, one sentence each.
    """

    group: DeviceGroup
    answer: Answer
    deploy: Entry | None
    reason: str
    requirement: Requirement | None
    is_default: bool
    judged: tuple[Judged, ...]
    accuracy_metric: Metric | None
    remarks: tuple[str, ...] = ()

    def of(self, entry: Entry) -> Judged:
        return self._by_number[entry.number]

    @cached_property
    def _by_number(self) -> dict[int, Judged]:
        return {judged.entry.number: judged for judged in self.judged}


def decide(report: MergedReport, requirement: Requirement | None = None) -> tuple[DeviceVerdict, ...]:
    """One verdict per device. ``requirement`` of ``None``: a default that the verdict states."""
    return tuple(decide_device(group, requirement) for group in report.groups)


def decide_device(group: DeviceGroup, requirement: Requirement | None) -> DeviceVerdict:
    """Which of one device's engines to deploy.

    Of the engines that meet the requirement the fastest (lowest median) is taken; of those whose speed cannot be told
    from its (95 % interval of the paired ratio holds 1 and no difference beyond 10 %) the most accurate, then the smallest.
    Baselines are never recommended. Where the noise of the measurement leaves open which one that is, the answer is
    ``cannot tell``.
    """
    is_default = requirement is None
    if requirement is None:
        requirement = default_requirement(group)
    metric = accuracy_metric(group)
    front = {id(entry) for entry in pareto_front(group.engines, metric)}
    judged = tuple(
        Judged(entry, None if requirement is None else requirement.evaluate(entry), id(entry) in front)
        for entry in group.entries
    )
    remarks = (
        *_remarks(group, metric),
        *_few_samples(group.engines, requirement),
        *(_few_images(group.engines) if is_default else ()),
    )
    engines = [one for one in judged if not one.entry.row.engine.is_baseline]
    fitting = [one.entry for one in engines if one.status == "pass" and _median(one.entry) is not None]
    doubts = _doubts(fitting, [one for one in engines if one.status == "cannot tell"])

    answer: Answer
    deploy: Entry | None = None
    if not engines:
        answer, reason = "not measured", "only baselines were measured; give bench an engine folder"
    elif requirement is None:
        answer = "not measured"
        reason = "accuracy beside a baseline was not measured: bench with --data, or say with --require what you need"
    elif doubts:
        more = f"; and {len(doubts) - 2} more" if len(doubts) > 2 else ""
        answer, reason = "cannot tell", f"{'; '.join(doubts[:2])}{more}; {MEASURE_LONGER}"
    elif fitting:
        deploy = fastest(fitting, metric)
        answer, reason = "deploy", _why(deploy, fitting, engines)
    elif any(one.status == "not measured" for one in engines) or any(one.status == "pass" for one in engines):
        answer, reason = "not measured", _missing(engines)
    else:
        answer = "none fits"
        reason = _nearest_miss(engines)
    return DeviceVerdict(group, answer, deploy, reason, requirement, is_default, judged, metric, remarks)


def default_requirement(group: DeviceGroup) -> Requirement | None:
    """mIoU against masks where there are some, else agreement with the baseline, else nothing to judge by."""
    for text in (DEFAULT_REQUIREMENT, DEFAULT_WITHOUT_MASKS):
        requirement = Requirement.parse(text)
        if any(requirement.evaluate(entry).status != "not measured" for entry in group.engines):
            return requirement
    return None


def accuracy_metric(group: DeviceGroup) -> Metric | None:
    """mIoU if any row has it, else agreement with the baseline, else ``None``."""
    for name in ("miou", "agreement"):
        if any(METRICS[name].value(entry) is not None for entry in group.entries):
            return METRICS[name]
    return None


def pareto_front(entries: Sequence[Entry], metric: Metric | None) -> tuple[Entry, ...]:
    """The entries none of the others beats: at least as fast and as accurate, and better in one of the two.

    Fast is the median of a call. Rows of another batch size or number of streams, or judged on different data, are not
    ranked against each other.
    """
    if metric is None:
        return ()
    points = [
        (entry, ms, score)
        for entry in entries
        if (ms := _median(entry)) is not None and (score := metric.value(entry)) is not None
    ]
    # From the fastest on, the more accurate of two as fast first: whoever comes later must be more accurate than all before.
    front: set[int] = set()
    best: dict[tuple[str | None, int, int], tuple[float, float]] = {}
    for entry, ms, score in sorted(points, key=lambda point: (point[1], -point[2])):
        before = best.get(comparable_key(entry))
        if before is None or score > before[1] or (ms, score) == before:
            best[comparable_key(entry)] = (ms, score)
            front.add(entry.number)
    return tuple(entry for entry, _, _ in points if entry.number in front)


def comparable_key(entry: Entry) -> tuple[str | None, int, int]:
    """Rows with equal keys answer the same question: same data, images of a call and callers at a time."""
    return data_key(entry), entry.row.setting.batch, entry.row.setting.streams


def data_key(entry: Entry) -> str | None:
    """Tells data sets apart; ``None`` when no accuracy was measured."""
    accuracy = entry.row.accuracy
    return None if accuracy is None else f"{accuracy.data_sha256} {accuracy.resolution} {accuracy.images}"


def _doubts(fitting: Sequence[Entry], near: Sequence[Judged]) -> list[str]:
    """What another run could turn, a sentence each: rows that may or may not be faster than the fastest that fits, and
    rows so near a limit that they may or may not fit, unless they are slower than one that does."""
    first = min(fitting, key=_median_or_never) if fitting else None
    doubts = []
    for entry in fitting:
        ratio = None if first is None or entry is first else speed_ratio(entry, first)
        if first is not None and ratio is not None and ratio.low <= 1.0 and not ratio.is_same:
            both = " or ".join(f"{e.name} ({METRICS['median_ms'].with_unit(_median(e))})" for e in (entry, first))
            interval = f"{ratio.value:.2f}x, {ratio.low:.2f} to {ratio.high:.2f}"
            doubts.append(f"which is faster, {both}, is not known: {interval}")
    for one in near:
        ratio = None if first is None else speed_ratio(one.entry, first)
        if (ratio is None or ratio.low <= 1.0) and one.outcome is not None:
            checks = [check.text for check in one.outcome.checks if check.status == "cannot tell"]
            doubts.append(f"whether {one.entry.name} fits is not known: {', '.join(checks)}")
    return doubts


def fastest(entries: Sequence[Entry], metric: Metric | None) -> Entry:
    """The fastest; among those as fast within the interval the most accurate, then the smallest."""
    first = min(entries, key=_median_or_never)
    tied = [entry for entry in entries if entry is first or _is_tie(entry, first)]

    def order(entry: Entry) -> tuple[float, int, float]:
        score = None if metric is None or data_key(entry) != data_key(first) else metric.value(entry)
        return (-score if score is not None else float("inf"), entry.row.engine.size_bytes, _median(entry) or 0.0)

    return min(tied, key=order)


def _is_tie(slow: Entry, fast: Entry) -> bool:
    if slow.row.setting != fast.row.setting:
        return False
    ratio = paired_ratio(slow, fast)
    return ratio is not None and ratio.is_same


def _median(entry: Entry) -> float | None:
    return METRICS["median_ms"].value(entry)


def _median_or_never(entry: Entry) -> float:
    return _median(entry) or float("inf")


def _why(deploy: Entry, fitting: Sequence[Entry], engines: Sequence[Judged]) -> str:
    count = f"{len(fitting)} of {len(engines)} rows meet the requirement"
    if len(engines) == 1:
        return "it meets the requirement"
    if len(fitting) == 1:
        return f"the only one of {len(engines)} rows that meets the requirement"
    first = min(fitting, key=_median_or_never)
    if first is deploy:
        return f"the fastest that meets the requirement ({count})"
    return f"as fast as {first.name} within the interval, and more accurate or smaller ({count})"


def _missing(engines: Sequence[Judged]) -> str:
    unmeasured = [
        check
        for one in engines
        if one.outcome is not None
        for check in one.outcome.checks
        if check.status == "not measured"
    ]
    names = {check.comparison.metric.name for check in unmeasured}
    if any(one.status == "pass" and _median(one.entry) is None for one in engines):
        names.add("median_ms")
    causes = "; ".join(dict.fromkeys(check.missing for check in unmeasured if check.missing is not None))
    why = f" ({causes})" if causes else ""
    return f"{', '.join(sorted(names))} was not measured{why}, so no row can pass; bench again and measure it"


def _nearest_miss(engines: Sequence[Judged]) -> str:
    """The row that misses by least: the smallest worst relative distance over its missed comparisons."""

    def distance(one: Judged) -> float:
        missed = [c for c in one.outcome.checks if c.status == "fail"] if one.outcome else []
        return max((c.margin or 0.0) / (abs(c.comparison.limit) or 1.0) for c in missed) if missed else float("inf")

    near = min(engines, key=distance)
    missed = [check.text for check in near.outcome.missed] if near.outcome else []
    if len(engines) == 1:
        return f"the only row, {near.entry.name}, does not meet the requirement: {'; '.join(missed)}"
    return f"none of {len(engines)} rows meets the requirement; nearest is {near.entry.name}: {'; '.join(missed)}"


def _remarks(group: DeviceGroup, metric: Metric | None) -> list[str]:
    remarks = []
    if len(group.runs) > 1:
        remarks.append(
            f"rows of {len(group.runs)} runs: only rows of one run were measured in turns, so differences between runs "
            "include the machine's drift"
        )
    if len({key for entry in group.entries if (key := data_key(entry)) is not None}) > 1:
        remarks.append("rows were judged on different data; accuracy is compared within each data set only")
    noisy = [entry.name for entry in group.entries if entry.row.latency is not None and entry.row.latency.flags]
    if noisy:
        which = "every row" if len(noisy) == len(group.entries) else "; ".join(noisy)
        remarks.append(f"flagged noisy, measure again before you rely on it: {which}")
    return remarks + _not_worth_it(group.engines, metric)


def _few_samples(engines: Sequence[Entry], requirement: Requirement | None) -> list[str]:
    """Percentiles that are required, of rows with too few samples to have one: the slowest sample stands for it."""
    remarks = []
    asked = set() if requirement is None else {c.metric.name for c in comparisons(requirement.root)}
    for name, needed in (("p90_ms", 10), ("p95_ms", 20), ("p99_ms", 100)):
        few = [e for e in engines if e.row.latency is not None and e.row.latency.end_to_end.count < needed]
        if name in asked and few:
            counts = "; ".join(f"{e.name} ({e.row.latency.end_to_end.count})" for e in few if e.row.latency is not None)
            remarks.append(
                f"{name.removesuffix('_ms')} of fewer than {needed} samples is the slowest of them, measure longer "
                f"(--duration-s): {counts}"
            )
    return remarks


def _few_images(engines: Sequence[Entry]) -> list[str]:
    """Masks that are there and were not judged by."""
    judged = [e for e in engines if e.row.accuracy is not None and e.row.accuracy.truth is not None]
    if not judged or any(METRICS["miou_drop"].value(entry) is not None for entry in engines):
        return []
    causes = dict.fromkeys(why_missing("miou_drop", entry) for entry in judged)
    return [
        f"there are masks, but no mIoU drop to judge by: {'; '.join(cause for cause in causes if cause is not None)}"
    ]


def _not_worth_it(engines: Sequence[Entry], metric: Metric | None) -> list[str]:
    """Rows of lower precision that are not faster than one of higher precision, same model, backend and setting."""
    # The fastest of each precision stands for all of it.
    fastest_of: dict[tuple[object, ...], dict[str, Entry]] = {}
    for entry in engines:
        of_precision = fastest_of.setdefault(_rivals_key(entry), {})
        rival = of_precision.setdefault(entry.row.engine.precision, entry)
        if _median_or_never(entry) < _median_or_never(rival):
            of_precision[entry.row.engine.precision] = entry
    remarks = []
    for low in engines:
        width = _FLOAT_WIDTH.get(low.row.engine.precision, 64)
        rivals = [high for name, high in fastest_of[_rivals_key(low)].items() if _FLOAT_WIDTH.get(name, 0) > width]
        for high in sorted(rivals, key=lambda entry: _FLOAT_WIDTH[entry.row.engine.precision]):
            ratio = paired_ratio(high, low)
            if ratio is None or ratio.low > 1.0:
                continue
            reduced, full = low.row.engine.precision.upper(), high.row.engine.precision.upper()
            runs = f"{reduced} runs at {ratio.value:.2f}x its speed, {ratio.low:.2f} to {ratio.high:.2f}"
            if not ratio.is_same and not ratio.is_difference:
                remarks.append(
                    f"cannot tell whether {reduced} is worth it for {low.name} beside {full} ({high.name}): {runs}"
                )
                break
            speed = "is faster" if ratio.is_difference else "is as fast within the interval"
            remarks.append(
                f"{reduced} is not worth it for {low.name}: {full} ({high.name}) {speed} ({runs})"
                + _accuracy_gap(low, high, metric)
            )
            break
    return remarks


def _accuracy_gap(low: Entry, high: Entry, metric: Metric | None) -> str:
    if metric is None or data_key(low) != data_key(high):
        return ""
    a, b = metric.value(low), metric.value(high)
    return "" if a is None or b is None else f"; {metric.title} {metric.text(a)} against {metric.text(b)}"


def _rivals_key(entry: Entry) -> tuple[object, ...]:
    """Equal for rows of one run that differ in precision alone."""
    engine = entry.row.engine
    model = (engine.backend, engine.arch, engine.encoder, engine.height, engine.width, engine.weights_sha256)
    return (entry.run, entry.row.setting, *model)
