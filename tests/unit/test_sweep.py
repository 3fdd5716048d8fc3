"""A sweep: its config is checked, what was done is reused, a failing cell stops nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from bench_rows import report, row
from command_line import typed
from test_engine_folder import make_engine

from edgeseg.decide.entries import failed_measurements
from edgeseg.errors import ArtifactError, BuildError, OutputExistsError, SpecError
from edgeseg.evaluate.bench import BenchRequest
from edgeseg.evaluate.results import FailedMeasurement, read_report, write_report
from edgeseg.store.atomic import lock
from edgeseg.store.documents import write_json
from edgeseg.store.engine import open_engine
from edgeseg.store.manifest import MANIFEST_NAME
from edgeseg.sweep.config import Cell, SweepConfig, expand, read_config
from edgeseg.sweep.executors import Built, build_locally
from edgeseg.sweep.run import bench_options, run_edgeseg, run_sweep
from edgeseg.sweep.state import cell_key, remember_reports

ROOT = Path(__file__).parents[2]


def config(tmp_path: Path, **changes: object) -> SweepConfig:
    plain = SweepConfig(
        ("unet", "fpn"), output=str(tmp_path / "out"), precisions=("fp32", "int8"), targets=("onnxruntime",)
    )
    return msgspec.structs.replace(plain, **changes)


def make_cell(cell: Cell) -> Built:
    """Stands in for a build: fpn in int8 fails, pspnet is killed, the rest make a folder."""
    assert cell.request.folder is not None
    if cell.name.startswith("pspnet"):
        os._exit(9)
    if cell.name.startswith("fpn") and cell.request.precision == "int8":
        return Built(cell, 1.0, "no int8 for fpn")
    make_engine(cell.request.folder)
    return Built(cell, 1.0)


class Recorder:
    """Builds and measures without either, and keeps what it was asked."""

    def __init__(self) -> None:
        self.built: list[str] = []
        self.benched: list[list[str]] = []
        self.lines: list[str] = []
        self.bench_reason: str | None = None

    def build(self, cells: Sequence[Cell]) -> Iterator[Built]:
        for cell in cells:
            self.built.append(cell.name)
            yield make_cell(cell)

    def bench(self, arguments: Sequence[str]) -> str | None:
        self.benched.append(list(arguments))
        if self.bench_reason is None:
            names = [Path(a).name for a in arguments[1:] if "engines" in a]
            write_report(Path(arguments[-1]), report(*(row(name, 10, miou=0.7) for name in names)))
        return self.bench_reason

    def run(self, sweep: SweepConfig, **said: Any):  # type: ignore[no-untyped-def]
        return run_sweep(sweep, say=self.lines.append, build=self.build, bench=self.bench, **said)


def test_a_failing_cell_does_not_stop_the_rest(tmp_path: Path) -> None:
    recorder = Recorder()
    result = recorder.run(config(tmp_path))
    assert result.failures == (("fpn-demo-int8-onnxruntime", "no int8 for fpn"),)
    measured = [r.engine.name for run in result.runs for r in run.report.rows]
    assert measured == ["unet-demo-fp32-onnxruntime", "unet-demo-int8-onnxruntime", "fpn-demo-fp32-onnxruntime"]
    assert any("fpn-demo-int8-onnxruntime failed: no int8 for fpn" in line for line in recorder.lines)


def test_what_is_done_is_reused_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    first, second = Recorder(), Recorder()
    first.run(config(tmp_path))
    second.run(config(tmp_path))
    assert second.built == ["fpn-demo-int8-onnxruntime"]
    assert second.benched == []
    assert second.lines[0] == "4 cells, 3 built before"


def test_a_grown_sweep_builds_only_what_is_new_and_measures_all_in_turns(tmp_path: Path) -> None:
    Recorder().run(config(tmp_path, archs=("unet",)))
    grown = Recorder()
    grown.run(config(tmp_path))
    assert grown.built == ["fpn-demo-fp32-onnxruntime", "fpn-demo-int8-onnxruntime"]
    (arguments,) = grown.benched
    assert sum("engines" in argument for argument in arguments) == 3


def test_a_damaged_engine_is_built_again(tmp_path: Path) -> None:
    Recorder().run(config(tmp_path, archs=("unet",)))
    (tmp_path / "out/engines/unet-demo-fp32-onnxruntime/engine.onnx").write_bytes(b"other!")
    again = Recorder()
    again.run(config(tmp_path, archs=("unet",)))
    assert again.built == ["unet-demo-fp32-onnxruntime"]


@pytest.mark.parametrize("change", [{"options": {"threads": 1}}, {"versions": {"onnxruntime": "0"}}])
def test_an_engine_that_runs_another_way_is_measured_again(tmp_path: Path, change: dict[str, Any]) -> None:
    """The engine's file is the same: what it is run with is not."""
    Recorder().run(config(tmp_path, archs=("unet",)))
    folder = tmp_path / "out/engines/unet-demo-fp32-onnxruntime"
    write_json(folder / MANIFEST_NAME, dataclasses.replace(open_engine(folder).manifest, **change))
    again = Recorder()
    again.run(config(tmp_path, archs=("unet",)))
    assert (again.built, len(again.benched)) == ([], 1)


