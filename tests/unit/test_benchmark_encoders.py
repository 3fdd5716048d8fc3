"""The encoders' page is what the committed results say; the list of families leaves none of SMP's out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import encoders
from benchmarks.encoders import ENCODERS, FILE, PAGE, architectures_for, page
from benchmarks.record import Machine, Record, read_record
from edgeseg.spec import ARCHITECTURES

MACHINE = Machine("a CPU", ("avx2",), 2, None, None, "Linux", "3.11", None, (0.1, 0.1, 0.1))


def record(rows: list[dict[str, object]], shared: bool = False) -> Record:
    settings = {"limit_s": 1.0, "shared_machine": shared}
    return Record("encoders", "a workload", MACHINE, {"edgeseg": "0"}, settings, rows, {}, "2026-01-01", "abc")  # type: ignore[arg-type]


def test_committed_page_is_generated_from_the_committed_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_record(FILE)), "run: python -m benchmarks.encoders --page"


def test_no_committed_build_failed_without_a_reason() -> None:
    for row in json.loads(FILE.read_text())["rows"]:
        for variant in encoders.VARIANTS:
            assert variant in row, f"{row['name']}: {variant} was neither built nor refused"
            assert "internal error" not in row[variant].get("failed", ""), row


def test_every_family_of_smp_is_listed_once_with_an_architecture() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    known = smp.encoders.encoders
    classes = {known[name]["encoder"] for name in encoders.SMP_FAMILIES}
    assert {entry["encoder"] for entry in known.values()} == classes
    assert len(set(ENCODERS)) == len(ENCODERS)
    used = {architectures_for(name)[0] for name in ENCODERS}
    assert used == set(ARCHITECTURES)


def test_every_timm_name_exists() -> None:
    timm = pytest.importorskip("timm")
    assert [name for name in encoders.TIMM_FAMILIES if not timm.is_model(name)] == []


def test_figures_refusals_and_what_was_not_run_are_shown() -> None:
    fine = {"agreement": 1.0, "int8_share": 0.0, "seconds": 12.3}
    int8 = {"agreement": 0.9876, "int8_share": 1.0, "seconds": 9.0}
    one_size = {"refused": "one size", "seconds": 2.0}
    hung = {"failed": "not finished in 1 s"}
    rows: list[dict[str, object]] = [
        {"name": "resnet18", "arch": "unet", "fp32": fine, "dynamic": fine, "int8": int8},
        {"name": "vgg11", "arch": "fpn", "not_with": {"pan": "no"}, "fp32": fine, "dynamic": one_size, "int8": hung},
    ]
    text = page(record(rows, shared=True))
    assert "| `resnet18` | unet | 1.0000 | 12 | 1.0000 | 12 | 0.9876 | 9 | 100.0% |" in text
    assert "| `vgg11` | fpn | 1.0000 | 12 | refused | 2 | failed | - | - |" in text
    assert "- `vgg11` with pan: no" in text and "- `vgg11` with fpn, dynamic refused: one size" in text
    missing = re.search(r"## Not run yet \((\d+)\)", text)
    assert missing is not None and int(missing[1]) == len(ENCODERS) - 2
    assert "busy machine" in text and "busy machine" not in page(record(rows))


def test_a_process_that_hangs_is_ended_and_what_it_had_built_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "python"
    script.write_text(
        '#!/bin/sh\nprintf \'{"name": "%s", "arch": "unet", "fp32": {"agreement": 1.0}}\' "$4" > "$5"\nexec sleep 600\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(encoders.sys, "executable", str(script))
    row = encoders.in_process("resnet18", {}, 2.0)
    assert row["fp32"] == {"agreement": 1.0} and row["dynamic"]["failed"].startswith("not finished in 2 s")
