"""What TensorRT 8.5 does on this GPU, in little: run before the long suite, and keep the JSON.

    python tests/gpu/kit/questions.py OUTPUT_FOLDER [ONNX_FILE ...]

Each question is asked in a process of its own, so that one that ends the process costs only itself. Graphs that are given
(`image` uint8 -> `mask`) are rewritten as edgeseg does for TensorRT 8, built in each precision they have, and compared with
ONNX Runtime.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

KEPT = ("JIT_CONVOLUTIONS", "EDGE_MASK_CONVOLUTIONS")
SIDE = 64


WIDTHS = (3, 32, 32, 8)
"""Channels of the image, and behind each convolution."""


def small(
    precision: str,
    weights: str = "floats",
    zero_point: bool = True,
    widths: tuple[int, ...] = WIDTHS,
    floats: tuple[int, ...] = (),
    has_relu_at_end: bool = True,
) -> onnx.ModelProto:
    """Cast, Transpose, Mul, convolutions, ArgMax, Cast: edgeseg's contract; int8 with Q/DQ written in several ways.

    ``floats``: convolutions that are not int8, by number.
    """
    rng = np.random.default_rng(3)
    dtype, kind = (np.float16, TensorProto.FLOAT16) if precision == "fp16" else (np.float32, TensorProto.FLOAT)
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], "pre/Cast", to=kind),
        helper.make_node("Transpose", ["float"], ["nchw"], "pre/Transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Mul", ["nchw", "factor"], ["x"], "pre/Mul"),
    ]
    tensors = [numpy_helper.from_array(np.asarray(1 / 255, dtype), "factor")]
    value = "x"
    for number, (channels, outputs) in enumerate(pairwise(widths)):
        name = f"conv{number}"
        weight = rng.standard_normal((outputs, channels, 3, 3)).astype(np.float32) / np.sqrt(9 * channels)
        inputs = [value, f"{name}/weight"]
        if precision == "int8" and number not in floats:
            scale = (np.abs(weight).max((1, 2, 3)) / 127).astype(np.float32)
            integers = np.rint(weight / scale[:, None, None, None]).astype(np.int8)
            zeros = [f"{name}/zeros"] if zero_point else []
            one = [f"{name}/zero"] if zero_point else []
            tensors += [
                numpy_helper.from_array(scale, f"{name}/scale"),
                numpy_helper.from_array(np.zeros(outputs, np.int8), f"{name}/zeros"),
                numpy_helper.from_array(np.float32(0.02), f"{name}/act"),
                numpy_helper.from_array(np.int8(0), f"{name}/zero"),
            ]
            nodes += [
                helper.make_node("QuantizeLinear", [value, f"{name}/act", f"{name}/zero"], [f"{name}/q"], f"{name}/Q"),
                helper.make_node("DequantizeLinear", [f"{name}/q", f"{name}/act", *one], [f"{name}/dq"], f"{name}/DQ"),
            ]
            if weights == "integers":
                tensors.append(numpy_helper.from_array(integers, f"{name}/integers"))
            else:
                tensors.append(numpy_helper.from_array(integers * scale[:, None, None, None], f"{name}/floats"))
                nodes.append(
                    helper.make_node(
                        "QuantizeLinear",
                        [f"{name}/floats", f"{name}/scale", f"{name}/zeros"],
                        [f"{name}/integers"],
                        f"{name}/Qw",
                        axis=0,
                    )
                )
            nodes.append(
                helper.make_node(
                    "DequantizeLinear",
                    [f"{name}/integers", f"{name}/scale", *zeros],
                    [f"{name}/weight"],
                    f"{name}/DQw",
                    axis=0,
                )
            )
            inputs = [f"{name}/dq", f"{name}/weight"]
        else:
            tensors.append(numpy_helper.from_array(weight.astype(dtype), f"{name}/weight"))
        nodes.append(helper.make_node("Conv", inputs, [f"{name}/y"], f"{name}/Conv", pads=[1] * 4, kernel_shape=[3, 3]))
        value = f"{name}/y"
        if has_relu_at_end or number < len(widths) - 2:
            nodes.append(helper.make_node("Relu", [value], [f"{name}/r"], f"{name}/Relu"))
            value = f"{name}/r"
    nodes += [
        helper.make_node("ArgMax", [value], ["index"], "post/ArgMax", axis=1, keepdims=0),
        helper.make_node("Cast", ["index"], ["wide"], "post/float", to=TensorProto.FLOAT),
        helper.make_node("Cast", ["wide"], ["mask"], "post/Cast", to=TensorProto.UINT8),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, (1, SIDE, SIDE, 3))],
        [helper.make_tensor_value_info("mask", TensorProto.UINT8, (1, SIDE, SIDE))],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Build:
    """One build with TensorRT: what it said, how long it took, and the plan."""

    def __init__(self, content: bytes, flags: tuple[str, ...], sources: str, preview: bool = False) -> None:
        import tensorrt as trt

        said: list[str] = []

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                super().__init__()

            def log(self, severity, text) -> None:
                if severity.name != "VERBOSE":
                    said.append(f"[{severity.name}] {text}")

        self.said, self.trt, self.logger = said, trt, Logger()
        begun = time.perf_counter()
        builder = trt.Builder(self.logger)
        self.facts = {
            "builder_s": time.perf_counter() - begun,
            "fast_int8": builder.platform_has_fast_int8,
            "fast_fp16": builder.platform_has_fast_fp16,
            "plugins": len(trt.get_plugin_registry().plugin_creator_list),
        }
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH))
        parser = trt.OnnxParser(network, self.logger)
        self.parsed = parser.parse(content)
        self.parser_errors = [
            f"node {parser.get_error(i).node()}: {parser.get_error(i).desc()}" for i in range(parser.num_errors)
        ]
        self.plan = None
        if not self.parsed:
            return
        config = builder.create_builder_config()
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        self.facts["default_sources"] = config.get_tactic_sources()
        for flag in flags:
            config.set_flag(getattr(trt.BuilderFlag, flag))
        if sources == "kept":
            config.set_tactic_sources(sum(1 << int(getattr(trt.TacticSource, name)) for name in KEPT))
        elif sources == "none":
            config.set_tactic_sources(0)
        if preview:
            config.set_preview_feature(trt.PreviewFeature.DISABLE_EXTERNAL_TACTIC_SOURCES_FOR_CORE_0805, True)
        begun = time.perf_counter()
        plan = builder.build_serialized_network(network, config)
        self.facts["build_s"] = time.perf_counter() - begun
        self.plan = None if plan is None else bytes(plan)

    def run(self, image: np.ndarray) -> tuple[dict[str, np.ndarray], str, float]:
        """Outputs, the inspector's JSON, and the median time of a run in milliseconds (launch to done, by the host)."""
        from cuda.bindings import runtime

        def call(name, *arguments):
            status, *values = getattr(runtime, name)(*arguments)
            if int(status) != 0:
                raise RuntimeError(f"{name}: {status.name}")
            return values[0] if values else None

        engine = self.trt.Runtime(self.logger).deserialize_cuda_engine(self.plan)
        context = engine.create_execution_context()
        stream = call("cudaStreamCreate")
        arrays, addresses = {}, {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            kind = {"FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT8": np.int8, "UINT8": np.uint8}
            dtype = kind[engine.get_tensor_dtype(name).name]
            if engine.get_tensor_mode(name) == self.trt.TensorIOMode.INPUT:
                context.set_input_shape(name, image.shape)
                arrays[name] = np.ascontiguousarray(image, dtype)
            else:
                arrays[name] = np.empty(tuple(context.get_tensor_shape(name)), dtype)
            addresses[name] = call("cudaMalloc", arrays[name].nbytes)
            context.set_tensor_address(name, int(addresses[name]))
        to_device, to_host = (
            runtime.cudaMemcpyKind.cudaMemcpyHostToDevice,
            runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost,
        )
        for name, array in arrays.items():
            call("cudaMemcpy", addresses[name], array.ctypes.data, array.nbytes, to_device)
        times = []
        for _ in range(60):
            begun = time.perf_counter()
            if not context.execute_async_v3(int(stream)):
                raise RuntimeError("execute_async_v3 refused")
            call("cudaStreamSynchronize", stream)
            times.append((time.perf_counter() - begun) * 1e3)
        for name, array in arrays.items():
            call("cudaMemcpy", array.ctypes.data, addresses[name], array.nbytes, to_host)
        inspector = engine.create_engine_inspector()
        layers = inspector.get_engine_information(self.trt.LayerInformationFormat.JSON)
        outputs = {name: array for name, array in arrays.items() if name != "image"}
        return outputs, layers, float(np.median(times[10:]))


def image_for(model: onnx.ModelProto) -> np.ndarray:
    shape = [d.dim_value or 1 for d in model.graph.input[0].type.tensor_type.shape.dim]
    coarse = (
        np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // 8, shape[2] // 8, shape[3])).astype(np.uint8)
    )
    return np.ascontiguousarray(coarse.repeat(8, 1).repeat(8, 2))


def reference(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"image": image})[0]


