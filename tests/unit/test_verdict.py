"""Which engine to deploy, and what keeps one from being recommended."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from bench_rows import merged, on, report, row

from edgeseg.decide.entries import Run, merge, paired_ratio
from edgeseg.decide.metrics import METRICS
from edgeseg.decide.requirement import Requirement
from edgeseg.decide.verdict import DeviceVerdict, decide, pareto_front
from edgeseg.errors import InputError
from edgeseg.evaluate.results import Row

JITTER = tuple(0.05 * (k % 7 - 3) for k in range(40))


def around(ms: float, seed: int) -> tuple[float, ...]:
    shuffled = list(JITTER)
    random.Random(seed).shuffle(shuffled)
    return tuple(ms + delta for delta in shuffled)


def judge(require: str | None, *rows: Row) -> DeviceVerdict:
    (verdict,) = decide(merged(*rows), None if require is None else Requirement.parse(require))
    return verdict


def test_the_fastest_that_fits_is_deployed() -> None:
    rows = row("slow", 30, miou=0.72), row("good", 20, miou=0.70), row("wrong", 5, miou=0.30)
    verdict = judge("miou >= 0.68", *rows)
    assert verdict.answer == "deploy"
    assert verdict.deploy is not None and verdict.deploy.row.engine.name == "good"
    assert [judged.status for judged in verdict.judged] == ["pass", "pass", "fail"]
    assert "2 of 3" in verdict.reason


def test_a_baseline_is_never_deployed() -> None:
    rows = row("pytorch", 1, miou=0.9, is_baseline=True), row("engine", 50, miou=0.7)
    assert judge("median_ms <= 33", *rows).answer == "none fits"
    assert judge("median_ms <= 33", rows[0]).answer == "not measured"


def test_nothing_fits_names_the_nearest_miss() -> None:
    verdict = judge("p99_ms <= 10", row("far", 30), row("near", 8))
    assert verdict.answer == "none fits" and verdict.deploy is None
    assert "nearest is near: p99_ms 11.00 ms, limit <= 10: 1.00 ms (10%) too much" in verdict.reason


def test_not_measured_is_not_passed() -> None:
    verdict = judge("miou >= 0.1", row("e", 5))
    assert verdict.answer == "not measured" and verdict.deploy is None
    assert "miou was not measured" in verdict.reason
    mixed = judge("miou >= 0.5", row("unknown", 5), row("bad", 6, miou=0.4))
    assert mixed.answer == "not measured"


def test_a_row_without_latency_cannot_be_the_fastest() -> None:
    verdict = judge("miou >= 0.5", row("e", None, miou=0.7))
    assert verdict.answer == "not measured" and "median_ms" in verdict.reason


def test_of_engines_as_fast_the_more_accurate_is_taken() -> None:
    fast = row("fast", 10.0, miou=0.70, samples_ms=around(10.0, 1), precision="int8")
    tied = row("tied", 10.01, miou=0.72, samples_ms=around(10.0, 2), precision="fp16")
    slow = row("slow", 20.0, miou=0.80, samples_ms=around(20.0, 3))
    verdict = judge("miou >= 0.5", fast, tied, slow)
    assert verdict.deploy is not None and verdict.deploy.row.engine.name == "tied"
    assert "as fast as fast within the interval" in verdict.reason


def worth(*rows: Row) -> list[str]:
    return [remark for remark in judge(None, *rows).remarks if "worth" in remark]


def test_int8_that_is_no_faster_is_not_worth_it() -> None:
    fp16 = row("half", 10.0, miou=0.72, samples_ms=around(10.0, 1), precision="fp16")
    int8 = row("quant", 10.0, miou=0.70, samples_ms=around(10.0, 2), precision="int8")
    (remark,) = worth(fp16, int8)
    assert remark.startswith("INT8 is not worth it for quant: FP16 (half) is as fast within the interval")
    assert "mIoU 0.7000 against 0.7200" in remark
    faster = row("quant", 5.0, miou=0.70, samples_ms=around(5.0, 2), precision="int8")
    assert worth(fp16, faster) == []
    slower = row("quant", 12.0, miou=0.70, samples_ms=around(12.0, 2), precision="int8")
    assert "FP16 (half) is faster (INT8 runs at 0.83x its speed" in worth(fp16, slower)[0]


NOISY_MS = (55.0, 20.0, 60.0, 58.0, 200.0, 50.0, 45.0, 52.0, 61.0, 30.0, 56.0, 57.0)


def test_what_another_run_could_turn_is_no_verdict() -> None:
    """Twelve samples each: the medians are 55.5 and 24 ms, the paired ratio's interval holds 1 and reaches far beyond."""
    full = row("full", 55.5, miou=0.72, drop=0.0, samples_ms=NOISY_MS)
    int8 = row(
        "quant", 24.0, miou=0.71, drop=0.0, precision="int8",
        samples_ms=(24.0, 70.0, 25.0, 23.0, 22.0, 24.0, 90.0, 80.0, 24.0, 24.0, 21.0, 130.0),
    )  # fmt: skip
    ratio = paired_ratio(*merged(full, int8).entries)
    assert ratio is not None and ratio.low < 1 < ratio.high and not ratio.is_same and not ratio.is_difference
    verdict = judge(None, full, int8)
    assert verdict.answer == "cannot tell" and verdict.deploy is None
    assert verdict.reason.startswith("which is faster, full (55.50 ms) or quant (24.00 ms), is not known: ")
    assert verdict.reason.endswith("; measure longer (edgeseg bench --duration-s) on a quiet machine")
    assert worth(full, int8) == [
        f"cannot tell whether INT8 is worth it for quant beside FP32 (full): INT8 runs at {ratio.value:.2f}x its speed, "
        f"{ratio.low:.2f} to {ratio.high:.2f}"
    ]
    longer = row("quant", 24.0, miou=0.71, drop=0.0, precision="int8", samples_ms=tuple(ms / 2 for ms in NOISY_MS))
    sure = judge(None, full, longer)
    assert sure.answer == "deploy" and sure.deploy is not None and sure.deploy.row.engine.name == "quant"


