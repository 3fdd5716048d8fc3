"""A trained network whose channels are badly scaled, so that plain INT8 loses a lot: equalization takes that back, and without
it ``--max-drop`` and ``--min-agreement`` are goals that builds search for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import edgeseg
from benchmarks.badly_scaled import badly_scaled
from edgeseg.convert.load import load_model
from edgeseg.demo import sample_folder
from edgeseg.errors import GateError
from edgeseg.pipeline.fastest import compile_fastest
from edgeseg.quantize.table import load_table
from edgeseg.spec import ModelRequest
from edgeseg.store.documents import read_json
from edgeseg.store.engine import Engine, open_engine
from edgeseg.store.search import SensitivityReport

pytestmark = pytest.mark.integration
CHOOSES_BY_TIME = True
IMAGES = 8


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before, folder = os.environ.get("EDGESEG_CACHE"), tmp_path_factory.mktemp("cache")
    os.environ["EDGESEG_CACHE"] = str(folder)
    yield folder
    if before is not None:
        os.environ["EDGESEG_CACHE"] = before


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a build of the network: a checkpoint, so that its graph is found in the cache again."""
    folder = tmp_path_factory.mktemp("network")
    module, preprocess = badly_scaled("fpn")
    torch.save(module.state_dict(), folder / "badly_scaled.pth")
    for kind in ("images", "masks"):
        (folder / "val" / kind).mkdir(parents=True)
        for path in sorted((sample_folder() / "val" / kind).iterdir())[:IMAGES]:
            (folder / "val" / kind / path.name).symlink_to(path)
    return {
        "arch": "fpn",
        "encoder": "tu-mobilenetv4_conv_small_050",
        "weights": folder / "badly_scaled.pth",
        "mean": preprocess.mean,
        "std": preprocess.std,
        "size": 64,
        "equalize": False,
        "calibration": sample_folder() / "calib" / "images",
        "calibration_limit": 24,
        "validation": folder / "val",
        "target": "onnxruntime",
    }


