"""The report's forms: every string shown as it is, nothing from elsewhere, the same figures everywhere."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import io
import itertools
import json
import os
import random
import re
import sys
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import pytest
from bench_rows import merged, report, row
from command_line import imported, typed

from edgeseg.decide.entries import MergedReport, Run, merge, read_runs
from edgeseg.decide.requirement import Requirement
from edgeseg.decide.verdict import decide
from edgeseg.errors import ArtifactError, InputError, MissingDependencyError
from edgeseg.evaluate.latency.protocol import BENCH
from edgeseg.evaluate.results import ModuleTime, Profile, Row, WorstImage, row_id, write_report
from edgeseg.report.charts import Scale, latency_scale, nice_step
from edgeseg.report.decision import decision_of
from edgeseg.report.details import CHANGES_SHOWN, PNG
from edgeseg.report.html import environment_lines, html
from edgeseg.report.plain import csv_text, markdown, terminal
from edgeseg.runtime.overlay import class_palette
from edgeseg.store.manifest import Repair

EXAMPLE = Path(__file__).parents[1] / "data" / "bench-report-example.json"
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&|`{{7*7}}[bold]</style>"
VOID = {"meta", "img", "br", "hr", "link", "input", "rect", "line", "circle", "polygon", "polyline", "path"}


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(merged_report: MergedReport, require: str | None = None) -> str:
    return html(merged_report, decide(merged_report, None if require is None else Requirement.parse(require)))


def full_row(name: str, folder_picture: str | None = None, **figures: object) -> Row:
    """A row with everything a page shows."""
    one = row(name, samples_ms=tuple(10 + 0.1 * k for k in range(20)), **figures)  # type: ignore[arg-type]
    assert one.accuracy is not None
    profile = Profile(name, 3, 1.0, (ModuleTime(name, 2, 1.0, 1.0, {name: 1.0}),))
    return replace(
        one,
        profile=profile,
        accuracy=replace(one.accuracy, worst=(WorstImage(name, 0.9, 0.5, folder_picture),)),
        notes=(name,),
    )


@pytest.fixture(scope="module")
def example() -> str:
    return page_of(merge(read_runs([EXAMPLE])), "p99_ms<=8 and miou>=0.68")


def test_page_is_well_formed_and_reaches_for_nothing(example: str) -> None:
    page = Page(example)
    assert page.open == []
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        for name in ("src", "href", "xlink:href", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, value)
    assert not re.search(r"url\(|@import|https?:", example)


def test_page_has_headings_in_order_unique_ids_and_labels(example: str) -> None:
    page = Page(example)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for name in (attributes.get("aria-labelledby") or "").split():
            assert name in ids
    tables = sum(tag == "table" for tag, _ in page.elements)
    assert tables == sum((attributes.get("class") or "") == "scroll" for _, attributes in page.elements)


def test_page_shows_the_decision_and_the_figures(example: str) -> None:
    text = " ".join(" ".join(Page(example).texts).split())
    assert "Deploy fpn-int8" in text
    assert "p99_ms 9.02 ms, limit <= 8: 1.02 ms (13%) too much" in text
    report_json = json.loads(EXAMPLE.read_text())
    for one in report_json["rows"]:
        assert f"{one['latency']['end_to_end']['median_ms']:.2f}" in text
        for iou in one["accuracy"]["truth"]["per_class_iou"]:
            assert f"{iou:.4f}" in text
    assert report_json["command"] in text
    assert all(note in text for note in report_json["notes"])


def test_settings_that_are_not_set_are_left_out() -> None:
    bench = replace(report(row("one")), protocol=dataclasses.asdict(BENCH))
    facts = dict(environment_lines(Run(bench)))
    assert BENCH.max_iterations is None and "None" not in page_of(merge([Run(bench)]))
    assert facts["Protocol"].startswith(f"warmup_ms {BENCH.warmup_ms}, ")
    assert facts["Protocol"].count(", ") + 1 == sum(value is not None for value in bench.protocol.values())


def test_hostile_names_stay_text() -> None:
    rows = (
        full_row(HOSTILE, miou=0.7, is_baseline=True, class_names=(HOSTILE, HOSTILE), data=HOSTILE),
        full_row(HOSTILE + "2", "../x.png", miou=0.6, drop=0.1, class_names=(HOSTILE, HOSTILE), data=HOSTILE),
    )
    bench = replace(report(*rows, device=HOSTILE), command=HOSTILE, notes=(HOSTILE,), protocol={HOSTILE: HOSTILE})
    merged_report = merge([Run(bench, Path("somewhere"), HOSTILE)])
    text = page_of(merged_report)
    page = Page(text)
    assert page.open == []
    assert "script" not in {tag for tag, _ in page.elements}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert not any(tag == "img" for tag, _ in page.elements)
    assert "49" not in "".join(page.texts).replace("{{7*7}}", "")[:200]
    assert sum(HOSTILE in piece for piece in page.texts) > 10

    verdicts = decide(merged_report)
    marked = markdown(merged_report, verdicts)
    outside_code = re.sub(r"\\[^\n]|`[^`\n]*`", "", marked)
    assert "<script" not in outside_code and "<img" not in outside_code
    table = [line for line in marked.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1

    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=600).print(terminal(verdicts, width=600))
    assert "[bold]" in stream.getvalue()


@pytest.mark.parametrize("missing", ["jinja2", "markupsafe"])
def test_what_a_page_needs_is_said(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("html", "details", "charts"):
        monkeypatch.delitem(sys.modules, f"edgeseg.report.{module}")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(
        MissingDependencyError, match=rf"{missing} is needed to write an HTML report: .*edgeseg\[report\]"
    ):
        importlib.import_module("edgeseg.report.html").require_templates()


def test_csv_has_every_row_and_no_formula() -> None:
    bench = merged(row("=cmd()", 12.5, miou=0.7, agreement=0.99), row("plain", None))
    table = list(csv.DictReader(io.StringIO(csv_text(bench, decide(bench)))))
    assert [line["engine"] for line in table] == ["'=cmd()", "plain"]
    assert float(table[0]["median_ms"]) == 12.5 and float(table[0]["miou_low"]) == pytest.approx(0.69)
    assert table[1]["median_ms"] == table[1]["miou"] == table[1]["gpu_mb"] == ""


@pytest.mark.parametrize(
    "name",
    [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "\n=1",
        " =1",
        "\u00a0=1",
        ";=1",
        "\uff1d1",
        "\uff0b1",
        "\x00=1",
        "\ufeff=1",
    ],
)
def test_no_cell_begins_like_a_formula(name: str) -> None:
    bench = merged(row(name, 12.5), row("e\r=1", 12.5), row("", 12.5))
    first, inside, empty = csv.DictReader(io.StringIO(csv_text(bench, decide(bench)), newline=""))
    assert first["engine"] == f"'{name}".replace("\0", "\ufffd")
    assert (inside["engine"], empty["engine"]) == ("e\r=1", "")


def test_json_is_for_programs() -> None:
    bench = merged(row("a", 5, miou=0.7), row("b", 9, miou=0.5))
    verdicts = decide(bench, Requirement.parse("miou >= 0.6"))
    value = json.loads(msgspec.json.encode(decision_of(bench, verdicts)))
    (device,) = value["devices"]
    assert (device["answer"], device["deploy"], device["folder"]) == ("deploy", "a b1 t- s1", "engines/a")
    assert [r["status"] for r in device["rows"]] == ["pass", "fail"]
    assert device["rows"][0]["figures"]["gpu_mb"] is None


def test_pictures_are_embedded_only_from_beside_the_report(tmp_path: Path) -> None:
    folder = tmp_path / "bench"
    folder.mkdir()
    (folder / "good.png").write_bytes(PNG + b"picture")
    (folder / "fake.png").write_bytes(b"<svg onload=alert(1)>")
    (tmp_path / "secret.png").write_bytes(PNG + b"secret")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["good.png", "fake.png", "../secret.png", str(tmp_path / "secret.png"), "link.png", "gone.png"]
    (folder / "loop.png").symlink_to("loop.png")
    names += ["loop.png", "n" * 300, "a\0b"]
    rows = [full_row(f"e{k}", name, miou=0.6) for k, name in enumerate(names)]
    page = Page(page_of(merge([Run(report(*rows), folder)])))
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 1
    assert images[0]["src"] == "data:image/png;base64,iVBORw0KGgpwaWN0dXJl"
    assert "image, baseline's mask, engine's mask" in (images[0]["alt"] or "")
    text = " ".join(page.texts)
    assert text.count("outside its own folder") == 3
    assert "fake.png is no PNG" in text and "gone.png is not beside" in text and "loop.png is not beside" in text
    assert "cannot be read (File name too long)" in text and "cannot be read (embedded null byte)" in text


def test_confusion_difference_is_in_points_of_the_truth() -> None:
    base, engine = row("pytorch", 20, miou=0.8, is_baseline=True), row("e", 10, miou=0.7, drop=0.1)
    assert engine.accuracy is not None and engine.accuracy.truth is not None
    worse = replace(engine.accuracy.truth, confusion=((85, 15), (10, 90)))
    engine = replace(engine, accuracy=replace(engine.accuracy, truth=worse))
    text = page_of(merged(base, engine))
    # 90 -> 85 of 100 road pixels right, 20 -> 10 of 100 sky pixels taken for road.
    cells = re.findall(r'<td class="n c(-?\d)">([^<]+)</td>', text)
    assert cells == [("-4", "-5.00"), ("-4", "+5.00"), ("4", "-10.00"), ("4", "+10.00")]


def test_many_classes_list_the_largest_changes() -> None:
    count = 30
    matrix = tuple(tuple(10 if i == j else 1 for j in range(count)) for i in range(count))
    changed = tuple(tuple(v + (i * j) % 7 for j, v in enumerate(line)) for i, line in enumerate(matrix))
    rows = []
    for name, confusion in (("pytorch", matrix), ("e", changed)):
        one = row(name, 10, miou=0.7, drop=0.0 if name == "e" else None, is_baseline=name == "pytorch")
        assert one.accuracy is not None and one.accuracy.truth is not None
        truth = replace(one.accuracy.truth, confusion=confusion)
        rows.append(replace(one, accuracy=replace(one.accuracy, truth=truth)))
    assert page_of(merged(*rows)).count(" taken for ") == CHANGES_SHOWN


def test_classes_stand_beside_the_baseline_they_were_compared_with() -> None:
    """Not beside another model's, though judged on the same data and with the same classes."""
    rows = [row(name, 20, miou=0.8, is_baseline=True) for name in ("pytorch-fpn", "pytorch-unet")]
    compared, alone = row("unet", 10, miou=0.7, agreement=0.9), row("pan", 10, miou=0.7)
    assert compared.accuracy is not None and compared.accuracy.agreement is not None
    agreement = replace(compared.accuracy.agreement, baseline="pytorch-unet")
    compared = replace(compared, accuracy=replace(compared.accuracy, agreement=agreement))
    page = page_of(merged(*rows, compared, alone))
    assert re.findall(r"<h3[^>]*>(\w+ against pytorch[\w-]*)", page) == ["unet against pytorch-unet"]


