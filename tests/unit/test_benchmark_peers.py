"""The peers' table: what is left out says so, and several networks share one record."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the benchmarks need PyTorch")

from rich.console import Console

from benchmarks import end_to_end
from benchmarks.end_to_end import Measured, combined, present, table
from benchmarks.peers import NotInstalledError
from benchmarks.peers.modelopt_onnxruntime import interpreter, run
from benchmarks.record import this_machine

OPTIONS = argparse.Namespace(warmup_ms=1.0, duration_ms=2.0, iterations=3)
RATIO = {"pytorch-eager": {"a": {"median": 2.0, "low": 1.5, "high": 2.5, "pairs": 9}}}


def measured(name: str) -> Measured:
    latency = {"median_ms": 12.34}
    rows = [
        {"name": "a", "miou": 0.5, "agreement": None, "latency": latency},
        {"name": "b", "left_out": "no environment"},
        {"name": "c", "failed": "RuntimeError: x"},
    ]
    return Measured(f"{name}, 3 images", rows, RATIO, {"other": "1.0"})


def test_one_network_keeps_the_contenders_names() -> None:
    record = combined([measured("camvid fpn e")], this_machine(), OPTIONS)
    assert [row["name"] for row in record.rows] == ["a", "b", "c"]
    assert record.ratios == RATIO
    assert record.versions["other"] == "1.0" and "numpy" in record.versions
    assert record.settings["protocol"]["min_iterations"] == 3


def test_of_several_networks_rows_and_baselines_are_told_apart() -> None:
    record = combined([measured("demo fpn e"), measured("demo unet e")], this_machine(), OPTIONS)
    assert [row["name"] for row in record.rows[::3]] == ["demo fpn: a", "demo unet: a"]
    assert list(record.ratios) == ["demo fpn: pytorch-eager", "demo unet: pytorch-eager"]
    assert record.workload == "demo fpn e, 3 images; demo unet e, 3 images"


def test_what_was_not_measured_is_a_dash() -> None:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(table(measured("demo fpn e")))
    lines = {line.split()[0]: line.split()[1:] for line in captured.get().splitlines() if line.strip()}
    assert lines["a"] == ["0.5000", "-", "12.3", "2.00", "1.50-2.50"]
    assert lines["b"] == ["-"] * 5
    assert lines["c"] == ["failed", *["-"] * 4]


def test_without_camvid_the_demo_models_remain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGESEG_CAMVID", str(tmp_path))
    console = Console(width=120)
    with console.capture() as captured:
        assert present(console) == ["demo"]
    assert "EDGESEG_CAMVID" in captured.get()


def test_an_output_needs_one_workload(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["end_to_end", "--output", "x.json"])
    with pytest.raises(SystemExit):
        end_to_end.arguments()
    assert "--output takes the results of one workload" in capsys.readouterr().err


def test_a_missing_environment_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGESEG_MODELOPT", str(tmp_path))
    with pytest.raises(NotInstalledError, match="make modelopt"):
        interpreter()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert interpreter() == str(tmp_path / "bin" / "python")


def test_the_command_runs_without_our_packages_and_its_error_is_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", "ours")
    said = run([sys.executable, "-c", "import os; print(os.getcwd(), 'PYTHONPATH' in os.environ)"], tmp_path)
    assert said.split() == [str(tmp_path), "False"]
    with pytest.raises(RuntimeError, match=r"ended with 1: .*ValueError: no such tensor"):
        run([sys.executable, "-c", "raise ValueError('no such tensor')"], tmp_path)
