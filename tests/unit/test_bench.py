"""The bench as a whole, on engines without a network."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench_rows import row_of
from click.testing import CliRunner
from memory_backend import MemorySession, write_memory_engine
from numpy.typing import NDArray
from PIL import Image

from edgeseg.backends import BACKENDS
from edgeseg.cli import bench as bench_verb
from edgeseg.cli import report as report_verb
from edgeseg.errors import ArtifactError, BuildError, CheckpointError, InputError, OutputExistsError, SpecError
from edgeseg.evaluate.accuracy.evaluation import AccuracyRequest
from edgeseg.evaluate.bench import BenchRequest, run_bench
from edgeseg.evaluate.bench_table import bench_summary, ratio_words
from edgeseg.evaluate.contenders import (
    Contender,
    Opener,
    baseline_contenders,
    baseline_request,
    engine_contenders,
)
from edgeseg.evaluate.latency.measure import measure_setting
from edgeseg.evaluate.results import Setting, SpeedComparison, read_report
from edgeseg.progress import SilentReporter
from edgeseg.spec import BatchRange, InputSpec, ModelRequest, ModelSpec, PipelineSpec
from edgeseg.store.documents import write_json
from edgeseg.store.engine import read_manifest
from edgeseg.store.manifest import MANIFEST_NAME

EXAMPLE = Path(__file__).parents[1] / "data" / "bench-report-example.json"
SPEC = PipelineSpec(ModelSpec("custom", classes=4), InputSpec(32, 32, batch=BatchRange(1, 2, 2)))
QUICK = ("--baseline", "none", "--duration-s", "0.01", "--fresh-processes", "0")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(BACKENDS, "memory", "memory_backend")
    write_memory_engine(tmp_path / "int8", SPEC)
    return tmp_path / "int8"


def test_a_bench_without_a_baseline_says_why(engine: Path) -> None:
    request = BenchRequest((engine,), batches=(1, 4), streams=(1, 2), duration_s=0.02, fresh_processes=0)
    report = run_bench(request, SilentReporter())
    assert [row.id for row in report.rows] == ["int8 b1 t- s1", "int8 b1 t- s2", "int8 b4 t- s1", "int8 b4 t- s2"]
    assert any("no PyTorch baseline for int8: it was built from a module object" in note for note in report.notes)
    assert report.comparisons == ()
    for row in report.rows:
        assert row.latency is not None
        assert row.latency.end_to_end.count == len(row.latency.samples_ms) >= 4
        assert row.latency.images_per_s > 0
        assert row.latency.stages.compute_ms is not None
        assert row.latency.stages.h2d_ms is None
        assert (row.memory, row.cold_start, row.profile, row.accuracy) == (None, None, None, None)
        assert (row.setting.source_height, row.setting.source_width) == (32, 32)
    assert row_of(report, "int8 b4 t- s1").notes == ("the engine takes batches of up to 2: 4 images are 2 runs",)


def test_two_engines_and_no_threads_to_set(engine: Path, tmp_path: Path) -> None:
    write_memory_engine(tmp_path / "fp16", SPEC)
    request = BenchRequest((engine, tmp_path / "fp16"), baselines=(), duration_s=0.01, fresh_processes=0)
    names = [row.engine.name for row in run_bench(request, SilentReporter()).rows]
    assert names == ["int8", "fp16"]
    with pytest.raises(SpecError, match="no threads to set"):
        run_bench(replace(request, threads=(2,)), SilentReporter())
    with pytest.raises(SpecError, match="given twice"):
        run_bench(replace(request, engines=(engine, engine)), SilentReporter())


def test_what_a_fresh_process_cannot_do_is_said_and_the_rest_is_measured(engine: Path) -> None:
    """A new process knows no memory backend: the test put it into the table of this one alone."""
    request = BenchRequest((engine,), baselines=(), duration_s=0.01, fresh_processes=1)
    (row,) = run_bench(request, SilentReporter()).rows
    assert (row.cold_start, row.memory) == (None, None)
    assert row.latency is not None
    assert any("not measured: int8 failed in a fresh process" in note and "'memory'" in note for note in row.notes)


def test_data_that_is_not_there_is_said_before_anything_is_measured(engine: Path, tmp_path: Path) -> None:
    request = BenchRequest((engine,), baselines=(), duration_s=86_400, fresh_processes=0)
    with pytest.raises(InputError, match="is not a folder"):
        run_bench(request, SilentReporter(), AccuracyRequest(tmp_path / "missing"))
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for index in range(2):
            Image.fromarray(np.full((32, 32), 9 * index, np.uint8)).save(tmp_path / "data" / kind / f"{index}.png")
    with pytest.raises(InputError, match=r"1\.png holds 9"):
        run_bench(request, SilentReporter(), AccuracyRequest(tmp_path / "data"))


def test_engines_of_one_name_are_told_apart(engine: Path, tmp_path: Path) -> None:
    write_memory_engine(tmp_path / "old" / "int8", SPEC)
    names = [c.name for c in engine_contenders([engine, tmp_path / "old" / "int8"])[0]]
    assert len(set(names)) == 2
    assert all(name.endswith("int8") for name in names)


@pytest.mark.parametrize(
    "change",
    [
        {"batches": (0,)},
        {"streams": ()},
        {"streams": (1, 10**9)},
        {"duration_s": float("inf")},
        {"duration_s": -1.0},
        {"baselines": ("tensorflow",)},
    ],
)
def test_impossible_requests_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(SpecError):
        replace(BenchRequest((Path("x"),)), **change)


@pytest.mark.parametrize("change", [{"batches": (1, 65_535), "streams": (1024,)}, {"source_size": (65_535, 65_535)}])
def test_images_that_fit_no_memory_are_refused_before_anything_is_loaded(
    engine: Path, change: dict[str, object]
) -> None:
    request = replace(BenchRequest((engine,), baselines=(), fresh_processes=0), **change)
    with pytest.raises(SpecError, match="GB; at most 4 GB are measured"):
        run_bench(request, SilentReporter())


def edited(engine: Path, **change: object) -> Path:
    write_json(engine / MANIFEST_NAME, replace(read_manifest(engine), **change))  # type: ignore[arg-type]
    return engine


def test_the_baseline_is_what_was_asked_of_the_model(engine: Path, tmp_path: Path) -> None:
    """Read from the manifest's fields: whatever words are used for the weights."""
    args = {"decoder_dropout": 0.0, "aux_params": {"classes": 2}}
    model = ModelSpec("fpn", "resnet18", classes=4, model_args=args)
    asked = ModelRequest(arch="fpn", weights="model.pt", model_args=args, keep_aux=True, mean=(0.5, 0.5, 0.5))
    edited(engine, spec=replace(SPEC, model=model), model_request=asked, weights="demo weights (not these)")
    manifest = read_manifest(engine)
    assert baseline_request(manifest, None) == (asked, "")
    elsewhere = tmp_path / "model.pt"
    given, _ = baseline_request(manifest, elsewhere)
    assert given is not None
    assert (given.weights, given.encoder, given.classes, given.model_args) == (str(elsewhere), "resnet18", 4, args)
    assert (given.keep_aux, given.mean) == (True, (0.5, 0.5, 0.5))
    # A folder of before this was recorded, or of a module object: the user has to say where the weights are.
    silent = replace(manifest, model_request=None)
    missing, reason = baseline_request(silent, None)
    assert missing is None and "--weights" in reason
    assert baseline_request(silent, elsewhere)[0] == replace(given, mean=None)