class Heard:
    """A reporter that keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.judged: list[str] = []
        """What the search judged, in order."""

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    def has(self, word: str) -> bool:
        return any(word in line for line in self.lines)


@pytest.fixture(scope="module")
def mixed(arguments: dict[str, Any], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Heard]:
    heard, folder = Heard(), tmp_path_factory.mktemp("engines") / "mixed"
    engine = edgeseg.build(**arguments, max_drop=0.005, output=folder, reporter=heard)
    judged = (cache / "judged").glob("[0-9a-f]*")
    heard.judged = [path.name for path in sorted(judged, key=lambda path: path.stat().st_mtime_ns)]
    return engine, heard


def test_the_goal_is_reached_with_most_of_the_work_in_int8(mixed: tuple[Engine, Heard]) -> None:
    engine, heard = mixed
    search, verification = engine.manifest.search, engine.manifest.verification
    assert search is not None
    assert verification is not None
    chosen, plain, floats = search.candidates[search.chosen], search.candidates[0], search.candidates[1]
    assert not plain.meets_goal and plain.float_modules == ()
    assert plain.miou_drop is not None and plain.miou_drop.value > 0.05
    assert floats.meets_goal and floats.precision == "fp32"
    assert chosen.meets_goal and chosen.float_modules
    assert verification.miou_drop is not None and verification.miou_drop <= 0.005
    # The figures of the search are those of the verification, and of the engine's own precision report.
    assert chosen.miou_drop is not None
    assert chosen.miou_drop.value == pytest.approx(verification.miou_drop, abs=1e-12)
    assert chosen.miou_drop.low is not None and chosen.miou_drop.low <= chosen.miou_drop.value
    assert chosen.agreement.value == pytest.approx(verification.agreement, abs=1e-12)
    assert chosen.mac_share == engine.manifest.precision.mac_share
    assert chosen.mac_share["int8"] > 0.75
    assert search.is_complete and search.images == IMAGES
    timed = [candidate for candidate in search.candidates if candidate.median_ms is not None]
    assert {plain.median_ms, floats.median_ms, chosen.median_ms} <= {candidate.median_ms for candidate in timed}
    assert chosen.median_ms == min(c.median_ms for c in timed if c.meets_goal)  # type: ignore[type-var]
    # The badly scaled channels are in the encoder.
    worst = min(search.modules, key=lambda module: 1.0 if module.agreement is None else module.agreement.value)
    assert worst.module.startswith("encoder.blocks") and worst.module in chosen.float_modules
    assert all(module.saved_ms is not None for module in search.modules)
    assert heard.has("in float for the goal") and heard.has("plain INT8 misses the goal")
    assert open_engine(engine.folder).manifest == engine.manifest
    with edgeseg.load(engine.folder) as segmenter:
        assert segmenter.spec == engine.manifest.spec


def test_the_summary_fits_a_terminal(mixed: tuple[Engine, Heard], capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from edgeseg.evaluate.summary import build_summary

    Console(width=80, force_terminal=False).print(build_summary(mixed[0]))
    shown = capsys.readouterr().out
    assert "met" in shown and "all (fp32)" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_sensitivity_of_the_folder_is_what_the_search_saw(
    mixed: tuple[Engine, Heard], arguments: dict[str, Any], tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from edgeseg.cli.sensitivity import command

    engine = mixed[0]
    words = [str(engine.folder), "--data", str(arguments["validation"]), "--json", str(tmp_path / "modules.json")]
    done = CliRunner().invoke(command, words)
    assert done.exit_code == 0, done.output
    assert "encoder.blocks.2" in done.output
    report = read_json(tmp_path / "modules.json", SensitivityReport, "sensitivity")
    assert engine.manifest.search is not None
    by_search = {module.module: module for module in engine.manifest.search.modules}
    assert [module.module for module in report.modules] == sorted(
        by_search, key=[m.module for m in report.modules].index
    )
    for module in report.modules:
        seen = by_search[module.module]
        assert (module.agreement, module.miou_drop, module.class_drops) == (
            seen.agreement,
            seen.miou_drop,
            seen.class_drops,
        )
        assert module.saved_ms is not None
    assert sum(module.mac_share for module in report.modules) == pytest.approx(1.0)
    refused = CliRunner().invoke(command, [*words, "--arch", "unet"])
    assert isinstance(refused.exception, edgeseg.SpecError)
    assert "says what its network is; leave out --arch" in str(refused.exception)


def test_the_recipe_keeps_the_float_network() -> None:
    module, _ = badly_scaled("fpn")
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 64, 64)).astype(np.float32))
    with torch.inference_mode():
        before, after = load_model(ModelRequest(arch="fpn")).module(image), module(image)
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


def test_no_search_where_equalized_int8_meets_the_goal(
    mixed: tuple[Engine, Heard], arguments: dict[str, Any], tmp_path: Path
) -> None:
    heard = Heard()
    easy = {**arguments, "equalize": True}
    engine = edgeseg.build(**easy, max_drop=0.05, min_agreement=0.9, output=tmp_path / "e", reporter=heard)
    assert engine.manifest.search is None
    assert not heard.has("misses the goal")
    plain = mixed[0]
    assert plain.manifest.search is not None and plain.manifest.search.candidates[0].agreement.value < 0.9
    assert engine.manifest.precision.mac_share["int8"] > 0.95
    for built, equalize in ((engine, True), (plain, False)):
        assert ("equalization" in [repair.name for repair in built.manifest.repairs]) is equalize
        assert bool(load_table(built.folder / "calibration.json").equalization) is equalize
    # A table brings the equalization it was made with.
    table = {"calibration": engine.folder / "calibration.json", "calibration_limit": None}
    again = edgeseg.build(**{**easy, **table}, output=tmp_path / "again")
    assert again.manifest.graph.sha256 == engine.manifest.graph.sha256


def test_without_search_it_is_a_gate(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(GateError, match="max_drop allows 0.005"):
        edgeseg.build(**arguments, max_drop=0.005, search=False, output=tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_what_no_engine_meets_is_said_with_figures(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model whose own masks are not those of its graph: what a wrong export looks like."""
    from edgeseg.backends.pytorch import PyTorchSession

    right = PyTorchSession.run

    def run(self: PyTorchSession, images: Any) -> Any:
        outputs = dict(right(self, images))
        outputs["mask"] = outputs["mask"].copy()
        outputs["mask"][:, :10] = 0
        return outputs

    monkeypatch.setattr(PyTorchSession, "run", run)
    with pytest.raises(GateError, match=r"not even the fp32 engine meets the goal: it agrees on 0\.\d+ of pixels"):
        edgeseg.build(**arguments, min_agreement=0.999, output=tmp_path / "e")
    assert not (tmp_path / "e").exists()


