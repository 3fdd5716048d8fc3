"""The GPU kit as far as it goes without one: what is typed, in which order, what is kept, and what a failure says."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from recorded_tensorrt import Recorder

from edgeseg.demo import demo_models
from edgeseg.spec import ARCHITECTURES

KIT = Path(__file__).parents[1] / "gpu" / "kit"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"kit_{name}", KIT / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", ["pack.sh", "unpack.sh"])
def test_the_shell_scripts_parse(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(KIT / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_folder_is_built_by_a_command_of_the_verb(arch: str, tmp_path: Path) -> None:
    from edgeseg.cli.build import command as build_verb

    folders = load("folders")
    typed = folders.build_command(arch, "int8", "256x256", None, tmp_path / "x")
    given = {str(value) for value in build_verb.make_context("build", typed[1:]).params.values()}
    assert {arch, "int8", "tensorrt", str(tmp_path / "x")} <= given
    assert ("random" in typed) == (arch not in demo_models())
    (tmp_path / f"{arch}.safetensors").write_bytes(b"")
    own = folders.build_command(arch, "fp16", "64x64", tmp_path, tmp_path / "x")
    assert str(tmp_path / f"{arch}.safetensors") in own and "random" not in own


class Machine:
    """A device machine: programs are not started, and answer what such a machine would."""

    def __init__(self, kit: ModuleType, monkeypatch: pytest.MonkeyPatch, card: str | None = "NVIDIA H100") -> None:
        self.started: list[list[str]] = []
        self.card = card
        self.kit = kit
        self.masks = 0
        monkeypatch.setattr(
            kit.Session, "start", lambda session, words, limit_s, python=sys.executable: self.start(words)
        )

    def start(self, words: list[str]) -> dict[str, Any]:
        self.started.append(words)
        answer: Any = {}
        if words[:1] == ["-c"] and "open_cuda" in words[1] and len(words) == 2:
            answer = {"cuda": {"name": self.card} if self.card else "DeviceError('no driver')", "tensorrt": "8.5.3.1"}
        elif "compile" in words:
            output = Path(words[words.index("--output") + 1])
            output.mkdir(parents=True, exist_ok=True)
            (output / "manifest.json").write_text("{}")
            if output.name == "unet-fp16":
                return {"ended": 1, "seconds": 1.0, "stdout": "", "stderr": "edgeseg: TensorRT cannot parse model.onnx"}
            precision = {"requested": "int8", "mac_share": {"int8": 1.0}, "time_share": None, "float_layers": {}}
            answer = {"precision": precision, "engine": {"size_bytes": 7}, "versions": {}, "device": {}}
        elif words[:2] == ["-c", self.kit.MASKS]:
            np.savez_compressed(
                words[-1], masks=np.arange(8, dtype=np.uint8).reshape(1, 2, 4) % (2 if "engine" in words else 4)
            )
            answer = {"median_ms": 1.0, "samples": 20, "options": {}}
        elif "pytest" in words:
            outcome = "passed" if self.card else "skipped"
            report = Path(words[words.index("--device-report") + 1])
            report.write_text(json.dumps({"tests": {"a": {"outcome": outcome, "said": "needs a GPU"}}}))
        return {"ended": 0, "seconds": 1.0, "stdout": json.dumps(answer), "stderr": ""}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("unet-fp16", "unet-int8"):
        (tmp_path / "kit" / "engines" / name).mkdir(parents=True)
        (tmp_path / "kit" / "engines" / name / "manifest.json").write_text("{}")
    return tmp_path / "kit"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_what_fails_costs_only_itself_and_the_rest_names_the_card(
    tmp_path: Path, folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kit = load("on_device")
    machine = Machine(kit, monkeypatch)
    out = tmp_path / "out"
    arguments = [str(out), "--folders", str(folders), "--option", "tactic_sources=JIT_CONVOLUTIONS"]
    only = [word for step in ("cuda", "compile", "agreement") for word in ("--only", step)]
    assert kit.main([*arguments, *only]) == 1
    summary = read(out / "summary.json")
    assert summary["card"] == "NVIDIA H100"
    assert {name: summary[name]["outcome"] for name in ("device", "cuda", "compile", "agreement")} == {
        "device": "done",
        "cuda": "done",
        "compile": "failed",
        "agreement": "done",
    }
    assert "1 of 2 failed: unet-fp16" in summary["compile"]["said"] and "unet-fp16" in capsys.readouterr().out
    compiled = read(out / "compile.json")
    assert compiled["card"] == "NVIDIA H100" and compiled["result"]["unet-int8"]["size_bytes"] == 7
    assert "cannot parse model.onnx" in compiled["result"]["unet-fp16"]["error"]
    agreed = read(out / "agreement.json")["result"]["unet-int8"]
    assert (agreed["beside"], agreed["agreement"], agreed["classes"]) == ("pytorch", 0.5, 4)
    assert all("tactic_sources=JIT_CONVOLUTIONS" in words for words in machine.started if "compile" in words)
    machine.started.clear()
    assert kit.main([*arguments, *only]) == 1
    tried = [words for words in machine.started if "compile" in words or "pytest" in words or kit.MASKS in words]
    assert tried and all("compile" in words for words in tried), "what was done is not done again"


def test_a_machine_without_a_gpu_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = load("on_device")
    Machine(kit, monkeypatch, card=None)
    assert kit.main([str(tmp_path), "--only", "suite", "--only", "soak"]) == 2
    summary = read(tmp_path / "summary.json")
    assert summary["card"] == "no GPU"
    assert "no test ran: needs a GPU" in summary["suite"]["said"]
    assert "no engine was compiled" in summary["soak"]["said"]


def test_the_programs_it_sends_are_python() -> None:
    kit = load("on_device")
    for program in (kit.MASKS, kit.SOAK):
        ast.parse(program, feature_version=(3, 10))


def test_external_tactics_are_left_out_of_every_config(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder("8.5.3.1")
    monkeypatch.setitem(sys.modules, "tensorrt", recorder.module)
    load("no_external_tactics").apply()
    builder = recorder.module.Builder(recorder.module.Logger())
    builder.create_builder_config()
    sources = recorder.module.TacticSource
    (call,) = recorder.of("IBuilderConfig.set_tactic_sources")
    assert call.arguments["tactic_sources"] == (
        1 << int(sources.JIT_CONVOLUTIONS) | 1 << int(sources.EDGE_MASK_CONVOLUTIONS)
    )
