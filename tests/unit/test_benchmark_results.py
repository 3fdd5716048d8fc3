"""RESULTS.md is what the committed raw results say, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from benchmarks.record import RESULTS, Machine, Record
from benchmarks.results import PAGE, page
from edgeseg.demo import demo_models
from edgeseg.store.documents import write_json

EXAMPLE = Path(__file__).parents[1] / "data" / "bench-report-example.json"


def test_committed_page_is_generated_from_the_committed_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(RESULTS), "run: python -m benchmarks.results"


def test_the_docs_say_of_rasters_what_was_measured() -> None:
    text = (RESULTS.parents[1] / "docs" / "rasters.md").read_text(encoding="utf-8")
    rows = json.loads((RESULTS / "rasters.json").read_text())["rows"]
    for label, kind in (("blended scores", "scores"), ("masks", "masks")):
        peaks = [f"{row['peak_bytes'] / 1e6:.0f}" for row in rows if row["name"].startswith(kind)]
        assert f"| {' | '.join([label, *peaks])} |" in text


def test_the_docs_say_of_the_demo_models_what_was_measured() -> None:
    rows = [line for line in page_lines("calibration/demo/RESULTS.md") if " MB |" in line]
    assert len(rows) == len(demo_models()) and set(rows) <= set(page_lines("docs/measured.md"))


def test_the_readme_and_the_docs_say_of_camvid_what_was_measured() -> None:
    record = json.loads((RESULTS / "end_to_end.json").read_text())
    rows = {row["name"]: row for row in record["rows"]}
    contenders = {
        "PyTorch eager": "pytorch-eager",
        "PyTorch, channels last": "pytorch-channels-last",
        "`torch.compile`": "pytorch-compile",
        "ONNX Runtime `quantize_static`": "onnxruntime-quantize-static",
        "NNCF + ONNX Runtime": "nncf-onnxruntime",
        "Model Optimizer + ONNX Runtime": "modelopt-onnxruntime",
        "NNCF + OpenVINO": "nncf-openvino",
        "**edgeseg**, ONNX Runtime": "edgeseg-onnxruntime",
        "**edgeseg**, OpenVINO": "edgeseg-openvino",
    }
    readme, docs = page_lines("README.md"), page_lines("docs/measured.md")
    for label, name in contenders.items():
        row, ratio = rows[name], record["ratios"]["pytorch-eager"].get(name)
        miou, median = f"{row['miou']:.4f}", f"{row['latency']['median_ms']:.1f}"
        faster = "1" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        agreement = "1" if row["agreement"] == 1 else f"{row['agreement']:.4f}"
        assert f"| {label} | {miou} | {agreement} | {median} | {faster} |" in docs
        short = f"| {label} | {miou} | {median} | {faster} |"
        assert short in readme or not any(line.startswith(f"| {label} |") for line in readme)


def test_the_docs_say_of_the_architectures_what_was_measured() -> None:
    faster = json.loads((RESULTS / "architectures.json").read_text())["ratios"]["fp32"]
    assert f"| {' | '.join(faster)} |" in page_lines("docs/measured.md")
    assert "| " + " | ".join(f"{ratio['median']:.1f}x" for ratio in faster.values()) + " |" in page_lines(
        "docs/measured.md"
    )


def test_the_docs_say_of_what_is_added_what_was_measured() -> None:
    rows = {row["name"]: row for row in json.loads((RESULTS / "overhead.json").read_text())["rows"]}
    page = " ".join(page_lines("docs/measured.md"))
    build = rows["int8 build of fpn 256x256, 64 calibration images"]
    for words in (
        f"`import edgeseg` takes {1000 * rows['import edgeseg']['median_s']:.0f} ms",
        f"`edgeseg.load` takes {rows['edgeseg.load']['median_s']:.2f} s",
        f"352x480 {100 * rows['Segmenter overhead']['share']:.1f} % more",
        f"`edgeseg run` of one image {rows['edgeseg run, one image']['median_s']:.2f} s",
        f"with 64 calibration images {build['total_s']:.0f} s",
    ):
        assert words in page
    for name, row in rows.items():
        if "said" in row:
            network, said = name.removeprefix("build of "), row["said"].removesuffix(" to go")
            assert f"| {network} | {said} | {row['took_s']:.0f} |" in page


def test_the_docs_say_of_accuracy_control_what_was_measured() -> None:
    record = json.loads((RESULTS / "accuracy_control.json").read_text())
    lines = "\n".join(page_lines("docs/measured.md"))
    for row in record["rows"]:
        network, runtime, who = row["name"].split(", ")
        if who == "pytorch":
            continue
        words = ("FPN" if network.endswith("fpn") else "U-Net", "OpenVINO" if runtime == "openvino" else "ONNX Runtime")
        figures = f"| {100 * row['miou_drop']:.2f} | {row['latency']['median_ms']:.2f} |"
        assert f"| {', '.join(words)}: {'NNCF' if who == 'nncf' else '**edgeseg**'} {figures}" in lines
    for ratio in record["ratios"]["nncf"].values():
        assert f"| {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}) |" in lines


def test_the_docs_say_of_hard_networks_what_was_measured() -> None:
    record = json.loads((RESULTS / "hard_networks.json").read_text())
    rows, faster = {row["name"]: row for row in record["rows"]}, record["ratios"]["fp32"]
    for network in {name.split(", ")[0] for name in rows}:
        names = [f"{network}, as trained, {target}" for target in ("onnxruntime", "openvino", "tensorrt")]
        kinds = ("plain", "repaired", "goal")
        lost = [" to ".join(f"{100 * rows[name][kind]['miou_drop']:.2f}" for kind in kinds) for name in names]
        speed = ", ".join(f"{faster[f'{name}, goal']['median']:.1f}x" for name in names[:2])
        end = f" | {' | '.join(lost)} | {speed} |".replace("-0.00", "0.00")
        assert [
            line for line in page_lines("docs/measured.md") if line.startswith(f"| {network}, ") and line.endswith(end)
        ]


def test_the_docs_say_of_memory_what_was_measured() -> None:
    rows = json.loads((RESULTS / "memory.json").read_text())["rows"]
    for what in ("build", "run"):
        peaks = [f"{row[f'{what}_peak_bytes'] / 1e6:.0f}" for row in rows]
        assert f"| {' | '.join([what, *peaks])} |" in page_lines("docs/measured.md")


def page_lines(page: str) -> list[str]:
    return (RESULTS.parents[1] / page).read_text(encoding="utf-8").splitlines()


def write(folder: Path, name: str, rows: list[dict[str, object]], ratios: dict[str, dict[str, object]]) -> None:
    machine = Machine("a CPU", ("avx2",), 2, None, None, "Linux", "3.11", None, (0.1, 0.1, 0.1))
    record = Record("made up", "a workload", machine, {"edgeseg": "0"}, {}, rows, ratios, "2026-01-01", "abc")  # type: ignore[arg-type]
    write_json(folder / name, record)


def test_rows_ratios_and_failures_are_shown(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"name": "a", "latency": {"median_ms": 12.345, "iterations": 9}, "size_bytes": 2_500_000, "samples_ms": [1.0]},
        {"name": "b", "latency": {"median_ms": 9.0}, "size_bytes": None},
        {"name": "c|d", "failed": "no such package"},
        {"name": "e", "left_out": "no environment of it"},
        {"name": "start", "median_s": 0.123456},
    ]
    ratio = {"low": 0.9, "high": 1.1, "median": 1.02, "pairs": 9}
    write(tmp_path, "x.json", rows, {"a": {"b": ratio}})
    text = page(tmp_path)
    assert re.search(r"\| a \| 12\.35 \| 2\.50 \| - \|", text)
    assert re.search(r"\| b \| 9\.00 \| - \| - \|", text)
    assert "c\\|d" in text and "no such package" in text
    assert "| e | - | - | - |\n" in text and "e was left out: no environment of it." in text
    assert re.search(r"\| name \| median_s \|\n\| --- \| ---: \|\n\| start \| 0\.1235 \|", text)
    assert "| b | 1.02 | 0.90 to 1.10 (no difference) | 9 |" in text
    assert "iterations" not in text and "samples" not in text.split("## x")[1]


def test_bench_reports_are_shown_too(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path / "board.json")
    text = page(tmp_path)
    assert "## board" in text and "### MADE-UP BOARD (15W)" in text and "3.60" in text


def test_no_results_say_so(tmp_path: Path) -> None:
    assert "No results are committed yet" in page(tmp_path)