def test_rows_of_two_runs_are_told_apart_by_the_intervals_of_their_medians() -> None:
    def judged(spread_ms: float) -> DeviceVerdict:
        runs = []
        for name, ms in (("a", 10.0), ("b", 12.0)):
            one = row(name, ms, miou=0.7)
            assert one.latency is not None
            wide = replace(one.latency.end_to_end, median_low_ms=ms - spread_ms, median_high_ms=ms + spread_ms)
            runs.append(Run(report(replace(one, latency=replace(one.latency, end_to_end=wide)))))
        (verdict,) = decide(merge(runs), Requirement.parse("miou >= 0.5"))
        return verdict

    assert judged(0.5).deploy is not None
    assert judged(3.0).answer == "cannot tell"


def test_a_limit_within_the_noise_is_no_verdict_unless_another_row_is_faster() -> None:
    near = row("near", 10.0, miou=0.7)
    verdict = judge("median_ms <= 10.05", near, row("slow", 20, miou=0.7))
    assert verdict.answer == "cannot tell" and [judged.status for judged in verdict.judged] == ["cannot tell", "fail"]
    assert (
        "whether near fits is not known: median_ms 10.00 ms, limit <= 10.05: cannot tell, another run could give 9.90 to 10.10"
        in (verdict.reason)
    )
    faster = judge("median_ms <= 10.05", near, row("fast", 5, miou=0.7))
    assert faster.deploy is not None and faster.deploy.row.engine.name == "fast"
    # "slow" fits for certain, but "near" would be taken before it if it fitted.
    assert judge("median_ms > 9.95", near, row("slow", 20, miou=0.7)).answer == "cannot tell"


def test_a_p99_of_a_few_samples_is_no_p99() -> None:
    """A row made here without samples says it has nine."""
    verdict = judge("p99_ms <= 50 and (miou >= 0.1 or p90_ms <= 9)", row("few", 10.0, miou=0.7))
    assert [r for r in verdict.remarks if "of fewer than" in r] == [
        "p90 of fewer than 10 samples is the slowest of them, measure longer (--duration-s): few (9)",
        "p99 of fewer than 100 samples is the slowest of them, measure longer (--duration-s): few (9)",
    ]
    enough = row("enough", 10.0, miou=0.7, samples_ms=tuple([10.0] * 100))
    assert not any("of fewer than" in remark for remark in judge("p99_ms <= 50", enough).remarks)
    assert not any("of fewer than" in remark for remark in judge("miou >= 0.1", row("few", 10.0, miou=0.7)).remarks)