def folds(text: str) -> dict[str, bool]:
    """Engines' sections by name, and whether each is unfolded."""
    shown = re.findall(r'<details class="one"( open)?>\s*<summary><h3[^>]*>(.*?) against', text)
    return {name: bool(is_open) for is_open, name in shown}


def test_only_the_engine_to_deploy_is_unfolded() -> None:
    rows = (
        row("pytorch", 50.0, miou=0.7, is_baseline=True),
        row("slow", 20.0, miou=0.7, drop=0.0),
        row("fast", 10.0, miou=0.7, drop=0.0),
    )
    assert folds(page_of(merged(*rows))) == {"slow": False, "fast": True}
    nothing_fits = page_of(merged(*rows), "miou>=0.9")
    assert folds(nothing_fits) == {"slow": True, "fast": True}


def test_equal_masks_are_said_not_shown() -> None:
    baseline = row("pytorch", 50.0, miou=0.7, is_baseline=True)
    equal = page_of(merged(baseline, row("same", miou=0.7, agreement=1.0)))
    differing = page_of(merged(baseline, row("other", miou=0.7, agreement=0.9)))
    assert "masks are those of pytorch, pixel for pixel" in equal
    assert "pixel for pixel" not in differing
    assert ("confuses more" in equal, "confuses more" in differing) == (False, True)