def with_judgements(names: list[str], cache: Path, folder: Path) -> Path:
    """The cache with the network's graph and ranges, and these judgements only."""
    shutil.copytree(cache, folder)
    for path in (folder / "judged").glob("[0-9a-f]*"):
        if path.name not in names:
            shutil.rmtree(path)
    return folder


def test_at_the_time_limit_the_best_so_far_is_delivered(
    arguments: dict[str, Any], cache: Path, mixed: tuple[Engine, Heard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGESEG_CACHE", str(with_judgements([], cache, tmp_path / "cache")))
    heard = Heard()
    engine = edgeseg.build(**arguments, max_drop=0.005, search_minutes=0, output=tmp_path / "e", reporter=heard)
    search = engine.manifest.search
    assert search is not None and not search.is_complete
    chosen = search.candidates[search.chosen]
    assert chosen.meets_goal
    assert heard.has("limit of 0 minutes")
    assert engine.manifest.precision.mac_share == chosen.mac_share


def test_a_killed_build_goes_on_where_it_was(
    arguments: dict[str, Any], cache: Path, tmp_path: Path, mixed: tuple[Engine, Heard]
) -> None:
    """SIGKILL during the search; the next build judges only what was not judged yet."""
    kept = mixed[1].judged[:-6]
    assert len(kept) > 6
    cache = with_judgements(kept, cache, tmp_path / "cache")
    words = ["build", "--output", str(tmp_path / "e"), "--max-drop", "0.005", "--no-equalize"]
    for name in ("arch", "encoder", "weights", "size", "calibration", "calibration_limit", "validation", "target"):
        words += [f"--{name.replace('_', '-')}", str(arguments[name])]
    for name in ("mean", "std"):
        words += [f"--{name}", ",".join(map(str, arguments[name]))]
    command = [sys.executable, "-m", "edgeseg", *words]
    environment = {**os.environ, "EDGESEG_CACHE": str(cache)}
    judged = cache / "judged"
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 400
        while len(list(judged.glob("[0-9a-f]*"))) < len(kept) + 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in judged.glob("[0-9a-f]*/judged.json")}
    assert not (tmp_path / "e").exists()
    done = subprocess.run(
        [*command, "--json"], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(list(judged.glob("[0-9a-f]*/judged.json"))) > len(before)
    search, first = json.loads(done.stdout)["search"], mixed[0].manifest.search
    assert first is not None
    assert search["candidates"][0]["agreement"]["value"] == first.candidates[0].agreement.value


def test_a_portable_folder_lets_the_device_choose(
    arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built as for another machine, compiled as on it: this machine stands for the device."""
    heard = Heard()
    with monkeypatch.context() as elsewhere:
        for module in ("candidate", "goal"):
            elsewhere.setattr(f"edgeseg.pipeline.{module}.builds_here", lambda *_: False)
        folder = edgeseg.build(**arguments, max_drop=0.005, output=tmp_path / "portable", reporter=heard)
    search = folder.manifest.search
    assert folder.manifest.engine is None
    assert search is not None
    carried = [candidate for candidate in search.candidates if candidate.graph is not None]
    assert 2 <= len(carried) <= 4
    assert all(
        candidate.meets_goal and candidate.median_ms is None for candidate in search.candidates if candidate in carried
    )
    assert carried[-1].precision == "fp32" or carried[0].precision == "fp32"
    assert search.candidates[search.chosen].graph == folder.manifest.graph
    assert {p.name for p in folder.folder.iterdir()} == {"manifest.json", *(f.name for f in folder.manifest.files)}

    engine = compile_fastest(folder.folder, output=tmp_path / "new" / "engine", reporter=None)
    timed = engine.manifest.search
    assert timed is not None
    chosen = timed.candidates[timed.chosen]
    medians = [c.median_ms for c in timed.candidates if c.graph is not None]
    assert None not in medians and chosen.median_ms == min(medians)  # type: ignore[type-var]
    assert engine.manifest.graph == chosen.graph
    assert engine.manifest.name == "engine"
    # In place, and again: the graphs are all still there.
    again = compile_fastest(folder.folder)
    assert [c.graph for c in again.manifest.search.candidates] == [c.graph for c in timed.candidates]  # type: ignore[union-attr]
    assert open_engine(folder.folder).manifest == again.manifest
    (folder.folder / carried[-1].graph.name).write_bytes(b"other")  # type: ignore[union-attr]
    with pytest.raises(edgeseg.ArtifactError, match=r"truncated or edited|hash"):
        compile_fastest(folder.folder, output=tmp_path / "no")