def test_speeds_of_different_runs_are_not_paired() -> None:
    a = report(row("a", 10.0, samples_ms=around(10.0, 1)))
    b = report(row("b", 10.0, samples_ms=around(10.0, 2), precision="int8"))
    both = merge([Run(a), Run(b)])
    assert len(both.groups) == 1
    assert paired_ratio(*both.entries) is None
    (verdict,) = decide(both)
    assert "rows of 2 runs" in verdict.remarks[0] and not any("worth" in remark for remark in verdict.remarks)


def test_devices_and_power_modes_are_judged_apart() -> None:
    slow, fast = report(row("e", 30, miou=0.7)), report(row("e", 10, miou=0.7))
    runs = [Run(on(slow, power_mode="7W")), Run(on(slow, power_mode="15W")), Run(on(fast, device="other"))]
    verdicts = decide(merge(runs), Requirement.parse("median_ms <= 20"))
    assert [v.group.label for v in verdicts] == ["board (7W)", "board (15W)", "other"]
    assert [v.answer for v in verdicts] == ["none fits", "none fits", "deploy"]
    assert [e.number for v in verdicts for e in v.group.entries] == [1, 2, 3]


def test_the_default_requirement_is_stated_and_needs_accuracy() -> None:
    verdict = judge(None, row("lossy", 5, miou=0.6, drop=0.1), row("kept", 10, miou=0.7, drop=0.005))
    assert verdict.is_default and verdict.requirement is not None
    assert verdict.requirement.text == "miou_drop <= 0.01"
    assert verdict.deploy is not None and verdict.deploy.row.engine.name == "kept"
    without_masks = judge(None, row("e", 5, agreement=0.995))
    assert without_masks.requirement is not None and without_masks.requirement.text == "agreement >= 0.99"
    assert without_masks.answer == "deploy"
    assert judge(None, row("e", 5)).answer == "not measured"


def few_images(images: int, *, baseline: bool = True) -> DeviceVerdict:
    one = row("e", 5, miou=0.7, agreement=0.995)
    assert one.accuracy is not None
    agreement = one.accuracy.agreement if baseline else None
    one = replace(one, accuracy=replace(one.accuracy, images=images, agreement=agreement))
    return judge(None if baseline else "miou_drop <= 0.01 and miou >= 0.1", one)


def test_masks_that_are_too_few_to_judge_by_are_said() -> None:
    verdict = few_images(4)
    assert verdict.requirement is not None and verdict.requirement.text == "agreement >= 0.99"
    assert (
        "there are masks, but no mIoU drop to judge by: 4 images were judged, a drop needs at least 5"
        in verdict.remarks[-1]
    )
    required = judge("miou_drop <= 0.01", *[judged.entry.row for judged in verdict.judged])
    assert required.answer == "not measured"
    assert required.reason.startswith(
        "miou_drop was not measured (4 images were judged, a drop needs at least 5: raise --limit, or give more), so"
    )
    assert few_images(6, baseline=False).reason.startswith(
        "miou_drop was not measured (there is no baseline of the same model in the run)"
    )
    assert (
        "miou was not measured (no accuracy was judged: bench with --data), so"
        in judge("miou >= 0.1", row("e", 5)).reason
    )


def test_pareto_front_by_brute_force() -> None:
    generator = random.Random(0)
    for _ in range(30):
        rows = [row(f"e{k}", generator.randint(1, 6), miou=generator.randint(1, 6) / 10) for k in range(8)]
        entries = merged(*rows).entries
        front = {e.number for e in pareto_front(entries, METRICS["miou"])}
        points = {e.number: (METRICS["median_ms"].value(e), METRICS["miou"].value(e)) for e in entries}
        expected = set()
        for n, (ms, score) in points.items():
            dominated = [m for m, (t, s) in points.items() if t <= ms and s >= score and (t, s) != (ms, score)]
            if not dominated:
                expected.add(n)
        assert front == expected


def test_front_keeps_batches_and_data_apart() -> None:
    one, four = row("a", 5, miou=0.7), row("b", 20, miou=0.6, batch=4)
    other = row("c", 20, miou=0.6, data="other images")
    entries = merged(one, four, other, row("d", 30, miou=0.65)).entries
    assert [e.row.engine.name for e in pareto_front(entries, METRICS["miou"])] == ["a", "b", "c"]


def test_nothing_to_report_is_an_error() -> None:
    with pytest.raises(InputError, match="edgeseg bench"):
        merge([Run(report())])