def test_weights_that_were_given_and_do_not_load_are_an_error(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = replace(SPEC, model=ModelSpec("fpn", "resnet18", classes=4))
    edited(engine, spec=spec, model_request=ModelRequest(arch="fpn", weights="gone.pt"))

    class Refusing(Opener):
        def loaded(self, contender: object) -> object:  # type: ignore[override]
            raise CheckpointError("another model's weights")

    contenders, _ = engine_contenders([engine])
    given = tmp_path / "given.pt"
    given.write_bytes(b"")
    with pytest.raises(CheckpointError, match="another model"):
        baseline_contenders(contenders, ("pytorch",), given, Refusing())
    assert baseline_contenders(contenders, ("pytorch",), None, Refusing())[0] == []


def test_the_command_writes_and_protects_the_report(engine: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    arguments = [str(engine), *QUICK, "--json", str(target)]
    done = CliRunner().invoke(bench_verb.command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert read_report(target).rows[0].engine.name == "int8"
    again = CliRunner().invoke(bench_verb.command, arguments)
    assert isinstance(again.exception, OutputExistsError)
    assert "--force" in str(again.exception)
    assert again.exception.exit_code == 2
    manifest = (engine / MANIFEST_NAME).read_bytes()
    over_engine = CliRunner().invoke(bench_verb.command, [*arguments[:-1], str(engine / MANIFEST_NAME), "--force"])
    assert "would replace the input" in str(over_engine.exception)
    assert (engine / MANIFEST_NAME).read_bytes() == manifest


def test_json_on_standard_output_is_json_alone(engine: Path) -> None:
    arguments = [str(engine), *QUICK, "--json", "-"]
    done = CliRunner().invoke(bench_verb.command, arguments, catch_exceptions=False)
    assert json.loads(done.stdout)["schema_version"] == 1


def test_the_summary_shows_what_was_measured_and_dashes_elsewhere() -> None:
    from rich.console import Console

    text = io.StringIO()
    Console(width=80, file=text).print(bench_summary(read_report(EXAMPLE)))
    shown = text.getvalue()
    for words in (
        "fpn-int8 b1 t- s1",
        "encoder.layer1",
        "6.41x (6.35-6.51)",
        "miou",
        "* noisy",
        "above 1.5 times the median",
    ):
        assert words in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_ratios_in_words() -> None:
    tie = SpeedComparison("a", "b", 1.01, 0.98, 1.03, 40, "no difference")
    assert ratio_words(tie) == "no difference"
    assert ratio_words(replace(tie, ratio=2.0, low=1.9, high=2.1, verdict="faster")) == "2.00x (1.90-2.10)"
    assert ratio_words(None) == "-"


def test_images_to_time_with_are_the_same_every_time(engine: Path) -> None:
    from edgeseg.evaluate.latency.measure import noise
    from edgeseg.evaluate.results import Setting

    contender = engine_contenders([engine])[0][0]
    first = noise(contender, Setting(batch=2, source_height=40, source_width=48))
    assert first.shape == (2, 40, 48, 3)
    assert np.array_equal(first, noise(contender, Setting(batch=2, source_height=40, source_width=48)))


def broken_engine(folder: Path) -> Path:
    """An engine file that is not the one its manifest vouches for."""
    write_memory_engine(folder, SPEC)
    (folder / "engine.json").write_text("{}")
    return folder


class Failing(MemorySession):
    """Runs batches of one image, and no others."""

    def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        if len(images) > 1:
            raise BuildError("out of memory")
        return super().run(images)


def test_an_engine_that_does_not_load_is_named_and_the_others_are_measured(engine: Path, tmp_path: Path) -> None:
    damaged, gone = broken_engine(tmp_path / "damaged"), tmp_path / "gone"
    request = BenchRequest((damaged, engine, gone), baselines=(), duration_s=0.01, fresh_processes=0)
    report = run_bench(request, SilentReporter())
    assert [row.engine.name for row in report.rows] == ["int8"]
    assert [(f.engine, f.folder, f.what) for f in report.failed] == [
        ("damaged", str(damaged), "load"),
        ("gone", str(gone), "load"),
    ]
    assert "truncated or edited" in report.failed[0].reason
    assert "no such folder" in report.failed[1].reason
    with pytest.raises(
        BuildError, match=r"no engine could be measured: damaged: .*truncated.*; gone: .*no such folder"
    ):
        run_bench(replace(request, engines=(damaged, gone)), SilentReporter())
    with pytest.raises(ArtifactError, match="truncated or edited"):
        run_bench(replace(request, engines=(damaged,)), SilentReporter())


def test_an_engine_that_fails_in_one_setting_keeps_the_rows_of_the_others(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_memory_engine(tmp_path / "small", SPEC)
    real = Opener.open

    def opened(self: Opener, contender: Contender, *settings: Any) -> Any:
        return Failing(SPEC) if contender.name == "small" else real(self, contender, *settings)

    monkeypatch.setattr(Opener, "open", opened)
    request = BenchRequest(
        (engine, tmp_path / "small"), baselines=(), batches=(1, 2), streams=(1, 2), duration_s=0.01, fresh_processes=0
    )
    report = run_bench(request, SilentReporter())
    assert [row.id for row in report.rows] == [
        "int8 b1 t- s1",
        "small b1 t- s1",
        "int8 b1 t- s2",
        "small b1 t- s2",
        "int8 b2 t- s1",
        "int8 b2 t- s2",
    ]
    assert [(f.engine, f.what, f.reason) for f in report.failed] == [
        ("small", "latency b2 t- s1", "out of memory"),
        ("small", "latency b2 t- s2", "out of memory"),
    ]


def test_a_baseline_is_not_measured_where_no_engine_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = Contender("pytorch", SPEC, baseline="pytorch")
    gone = Contender("gone", SPEC, folder=str(tmp_path / "gone"))
    real, called = Opener.open, []

    class Counted(MemorySession):
        def run(self, images: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
            called.append(len(images))
            return super().run(images)

    def opened(self: Opener, contender: Contender, *settings: Any) -> Any:
        return Counted(SPEC) if contender is baseline else real(self, contender, *settings)

    monkeypatch.setattr(Opener, "open", opened)
    measured = measure_setting([baseline, gone], Opener(), Setting(), BenchRequest((), duration_s=0.01).protocol)
    assert called == []
    assert list(measured.not_loaded) == ["gone"]


@pytest.mark.parametrize(
    ("count", "limit", "advice"), [(4, None, "give more with --data"), (6, 4, "raise --limit"), (6, None, None)]
)
def test_too_few_masks_for_a_drop_are_said(
    engine: Path, tmp_path: Path, count: int, limit: int | None, advice: str | None
) -> None:
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "data" / kind / f"{index}.png")
    accuracy = AccuracyRequest(tmp_path / "data", limit=limit, state_folder=tmp_path / "state")
    notes = accuracy.check(engine_contenders([engine])[0])
    expected = f"4 images with masks: no drop against the baseline is judged, that needs at least 5; {advice}"
    assert notes == (() if advice is None else (expected,))
    report = run_bench(BenchRequest((engine,), duration_s=0, fresh_processes=0), SilentReporter(), accuracy)
    assert set(notes) <= set(report.notes)


def test_a_broken_mask_does_not_throw_the_latency_away(engine: Path, tmp_path: Path) -> None:
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        side = 32 if kind == "images" else 16
        Image.fromarray(np.zeros((side, side), np.uint8)).save(tmp_path / "data" / kind / "a.png")
    request = BenchRequest((engine,), baselines=(), duration_s=0.01, fresh_processes=0)
    accuracy = AccuracyRequest(tmp_path / "data", state_folder=tmp_path / "state")
    report = run_bench(request, SilentReporter(), accuracy)
    assert report.rows[0].latency is not None
    assert report.rows[0].accuracy is None
    (failure,) = report.failed
    assert (failure.engine, failure.what) == ("int8", "accuracy")
    assert "is 16x16 and its image" in failure.reason
    with pytest.raises(InputError, match="is 16x16 and its image"):
        run_bench(replace(request, duration_s=0.0), SilentReporter(), accuracy)


def test_a_failure_is_shown_and_ends_in_exit_code_1(engine: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    arguments = [str(engine), str(broken_engine(tmp_path / "damaged")), *QUICK, "--json", str(target)]
    done = CliRunner().invoke(bench_verb.command, arguments, catch_exceptions=False)
    assert done.exit_code == 1
    assert "failed: damaged (load):" in done.stdout
    assert "damaged failed (load)" in done.stderr
    assert [f.engine for f in read_report(target).failed] == ["damaged"]
    shown = CliRunner().invoke(
        report_verb.command,
        [str(target), "--markdown", str(tmp_path / "r.md"), "--html", str(tmp_path / "r.html")],
        catch_exceptions=False,
    )
    assert shown.exit_code == 0
    for text in (shown.stdout, (tmp_path / "r.md").read_text(), (tmp_path / "r.html").read_text()):
        assert "Not built or not measured" in text
        assert "damaged" in text
    as_json = CliRunner().invoke(report_verb.command, [str(target), "--json"], catch_exceptions=False)
    assert [f["engine"] for f in json.loads(as_json.stdout)["failed"]] == ["damaged"]


def test_one_command_from_engines_to_page_and_answer(engine: Path, tmp_path: Path) -> None:
    page, target = tmp_path / "page.html", tmp_path / "report.json"
    plain = [str(engine), *QUICK]

    def bench(*more: object) -> Any:
        return CliRunner().invoke(bench_verb.command, [*plain, *map(str, more)], catch_exceptions=False)

    done = bench("--html", page, "--json", target)
    assert done.exit_code == 0 and f"written: {page}" in done.stdout and "end to end, ms" in done.stdout
    shown = CliRunner().invoke(
        report_verb.command, [str(target), "--html", str(tmp_path / "other.html"), "--title", "edgeseg bench"]
    )
    assert shown.exit_code in (0, 3)
    assert page.read_text() == (tmp_path / "other.html").read_text(), "the page edgeseg report makes of the JSON"
    with pytest.raises(OutputExistsError):
        bench("--html", page)
    with pytest.raises(SpecError, match="only one thing can be printed"):
        bench("--json", "-", "--html", "-")
    assert bench("--require", "size_mb<=1000").exit_code == 0
    refused = bench("--require", "size_mb<=0.0000001")
    assert refused.exit_code == 3 and "size" in refused.stdout