QUESTIONS: dict[str, dict] = {
    "fp32, TensorRT's default sources": {"precision": "fp32", "sources": "default"},
    "fp32, no external sources": {"precision": "fp32", "sources": "kept"},
    "fp32, no sources at all": {"precision": "fp32", "sources": "none"},
    "fp32, default sources, preview feature": {"precision": "fp32", "sources": "default", "preview": True},
    "fp16": {"precision": "fp16", "flags": ["FP16"], "sources": "kept"},
    "int8, float weights with Q and DQ": {"precision": "int8", "flags": ["INT8"], "sources": "kept"},
    "int8 and fp16, float weights with Q and DQ": {"precision": "int8", "flags": ["INT8", "FP16"], "sources": "kept"},
    "int8, integer weights with DQ": {"precision": "int8", "flags": ["INT8"], "sources": "kept", "weights": "integers"},
    "int8, Q/DQ without zero points": {"precision": "int8", "flags": ["INT8"], "sources": "kept", "zero_point": False},
    # The tests' small network, of 8 channels and 4 classes, was wrong in int8 where others were right: which part of it?
    **{
        f"int8, {what}": {"precision": "int8", "flags": ["INT8"], "sources": "kept", **how}
        for what, how in {
            "8 channels, 4 classes": {"widths": (3, 8, 4)},
            "8 channels, 8 classes": {"widths": (3, 8, 8)},
            "32 channels, 4 classes": {"widths": (3, 32, 4)},
            "8 channels, 4 classes, first in float": {"widths": (3, 8, 4), "floats": (0,)},
            "8 channels, 4 classes, last in float": {"widths": (3, 8, 4), "floats": (1,)},
            "8 channels, 4 classes, no Relu at the end": {"widths": (3, 8, 4), "has_relu_at_end": False},
        }.items()
    },
}


