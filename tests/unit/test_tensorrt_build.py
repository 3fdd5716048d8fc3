"""The tensorrt backend on recorded modules: names, signatures and order fit 8.5, 8.6, 10.3, 10.16 and 11.4. No GPU, no engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from engine_folders import write_manifest
from onnx import TensorProto
from recorded_tensorrt import VERSIONS, Recorder
from recorded_tensorrt.fake import cuda_device, parse
from recorded_tensorrt.graphs import SIDE, small_model

from edgeseg.backends.base import BuildContext, BuiltEngine
from edgeseg.backends.cuda.driver import CudaDevice
from edgeseg.backends.tensorrt import backend as tensorrt_module
from edgeseg.backends.tensorrt import calibration as tensorrt_calibration
from edgeseg.backends.tensorrt import device as tensorrt_device
from edgeseg.backends.tensorrt.backend import TensorRTBackend
from edgeseg.backends.tensorrt.calibration import ImageFeed, cache_text
from edgeseg.backends.tensorrt.options import profile_shapes
from edgeseg.backends.tensorrt.progress import BuildWatch
from edgeseg.errors import ArtifactError, BuildError, DeviceError, MissingDependencyError, SpecError
from edgeseg.quantize.fp16 import fp16_model
from edgeseg.quantize.samples import CalibrationSet
from edgeseg.quantize.table import KEY_CAUSES, TABLE_SCHEMA_VERSION, CalibrationTable, TensorRange
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, PipelineSpec
from edgeseg.store.engine import Engine
from edgeseg.store.hashing import sha256_file
from edgeseg.store.manifest import OnnxGraph

ORIN = cuda_device("Orin", (8, 7), 8)
TEN = ("10.3.0", "10.16.1.11")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGESEG_CACHE", str(tmp_path / "cache"))


def portable(folder: Path, precision: str = "fp32", dynamic: bool = False, scheme: str | None = None) -> OnnxGraph:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    batch: Any = "batch" if dynamic else 1
    size: Any = ("height", "width") if dynamic else (SIDE, SIDE)
    path.write_bytes(small_model(precision, batch, size).SerializeToString())
    spec = PipelineSpec(
        ModelSpec("unet", classes=4),
        InputSpec(SIDE, SIDE, batch=BatchRange(1, 2, 4) if dynamic else BatchRange(), dynamic_size=dynamic),
    )
    return OnnxGraph(path, sha256_file(path), precision, spec, "0" * 64, scheme)  # type: ignore[arg-type]


def portable_hash(folder: Path) -> str:
    return sha256_file(folder / "engine" / "model.onnx")[:16]


def backend_of(recorder: Recorder, gpu: CudaDevice = ORIN) -> TensorRTBackend:
    return TensorRTBackend(import_module=lambda: recorder.module, gpu=lambda: gpu, layer_times=no_times)


def no_times(*_: Any) -> list[tuple[str, float]]:
    """There is no GPU to run the engine on; ``tests/on_stub_cuda`` has one that is not real."""
    return []


def build(
    folder: Path,
    recorder: Recorder,
    precision: str = "fp32",
    dynamic: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> BuiltEngine:
    graph = portable(folder / "engine", precision, dynamic)
    return backend_of(recorder).build(graph, graph.path.parent, options, BuildContext(progress))


def network_flags(recorder: Recorder) -> set[str]:
    (call,) = recorder.of("Builder.create_network")
    flags = recorder.module.NetworkDefinitionCreationFlag
    given = call.arguments.get("flags", 0)
    return {flag.name for flag in flags if given >> int(flag) & 1}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_every_precision(tmp_path: Path, version: str, precision: str) -> None:
    recorder = Recorder(version)
    built = build(tmp_path, recorder, precision)
    assert built.path is not None and built.path.stat().st_size > 0
    assert built.precision.mac_share == {precision: 1.0}
    assert built.precision.evidence == "inspected"
    assert built.precision.macs == SIDE * SIDE * 9 * (3 * 8 + 8 * 4)
    assert built.versions == {"tensorrt": version}
    assert built.device == {"gpu": "Orin", "compute_capability": "8.7"}
    weak = version.startswith("8.")
    assert built.options["typing"] == ("weak" if weak else "strong")
    assert network_flags(recorder) == ({"EXPLICIT_BATCH"} if weak else {"STRONGLY_TYPED"})
    wanted = {"fp32": set(), "fp16": {"FP16"}, "int8": {"FP16", "INT8"}}[precision] if weak else set()
    assert recorder.set_flags() == wanted


@pytest.mark.parametrize("version", TEN)
def test_weak_typing_on_ten(tmp_path: Path, version: str) -> None:
    recorder = Recorder(version)
    build(tmp_path, recorder, "int8", typing="weak", allow_fp16=False)
    assert network_flags(recorder) == set()
    assert recorder.set_flags() == {"INT8"}


@pytest.mark.parametrize(
    ("version", "precision", "options", "message"),
    [
        ("8.6.1", "fp16", {"typing": "strong"}, "8.6.1 has no strong typing"),
        (
            "8.5.3.1",
            "fp16",
            {"optimization_level": 3},
            "8.5.3.1 has no optimization_level .8.6 and later have.; leave it out",
        ),
        ("8.5.3.1", "fp16", {"aux_streams": 0}, "8.5.3.1 has no aux_streams"),
        ("8.5.3.1", "fp16", {"hardware_compatibility": "ampere_plus"}, "8.5.3.1 has no hardware_compatibility"),
        ("8.5.3.1", "fp16", {"version_compatible": True}, "8.5.3.1 has no BuilderFlag VERSION_COMPATIBLE"),
        ("11.4.0.106", "fp16", {"typing": "weak"}, "11.4.0.106 has strong typing only"),
        ("11.4.0.106", "fp32", {"implicit_calibration": True}, "no implicit calibration"),
        ("8.6.1", "fp32", {"strip_weights": True}, "8.6.1 has no BuilderFlag STRIP_PLAN"),
        ("11.4.0.106", "fp32", {"tactic_sources": "CUDNN"}, "no TacticSource CUDNN .it has .*JIT_CONVOLUTIONS"),
        (
            "10.3.0",
            "fp32",
            {"hardware_compatibility": "same_compute_capability"},
            "no HardwareCompatibilityLevel SAME_COMPUTE_CAPABILITY",
        ),
        ("10.3.0", "int8", {"profiling_verbosity": "none"}, "would leave int8 unproven"),
        ("10.3.0", "int8", {"dla_core": 0}, "takes no Q/DQ graph"),
        ("10.3.0", "fp32", {"dla_core": 0}, "fp16 and int8 only"),
        ("10.3.0", "fp16", {"dla_core": 0}, "this device has 0 DLA cores"),
        ("10.3.0", "fp32", {"min_size": "32x32"}, "dynamic size"),
        ("10.3.0", "fp32", {"workspace": 1}, "no build option 'workspace'; did you mean 'workspace_mb'"),
        ("10.3.0", "fp32", {"workspace_mb": 0}, "workspace_mb is 0; give MiB"),
        ("10.3.0", "fp32", {"optimization_level": 6}, "from 0 to 5"),
        ("10.3.0", "fp32", {"refit": "yes"}, "true or false"),
        ("10.3.0", "fp32", {"typing": "strnog"}, "unknown typing 'strnog'; did you mean 'strong'"),
        ("10.3.0", "fp32", {"calibration_cache": "x"}, "with implicit_calibration=true only"),
        ("10.3.0", "int8", {"implicit_calibration": True}, "has Q/DQ nodes, implicit calibration needs the fp32 graph"),
    ],
)
def test_what_cannot_be_is_said_before_a_build(
    tmp_path: Path, version: str, precision: str, options: dict[str, Any], message: str
) -> None:
    recorder = Recorder(version)
    with pytest.raises(SpecError, match=message):
        build(tmp_path, recorder, precision, **options)
    assert "Builder.build_serialized_network" not in recorder.names


@pytest.mark.parametrize("version", VERSIONS[1:])
def test_options_reach_tensorrt_and_the_manifest(tmp_path: Path, version: str) -> None:
    recorder = Recorder(version)
    trt = recorder.module
    built = build(
        tmp_path,
        recorder,
        "fp16",
        workspace_mb=64,
        optimization_level=4,
        aux_streams=0,
        tactic_sources="jit_convolutions,EDGE_MASK_CONVOLUTIONS",
        hardware_compatibility="ampere_plus",
        version_compatible=True,
        refit=True,
        tf32=False,
        timing_cache=False,
    )
    assert recorder.of("IBuilderConfig.set_memory_pool_limit")[0].arguments == {
        "pool": trt.MemoryPoolType.WORKSPACE,
        "pool_size": 64 << 20,
    }
    values = {call.name: call.arguments["value"] for call in recorder.calls if call.name.endswith(" =")}
    assert values["IBuilderConfig.builder_optimization_level ="] == 4
    assert values["IBuilderConfig.max_aux_streams ="] == 0
    assert values["IBuilderConfig.hardware_compatibility_level ="] is trt.HardwareCompatibilityLevel.AMPERE_PLUS
    assert values["IBuilderConfig.profiling_verbosity ="] is trt.ProfilingVerbosity.DETAILED
    sources = trt.TacticSource
    (mask,) = recorder.of("IBuilderConfig.set_tactic_sources")
    assert mask.arguments["tactic_sources"] == (
        1 << int(sources.JIT_CONVOLUTIONS) | 1 << int(sources.EDGE_MASK_CONVOLUTIONS)
    )
    assert {"VERSION_COMPATIBLE", "REFIT", "DISABLE_TIMING_CACHE"} <= recorder.set_flags()
    assert recorder.of("IBuilderConfig.clear_flag")[0].arguments["flag"] is trt.BuilderFlag.TF32
    assert built.options["workspace_mb"] == 64 and built.options["hardware_compatibility"] == "ampere_plus"
    # A version compatible plan carries code: the runtime is told that it is ours.
    assert recorder.of("Runtime.engine_host_code_allowed =")[0].arguments["value"] is True


@pytest.mark.parametrize("version", VERSIONS)
def test_dynamic_shapes_become_a_profile(tmp_path: Path, version: str) -> None:
    recorder = Recorder(version)
    recorder.fakery.dynamic_formats = True
    built = build(tmp_path, recorder, "int8", dynamic=True, max_size="128x64")
    (call,) = recorder.of("IOptimizationProfile.set_shape")
    assert call.arguments == {
        "input": "image",
        "min": (1, 32, 32, 3),
        "opt": (2, 32, 32, 3),
        "max": (4, 128, 64, 3),
    }
    # Up to 10 the inspector knows no formats then: the weights say what a convolution runs in.
    assert built.precision.mac_share == {"int8": 1.0}


@pytest.mark.parametrize(
    ("bounds", "options", "least", "most"),
    [
        ({}, {}, (64, 96), (256, 384)),
        ({"min_size": (33, 40), "max_size": (200, 192)}, {}, (64, 96), (192, 192)),
        ({"min_size": (100, 40)}, {}, (128, 96), (256, 384)),
        ({"min_size": (128, 128)}, {}, (128, 128), (256, 384)),
        ({"min_size": (33, 40)}, {"min_size": "32x32", "max_size": "128x192"}, (32, 32), (128, 192)),
    ],
)
def test_bounds_of_a_dynamic_size(bounds: Any, options: Any, least: Any, most: Any) -> None:
    spec = InputSpec(128, 192, dynamic_size=True, **bounds)
    shapes = profile_shapes(spec, options.get("min_size"), options.get("max_size"))
    assert shapes == ((1, *least, 3), (1, 128, 192, 3), (1, *most, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("100x96", None), "min_size 100x96 does not fit: this model needs multiples of 32"),
        (("160x192", None), "do not hold the engine's own 128x192"),
        ((None, "64x64"), "do not hold the engine's own 128x192"),
    ],
)
def test_bounds_that_do_not_hold_the_engine(options: tuple[str | None, str | None], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        profile_shapes(InputSpec(128, 192, dynamic_size=True), *options)


@pytest.mark.parametrize("version", VERSIONS)
def test_contexts_share_the_profile(tmp_path: Path, version: str) -> None:
    """Before 10 each context of an engine of dynamic shape needs a profile of its own, unless this is asked for."""
    recorder = Recorder(version)
    graph = portable(tmp_path / "engine", dynamic=True)
    backend_of(recorder).build(graph, graph.path.parent, {})
    asked = [call.arguments["feature"].name for call in recorder.of("IBuilderConfig.set_preview_feature")]
    assert asked == ([] if version.startswith(("8.5", "11.")) else ["PROFILE_SHARING_0806"])


def test_without_profile_sharing_one_batch_runs_at_a_time(tmp_path: Path) -> None:
    """8.5: two contexts of one dynamic profile would be refused when the engine is loaded."""
    said = "TensorRT 8.5.3.1 runs one batch at a time of an engine of dynamic shapes"
    built = build(tmp_path / "default", Recorder("8.5.3.1"), dynamic=True)
    assert built.options["contexts"] == 1 and said in built.notes[0]
    with pytest.raises(SpecError, match=f"{said}.*contexts is 3; leave it out"):
        build(tmp_path / "asked", Recorder("8.5.3.1"), dynamic=True, contexts=3)
    assert build(tmp_path / "one", Recorder("8.5.3.1"), dynamic=True, contexts=1).notes == ()
    assert build(tmp_path / "static", Recorder("8.5.3.1"), contexts=3).options["contexts"] == 3


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("precision", "options", "bound"),
    [("fp16", {}, True), ("int8", {}, True), ("int8", {"allow_fp16": False}, False), ("fp32", {}, False)],
)
def test_statistics_of_a_normalization_stay_in_float32(
    tmp_path: Path, version: str, precision: str, options: dict[str, Any], bound: bool
) -> None:
    """In TensorRT 8 the graph's types do not bind: where half precision is allowed, squares of 300 would be infinite."""
    graph = portable(tmp_path / "engine", precision)
    model = onnx.load(graph.path)
    dtype = np.float16 if precision == "fp16" else np.float32
    first = next(node for node in model.graph.node if node.op_type == "Relu")
    node = onnx.helper.make_node(
        "InstanceNormalization", [first.output[0], "gain", "gain"], ["normal"], "encoder.norm/IN"
    )
    following = next(n for n in model.graph.node if first.output[0] in n.input)
    following.input[list(following.input).index(first.output[0])] = "normal"
    model.graph.node.insert(list(model.graph.node).index(first) + 1, node)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, dtype), "gain"))
    onnx.save(model, graph.path)
    recorder = Recorder(version, {"ILayer.set_output_type": lambda layer, index, dtype: None})
    backend_of(recorder).build(graph, graph.path.parent, options)
    asked = {call.target.name for call in recorder.of("ILayer.precision =")}
    expected = {
        f"encoder.norm/IN/{part}"
        for part in ("centred", "mean", "squares", "variance", "positive", "deviation", "normal")
    }
    assert asked == (expected if bound and version.startswith("8.") else set())
    assert {call.target.name for call in recorder.of("ILayer.set_output_type")} == asked
    assert ("PREFER_PRECISION_CONSTRAINTS" in recorder.set_flags()) == bool(asked)