def test_key_follows_the_content_of_weights_and_images(tmp_path: Path) -> None:
    weights, images = tmp_path / "w.safetensors", tmp_path / "images"
    weights.write_bytes(b"one")
    images.mkdir()
    (images / "a.png").write_bytes(b"a")
    sweep = config(tmp_path, archs=("unet",), weights={"unet": str(weights)}, calibration=str(images))

    def key() -> str:
        return cell_key(expand(sweep)[1])

    keys = [key(), key()]
    weights.write_bytes(b"two")
    keys.append(key())
    (images / "b.png").write_bytes(b"b")
    keys.append(key())
    (images / "b.png").rename(images / "c.png")
    keys.append(key())
    assert keys[0] == keys[1] and len(set(keys)) == 4
    moved = msgspec.structs.replace(sweep, output=str(tmp_path / "elsewhere"))
    assert cell_key(expand(moved)[1]) == key()


@pytest.mark.parametrize("form", ["glob", "list"])
def test_key_follows_the_images_that_a_glob_or_a_list_names(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    (tmp_path / "list.txt").write_text("a.png\n")
    source = str(tmp_path / ("*.png" if form == "glob" else "list.txt"))
    sweep = config(tmp_path, archs=("unet",), calibration=source)
    before = cell_key(expand(sweep)[1])
    assert cell_key(expand(sweep)[1]) == before
    (tmp_path / "a.png").write_bytes(b"b")
    assert cell_key(expand(sweep)[1]) != before


def test_measuring_that_fails_is_every_cells_reason(tmp_path: Path) -> None:
    recorder = Recorder()
    recorder.bench_reason = "code 1"
    with pytest.raises(BuildError, match="none of 4 cells gave a result; fpn-demo-int8-onnxruntime: no int8 for fpn"):
        recorder.run(config(tmp_path))


def test_an_engine_that_could_not_be_measured_is_measured_again_with_all_others(tmp_path: Path) -> None:
    class Partly(Recorder):
        def bench(self, arguments: Sequence[str]) -> str | None:
            reason = super().bench(arguments)
            path = Path(arguments[-1])
            written, folder = read_report(path), arguments[1]
            failure = FailedMeasurement(Path(folder).name, folder, "load", "damaged")
            path.unlink()
            write_report(path, dataclasses.replace(written, rows=written.rows[1:], failed=(failure,)))
            return reason or "exit code 1"

    result = Partly().run(config(tmp_path))
    (run,) = result.runs
    assert [r.engine.name for r in run.report.rows] == ["unet-demo-int8-onnxruntime", "fpn-demo-fp32-onnxruntime"]
    assert failed_measurements(result.runs) == (("unet-demo-fp32-onnxruntime", "damaged"),)
    again = Recorder()
    (run,) = again.run(config(tmp_path)).runs
    assert len(again.benched) == 1
    assert len(run.report.rows) == 3 and run.report.failed == ()


def test_any_argument_of_a_build_can_be_said(tmp_path: Path) -> None:
    options = {"batch": "1:4:8", "fit": "letterbox", "backend_options": {"threads": 2}}
    (cell, *_) = expand(config(tmp_path, build=options, sizes=("64x96",)))
    assert (cell.request.size, str(cell.request.batch), cell.request.fit) == ((64, 96), "1:4:8", "letterbox")
    assert cell.request.backend_options == {"threads": 2}
    for wrong, message in (
        ({"bacth": 4}, "no argument 'bacth'; did you mean 'batch'"),
        ({"batch": "x"}, "batch is 'x'; give N or MIN:OPT:MAX"),
        ({"size": 64}, "size in [build] of the sweep is a field of the sweep itself"),
    ):
        with pytest.raises(SpecError) as caught:
            expand(config(tmp_path, build=wrong))
        assert message in str(caught.value)


def test_the_measuring_process_tells_its_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_edgeseg(["bench"]) == "Missing argument 'ENGINE_DIR...'."
    reason = run_edgeseg(["report", "missing.json"])
    assert reason is not None and "missing.json" in reason
    assert f"edgeseg: {reason}" in capfd.readouterr().err


def test_engines_can_be_built_to_tell_their_scores(tmp_path: Path) -> None:
    plain, scores = config(tmp_path), config(tmp_path, output_kind="logits")
    assert {cell.request.output.kind for cell in expand(plain)} == {"mask"}
    assert {cell.request.output.kind for cell in expand(scores)} == {"logits"}
    assert cell_key(expand(plain)[0]) != cell_key(expand(scores)[0])


def test_an_engine_for_another_device_is_built_and_not_measured(tmp_path: Path) -> None:
    class Portable(Recorder):
        def build(self, cells: Sequence[Cell]) -> Iterator[Built]:
            for built in super().build(cells):
                folder = built.cell.request.folder
                if folder is not None and built.cell.name.startswith("unet"):
                    manifest = dataclasses.replace(open_engine(folder).manifest, engine=None)
                    write_json(folder / MANIFEST_NAME, manifest)
                yield built

    recorder = Portable()
    result = recorder.run(config(tmp_path, precisions=("fp32",)))
    assert [r.engine.name for run in result.runs for r in run.report.rows] == ["fpn-demo-fp32-onnxruntime"]
    ((name, reason),) = result.failures
    assert name == "unet-demo-fp32-onnxruntime"
    assert "edgeseg compile" in reason
    again = Portable()
    again.run(config(tmp_path, precisions=("fp32",)))
    assert (again.built, again.benched) == ([], [])


def test_what_only_the_bench_would_find_is_said_before_anything_is_built(tmp_path: Path) -> None:
    for bench, words in (
        ({"baseline": "pytrch"}, "did you mean 'pytorch'"),
        ({"data": str(tmp_path / "gone")}, "gone of the sweep is not there"),
    ):
        with pytest.raises(SpecError, match=words):
            Recorder().run(config(tmp_path, bench=bench))
    assert not (tmp_path / "out").exists()
    (tmp_path / "sweep.toml").write_text('archs = ["fpn"]\nprecision = ["int8"]\n')
    with pytest.raises(SpecError, match=r"unknown field `precision`; did you mean 'precisions'"):
        read_config(tmp_path / "sweep.toml")
    (tmp_path / "sweep.toml").write_text('archs = ["fpn"]\njobs = 2\n')
    with pytest.raises(SpecError, match=r"unknown field `jobs`; it belongs in \[bench\];"):
        read_config(tmp_path / "sweep.toml")
    (tmp_path / "sweep.toml").write_text('archs = ["fpn"]\n[bench]\nsizes = ["64x64"]\n')
    with pytest.raises(SpecError, match=r"unknown field `sizes`.*; it belongs above the first \[table\];"):
        read_config(tmp_path / "sweep.toml")


def test_models_can_be_measured_apart(tmp_path: Path) -> None:
    recorder = Recorder()
    result = recorder.run(config(tmp_path, bench={"together": "model"}))
    assert [sum("engines" in a for a in arguments) for arguments in recorder.benched] == [2, 1]
    assert len(result.runs) == 2


def test_two_sweeps_of_one_folder_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with lock(tmp_path / "out" / ".lock"), pytest.raises(ArtifactError, match="another sweep"):
        Recorder().run(config(tmp_path))


def test_a_sweep_replaces_what_it_wrote_and_asks_about_the_rest(tmp_path: Path) -> None:
    sweep, pages = config(tmp_path, archs=("unet",)), (tmp_path / "out/report.md", tmp_path / "out/report.csv")
    pages[1].parent.mkdir()
    pages[1].write_text("mine")
    asked = Recorder()
    with pytest.raises(OutputExistsError, match=r"report\.csv exists; give --force"):
        asked.run(sweep, reports=pages)
    assert asked.built == [] and pages[1].read_text() == "mine"
    asked.run(sweep, reports=pages, force=True)
    for page in pages:
        page.write_text("of the sweep")
    remember_reports(pages)
    Recorder().run(sweep, reports=pages)  # a resumed sweep updates its own
    pages[0].write_text("of the sweep, and edited")
    with pytest.raises(OutputExistsError, match=r"report\.md exists; give --force"):
        Recorder().run(sweep, reports=pages)
    pages[0].unlink()
    pages[0].mkdir()
    with pytest.raises(SpecError, match=r"report\.md is a folder"):
        Recorder().run(sweep, reports=pages, force=True)


def test_a_sweep_asks_about_engines_it_did_not_build(tmp_path: Path) -> None:
    engine = tmp_path / "out/engines/unet-demo-fp32-onnxruntime"
    make_engine(engine)
    asked = Recorder()
    with pytest.raises(OutputExistsError, match=r"unet-demo-fp32-onnxruntime exists; give --force"):
        asked.run(config(tmp_path))
    assert asked.built == [] and open_engine(engine)
    asked.run(config(tmp_path), force=True)
    assert len(asked.built) == 4


def test_a_killed_sweep_knows_the_engines_that_its_builders_left(tmp_path: Path) -> None:
    class Killed(Recorder):
        def build(self, cells: Sequence[Cell]) -> Iterator[Built]:
            make_cell(cells[0])
            raise KeyboardInterrupt
            yield

    with pytest.raises(KeyboardInterrupt):
        Killed().run(config(tmp_path))
    again = Recorder()
    again.run(config(tmp_path))
    assert len(again.built) == 4


def test_processes_are_apart_and_a_killed_one_is_reported(tmp_path: Path) -> None:
    sweep = config(tmp_path, archs=("pspnet", "unet"), precisions=("fp32",))
    outcomes = {built.cell.name: built for built in build_locally(expand(sweep), 2, make_cell)}
    assert "killed" in (outcomes["pspnet-demo-fp32-onnxruntime"].reason or "")
    assert outcomes["unet-demo-fp32-onnxruntime"].reason is None
    assert (tmp_path / "out/engines/unet-demo-fp32-onnxruntime/manifest.json").is_file()


def test_lists_are_multiplied_and_names_are_unique(tmp_path: Path) -> None:
    sweep = config(
        tmp_path,
        encoders=("resnet18", "resnet34"),
        sizes=("64x96", "128x128"),
        weights={"default": "w/{arch}-{encoder}.pt"},
    )
    cells = expand(sweep)
    assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 * 2 * 2
    assert cells[0].name == "unet-resnet18-64x96-fp32-onnxruntime"
    assert cells[0].request.size == (64, 96)
    assert cells[0].request.model.weights == "w/unet-resnet18.pt"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"archs": ("unett",)}, "unett"),
        ({"archs": ()}, "archs of the sweep is empty"),
        ({"precisions": ("int4",)}, "int4"),
        ({"targets": ("tpu",)}, "tpu"),
        ({"sizes": ("big",), "weights": {"default": "random"}}, "HEIGHTxWIDTH"),
        ({"archs": ("unet", "unet")}, "twice"),
        ({"archs": ("manet",)}, "no demo model of manet"),
        ({"encoders": ("resnet18",)}, "no demo model of encoder resnet18"),
        ({"weights": {"unett": "x"}}, "unett"),
        ({"require": "p99<=3"}, "p99_ms"),
        (
            {"require": "p99_ms<=3 and miou_drop<=0.01"},
            "miou_drop, which would not be measured: there is no bench.data",
        ),
        ({"require": "miou_drop<=0.01 or agreement>=0.9"}, "there is no bench.data"),
        ({"require": "speedup>=2", "bench": {"baseline": "none"}}, "speedup, .*: bench.baseline is none"),
        (
            {"require": "miou_drop<=0.01", "bench": {"data": "demo", "limit": 4}},
            "bench.limit is 4, and a drop needs at least 5 images",
        ),
        ({"bench": {"duration_s": math.inf}}, "duration_s is inf; give seconds, from 0 to 86400"),
        ({"bench": {"duration_s": -1.0}}, "duration_s is -1.0; give seconds"),
        ({"bench": {"jobs": -1}}, "jobs is -1; give a whole number from 1 to 1024"),
        ({"bench": {"batch": "1,0"}}, "batch is '1,0'; give different counts from 1"),
        ({"bench": {"data": 5}}, "bench.data is 5; give a path"),
        ({"bench": {"label_map": "road=1"}}, "label_map is 'road=1'; give FILE_VALUE=CLASS pairs"),
        ({"bench": {"label_map": ["7=0"]}}, r"label_map is \['7=0'\]; give FILE_VALUE=CLASS pairs"),
        ({"bench": {"label_map": 7}}, "label_map is 7; give FILE_VALUE=CLASS pairs"),
        ({"classes": 0}, r">= 1 - at `\$.classes`"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        expand(config(tmp_path, **changes))


def test_a_requirement_that_can_be_met_without_what_is_not_measured_is_no_mistake(tmp_path: Path) -> None:
    assert expand(config(tmp_path, require="miou_drop <= 0.01 or p99_ms <= 30"))
    with pytest.raises(SpecError, match="-1 jobs"):
        run_sweep(config(tmp_path), jobs=-1, say=print)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    path.write_text(
        "archs=['unet']\noutput='o'\ncalibration='c'\n[weights]\nunet='w.pt'\nfpn='demo'\n[bench]\ndata='v'"
    )
    sweep = read_config(path)
    assert (sweep.output, sweep.calibration) == (str(tmp_path / "o"), str(tmp_path / "c"))
    assert sweep.weights == {"unet": str(tmp_path / "w.pt"), "fpn": "demo"}
    assert sweep.data == tmp_path / "v"


def test_bench_accepts_every_option_a_sweep_gives(tmp_path: Path) -> None:
    import click

    from edgeseg.cli.app import cli

    sweep = config(tmp_path, ignore_index=255, bench={"data": "demo", "limit": 3, "profile": True})
    arguments = ["some-engine", *bench_options(sweep), "--json", "x.json"]
    context = click.Context(cli)
    command = cli.get_command(context, "bench")
    assert command is not None
    parsed = command.make_context("bench", arguments, parent=context).params
    assert parsed["limit"] == 3 and parsed["profile"] is True and parsed["ignore_index"] == 255


@pytest.mark.parametrize(
    ("given", "wanted"), [("none", ()), (["none"], ()), ("pytorch-compile", ("pytorch-compile",)), (None, ("pytorch",))]
)
def test_bench_measures_the_baselines_of_the_sweep(
    given: object, wanted: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(request: BenchRequest, *_: object) -> None:
        raise BuildError(f"baselines {request.baselines}")

    monkeypatch.setattr("edgeseg.cli.bench.run_bench", measure)
    sweep = config(tmp_path, bench={} if given is None else {"baseline": given})
    assert sweep.measuring()[0].baselines == wanted
    assert typed("bench", "an-engine", *bench_options(sweep)).stderr == f"edgeseg: baselines {wanted}\n"


def test_the_documented_example_is_one_the_sweep_accepts(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "sweep.md").read_text(encoding="utf-8")
    examples = [block.split("```", 1)[0] for block in page.split("```toml\n")[1:]]
    assert examples
    for k, text in enumerate(examples):
        path = tmp_path / f"{k}.toml"
        path.write_text(text)
        assert expand(read_config(path))


def test_states_are_readable_by_people(tmp_path: Path) -> None:
    Recorder().run(config(tmp_path))
    state = json.loads((tmp_path / "out/cells/fpn-demo-int8-onnxruntime.json").read_text())
    assert state["reason"] == "no int8 for fpn" and len(state["key"]) == 64
