"""Which PyTorch baselines stand beside which engines: on the engine's device, and never another one without its name."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_rows import report, row
from rich.console import Console
from test_compile_for_device import portable_folder

from edgeseg.evaluate import contenders
from edgeseg.evaluate.bench_table import bench_summary
from edgeseg.evaluate.contenders import Contender, Opener, baseline_contenders, engine_contenders, first_baseline
from edgeseg.evaluate.results import SpeedComparison
from edgeseg.spec import BatchRange

NO_CUDA = "the PyTorch here (2.14.1+cpu) is built without CUDA"


class Loads(Opener):
    """Whose PyTorch models are always the right ones."""

    def loaded(self, contender: Contender) -> Any:
        return None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_why_no_cuda", lambda: None)


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_why_no_cuda", lambda: NO_CUDA)


def engines(folder: Path) -> list[Contender]:
    """An engine of the GPU and one of the CPU, of one model."""
    (gpu,), _ = engine_contenders([portable_folder(folder / "on-gpu")])
    assert gpu.device == "cuda"
    return [gpu, replace(gpu, name="on-cpu", device="cpu")]


def baselines(of: Sequence[Contender], *kinds: str) -> tuple[dict[str, str], list[str]]:
    made, notes = baseline_contenders(of, kinds, Path("weights.pt"), Loads())
    return {contender.name: contender.device for contender in made}, notes


@pytest.mark.usefixtures("cuda")
def test_pytorch_runs_where_the_engine_runs(tmp_path: Path) -> None:
    gpu, cpu = engines(tmp_path)
    assert baselines([gpu], "pytorch", "pytorch-fp16") == ({"pytorch-cuda": "cuda", "pytorch-fp16-cuda": "cuda"}, [])
    assert baselines([cpu], "pytorch", "pytorch-bf16") == ({"pytorch": "cpu", "pytorch-bf16": "cpu"}, [])
    assert baselines([gpu, cpu], "pytorch")[0] == {"pytorch-cuda": "cuda", "pytorch": "cpu"}
    both = {"pytorch-cuda": "cuda", "pytorch-cpu": "cpu", "pytorch": "cpu"}
    for order in ([gpu, cpu], [cpu, gpu]):
        assert baselines(order, "pytorch", "pytorch-cpu") == (both, [])
    names, notes = baselines([cpu], "pytorch-fp16", "pytorch")
    assert names == {"pytorch": "cpu"} and notes == [
        "no pytorch-fp16 beside engines of the CPU: PyTorch's float16 is for GPUs"
    ]


@pytest.mark.usefixtures("no_cuda")
def test_without_cuda_a_gpus_engine_has_no_baseline_unless_asked_for_the_cpus(tmp_path: Path) -> None:
    gpu, cpu = engines(tmp_path)
    names, notes = baselines([gpu, cpu], "pytorch")
    assert names == {"pytorch": "cpu"}
    assert notes == [
        f"no PyTorch baseline on the GPU, where the engines run: {NO_CUDA}; --baseline pytorch-cpu compares with the CPU, "
        "and says so"
    ]
    assert baselines([gpu], "pytorch-cpu") == ({"pytorch-cpu": "cpu"}, [])
    assert baselines([cpu], "pytorch") == ({"pytorch": "cpu"}, [])


def test_who_is_compared_with_whom(tmp_path: Path) -> None:
    gpu, cpu = engines(tmp_path)
    here = replace(cpu, name="pytorch", folder=None, baseline="pytorch")
    there = replace(gpu, name="pytorch-cuda", folder=None, baseline="pytorch")
    asked = replace(cpu, name="pytorch-cpu", folder=None, baseline="pytorch-cpu")
    assert first_baseline(gpu, [here, there, gpu, cpu]) is there
    assert first_baseline(cpu, [there, here, gpu, cpu]) is here
    assert first_baseline(gpu, [here, gpu]) is None, "a GPU is not compared with a CPU nobody named"
    assert first_baseline(gpu, [asked, gpu]) is asked
    assert first_baseline(gpu, [asked, there, gpu]) is there
    assert first_baseline(there, [there, gpu]) is None and first_baseline(asked, [there, asked]) is None


OTHER_CONTRACTS = (
    lambda spec: replace(spec, output=replace(spec.output, kind="logits")),
    lambda spec: replace(spec, output=replace(spec.output, threshold=0.3)),
    lambda spec: replace(spec, input=replace(spec.input, fit="letterbox")),
    lambda spec: replace(spec, input=replace(spec.input, interpolation="area")),
    lambda spec: replace(spec, preprocess=replace(spec.preprocess, scale=1.0)),
)
SAME_ANSWERS = (
    lambda spec: replace(spec, input=replace(spec.input, batch=BatchRange(1, 4, 8))),
    lambda spec: replace(spec, output=replace(spec.output, confidence=True)),
)


@pytest.mark.parametrize("changed", OTHER_CONTRACTS)
def test_what_is_decided_otherwise_has_a_baseline_of_its_own(tmp_path: Path, changed: Callable[[Any], Any]) -> None:
    """Else the second engine would be judged by how the first one takes images and makes masks of scores."""
    _, cpu = engines(tmp_path)
    other = replace(cpu, name="other", spec=changed(cpu.spec))
    for order in ([cpu, other], [other, cpu]):
        made, _ = baseline_contenders(order, ("pytorch",), Path("weights.pt"), Loads())
        assert [contender.name for contender in made] == [f"pytorch-{engine.name}" for engine in order]
        for engine in order:
            found = first_baseline(engine, [*made, *order])
            assert found is not None and found.name == f"pytorch-{engine.name}" and found.spec == engine.spec


@pytest.mark.parametrize("changed", SAME_ANSWERS)
def test_what_gives_the_same_masks_shares_its_baseline(tmp_path: Path, changed: Callable[[Any], Any]) -> None:
    _, cpu = engines(tmp_path)
    assert baselines([cpu, replace(cpu, name="other", spec=changed(cpu.spec))], "pytorch")[0] == {"pytorch": "cpu"}


@pytest.mark.parametrize(
    ("backend", "device", "text"), [("tensorrt", "cpu", "of pytorch-cpu"), ("tensorrt", "cuda", "")]
)
def test_a_ratio_across_devices_has_the_baselines_name(backend: str, device: str, text: str) -> None:
    base, engine = row("pytorch-cpu", 30.0, is_baseline=True), row("fpn", 3.0)
    base = replace(base, engine=replace(base.engine, options={"device": device}))
    engine = replace(engine, engine=replace(engine.engine, backend=backend))
    comparison = SpeedComparison(base.id, engine.id, 10.0, 9.5, 10.5, 50, "faster")
    out = io.StringIO()
    Console(file=out, width=100).print(bench_summary(replace(report(base, engine), comparisons=(comparison,))))
    (line,) = [line for line in out.getvalue().splitlines() if "10.00x" in line]
    assert line.strip().endswith(f"10.00x (9.50-10.50) {text}".strip())