def test_repairs_are_shown_with_what_they_gained() -> None:
    baseline, plain = row("pytorch", 50.0, miou=0.7, is_baseline=True), row("plain", 10.0, miou=0.7)
    repairs = (
        Repair("calibration-method", {"mse": 30, "percentile": 1200}, "tensorrt", 8, 0.9712, 0.9794),
        Repair("equalization", {"channels": 64}, "tensorrt", 8, 0.9794, None),
    )
    repaired = replace(plain, engine=replace(plain.engine, repairs=repairs))
    assert "What was done" not in page_of(merged(baseline, plain))
    page = page_of(merged(baseline, repaired))
    section = page[page.index("What was done") :]
    for expected in ("range methods chosen", "30 mse, 1,200 percentile", "0.9712", "0.9794", ">-<", "scheme tensorrt"):
        assert expected in section


def test_pictures_come_with_the_meaning_of_their_colours() -> None:
    page = Page(page_of(merged(full_row("one", miou=0.7, drop=0.0, agreement=0.9, class_names=("road", "background")))))
    colours = [str(a["style"]) for tag, a in page.elements if tag == "i" and "style" in a]
    palette = class_palette(1)[0]
    assert colours == ["background: #{:02x}{:02x}{:02x}".format(*palette), "background: #000000"]