@pytest.mark.parametrize("version", VERSIONS)
def test_float32_islands_of_an_fp16_graph_stay_in_float32(tmp_path: Path, version: str) -> None:
    graph = portable(tmp_path / "engine", "fp16")
    onnx.save(fp16_model(small_model(), {"encoder.conv1.y": 60_000.0}), graph.path)
    recorder = Recorder(version, {"ILayer.set_output_type": lambda layer, index, dtype: None})
    backend_of(recorder).build(graph, graph.path.parent, {})
    asked = {call.target.name for call in recorder.of("ILayer.precision =")}
    assert asked == ({"encoder.conv1/Conv", "encoder.conv1/Relu"} if version.startswith("8.") else set())
    assert ("PREFER_PRECISION_CONSTRAINTS" in recorder.set_flags()) == bool(asked)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", ["Builder", "Runtime"])
def test_a_driver_tensorrt_cannot_use(tmp_path: Path, version: str, kind: str) -> None:
    """What 8.5.3.1 did on a machine without a driver: an error in the log (CUDA error 35), then this TypeError."""

    def none(self: Any, logger: Any, **_: Any) -> None:
        logger.log(recorder.classes["Severity"].ERROR, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    recorder = Recorder(version)
    recorder.behaviour[f"{kind}.__init__"] = none
    with pytest.raises(
        DeviceError, match=f"TensorRT {version} cannot use the GPU of this machine: CUDA init.*35; it needs"
    ):
        build(tmp_path, recorder)
    broken = Recorder(version)
    broken.behaviour[f"{kind}.__init__"] = lambda self, logger, **_: len(logger)
    with pytest.raises(TypeError, match="len"):
        build(tmp_path / "ours", broken)


@pytest.mark.parametrize("version", VERSIONS[:2])
def test_an_error_at_a_node_that_was_made_names_the_users(tmp_path: Path, version: str) -> None:
    recorder = Recorder(version)
    written = {}

    def refuse(parser: Any, model: bytes, path: str | None = None) -> bool:
        nodes = onnx.load_model_from_string(bytes(model)).graph.node
        written.update({node.name: index for index, node in enumerate(nodes)})
        recorder.fakery.parse_error = (written["encoder.conv1/DQ_weight/Q"], "Assertion failed: no luck")
        return bool(parse(parser, model, path))

    recorder.behaviour["OnnxParser.parse"] = refuse
    with pytest.raises(BuildError, match=r"at node encoder.conv1/DQ_weight .module encoder.conv1 of the SMP model."):
        build(tmp_path, recorder, "int8")
    assert "encoder.conv1/DQ_weight" in written
    again = Recorder(version)
    again.fakery.build_error = "Error Code 10: no implementation for node encoder.conv1/DQ_weight/Q."
    with pytest.raises(BuildError, match=r"at node encoder.conv1/DQ_weight .module encoder.conv1 of the SMP model."):
        build(tmp_path / "built", again, "int8")


def test_phases_are_shares_of_their_parents_step() -> None:
    told: list[int] = []
    watch = BuildWatch(lambda done, total: told.append(done))
    watch.start("build", None, 4)
    watch.start("tactics", "build", 10)
    watch.start("kernels", "build", 2)  # at the same time, in another thread
    for _ in range(5):
        assert watch.step("tactics", 0)
    watch.step("kernels", 1)
    assert told == [2, 5, 7, 10, 12], "a phase beside another is no part of it"
    watch.finish("tactics")
    watch.finish("kernels")
    watch.step("build", 0)
    watch.start("inner", "build", 2)
    watch.start("innermost", "inner", 2)
    watch.step("innermost", 0)
    watch.step("unheard of", 0)
    for number in (2, 1, 3):
        watch.step("build", number)
    assert told == [2, 5, 7, 10, 12, 25, 31, 50, 75, 100]


@pytest.mark.parametrize("version", VERSIONS[2:])
def test_ctrl_c_stops_a_build(tmp_path: Path, version: str) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    recorder = Recorder(version)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, recorder, progress=interrupt)
    assert not (tmp_path / "engine" / "engine.plan").exists()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_parser_error_names_node_and_module(tmp_path: Path, version: str) -> None:
    recorder = Recorder(version)
    recorder.fakery.parse_error = (3, "Assertion failed:\n  no luck")
    with pytest.raises(BuildError) as raised:
        build(tmp_path, recorder)
    assert str(raised.value) == (
        f"TensorRT {version} cannot parse model.onnx: Assertion failed: no luck, at node encoder.conv1/Conv "
        "(module encoder.conv1 of the SMP model); TensorRT's log: "
        f"{tmp_path / 'cache' / 'tensorrt-log' / portable_hash(tmp_path)}.log"
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_a_builder_error_names_node_and_module_and_leaves_the_log(tmp_path: Path, version: str) -> None:
    recorder = Recorder(version)
    recorder.fakery.messages = [("INFO", "Detected 1 inputs"), ("VERBOSE", "chatter")]
    recorder.fakery.build_error = (
        "Error Code 10: no implementation for node {ForeignNode[decoder.block/Conv + decoder.block/Relu]}."
    )
    with pytest.raises(BuildError, match="at node decoder.block/Conv .module decoder.block of") as raised:
        build(tmp_path, recorder)
    assert "\n" not in str(raised.value)
    (log,) = (tmp_path / "cache" / "tensorrt-log").iterdir()
    assert log.read_text().splitlines()[0] == "[INFO] Detected 1 inputs"
    assert "Error Code 10" in log.read_text() and "chatter" not in log.read_text()


@pytest.mark.parametrize(
    ("text", "node"),
    [
        (
            "10: [optimizer.cpp::computeCosts::3728] Error Code 10: Internal Error (Could not find any implementation for "
            "node {ForeignNode[encoder.conv1/Conv...decoder.block/Relu]}.)",
            "encoder.conv1/Conv",
        ),
        (
            "IBuilder::buildSerializedNetwork: Error Code 4: Internal Error (decoder.block/Conv: two inputs (data and\n"
            "weights) are allowed only in explicit-quantization mode.)",
            "decoder.block/Conv",
        ),
        (
            "[graphShapeAnalyzer.cpp::processCheck::872] Error Code 4 (encoder.conv1/Relu: broadcast 8 != 4)",
            "encoder.conv1/Relu",
        ),
    ],
)
def test_of_several_errors_the_one_that_names_a_node_is_told(tmp_path: Path, text: str, node: str) -> None:
    recorder = Recorder("10.3.0")
    recorder.fakery.messages = [("ERROR", "Timing cache mismatch"), ("ERROR", "2: [builder.cpp] engine != nullptr")]
    recorder.fakery.build_error = text
    with pytest.raises(BuildError) as raised:
        build(tmp_path, recorder)
    module = node.partition("/")[0]
    assert str(raised.value).startswith(
        f"TensorRT 10.3.0 cannot build model.onnx: {' '.join(text.split())}, at node {node} "
        f"(module {module} of the SMP model); TensorRT's log: "
    )


def test_without_a_node_the_first_error_is_told(tmp_path: Path) -> None:
    recorder = Recorder("10.3.0")
    recorder.fakery.messages = [("ERROR", "Cuda Runtime (out of memory)")]
    recorder.fakery.build_error = "Error Code 2: engine != nullptr"
    with pytest.raises(BuildError, match=r"cannot build model.onnx: Cuda Runtime \(out of memory\); TensorRT's log: "):
        build(tmp_path, recorder)


@pytest.mark.parametrize("version", VERSIONS)
def test_what_tensorrt_refuses_to_set_is_an_error(tmp_path: Path, version: str) -> None:
    recorder = Recorder(version, {"IBuilderConfig.set_tactic_sources": lambda config, tactic_sources: False})
    with pytest.raises(SpecError, match=f"TensorRT {version} refuses tactic_sources JIT_CONVOLUTIONS"):
        build(tmp_path, recorder, tactic_sources="JIT_CONVOLUTIONS")
    recorder = Recorder(version, {"IBuilderConfig.add_optimization_profile": lambda config, profile: -1})
    with pytest.raises(BuildError, match=f"TensorRT {version} refuses shapes "):
        build(tmp_path, recorder, dynamic=True)
    assert "Builder.build_serialized_network" not in recorder.names


def test_a_dla_takes_one_shape(tmp_path: Path) -> None:
    recorder = Recorder("11.4.0.106", {"Builder.num_DLA_cores": lambda builder: 1})
    with pytest.raises(SpecError, match="a DLA takes images of one shape"):
        build(tmp_path, recorder, "int8", dynamic=True, dla_core=0)


def test_the_log_is_left_in_the_engine_folder(tmp_path: Path) -> None:
    recorder = Recorder("10.3.0")
    recorder.fakery.messages = [("WARNING", "weights are subnormal")]
    built = build(tmp_path, recorder)
    assert built.extra_files == (tmp_path / "engine" / "tensorrt.log",)
    assert built.extra_files[0].read_text() == "[WARNING] weights are subnormal\n"


def test_tensorrt_is_given_one_logger_however_often_it_builds(tmp_path: Path) -> None:
    recorder = Recorder("10.3.0")
    build(tmp_path, recorder)
    build(tmp_path, recorder)
    loggers = {id(call.arguments["logger"]) for call in recorder.of("Builder.__init__")}
    assert len(loggers) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_layers_that_cannot_be_matched_are_not_taken_for_proof(tmp_path: Path, version: str) -> None:
    def nameless(inspector: Any, format: Any) -> str:
        return json.dumps({"Layers": [{"Name": "__myl_Fused", "Inputs": [{"Format/Datatype": "Int8"}]}]})

    behaviour = {"EngineInspector.get_engine_information": nameless}
    with pytest.raises(BuildError, match="0.0% .* not found among the engine's layers.*prove_precision=false"):
        build(tmp_path, Recorder(version, behaviour), "int8")
    built = build(tmp_path, Recorder(version, behaviour), "int8", prove_precision=False)
    assert built.precision.mac_share == {"unknown": 1.0}


@pytest.mark.parametrize("version", VERSIONS)
def test_only_tensorrt_8_gets_a_float_between_argmax_and_uint8(tmp_path: Path, version: str) -> None:
    recorder = Recorder(version)
    build(tmp_path, recorder)
    model = onnx.load_model_from_string(recorder.of("OnnxParser.parse")[0].arguments["model"])
    casts = [a.i for n in model.graph.node if n.op_type == "Cast" for a in n.attribute]
    between = [TensorProto.FLOAT] if version.startswith("8.") else []
    assert casts == [TensorProto.FLOAT, *between, TensorProto.UINT8]
    onnx.checker.check_model(model, full_check=True)


def test_a_graph_of_another_targets_scheme_is_refused(tmp_path: Path) -> None:
    graph = portable(tmp_path / "engine", "int8")
    model = onnx.load(str(graph.path))
    next(t for t in model.graph.initializer if t.name == "zero").CopyFrom(
        onnx.numpy_helper.from_array(np.uint8(128), "zero")
    )
    onnx.save(model, str(graph.path))
    with pytest.raises(SpecError, match="quantized for another target"):
        backend_of(Recorder("10.3.0")).build(graph, graph.path.parent, {})


# --- implicit calibration ---


def table() -> CalibrationTable:
    names = ("nchw", "x", "encoder.conv1.y", "encoder.conv1.r", "decoder.block.y", "decoder.block.r")
    ranges = {name: TensorRange(-1.0, 2.54, -1.0, 2.54) for name in names}
    return CalibrationTable(TABLE_SCHEMA_VERSION, "minmax", {}, dict.fromkeys(KEY_CAUSES, "0"), 8, ranges)


@pytest.mark.parametrize("version", VERSIONS[:4])
def test_ranges_of_the_table_beside_the_graph(tmp_path: Path, version: str) -> None:
    recorder = Recorder(version)
    (tmp_path / "engine").mkdir()
    table().save(tmp_path / "engine" / "calibration.json")
    built = build(tmp_path, recorder, "fp32", implicit_calibration=True)
    assert built.precision.requested == "int8" and built.precision.mac_share == {"int8": 1.0}
    assert {"INT8", "FP16"} <= recorder.set_flags()
    assert built.options["typing"] == "weak"
    cache = next(path for path in built.extra_files if path.name == "calibration.cache").read_text()
    assert cache == cache_text(table(), version)
    assert "nchw: 3ca3d70a" in cache  # float32(2.54 / 127) = 0.02


def test_a_cache_that_is_not_taken_is_an_error(tmp_path: Path) -> None:
    def asks_anyway(builder: Any, network: Any, config: Any) -> None:
        config._state["int8_calibrator"].get_batch(["image"])

    recorder = Recorder("8.6.1", {"Builder.build_serialized_network": asks_anyway})
    (tmp_path / "engine").mkdir()
    table().save(tmp_path / "engine" / "calibration.json")
    with pytest.raises(BuildError, match="did not take the calibration cache"):
        build(tmp_path, recorder, implicit_calibration=True)


def test_without_a_table_it_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"no calibration.json beside the graph; give calibration_cache=FILE"):
        build(tmp_path, Recorder("8.6.1"), implicit_calibration=True)


