"""The language of --require: read right, refused in one line, and three-valued."""

from __future__ import annotations

import itertools

import pytest
from bench_rows import merged, row
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeseg.decide.entries import Entry
from edgeseg.decide.metrics import METRICS
from edgeseg.decide.requirement import Junction, Requirement
from edgeseg.errors import SpecError


def entry(**figures: object) -> Entry:
    return merged(row("e", **figures)).entries[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("median_ms <= 10", "pass"),
        ("median_ms<10", "fail"),
        ("10>=median_ms", "pass"),
        ("p99_ms == 13", "pass"),
        ("p99_ms != 13", "fail"),
        ("5 < median_ms < 20", "pass"),
        ("5 < median_ms < 9", "fail"),
        ("median_ms \u2264 1e1 and miou \u2265 .7", "pass"),
        ("miou>=0.8 or median_ms<=10", "pass"),
        ("miou>=0.8 or median_ms<=9 and size_mb<=5", "fail"),
        ("(miou>=0.8 or median_ms<=10) and size_mb<=0.5", "fail"),
        ("gpu_mb <= 100", "not measured"),
        ("gpu_mb <= 100 and median_ms <= 10", "not measured"),
        ("gpu_mb <= 100 and median_ms <= 9", "fail"),
        ("gpu_mb <= 100 or median_ms <= 10", "pass"),
        ("gpu_mb <= 100 or median_ms <= 9", "not measured"),
    ],
)
def test_statuses(text: str, status: str) -> None:
    assert Requirement.parse(text).evaluate(entry(median_ms=10.0, miou=0.7)).status == status


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("p99<=33", "did you mean 'p99_ms'"),
        ("p99<=33", "size_mb (MB)"),
        ("p99_ms", "at character 7 (the end)"),
        ("p99_ms = 33", "at character 8"),
        ("p99_ms <= 33 &&", "&&"),
        ("p99_ms <= 33 miou >= 0.6", "at character 14"),
        ("(p99_ms <= 33", "the end"),
        ("p99_ms <= 33)", "')'"),
        ("p99_ms <= median_ms", "one metric with one number"),
        ("1 <= 2", "one metric with one number"),
        ("p99_ms <= 1e999", "finite"),
        ("p99_ms <= 33ms", "at character"),
        ("p99_ms <= 33and miou>=1", "at character"),
        ("not p99_ms <= 33", "'not p99_ms"),
        ("__import__('os').system('true')", "cannot read"),
        ("p99_ms.__class__ <= 3", "at character 7"),
        ("(" * 60 + "p99_ms<=1" + ")" * 60, "nested"),
        ("p99_ms<=1 and " * 300 + "p99_ms<=1", "characters"),
    ],
)
def test_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        Requirement.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["(", ")", "<=", "and", "or", "miou", "1", "p99_ms", "<"])).map(" ".join)
)
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        requirement = Requirement.parse(text)
    except SpecError:
        return
    assert requirement.evaluate(entry()).status in {"pass", "fail", "not measured"}


comparisons = st.builds(
    lambda name, op, limit: f"{name} {op} {limit}",
    st.sampled_from(["median_ms", "p99_ms", "miou", "size_mb"]),
    st.sampled_from(["<=", "<", ">=", ">", "==", "!="]),
    st.sampled_from([0, 0.7, 1, 10, 13, 20]),
)
expressions = st.recursive(
    comparisons,
    lambda inner: st.builds(lambda a, j, b: f"({a}) {j} {b}", inner, st.sampled_from(["and", "or"]), inner),
    max_leaves=8,
)


@given(expressions)
@settings(max_examples=200, deadline=None)
def test_python_itself_agrees_on_what_was_measured(text: str) -> None:
    one = entry(median_ms=10.0, miou=0.7)
    values = {"median_ms": 10.0, "p99_ms": 13.0, "miou": 0.7, "size_mb": 1.0}
    expected = eval(text, {"__builtins__": {}}, values)
    assert (Requirement.parse(text).evaluate(one).status == "pass") == expected


def test_an_unmeasured_metric_never_decides() -> None:
    """Kleene's table: the outcome is definite only if it is the same for every value the unmeasured one could have."""
    known = {"median_ms <= 10": True, "median_ms <= 9": False}
    for (a, value), junction in itertools.product(known.items(), ("and", "or")):
        possible = {(value and unknown) if junction == "and" else (value or unknown) for unknown in (True, False)}
        expected = "not measured" if len(possible) == 2 else "pass" if possible == {True} else "fail"
        for text in (f"{a} {junction} gpu_mb <= 5", f"gpu_mb <= 5 {junction} {a}"):
            assert Requirement.parse(text).evaluate(entry(median_ms=10.0)).status == expected, text


def test_misses_say_by_how_much() -> None:
    outcome = Requirement.parse("p99_ms <= 10 and miou >= 0.8 and gpu_mb <= 5").evaluate(
        entry(median_ms=10.0, miou=0.7)
    )
    assert [check.text for check in outcome.missed] == [
        "p99_ms 13.00 ms, limit <= 10: 3.00 ms (30%) too much",
        "miou 0.7000, limit >= 0.8: 0.1000 (13%) too little",
        "gpu_mb not measured, limit <= 5",
    ]


def test_a_limit_inside_the_interval_is_close() -> None:
    close, clear = Requirement.parse("miou >= 0.695 and miou >= 0.5").evaluate(entry(miou=0.7)).checks
    assert (close.status, close.is_close) == ("pass", True)
    assert (clear.status, clear.is_close) == ("pass", False)


def test_and_binds_tighter_than_or() -> None:
    root = Requirement.parse("miou>=1 or miou>=2 and miou>=3").root
    assert isinstance(root, Junction) and root.kind == "or" and len(root.parts) == 2


def test_metric_names_carry_their_units() -> None:
    suffix = {"ms": "_ms", "MB": "_mb", "W": "_w", "J": "_j", "images/s": "_per_s", "x": "speedup", "": ""}
    assert all(name.endswith(suffix[metric.unit]) for name, metric in METRICS.items())
