"""The OpenVINO backend: ArgMax by comparison, a build-load-run round trip, threads, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

ov = pytest.importorskip("openvino", reason="openvino is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

from neighbouring_weights import errors  # noqa: E402
from small_graphs import RNG, floats, graph, run, spec, table_for  # noqa: E402

from edgeseg.backends import get_backend  # noqa: E402
from edgeseg.backends.cpu.openvino import OpenVinoBackend  # noqa: E402
from edgeseg.backends.cpu.openvino_argmax import replace_argmax  # noqa: E402
from edgeseg.backends.cpu.openvino_group_norm import replace_group_norm  # noqa: E402
from edgeseg.errors import ArtifactError, BuildError, InputError, SpecError  # noqa: E402
from edgeseg.machine.cpu import Cpu, this_cpu  # noqa: E402
from edgeseg.quantize.qdq import write_qdq  # noqa: E402
from edgeseg.quantize.schemes import SCHEMES  # noqa: E402
from edgeseg.spec import BatchRange  # noqa: E402
from edgeseg.store.hashing import sha256_file  # noqa: E402
from edgeseg.store.manifest import OnnxGraph  # noqa: E402

pytestmark = pytest.mark.integration

HEIGHT, WIDTH, CLASSES = 16, 24, 5


def mask_model(batch: int | str = 1) -> onnx.ModelProto:
    return graph(
        f"(uint8[{batch}, {HEIGHT}, {WIDTH}, 3] image) => (uint8[{batch}, {HEIGHT}, {WIDTH}] mask)",
        """real = Cast <to = 1> (image) planes = Transpose <perm = [0, 3, 1, 2]> (real) s = Mul(planes, gain) x = Add(s, shift)
        a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu(a) l = Conv(r, w2, b2)
        index = ArgMax <axis = 1, keepdims = 0> (l) mask = Cast <to = 2> (index)""",
        gain=np.array(1 / 64, np.float32),
        shift=np.array(-2, np.float32),
        w1=floats(8, 3, 3, 3),
        b1=floats(8),
        w2=floats(CLASSES, 8, 1, 1),
        b2=floats(CLASSES),
    )


def images(batch: int = 1) -> np.ndarray[Any, Any]:
    return RNG.integers(0, 256, (batch, HEIGHT, WIDTH, 3), dtype=np.uint8)


def saved(model: onnx.ModelProto, path: Path) -> OnnxGraph:
    onnx.save(model, str(path))
    return OnnxGraph(path, sha256_file(path), "fp32", spec(HEIGHT, WIDTH, CLASSES), "0" * 64)


def engine(folder: Path, built: Any, batch: BatchRange = BatchRange(), **device: str) -> Any:  # noqa: B008
    contract = spec(HEIGHT, WIDTH, CLASSES)
    manifest = SimpleNamespace(
        device={**built.device, **device},
        versions=built.versions,
        options=built.options,
        precision=built.precision,
        spec=replace(contract, input=replace(contract.input, batch=batch)),
    )
    return SimpleNamespace(folder=folder, engine_path=built.path, manifest=manifest)


@pytest.mark.parametrize("layout", ["ArgMax <axis = 1, keepdims = 0>", "ArgMax <axis = 1, keepdims = 1>"])
def test_argmax_by_comparison_returns_the_first_of_equals(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "argmax.onnx"
    model = graph(f"(float[n, {CLASSES}, 6, 7] x) => (int64[n, a, b] y)", f"y = {layout} (x)")
    onnx.save(model, str(path))
    logits = RNG.integers(-2, 3, (3, CLASSES, 6, 7)).astype(np.float32)  # few values: many ties
    converted = ov.Core().read_model(str(path))
    assert replace_argmax(ov, converted) == 1
    assert not any(op.get_type_name() == "TopK" for op in converted.get_ops())
    (actual,) = ov.Core().compile_model(converted, "CPU")([logits]).values()
    np.testing.assert_array_equal(actual, run(model, x=logits)[0])


def test_other_topk_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "topk.onnx"
    body = "v, y = TopK <axis = 1> (x, two)"
    onnx.save(graph("(float[1, 5, 6, 7] x) => (int64[1, 2, 6, 7] y)", body, two=np.array([2])), str(path))
    assert replace_argmax(ov, ov.Core().read_model(str(path))) == 0


@pytest.mark.parametrize(("channels", "replaced"), [(64, 1), (96, 0)])
def test_group_norm_by_sums_is_pytorchs(channels: int, replaced: int, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    groups, path = 16, tmp_path / "norm.onnx"
    gain, shift = floats(channels), floats(channels)
    body = """rows = Reshape(x, flat) normal = InstanceNormalization <epsilon = 0.00001> (rows, ones, zeros)
    back = Reshape(normal, whole) scaled = Mul(back, gain) y = Add(scaled, shift)"""
    constants = {
        "flat": np.array([0, groups, -1]),
        "whole": np.array([2, channels, 12, 20]),
        "ones": np.ones(groups, np.float32),
        "zeros": np.zeros(groups, np.float32),
        "gain": gain.reshape(1, -1, 1, 1),
        "shift": shift.reshape(1, -1, 1, 1),
    }
    onnx.save(
        graph(f"(float[2, {channels}, 12, 20] x) => (float[2, {channels}, 12, 20] y)", body, **constants), str(path)
    )
    model = ov.Core().read_model(str(path))
    assert replace_group_norm(ov, model) == replaced
    # Means far from zero: what a difference of squares could lose.
    given = RNG.normal(RNG.normal(0, 8, (2, channels, 1, 1)), 1.5, (2, channels, 12, 20)).astype(np.float32)
    (actual,) = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([given]).values()
    expected = torch.nn.functional.group_norm(
        torch.from_numpy(given).double(), groups, torch.from_numpy(gain).double(), torch.from_numpy(shift).double()
    )
    np.testing.assert_allclose(actual, expected.numpy(), atol=2e-4)


@pytest.mark.parametrize("batch", [1, 2, "batch"])
def test_build_load_run(batch: int | str, tmp_path: Path) -> None:
    model = mask_model(batch)
    backend = get_backend("openvino")
    built = backend.build(saved(model, tmp_path / "model.onnx"), tmp_path, {"threads": 1})
    assert built.precision.mac_share == {"fp32": 1.0}
    sizes = BatchRange(1, 1, 3) if batch == "batch" else BatchRange(batch, batch, batch)  # type: ignore[arg-type]
    with backend.load(engine(tmp_path, built, sizes)) as session:
        batches = [images(batch if isinstance(batch, int) else count) for count in (1, 2, 3)]
        for given in batches:
            np.testing.assert_array_equal(session.run(given)["mask"], run(model, image=given)[0])


def test_int8_runs_in_int8_and_agrees(tmp_path: Path) -> None:
    model, given = mask_model(), images()
    quantized = write_qdq(
        saved(model, tmp_path / "model.onnx"),
        table_for(model, image=given),
        SCHEMES["openvino"],
        tmp_path / "int8.onnx",
    )
    backend = get_backend("openvino")
    built = backend.build(quantized, tmp_path, {})
    assert built.precision.mac_share == {"int8": 1.0}, built.precision.float_layers
    assert built.precision.macs == HEIGHT * WIDTH * (8 * 3 * 9 + CLASSES * 8)
    mask = backend.load(engine(tmp_path, built)).run(given)["mask"]
    assert (mask == run(model, image=given)[0]).mean() > 0.9


def layer_errors(scheme: str) -> dict[str, float]:
    core, settings = ov.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    return errors(
        scheme, lambda model, x: core.compile_model(core.read_model(model.SerializeToString()), "CPU", settings)([x])[0]
    )


@pytest.mark.skipif(this_cpu().arch != "x86", reason="x86 instructions")
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_without_vnni_no_pair_of_products_overflows(isa: str) -> None:
    """In a process whose kernels are those of a CPU without VNNI."""
    old = OpenVinoBackend(Cpu("old", "x86", ("avx2",), 2))
    assert old.scheme == "openvino-avx2"
    code = (
        f"import json, test_openvino as t; print(json.dumps([t.layer_errors(s) for s in ({old.scheme!r}, 'openvino')]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    ours, for_vnni = json.loads(done.stdout)
    assert {name: error for name, error in ours.items() if error > 1e-4} == {}
    assert for_vnni["convolution"] > 0.1, f"the process was to run the kernels of {isa}"


@pytest.mark.parametrize("options", [{}, {"threads": 4, "streams": 2}])
def test_results_belong_to_the_caller_and_threads_do_not_mix(tmp_path: Path, options: dict[str, int]) -> None:
    model = mask_model()
    backend = get_backend("openvino")
    session = backend.load(engine(tmp_path, backend.build(saved(model, tmp_path / "model.onnx"), tmp_path, options)))
    assert session._compiled.get_property("NUM_STREAMS") == options.get("streams", 1)  # type: ignore[attr-defined]
    given = [images() for _ in range(12)]
    expected = [run(model, image=one)[0] for one in given]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(session.run, given))
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result["mask"], wanted)


def test_what_it_refuses(tmp_path: Path) -> None:
    backend = get_backend("openvino")
    source = saved(mask_model(), tmp_path / "model.onnx")
    with pytest.raises(SpecError, match="no build option 'spinning'"):
        backend.build(source, tmp_path, {"spinning": True})
    built = backend.build(source, tmp_path, {})
    with pytest.raises(ArtifactError, match="built for a CPU with"):
        backend.load(engine(tmp_path, built, isa="x86 other"))
    session = backend.load(engine(tmp_path, built))
    with pytest.raises(InputError, match=r"images are uint8 \(1, 8, 8, 3\), this engine takes uint8 \(1, 16, 24, 3\)"):
        session.run(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(InputError, match="float32"):
        session.run(np.zeros((1, HEIGHT, WIDTH, 3), np.float32))  # type: ignore[arg-type]
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run(images())
    built.path.write_bytes(built.path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot load"):
        backend.load(engine(tmp_path, built))
    unknown = mask_model()
    unknown.graph.node[-1].domain = "nowhere"
    unknown.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    source.path.write_bytes(unknown.SerializeToString())
    with pytest.raises(BuildError, match="cannot compile"):
        backend.build(replace(source), tmp_path, {})
    source.path.write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match="is not an ONNX file"):
        backend.build(replace(source), tmp_path, {})


def test_status_names_the_version_and_the_cpu() -> None:
    status = get_backend("openvino").status()
    assert status.available
    assert status.version
    assert "INT8" in status.detail