class FakeCuda:
    """Device memory that is a numpy array; counts what is open. Stands in for :class:`edgeseg.backends.cuda.device.Cuda`."""

    device = ORIN

    def __init__(self) -> None:
        self.open = 1
        self.copied: list[np.ndarray] = []

    def device_memory(self, size_bytes: int) -> Any:
        return self._part(address=4096, size_bytes=size_bytes)

    def stream(self) -> Any:
        part = self._part()
        part.copy_to_device = lambda address, host: self.copied.append(host.copy())
        part.synchronize = lambda: None
        return part

    def active(self) -> Any:
        return nullcontext()

    def close(self) -> None:
        self.open -= 1

    def _part(self, **fields: Any) -> Any:
        from types import SimpleNamespace

        self.open += 1
        return SimpleNamespace(close=self.close, **fields)


@pytest.mark.parametrize("version", VERSIONS[:4])
@pytest.mark.parametrize("calibrator", ["entropy", "minmax"])
def test_tensorrt_measures_on_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, calibrator: str
) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(tensorrt_calibration, "open_cuda", lambda: cuda)
    images = np.random.default_rng(0).integers(0, 256, (9, SIDE, SIDE, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    recorder = Recorder(version)
    built = build(
        tmp_path,
        recorder,
        implicit_calibration=True,
        calibrator=calibrator,
        calibration_images=str(tmp_path / "images.npy"),
    )
    np.testing.assert_array_equal(np.concatenate(cuda.copied), images.reshape(-1))
    assert cuda.open == 0
    base = recorder.module.IInt8EntropyCalibrator2 if calibrator == "entropy" else recorder.module.IInt8MinMaxCalibrator
    assert isinstance(recorder.of("IBuilderConfig.int8_calibrator =")[0].arguments["value"], base)
    cache = next(path for path in built.extra_files if path.name == "calibration.cache")
    assert cache.read_bytes() == b"TRT-8601-EntropyCalibration2\nimage: 9\n"


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_tensorrt_measures_on_16_bits_as_float32(tmp_path: Path, dtype: Any) -> None:
    images = np.random.default_rng(0).integers(0, 65536, (8, SIDE, SIDE, 3)).astype(dtype)
    cuda = FakeCuda()
    samples = CalibrationSet.open(list(images), dtype=dtype)
    feed = ImageFeed(samples, InputSpec(SIDE, SIDE, dtype=dtype), cuda)  # type: ignore[arg-type]
    while feed.next_address() is not None:
        pass
    feed.close()
    given = np.concatenate(cuda.copied).view(np.float32)
    np.testing.assert_array_equal(given, images.reshape(-1).astype(np.float32))


def test_an_image_that_vanishes_is_the_error_and_nothing_stays_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    cuda = FakeCuda()
    monkeypatch.setattr(tensorrt_calibration, "open_cuda", lambda: cuda)
    for number in range(9):
        pixels = np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")

    def remove(builder: Any, network: Any, config: Any) -> Any:
        (tmp_path / "5.png").unlink()
        from recorded_tensorrt.fake import build_serialized_network

        return build_serialized_network(builder, network, config)

    recorder = Recorder("8.6.1", {"Builder.build_serialized_network": remove})
    with pytest.raises(BuildError, match="calibration stopped after 5 batches: .*5.png"):
        build(
            tmp_path,
            recorder,
            implicit_calibration=True,
            calibrator="entropy",
            calibration_images=str(tmp_path / "*.png"),
        )
    assert cuda.open == 0


@pytest.mark.parametrize("version", VERSIONS[:4])
def test_dla_with_implicit_int8(tmp_path: Path, version: str) -> None:
    recorder = Recorder(version, {"Builder.num_DLA_cores": lambda builder: 2})
    (tmp_path / "engine").mkdir()
    table().save(tmp_path / "engine" / "calibration.json")
    build(tmp_path, recorder, implicit_calibration=True, dla_core=1)
    values = {call.name: call.arguments["value"] for call in recorder.calls if call.name.endswith(" =")}
    assert values["IBuilderConfig.default_device_type ="] is recorder.module.DeviceType.DLA
    assert values["IBuilderConfig.DLA_core ="] == 1 and values["Runtime.DLA_core ="] == 1
    assert {"GPU_FALLBACK", "INT8", "FP16"} <= recorder.set_flags()


def test_dla_takes_the_typed_graph_on_11(tmp_path: Path) -> None:
    recorder = Recorder("11.4.0.106", {"Builder.num_DLA_cores": lambda builder: 1})
    built = build(tmp_path, recorder, "int8", dla_core=0)
    assert built.options["typing"] == "strong" and recorder.set_flags() == {"GPU_FALLBACK"}


# --- load ---


def engine_folder(folder: Path, graph: OnnxGraph, built: BuiltEngine) -> Engine:
    assert built.path is not None
    manifest = write_manifest(folder, graph.spec, built=built, graph=graph.path.name)
    return Engine(folder, manifest)


def load(monkeypatch: pytest.MonkeyPatch, recorder: Recorder, engine: Engine) -> tuple[Any, FakeCuda]:
    cuda = FakeCuda()
    monkeypatch.setattr(tensorrt_device, "open_cuda", lambda: cuda)
    monkeypatch.setattr(tensorrt_module, "open_session", lambda trt, engine, spec, cuda, _: (trt, engine, spec, cuda))
    try:
        return backend_of(recorder).load(engine), cuda
    except Exception:
        assert cuda.open == 0  # nothing stays open behind an error
        raise


@pytest.mark.parametrize("version", VERSIONS)
def test_load_hands_the_engine_to_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    graph = portable(tmp_path / "engine", "fp16")
    built = backend_of(Recorder(version)).build(graph, graph.path.parent, {})
    recorder = Recorder(version)
    (trt, engine, spec, cuda), opened = load(monkeypatch, recorder, engine_folder(tmp_path / "engine", graph, built))
    assert trt is recorder.module and spec == graph.spec and cuda is opened
    assert [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)] == ["image", "mask"]


@pytest.mark.parametrize(
    ("options", "version", "gpu", "fits"),
    [
        ({}, "10.3.0", ORIN, True),
        ({}, "10.16.1.11", ORIN, False),
        ({}, "10.3.0", cuda_device("Orin Nano", (8, 7), 8), False),
        ({}, "10.3.0", cuda_device("Orin", (8, 6), 8), False),
        ({"version_compatible": True}, "10.16.1.11", ORIN, True),
        ({"version_compatible": True}, "11.4.0.106", ORIN, False),
        ({"hardware_compatibility": "ampere_plus"}, "10.3.0", cuda_device("Thor", (11, 0), 8), True),
        ({"hardware_compatibility": "ampere_plus"}, "10.3.0", cuda_device("Xavier", (7, 2), 8), False),
    ],
)
def test_load_asks_for_the_same_tensorrt_and_gpu(
    tmp_path: Path, options: dict[str, Any], version: str, gpu: CudaDevice, fits: bool
) -> None:
    graph = portable(tmp_path / "engine")
    built = backend_of(Recorder("10.3.0")).build(graph, graph.path.parent, options)
    engine = engine_folder(tmp_path / "engine", graph, built)
    if fits:
        tensorrt_device.check_built_for(engine, "tensorrt", version, gpu)
        return
    with pytest.raises(ArtifactError) as raised:
        tensorrt_device.check_built_for(engine, "tensorrt", version, gpu)
    assert str(raised.value) == (
        f"{engine.folder} was built with tensorrt 10.3.0 for Orin (compute capability 8.7), this is tensorrt {version} on "
        f"{gpu.name} ({gpu.capability_text}); run: edgeseg compile {engine.folder}"
    )


def test_another_gpu_is_named_on_one_line_whatever_a_manifest_calls_it(tmp_path: Path) -> None:
    graph = portable(tmp_path / "engine")
    built = replace(backend_of(Recorder("10.3.0")).build(graph, graph.path.parent, {}), device={"gpu": "\x1b[2J\n"})
    engine = engine_folder(tmp_path / "engine", graph, built)
    with pytest.raises(ArtifactError, match=r"built with tensorrt 10\.3\.0 for \\x1b\[2J\\n \(compute capability \?\)"):
        tensorrt_device.check_built_for(engine, "tensorrt", "10.3.0", ORIN)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plan_tensorrt_does_not_take_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    graph = portable(tmp_path / "engine")
    built = backend_of(Recorder(version)).build(graph, graph.path.parent, {})
    assert built.path is not None
    built.path.write_bytes(b"not a plan")
    with pytest.raises(
        ArtifactError, match="cannot load .*engine.plan: IRuntime::deserializeCudaEngine.*compile it again"
    ):
        load(monkeypatch, Recorder(version), engine_folder(tmp_path / "engine", graph, built))


@pytest.mark.parametrize("version", VERSIONS[2:])
def test_stripped_weights_come_back_from_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    graph = portable(tmp_path / "engine")
    first = Recorder(version)
    built = backend_of(first).build(graph, graph.path.parent, {"strip_weights": True})
    assert "STRIP_PLAN" in first.set_flags()
    behaviour = {
        "OnnxParserRefitter.refit_from_file": lambda refitter, model: Path(model) == graph.path,
        "Refitter.refit_cuda_engine": lambda refitter: True,
    }
    recorder = Recorder(version, behaviour)
    load(monkeypatch, recorder, engine_folder(tmp_path / "engine", graph, built))
    assert recorder.names[-2:] == ["OnnxParserRefitter.refit_from_file", "Refitter.refit_cuda_engine"]


# --- status ---


def test_status_never_raises() -> None:
    def absent() -> Any:
        raise MissingDependencyError("tensorrt", "tensorrt", "build")

    assert not TensorRTBackend(import_module=absent).status().available
    status = backend_of(Recorder("10.3.0")).status()
    assert status.available and status.version == "10.3.0" and "Orin, compute capability 8.7" in status.detail


# --- share of time ---


@pytest.mark.parametrize("version", VERSIONS)
def test_share_of_time_by_the_profilers_names(tmp_path: Path, version: str) -> None:
    """Two runs; the layers of the recorded inspector, and one it does not know."""
    recorder = Recorder(version)
    graph = portable(tmp_path / "engine", "int8")
    run = [("preprocess/Mul", 0.5), ("encoder.conv1/Conv", 2.0), ("decoder.block/Conv", 1.0), ("__wait", 0.5)]
    asked: list[Any] = []

    def times(library: Any, plan: bytes, options: Any, parsed: Any) -> list[tuple[str, float]]:
        asked.append((library.trt, plan, options["layer_times"], parsed.path))
        return run * 2

    backend = TensorRTBackend(import_module=lambda: recorder.module, gpu=lambda: ORIN, layer_times=times)
    built = backend.build(graph, graph.path.parent, {})
    assert built.path is not None
    assert asked == [(recorder.module, built.path.read_bytes(), True, graph.path)]
    assert built.precision.time_share == {"fp32": 0.125, "int8": 0.75, "unknown": 0.125}
    assert built.precision.mac_share == {"int8": 1.0}


def test_time_that_cannot_be_measured_is_none_and_said(tmp_path: Path) -> None:
    def refused(*_: Any) -> list[tuple[str, float]]:
        raise DeviceError("out of memory")

    recorder = Recorder("10.3.0")
    graph = portable(tmp_path / "engine")
    backend = TensorRTBackend(import_module=lambda: recorder.module, gpu=lambda: ORIN, layer_times=refused)
    built = backend.build(graph, graph.path.parent, {})
    assert built.precision.time_share is None
    assert built.notes == ("time per dtype was not measured: out of memory",)
    again = backend.build(graph, graph.path.parent, {"layer_times": False})
    assert again.precision.time_share is None and again.notes == ()
