"""``edgeseg compile`` of a portable folder on a device with TensorRT, on recorded modules: torch-free, options kept."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from command_line import typed
from engine_folders import write_manifest
from recorded_tensorrt import VERSIONS, Recorder
from recorded_tensorrt.fake import build_serialized_network, cuda_device
from recorded_tensorrt.graphs import SIDE, small_model
from rich.console import Console

from edgeseg.backends import compile as recompile
from edgeseg.backends.portable import check_options, portable_engine
from edgeseg.backends.tensorrt.backend import TensorRTBackend
from edgeseg.backends.tensorrt.options import TensorRTOptions
from edgeseg.errors import ArtifactError, SpecError
from edgeseg.progress import ConsoleReporter, SilentReporter
from edgeseg.quantize.table import KEY_CAUSES, TABLE_SCHEMA_VERSION, CalibrationTable, TensorRange
from edgeseg.spec import InputSpec, ModelSpec, PipelineSpec, Precision
from edgeseg.store.engine import open_engine
from edgeseg.store.hashing import FileRef, sha256_file
from edgeseg.store.manifest import MANIFEST_NAME, OnnxGraph


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path / "cache"))


def portable_folder(folder: Path, precision: Precision = "int8", **options: Any) -> Path:
    """What a build for TensorRT without a GPU leaves behind."""
    folder.mkdir(parents=True)
    path = folder / "model.onnx"
    implicit = bool(options.get("implicit_calibration"))
    path.write_bytes(small_model("fp32" if implicit else precision).SerializeToString())
    ranges = {name: TensorRange(-1.0, 1.0, -1.0, 1.0) for name in ("x", "encoder.conv1.r", "decoder.block.r")}
    table = CalibrationTable(TABLE_SCHEMA_VERSION, "minmax", {}, dict.fromkeys(KEY_CAUSES, "0"), 8, ranges)
    table.save(folder / "calibration.json")
    spec = PipelineSpec(ModelSpec("unet", classes=4), InputSpec(SIDE, SIDE))
    graph = OnnxGraph(path, sha256_file(path), precision, spec, "0" * 64, None if implicit else "tensorrt")
    built = portable_engine(graph, "tensorrt", precision, options)
    calibration = FileRef.of(folder / "calibration.json")
    write_manifest(folder, spec, built=built, scheme=graph.scheme, calibration=calibration, versions={}, device={})
    return folder


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let ``compile`` find TensorRT of a version and a GPU."""

    def install(version: str, times: Sequence[tuple[str, float]] = ()) -> Recorder:
        recorder = Recorder(version)
        backend = TensorRTBackend(
            import_module=lambda: recorder.module,
            gpu=lambda: cuda_device("Orin", (8, 7), 8),
            layer_times=lambda *_: list(times),
        )
        monkeypatch.setattr(recompile, "require_builder", lambda name: backend)
        return recorder

    return install


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_precision_not_delivered_is_exit_code_1_and_names_the_layers(
    tmp_path: Path, on_device: Any, version: str, precision: Precision
) -> None:
    folder = portable_folder(tmp_path / "fpn", precision)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    on_device(version).fakery.layer_dtype = lambda name, dtype: "fp32" if name == "decoder.block/Conv" else dtype
    done = typed("compile", folder)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith(
        f"edgeseg: {precision} was asked for, but TensorRT {version} runs 42.9% of the multiply-accumul"
    )
    assert "decoder.block/Conv runs in fp32" in line and "encoder.conv1/Conv" not in line
    assert Path(line.rpartition("TensorRT's log: ")[2]).is_file()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("version", VERSIONS)
def test_shares_of_macs_and_time_are_printed_and_kept(tmp_path: Path, on_device: Any, version: str) -> None:
    folder = portable_folder(tmp_path / "fpn")
    on_device(version, [("preprocess/Mul", 1.0), ("encoder.conv1/Conv", 2.0), ("decoder.block/Conv", 1.0)])
    assert typed("compile", folder).stdout.splitlines() == [
        f"engine: {folder} (tensorrt, 100.0% of MACs in int8)",
        "time: 75.0% in int8, 25.0% in fp32",
    ]
    assert open_engine(folder).manifest.precision.time_share == {"fp32": 0.25, "int8": 0.75}
    assert "\ntime: 75.0% in int8, 25.0% in fp32\n" in typed("inspect", folder).stdout
    on_device(version)
    assert len(typed("compile", folder).stdout.splitlines()) == 1
    assert "time:" not in typed("inspect", folder).stdout


