"""``edgeseg compile`` for the CPU backends: whose figures stay, and graphs that were made for another target or CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
from cpu_folders import COMMAND, IMAGES, SIDE, folder_for, own_scheme, verification
from small_graphs import spec

import edgeseg
from edgeseg.backends import compile as recompile
from edgeseg.backends import get_backend, portable
from edgeseg.backends.compile import compile_folder
from edgeseg.backends.cpu import onnxruntime
from edgeseg.errors import BuildError, SpecError, StaleEngineError
from edgeseg.evaluate.latency import protocol
from edgeseg.evaluate.latency import streams as under_load
from edgeseg.evaluate.latency.protocol import LatencySamples
from edgeseg.machine.cpu import Cpu, this_cpu
from edgeseg.pipeline.build import choose_fastest
from edgeseg.pipeline.candidate import measured_sessions
from edgeseg.pipeline.plan import choose_targets
from edgeseg.pipeline.request import BuildRequest
from edgeseg.progress import SilentReporter
from edgeseg.quantize.schemes import SCHEMES
from edgeseg.store.documents import write_json
from edgeseg.store.engine import open_engine
from edgeseg.store.manifest import MANIFEST_NAME

VNNI = Cpu("Some Xeon", "x86", ("avx2", "avx512_vnni"), 2)
AVX2 = Cpu("Old Xeon", "x86", ("avx2",), 2)
ARM = Cpu("Cortex", "arm", ("asimddp",), 2)


class Notes(SilentReporter):
    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_for(tmp_path_factory.mktemp("engines") / "a", "onnxruntime", own_scheme())


def test_the_very_same_engine_keeps_its_figures_and_its_command(verified: Path, tmp_path: Path) -> None:
    manifest = compile_folder(verified, output=tmp_path / "again").manifest
    assert manifest.engine == open_engine(verified).manifest.engine
    assert manifest.verification == verification()
    assert manifest.command == COMMAND


@pytest.mark.parametrize(
    ("built_with", "streams", "threads", "spins"),
    [(4, 1, 4, "1"), (4, 3, 1, "0"), (4, 9999, 1, "0"), (4, 2, 2, "0"), (1, 4, 1, "0")],
)
def test_callers_at_the_same_time_share_the_threads(
    verified: Path, tmp_path: Path, built_with: int, streams: int, threads: int, spins: str
) -> None:
    folder = compile_folder(verified, options={"threads": built_with}, output=tmp_path / "b").folder
    with edgeseg.load(verified) as usual, edgeseg.load(folder, streams=streams) as segmenter:
        assert np.array_equal(segmenter(IMAGES), usual(IMAGES))
        settings = segmenter._session._session.get_session_options()  # type: ignore[union-attr]
    assert settings.intra_op_num_threads == threads
    assert settings.get_session_config_entry("session.intra_op.allow_spinning") == spins


def test_an_engine_built_for_throughput_runs_on_a_thread_for_each_caller(verified: Path, tmp_path: Path) -> None:
    folder = compile_folder(verified, options={"threads": 3, "streams": 0}, output=tmp_path / "b").folder
    for streams, threads in ((None, 1), (1, 3)):
        with edgeseg.load(folder, streams=streams) as segmenter:
            settings = segmenter._session._session.get_session_options()  # type: ignore[union-attr]
        assert settings.intra_op_num_threads == threads


@pytest.mark.parametrize("streams", [0, -1, 1.5, True, "2"])
def test_streams_that_are_no_number_of_callers(verified: Path, streams: Any) -> None:
    with pytest.raises(SpecError, match="streams is .*; give the number of threads that will call, from 1"):
        edgeseg.load(verified, streams=streams)


def test_threads_and_streams_may_be_numpy_s(verified: Path) -> None:
    for options, threads in (({"threads": np.int64(2)}, 2), ({"threads": 2, "streams": np.uint8(2)}, 1)):
        with edgeseg.load(verified, **options) as segmenter:
            settings = segmenter._session._session.get_session_options()  # type: ignore[union-attr]
        assert settings.intra_op_num_threads == threads


@pytest.mark.parametrize("umask", [0o002, 0o077])
def test_every_file_follows_the_umask(verified: Path, tmp_path: Path, umask: int) -> None:
    """ONNX Runtime, which writes the engine, sets a mode of its own."""
    before = os.umask(umask)
    try:
        folder = compile_folder(verified, output=tmp_path / "again").folder
    finally:
        os.umask(before)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {
        path.name: oct(0o666 & ~umask) for path in folder.iterdir()
    }


@pytest.mark.parametrize("options", [{"threads": 1}, {"spinning": False}])
def test_other_options_are_another_engine(verified: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    manifest = compile_folder(verified, options=options, output=tmp_path / "b").manifest
    assert manifest.engine == open_engine(verified).manifest.engine  # the file alone does not tell
    assert manifest.verification is None and manifest.candidates == {}
    assert manifest.command is None


def test_another_target_is_another_engine(verified: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    manifest = compile_folder(verified, target="openvino", output=tmp_path / "b").manifest
    assert manifest.verification is None and manifest.candidates == {} and manifest.command is None
    assert manifest.precision.evidence == "inspected"
    assert set(manifest.versions) == {"torch", "openvino"}


@pytest.mark.parametrize(
    "change", [{"versions": {"torch": "2.0", "onnxruntime": "1.0"}}, {"device": {"cpu": "Other", "isa": "x86"}}]
)
def test_another_version_or_device_is_another_engine(verified: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    manifest = open_engine(verified).manifest
    before = tmp_path / "before"
    before.mkdir()
    for file in verified.iterdir():
        (before / file.name).write_bytes(file.read_bytes())
    write_json(before / MANIFEST_NAME, dataclasses.replace(manifest, **change))
    after = compile_folder(before).manifest
    assert after.verification is None
    assert after.command == COMMAND  # the same build, run here, makes this engine


def test_a_graph_of_another_target_that_runs_in_float_says_what_to_build(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    folder = folder_for(tmp_path / "ov", "openvino", get_backend("openvino").scheme)
    notes = Notes()
    share = compile_folder(folder, target="onnxruntime", output=tmp_path / "ort", reporter=notes).manifest.precision
    (note,) = notes.notes
    assert share.mac_share.get("int8", 0.0) < 0.7
    assert note.startswith(
        f"int8 was asked for, but onnxruntime executes only {share.mac_share.get('int8', 0.0):.1%} of"
    )
    assert "is quantized for openvino" in note and "edgeseg build ... --target onnxruntime" in note


def test_an_engine_in_the_precision_asked_for_is_said_nothing_of(verified: Path, tmp_path: Path) -> None:
    notes = Notes()
    compile_folder(verified, output=tmp_path / "b", reporter=notes)
    assert notes.notes == []


@pytest.mark.parametrize(
    ("cpu", "computed"),
    [
        (VNNI, {"onnxruntime-vnni", "onnxruntime-avx2", "openvino", "openvino-avx2", "tensorrt"}),
        (AVX2, {"onnxruntime-avx2", "openvino-avx2"}),
        (ARM, {"onnxruntime-arm", "openvino", "openvino-avx2", "tensorrt"}),
    ],
)
def test_a_cpu_computes_the_schemes_it_has_kernels_for(cpu: Cpu, computed: set[str]) -> None:
    assert {name for name in SCHEMES if cpu.computes(name)} == computed
    assert cpu.computes(None)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cpu], None]:
    def install(cpu: Cpu) -> None:
        for module in (portable, recompile, onnxruntime):
            monkeypatch.setattr(module, "this_cpu", lambda: cpu)

    return install


@pytest.mark.parametrize(
    ("scheme", "wrong", "right"),
    [("onnxruntime-arm", VNNI, ARM), ("onnxruntime-vnni", AVX2, VNNI), ("onnxruntime-avx2", ARM, AVX2)],
)
def test_a_graph_for_another_cpu_is_compiled_on_its_device_only(
    tmp_path: Path, on_cpu: Callable[[Cpu], None], scheme: str, wrong: Cpu, right: Cpu
) -> None:
    folder = folder_for(tmp_path / "a", "onnxruntime", scheme, portable_only=True)
    manifest = open_engine(folder).manifest
    assert manifest.engine is None and manifest.precision.evidence == "typed"
    assert manifest.precision.mac_share["int8"] > 0.9
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    on_cpu(wrong)
    for refused in (lambda: compile_folder(folder), lambda: edgeseg.load(folder, recompile=True)):
        with pytest.raises(BuildError) as caught:
            refused()
        assert f"({scheme}; {wrong.name} takes " in str(caught.value)
        assert "compile it on its device" in str(caught.value)
    with pytest.raises(
        StaleEngineError, match=rf"portable graph only \({scheme}\); run on its device: edgeseg compile"
    ):
        edgeseg.load(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    on_cpu(right)
    compiled = compile_folder(folder).manifest
    assert compiled.engine is not None and compiled.scheme == scheme
    assert compiled.device["isa"] == right.isa
    assert compiled.verification is None  # what the portable graph was worth elsewhere is not this engine's


def request(**changes: Any) -> BuildRequest:
    return BuildRequest("fpn", **changes)


def test_auto_leaves_out_who_does_not_know_an_option_before_any_work() -> None:
    pytest.importorskip("openvino")
    assert choose_targets(request(), Notes()) == ("onnxruntime", "openvino")
    notes = Notes()
    assert choose_targets(request(backend_options={"spinning": False}), notes) == ("onnxruntime",)
    (note,) = notes.notes
    assert note.startswith("openvino is left out: target openvino has no build option 'spinning'")
    with pytest.raises(SpecError, match="threads is -1; give a number"):
        choose_targets(request(backend_options={"threads": -1}), Notes())
    with pytest.raises(SpecError, match="target onnxruntime has no build option 'thread'"):
        choose_targets(request(backend_options={"thread": 1}), Notes())


def test_with_a_scheme_auto_is_the_target_it_is_for() -> None:
    pytest.importorskip("openvino")
    assert choose_targets(request(scheme="onnxruntime-arm"), Notes()) == ("onnxruntime",)
    assert choose_targets(request(scheme="openvino"), Notes()) == ("openvino",)
    with pytest.raises(SpecError, match="scheme tensorrt is for none of onnxruntime, openvino; name its target"):
        choose_targets(request(scheme="tensorrt"), Notes())


def test_sessions_are_closed_when_measuring_raises() -> None:
    class Session:
        closed = False

        def run(self, images: Any) -> Any:
            raise BuildError("the engine does not run")

        def __enter__(self) -> Session:
            return self

        def __exit__(self, *_: object) -> None:
            self.closed = True

    sessions = [Session(), Session()]

    def candidate(name: str, session: Session) -> Any:
        backend = type("B", (), {"name": name, "load": lambda self, engine: session})()
        return type("C", (), {"backend": backend, "folder": Path()})()

    make = type("M", (), {"spec": spec(SIDE, SIDE), "write": lambda *_: None, "request": BuildRequest(arch="fpn")})()
    candidates = [candidate(name, session) for name, session in zip("ab", sessions, strict=True)]
    with pytest.raises(BuildError, match="does not run"):
        choose_fastest(candidates, make, Notes())
    assert [session.closed for session in sessions] == [True, True]


def test_with_auto_the_first_target_is_taken_unless_another_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(second_ms: list[float]) -> tuple[str, str]:
        measured = {
            name: LatencySamples(tuple(values), 2)
            for name, values in {"onnxruntime": [10.0, 10.2] * 20, "openvino": second_ms}.items()
        }
        monkeypatch.setattr(protocol, "measure_sessions", lambda *_: measured)
        load = type("B", (), {"load": lambda *_: contextlib.nullcontext()})
        candidates: list[Any] = [
            type("C", (), {"backend": type("N", (load,), {"name": name})(), "folder": Path()})() for name in measured
        ]
        request = BuildRequest(arch="fpn")
        make: Any = type("M", (), {"spec": spec(SIDE, SIDE), "write": lambda *_: None, "request": request})()
        notes = Notes()
        best, medians = choose_fastest(candidates, make, notes)
        assert medians == {name: samples.median_ms for name, samples in measured.items()}
        return best.backend.name, notes.notes[-1]

    assert chosen([5.0, 5.1] * 20)[0] == "openvino"
    # A lower median that noise may have made is no reason to leave the default, nor to call it the fastest.
    name, note = chosen([ms for ms in (12, 6, 9, 16, 9.5, 7, 8, 14, 9.5, 9) for _ in range(4)])
    assert name == "onnxruntime"
    assert note.startswith("target auto took onnxruntime: the first of them; openvino is ")
    assert note.endswith("here: noise could turn it; name one with --target")


def test_a_build_for_throughput_is_chosen_by_callers_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = BuildRequest(arch="fpn", optimize_for="throughput", backend_options={"threads": 4})
    assert asked.options_for("openvino") == {"threads": 4, "streams": 0}
    with pytest.raises(SpecError, match=r"tensorrt is for a GPU: build with --batch"):
        asked.options_for("tensorrt")
    given: list[int] = []

    def measured(sessions: Any, spec: Any, callers: int) -> dict[str, LatencySamples]:
        given.append(callers)
        return {"a": LatencySamples((1.0,), 1)}

    monkeypatch.setattr(under_load, "measure_throughput", measured)
    assert measured_sessions(asked, {}, spec(SIDE, SIDE))["a"].median_ms == 1.0
    assert given == [this_cpu().cores]


def test_loading_leaves_the_callers_arithmetic_as_it_was(verified: Path) -> None:
    """In a process of its own: ONNX Runtime changes how a thread computes with the first session it makes."""
    code = (
        "import sys, numpy as np, edgeseg; seg = edgeseg.load(sys.argv[1]); seg(np.zeros((16, 16, 3), np.uint8)); "
        "print(np.float32(1e-40) * np.float32(0.5) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, verified], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