def ask(name: str, folder: Path) -> dict:
    """Answer one question in this process."""
    if name.endswith(".onnx"):
        from edgeseg.backends.tensorrt.opset17 import for_tensorrt_8

        original = onnx.load(name)
        content = for_tensorrt_8(original).model.SerializeToString()
        kinds = {n.op_type for n in original.graph.node}
        half = any(t.data_type == TensorProto.FLOAT16 for t in original.graph.initializer)
        flags = (
            *(("INT8",) if "QuantizeLinear" in kinds else ()),
            *(("FP16",) if half or "QuantizeLinear" in kinds else ()),
        )
        sources, preview = "kept", False
    else:
        how = QUESTIONS[name]
        original = small(**{key: value for key, value in how.items() if key not in ("flags", "sources", "preview")})
        content, flags = original.SerializeToString(), tuple(how.get("flags", ()))
        sources, preview = how["sources"], how.get("preview", False)
    image = image_for(original)
    wanted = reference(original, image)
    build = Build(content, flags, sources, preview)
    answer = {
        "parsed": bool(build.parsed),
        "parser_errors": build.parser_errors,
        "built": build.plan is not None,
        **build.facts,
    }
    answer["said"] = [line[:400] for line in build.said if not line.startswith("[INFO]")][:30]
    if build.plan is not None:
        outputs, layers, ms = build.run(image)
        (mask,) = outputs.values()
        answer.update(plan_bytes=len(build.plan), ms=ms, agreement=float((mask.reshape(wanted.shape) == wanted).mean()))
        stem = "".join(c if c.isalnum() else "-" for c in Path(name).parent.name + Path(name).stem)
        (folder / f"layers-{stem}.json").write_text(layers)
        listed = json.loads(layers)["Layers"]
        answer["tactics"] = sorted(
            {str(layer.get("TacticName", "")) for layer in listed if isinstance(layer, dict)} - {""}
        )[:20]
        try:
            from edgeseg.backends.tensorrt.inspector import executed_dtypes, read_layers

            ran = executed_dtypes(read_layers(layers), [n.name for n in original.graph.node])
            multiplied = [
                n.name for n in original.graph.node if n.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")
            ]
            counts: dict[str, int] = {}
            for node in multiplied:
                counts[ran.get(node, "not named")] = counts.get(ran.get(node, "not named"), 0) + 1
            answer["convolutions_ran_in"] = counts
        except Exception as exc:
            answer["convolutions_ran_in"] = repr(exc)
    return answer


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) == 4 and sys.argv[2] == "--ask":
        print("ANSWER " + json.dumps(ask(sys.argv[3], folder)))
        return
    answers: dict[str, dict] = {}
    for name in [*QUESTIONS, *sys.argv[2:]]:
        begun = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, __file__, str(folder), "--ask", name], capture_output=True, text=True, timeout=150
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
            answer = json.loads(lines[-1][7:]) if lines else {"ended": done.returncode, "stderr": done.stderr[-1500:]}
        except subprocess.TimeoutExpired:
            answer = {"ended": "after 150 s"}
        answer["seconds"] = round(time.perf_counter() - begun, 2)
        answers[name] = answer
        told = ("parsed", "built", "agreement", "ms", "build_s", "ended", "convolutions_ran_in", "seconds")
        short = {name: answer[name] for name in told if name in answer}
        errors = [line for line in answer.get("said", []) if "ERROR" in line][:2] + answer.get("parser_errors", [])[:1]
        print(name, short, *errors, answer.get("stderr", "")[-300:], sep="\n    ")
        (folder / "probe.json").write_text(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main()