def test_a_manifest_of_before_times_were_measured_is_read(tmp_path: Path) -> None:
    folder = portable_folder(tmp_path / "fpn")
    text = json.loads((folder / MANIFEST_NAME).read_text())
    assert text["precision"].pop("time_share") is None
    (folder / MANIFEST_NAME).write_text(json.dumps(text))
    assert open_engine(folder).manifest.precision.time_share is None


@pytest.mark.parametrize("version", VERSIONS)
def test_the_progress_bar_is_tensorrts(tmp_path: Path, on_device: Any, version: str) -> None:
    """On a terminal: an hourglass while TensorRT 8 builds, which tells nothing, else a bar that follows its phases."""
    seen: list[tuple[float, float | None]] = []
    terminal = io.StringIO()
    reporter = ConsoleReporter(Console(file=terminal, force_terminal=True, width=100))

    def watched(builder: Any, network: Any, config: Any) -> Any:
        plan = build_serialized_network(builder, network, config)
        assert reporter._bar is not None
        reporter._bar.refresh()
        seen.extend((task.completed, task.total) for task in reporter._bar.tasks)
        return plan

    on_device(version).behaviour["Builder.build_serialized_network"] = watched
    recompile.compile_folder(portable_folder(tmp_path / "fpn"), reporter=reporter)
    assert seen == ([(0, None)] if version.startswith("8.") else [(100, 100)])
    assert ("100/100" in terminal.getvalue()) is not version.startswith("8.")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_engine_joins_the_portable_graph(tmp_path: Path, on_device: Any, version: str) -> None:
    folder = portable_folder(tmp_path / "fpn")
    on_device(version)
    recompile.compile_folder(folder)
    manifest = open_engine(folder).manifest
    assert manifest.engine is not None and manifest.engine.name == "engine.plan"
    assert [ref.name for ref in manifest.extra_files] == ["tensorrt.log"]
    assert manifest.device == {"gpu": "Orin", "compute_capability": "8.7"}
    assert manifest.versions == {"tensorrt": version}
    assert manifest.precision.mac_share == {"int8": 1.0} and manifest.verification is None
    assert sorted(path.name for path in folder.iterdir()) == [
        "calibration.json",
        "engine.plan",
        "manifest.json",
        "model.onnx",
        "tensorrt.log",
    ]


def test_options_of_the_build_are_those_of_the_compile_unless_given_again(tmp_path: Path, on_device: Any) -> None:
    folder = portable_folder(tmp_path / "fpn", workspace_mb=64, optimization_level=2)
    on_device("10.3.0")
    manifest = recompile.compile_folder(folder, options={"optimization_level": 5}).manifest
    assert (manifest.options["workspace_mb"], manifest.options["optimization_level"]) == (64, 5)


def test_kernel_times_are_kept_beside_the_folders(tmp_path: Path, on_device: Any) -> None:
    said: list[str] = []

    class Notes(SilentReporter):
        def note(self, text: str) -> None:
            said.append(text)

    for name in ("fpn", "unet"):
        recorder = on_device("10.3.0")
        recompile.compile_folder(portable_folder(tmp_path / "engines" / name), reporter=Notes())
    assert recorder.of("IBuilderConfig.create_timing_cache")[0].arguments["serialized_timing_cache"] != b""
    assert said == []
    (cache,) = (tmp_path / "engines" / ".timing").glob("*.cache")
    assert cache.name == "Orin-8sm-8.7-tensorrt-10.3.0.cache"
    cache.write_bytes(b"damaged")
    recompile.compile_folder(tmp_path / "engines" / "fpn", reporter=Notes())
    assert said == [f"timing cache {cache} is damaged: not used, measured anew"]


