"""What a search found, as people see it: in the report's forms, in the build's summary, in a folder that is checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_rows import merged, report, row
from test_report import HOSTILE, Page, page_of

from edgeseg.decide.verdict import decide
from edgeseg.errors import ArtifactError
from edgeseg.evaluate.results import read_report, write_report
from edgeseg.evaluate.summary import front_table, pareto_front, sensitivity_table
from edgeseg.report.plain import csv_text, markdown
from edgeseg.store.search import Estimate, ModuleSensitivity, Search, SearchCandidate


def candidate(floats: tuple[str, ...], drop: float, ms: float | None, **changes: Any) -> SearchCandidate:
    plain = SearchCandidate(
        target="onnxruntime",
        precision="int8",
        float_modules=floats,
        mac_share={"int8": 1.0 - 0.1 * len(floats), "fp32": 0.1 * len(floats)},
        agreement=Estimate(1.0 - drop, 0.9, 1.0),
        miou_drop=Estimate(drop, drop - 0.01, drop + 0.01),
        meets_goal=drop <= 0.01,
        median_ms=ms,
        estimated_ms=7.0,
        size_bytes=1_000_000,
    )
    return replace(plain, **changes)


def search(*names: str) -> Search:
    modules = tuple(
        ModuleSensitivity(name, 0.25, Estimate(1.0 - 0.01 * k, 0.9, 1.0), Estimate(0.001 * k), (0.1, None), 0.5 - k)
        for k, name in enumerate(names, start=1)
    )
    candidates = (
        candidate((), 0.2, 1.0),
        candidate((), 0.0, 9.0, precision="fp32", mac_share={"fp32": 1.0}),
        candidate(names[:2], 0.009, 2.0),
        candidate(names[:1], 0.01, 3.0),
        candidate(names[:3], 0.005, None),
    )
    return Search(0.01, None, 48, True, "a profiler", modules, candidates, 2)


def test_the_front_is_what_no_other_beats() -> None:
    made = search("encoder.layer1", "encoder.layer2", "decoder.p5")
    # Slower and less accurate, and the one whose time nobody knows: not on it.
    assert [c.median_ms for c in pareto_front(made)] == [1.0, 2.0, 9.0]
    untimed = made.untimed()
    assert [c.mac_share.get("int8", 0.0) for c in pareto_front(untimed)] == [1.0, 0.9, 0.8, 0.7, 0.0]


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_a_terminal(width: int, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    made = search("decoder.fpn_lateral_blocks.10", "encoder.patch_embed1", "segmentation_head")
    for table in (front_table(made), sensitivity_table(made.modules)):
        Console(width=width, force_terminal=False).print(table)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown
    assert "decoder.fpn_lateral_blocks" in shown
    assert "0.1000" in shown and "-0.50" in shown


def test_the_report_shows_what_modules_cost_and_that_precision_is_mixed() -> None:
    int8 = row("mixed", precision="int8", miou=0.6)
    made = search("encoder.layer1", HOSTILE, "decoder.p5")
    int8 = replace(int8, engine=replace(int8.engine, search=made))
    both = merged(row("pytorch", is_baseline=True, miou=0.6), int8)
    page = Page(page_of(both))
    text = " ".join(page.texts)
    assert "What INT8 of each module costs and saves" in text
    assert "int8, mixed" in text
    assert HOSTILE in page.texts
    assert "mIoU drop at most 0.01; 5 engines judged on 48 images" in text
    assert {"float", "int8"} <= set(page.texts)
    verdicts = decide(both)
    assert "int8, mixed" in markdown(both, verdicts)
    assert '"int8, mixed"' in csv_text(both, verdicts)


def test_a_bench_report_keeps_the_search(tmp_path: Path) -> None:
    int8 = row("mixed", precision="int8")
    int8 = replace(int8, engine=replace(int8.engine, search=search("encoder.layer1")))
    write_report(tmp_path / "b.json", report(int8))
    assert read_report(tmp_path / "b.json").rows[0].engine.search == int8.engine.search
    text = (tmp_path / "b.json").read_text().replace('"chosen": 2', '"chosen": 5')
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ArtifactError, match="candidate 5 was chosen of 5"):
        read_report(tmp_path / "c.json")