def test_every_command_is_there_once_builds_before_the_bench() -> None:
    made = "edgeseg build --arch fpn --precision int8"
    rows = [row(name, batch=batch) for name in ("a", "b") for batch in (1, 4)]
    rows = [replace(r, engine=replace(r.engine, build_command=f"{made} --output {r.engine.name}")) for r in rows]
    both = merged(row("pytorch", is_baseline=True), *rows)
    expected = [f"{made} --output a", f"{made} --output b", "edgeseg bench ..."]
    assert list(both.runs[0].commands) == expected
    assert "\n".join(expected) in "".join(Page(page_of(both)).texts)
    marked = markdown(both, decide(both))
    assert [line for line in marked.splitlines() if line.startswith("- `edgeseg")] == [f"- `{c}`" for c in expected]


def test_several_devices_have_their_own_tables() -> None:
    both = merge([Run(report(row("e", 10, miou=0.7), device=d)) for d in ("nano", "orin")])
    text = page_of(both)
    assert len(re.findall(r'<section class="device"', text)) == 2
    assert "not ranked against each other" in text
    assert "not ranked against each other" in markdown(both, decide(both))


def test_rows_without_anything_measured_still_make_a_page() -> None:
    page = Page(page_of(merged(row("e", None))))
    assert "Not decided: not measured" in " ".join(page.texts)
    assert page.open == []