EVERY_OPTION: dict[str, Any] = {
    "workspace_mb": 64,
    "timing_cache": False,
    "typing": "weak",
    "allow_fp16": False,
    "tf32": False,
    "hardware_compatibility": "ampere_plus",
    "version_compatible": True,
    "optimization_level": 2,
    "aux_streams": 0,
    "tactic_sources": ("JIT_CONVOLUTIONS",),
    "dla_core": 0,
    "profiling_verbosity": "detailed",
    "prove_precision": False,
    "strip_weights": False,
    "refit": True,
    "min_size": None,
    "max_size": None,
    "implicit_calibration": True,
    "calibrator": "table",
    "calibration_images": None,
    "calibration_cache": None,
    "layer_times": False,
    "contexts": 3,
    "cuda_graph": True,
    "host_memory": "copy",
}


@pytest.mark.parametrize("again", ["compile", "recompile"])
def test_every_option_survives(tmp_path: Path, on_device: Any, again: str) -> None:
    assert set(EVERY_OPTION) == {field.name for field in dataclasses.fields(TensorRTOptions)}
    folder = portable_folder(tmp_path / "fpn", implicit_calibration=True)
    on_device("10.3.0").behaviour["Builder.num_DLA_cores"] = lambda builder: 2
    first = recompile.compile_folder(folder, options=EVERY_OPTION).manifest
    recorder = on_device("10.16.1.11")
    recorder.behaviour["Builder.num_DLA_cores"] = lambda builder: 2
    if again == "compile":
        recompile.compile_folder(folder)
    else:
        recompile.recompile(open_engine(folder))
    second = open_engine(folder).manifest
    assert second.versions["tensorrt"] == "10.16.1.11"
    assert second.options == json.loads(json.dumps(EVERY_OPTION)) == json.loads(json.dumps(first.options))
    assert {"INT8", "GPU_FALLBACK", "REFIT", "VERSION_COMPATIBLE", "DISABLE_TIMING_CACHE"} <= recorder.set_flags()
    values = {call.name: call.arguments["value"] for call in recorder.calls if call.name.endswith(" =")}
    assert values["IBuilderConfig.default_device_type ="] is recorder.module.DeviceType.DLA
    # Given again, an option is overridden; null asks for the default. Both last.
    recompile.compile_folder(folder, options={"contexts": 5, "dla_core": None})
    third = recompile.compile_folder(folder).manifest
    assert (third.options["contexts"], third.options["dla_core"], third.options["workspace_mb"]) == (5, None, 64)


def test_what_was_not_asked_for_is_chosen_anew(tmp_path: Path, on_device: Any) -> None:
    folder = portable_folder(tmp_path / "fpn")
    on_device("8.6.1")
    assert recompile.compile_folder(folder).manifest.options["typing"] == "weak"
    on_device("10.3.0")
    manifest = recompile.compile_folder(folder).manifest
    assert manifest.options["typing"] == "strong" and manifest.options_given == {}


def test_file_names_are_kept_as_absolute_ones(tmp_path: Path, on_device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = portable_folder(tmp_path / "fpn")
    on_device("10.3.0")
    monkeypatch.chdir(tmp_path)
    recompile.compile_folder(folder, options={"timing_cache": "mine.cache"})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    recorder = on_device("10.3.0")
    recompile.compile_folder(folder)
    used = recorder.of("IBuilderConfig.create_timing_cache")[0].arguments["serialized_timing_cache"]
    assert used == (tmp_path / "mine.cache").read_bytes()


def test_a_kept_option_that_cannot_be_had_here_says_how_to_drop_it(tmp_path: Path, on_device: Any) -> None:
    folder = portable_folder(tmp_path / "fpn", implicit_calibration=True)
    on_device("10.3.0").behaviour["Builder.num_DLA_cores"] = lambda builder: 2
    recompile.compile_folder(folder, options={"dla_core": 1})
    on_device("10.3.0")  # an Orin Nano: no DLA
    with pytest.raises(SpecError) as raised:
        recompile.recompile(open_engine(folder))
    assert str(raised.value) == (
        f"dla_core is 1, this device has 0 DLA cores; leave it out; dla_core was kept from {folder}, to drop it: "
        "--backend-option dla_core=null"
    )
    assert typed("compile", folder, "--backend-option", "dla_core=null").returncode == 0
    assert open_engine(folder).manifest.options["dla_core"] is None
    # Nobody kept what is given now: the message stands as it is.
    with pytest.raises(SpecError, match="leave it out$"):
        recompile.compile_folder(folder, options={"dla_core": 0})


def test_11_takes_no_implicit_int8_and_leaves_the_folder_as_it_was(tmp_path: Path, on_device: Any) -> None:
    folder = portable_folder(tmp_path / "fpn", implicit_calibration=True)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    on_device("11.4.0.106")
    with pytest.raises(SpecError, match="no implicit calibration"):
        recompile.compile_folder(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["fpn"]


def test_a_portable_folder_does_not_load_and_says_what_to_run(tmp_path: Path) -> None:
    folder = portable_folder(tmp_path / "fpn")
    with pytest.raises(ArtifactError, match=f"portable graph only; run: edgeseg compile {folder}"):
        TensorRTBackend().load(open_engine(folder))


def test_options_are_checked_when_the_folder_is_made() -> None:
    with pytest.raises(SpecError, match="dla_core is -1"):
        check_options("tensorrt", {"dla_core": -1})
    with pytest.raises(SpecError, match="no build option 'dla_core'"):
        check_options("tensorrt-rtx", {"dla_core": 0})
    with pytest.raises(SpecError, match="target onnxruntime has no build option 'thread'; did you mean 'threads'"):
        check_options("onnxruntime", {"thread": 2})
    with pytest.raises(SpecError, match="no build option 'spin'; did you mean 'spinning'"):
        check_options("onnxruntime", {"spin": True})
    assert check_options("onnxruntime", {"threads": 2, "spinning": None}) == {"threads": 2}
    assert check_options("openvino", {"threads": None}) == {}


def test_building_for_tensorrt_imports_no_torch() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'segmentation_models_pytorch', 'timm')));"
        "import edgeseg.backends.tensorrt.backend, edgeseg.backends.tensorrt.graph, edgeseg.backends.tensorrt.inspector,"
        "edgeseg.backends.tensorrt.calibration, edgeseg.backends.tensorrt.rtx, edgeseg.backends.compile"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_all_folders_are_compiled_and_those_that_fail_are_named(tmp_path: Path, on_device: Any) -> None:
    folders = [portable_folder(tmp_path / "engines" / name) for name in ("a", "b", "c")]
    whole = (folders[0], folders[2])
    (folders[1] / "model.onnx").write_bytes(b"damaged")
    (tmp_path / "engines" / "README.md").write_text("no folder")
    on_device("8.5.3.1")
    done = typed("compile", "--all", tmp_path / "engines")
    made = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("engine:")]
    assert (done.returncode, made) == (1, [str(folder) for folder in whole])
    assert done.stderr.splitlines()[-1] == (
        f"edgeseg: 1 of 3 folders were not compiled ({folders[1]}); the reasons are above"
    )
    assert [open_engine(folder).manifest.engine is not None for folder in whole] == [True, True]
    done = typed("compile", *whole, "--json")
    assert (done.returncode, [manifest["name"] for manifest in json.loads(done.stdout)]) == (0, ["a", "c"])
    done = typed("compile", *folders, "--json")
    ending = json.loads(done.stdout)
    assert (done.returncode, ending["error"]["kind"]) == (1, "BuildError")
    assert [manifest["name"] for manifest in ending["figures"]] == ["a", "c"]
    (tmp_path / "empty").mkdir()
    for words, code, said in (
        ((*whole, "--output", tmp_path / "one"), 2, "--output"),
        (("--all", tmp_path / "none"), 1, "cannot list"),
        (("--all", tmp_path / "empty"), 1, "holds no engine folders"),
    ):
        done = typed("compile", *words)
        assert done.returncode == code and said in done.stderr


def test_a_graph_for_trtexec_is_written_anywhere(tmp_path: Path) -> None:
    folder = portable_folder(tmp_path / "fpn")
    output = tmp_path / "trt8.onnx"
    words = ("compile", folder, "--graph-for", "tensorrt-8")
    done = typed(*words, "--output", output)
    assert done.returncode == 0 and output.is_file()
    assert done.stdout == f"graph: {output}; on the device: trtexec --onnx=trt8.onnx --int8 --fp16\n"
    for options in ((), ("--output", output), ("--output", output, "--target", "tensorrt")):
        assert typed(*words, *options).returncode == 2
    for name in os.listdir(folder):  # what is read is not replaced, the manifest no more than the graph
        done = typed(*words, "--output", folder / name, "--force")
        assert done.returncode == 2 and "would replace the input" in done.stderr
    assert typed(*words, "--output", output, "--force").returncode == 0