def test_an_engine_driven_in_several_ways_has_a_line_of_throughput_against_latency() -> None:
    one = row("e", 10, miou=0.7)
    assert "Throughput against latency" not in page_of(merged(one))
    driven = []
    for streams, rate, p99_ms in ((1, 100.0, 12.0), (2, 150.0, 17.0)):
        setting = replace(one.setting, streams=streams)
        assert one.latency is not None
        end_to_end = replace(one.latency.end_to_end, p99_ms=p99_ms)
        latency = replace(one.latency, images_per_s=rate, end_to_end=end_to_end)
        driven.append(replace(one, id=row_id("e", setting), setting=setting, latency=latency))
    page = page_of(merged(*driven))
    (chart,) = re.findall(r"<svg(?:(?!</svg>).)*Throughput against latency.*?</svg>", page, re.DOTALL)
    assert "p99 12.00 ms, 100.0 images/s" in chart
    (line,) = re.findall(r'<polyline class="front" points="(.*?)"', chart)
    (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in line.split())
    assert x1 < x2  # later
    assert y1 > y2  # more, which is up
    assert Page(page).open == []


@pytest.mark.parametrize(("rough", "expected"), [(0.3, 0.5), (1.0, 1.0), (1.2, 2.0), (2.1, 2.5), (7.0, 10.0), (40, 50)])
def test_ticks_are_round(rough: float, expected: float) -> None:
    assert nice_step(rough) == pytest.approx(expected)
    assert all(0 <= tick <= 7 * rough for tick in Scale(0, 7 * rough, 0, 1).ticks())


def test_latencies_far_apart_get_a_logarithmic_axis() -> None:
    near, far = latency_scale(5, 30, 0, 100), latency_scale(2, 2000, 0, 100)
    assert not near.is_log and far.is_log
    assert [far(v) for v in (2, 20, 200, 2000)] == pytest.approx([0, 100 / 3, 200 / 3, 100], abs=0.01)
    assert far.ticks() == (10, 100, 1000)
    assert latency_scale(3, 40, 0, 1).ticks() == (5, 10, 20)
    rows = (row("fast", 2, miou=0.7, samples_ms=(2, 2.1)), row("slow", 900, miou=0.7, samples_ms=(900, 950)))
    assert page_of(merged(*rows)).count("logarithmic") == 2


def test_reports_are_read_once_and_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="given twice"):
        read_runs([EXAMPLE, EXAMPLE])
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(ArtifactError):
        read_runs([bad])


cli = partial(typed, "report")


@pytest.mark.parametrize(
    ("require", "code"),
    [("p99_ms<=8 and miou>=0.68 and size_mb<=20", 0), ("p99_ms<=1", 3), ("gpu_mb<=100", 3), ("p99<=1", 2)],
)
def test_exit_codes_gate(require: str, code: int) -> None:
    assert cli(str(EXAMPLE), "--require", require).returncode == code


def calls_of(rows: int) -> int:
    """How many function calls it takes to decide on so many rows and to write every form of the report."""
    generator = random.Random(0)
    made = [
        row(
            f"e{k}", 5 + 50 * generator.random(), miou=generator.random(), drop=0.0, agreement=0.995,
            precision=("fp32", "int8")[k % 2], samples_ms=tuple(5 + generator.random() for _ in range(8)),
            is_baseline=k % 10 == 0,
        )
        for k in range(rows)
    ]  # fmt: skip
    together = merge([Run(report(*made))])
    count = itertools.count()
    sys.setprofile(lambda frame, event, argument: next(count) and None)
    try:
        verdicts = decide(together)
        texts = html(together, verdicts), markdown(together, verdicts), csv_text(together, verdicts)
        decision_of(together, verdicts)
        terminal(verdicts, width=80)
    finally:
        sys.setprofile(None)
    assert all(f"e{rows - 1}" in text for text in texts)
    return next(count)


def test_work_grows_with_the_rows_not_with_their_square() -> None:
    few, many = calls_of(100), calls_of(500)
    assert many < 6 * few  # a square would be 25 times as much


def test_a_verdict_that_noise_could_turn_is_none(tmp_path: Path) -> None:
    """Two engines of 12 samples that vary from 20 to 200 ms; where each pair is 3 to 1, it is decided."""
    calls = (55.0, 20.0, 60.0, 58.0, 200.0, 50.0, 45.0, 52.0, 61.0, 30.0, 56.0, 57.0)
    slow = row("full", 55.5, miou=0.7, drop=0.0, samples_ms=calls)
    fast = row("quant", 24.0, miou=0.7, drop=0.0, precision="int8", samples_ms=(*calls[6:], *calls[:6]))
    write_report(tmp_path / "noisy.json", report(slow, fast))
    for options in ((), ("--require", "miou >= 0.1")):
        done = cli(str(tmp_path / "noisy.json"), "--json", *options)
        assert done.returncode == 3, done.stderr
        (device,) = json.loads(done.stdout)["devices"]
        assert device["answer"] == "cannot tell" and device["deploy"] is None and "measure longer" in device["reason"]
    steady = replace(fast, latency=replace(fast.latency, samples_ms=tuple(ms / 3 for ms in calls)))
    write_report(tmp_path / "steady.json", report(slow, steady))
    assert cli(str(tmp_path / "steady.json")).returncode == 0


def test_command_writes_what_is_asked(tmp_path: Path) -> None:
    files = [tmp_path / "new" / name for name in ("r.html", "r.md", "r.csv")]
    done = cli(str(EXAMPLE), "--html", str(files[0]), "--markdown", str(files[1]), "--csv", str(files[2]), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["devices"][0]["deploy"] == "fpn-int8 b1 t- s1"
    assert all(path.stat().st_size > 500 for path in files)
    blocked = cli(str(EXAMPLE), "--csv", str(files[2] / "under-a-file.csv"))
    assert blocked.returncode == 1 and "cannot write" in blocked.stderr


def test_files_are_replaced_only_when_asked_and_inputs_never(tmp_path: Path) -> None:
    mine, copy = tmp_path / "mine.csv", tmp_path / "b.json"
    mine.write_text("mine")
    copy.write_bytes(EXAMPLE.read_bytes())
    refused = cli(str(EXAMPLE), "--csv", str(mine))
    assert (refused.returncode, refused.stderr.count("\n"), mine.read_text()) == (2, 1, "mine")
    assert "exists; give --force" in refused.stderr
    assert cli(str(EXAMPLE), "--csv", str(mine), "--force").returncode == 0
    assert mine.read_text().startswith("number,device,")
    for force in ([], ["--force"]):
        done = cli(str(copy), "--csv", str(copy), *force)
        assert done.returncode == 2 and "would replace the input" in done.stderr
    assert copy.read_bytes() == EXAMPLE.read_bytes()
    assert cli(str(EXAMPLE), "--csv", str(tmp_path / "n"), "--html", str(tmp_path / "n")).returncode == 2


def test_files_can_be_printed_and_devices_stay_devices(tmp_path: Path) -> None:
    printed = cli(str(EXAMPLE), "--csv", "-", "--markdown", "/dev/null")
    assert printed.returncode == 0
    assert {len(cells) for cells in csv.reader(io.StringIO(printed.stdout))} == {
        printed.stdout.splitlines()[0].count(",") + 1
    }
    assert Path("/dev/null").is_char_device()
    assert cli(str(EXAMPLE), "--csv", "-", "--json").returncode == 2
    os.mkfifo(tmp_path / "pipe")
    hangs_not = cli(str(tmp_path / "pipe"))
    assert hangs_not.returncode == 1 and "is no regular file" in hangs_not.stderr


def test_report_needs_no_torch(tmp_path: Path) -> None:
    words = ["report", str(EXAMPLE), "--html", str(tmp_path / "r.html")]
    imported(words, {"torch", "onnx", "onnxruntime", "openvino", "ray"})
