"""What the calls of a recorded module do by default: a network read from the ONNX file, a plan that is a JSON text.

None of this is TensorRT's behaviour beyond the shape of its answers. Values nobody made up on purpose do not exist: asking
for one is an AssertionError of the test.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto

from edgeseg.backends.cuda.driver import CudaDevice
from recorded_tensorrt.fake_timing import (
    combine_timing_cache,
    create_timing_cache,
    host_memory,
    serialize_timing_cache,
    set_timing_cache,
)
from recorded_tensorrt.parser8 import complaints

PLAN_MARK = b"recorded-tensorrt-plan\n"
_DTYPES = {
    TensorProto.FLOAT: "FLOAT",
    TensorProto.FLOAT16: "HALF",
    TensorProto.INT8: "INT8",
    TensorProto.INT32: "INT32",
    TensorProto.BOOL: "BOOL",
    TensorProto.UINT8: "UINT8",
}
_LAYER_TYPES = {"Conv": "CONVOLUTION", "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE"}
_FORMATS = {"int8": "Int8", "fp16": "FP16", "fp32": "FP32"}


def cuda_device(name: str, compute_capability: tuple[int, int], multiprocessors: int) -> CudaDevice:
    """A GPU as far as engines and kernel times depend on it."""
    return CudaDevice(0, name, compute_capability, multiprocessors, False, True, "12.6")


@dataclass
class Fakery:
    """Knobs of the default behaviour.

    Attributes:
        layer_dtype: ``(node name, dtype by the graph) -> dtype`` of the built layer, in edgeseg's words.
        parse_error: ``(index of a node, text)``: the parser fails on it.
        build_error: the builder logs this as an error and returns ``None``.
        messages: ``(severity name, text)`` the builder logs before it is done.
        device_memory_bytes: what an engine says it needs.
        on_execute: called with the execution context by ``execute_async_v3``; returns its result.
        kernels: the builder measures the times of these, into its timing cache.
        dynamic_formats: the inspector says ``N/A due to dynamic shapes`` for formats.
    """

    layer_dtype: Callable[[str, str], str] = lambda name, dtype: dtype
    parse_error: tuple[int, str] | None = None
    build_error: str | None = None
    messages: list[tuple[str, str]] = field(default_factory=list)
    device_memory_bytes: int = 1 << 20
    on_execute: Callable[[Any], bool] = lambda context: True
    dynamic_formats: bool = False
    kernels: tuple[str, ...] = ("conv",)


def create_network(builder: Any, flags: int = 0) -> Any:
    return builder._recorder.new(
        "INetworkDefinition", name="", inputs=[], outputs=[], layers=[], creation_flags=int(flags), builder=builder
    )


def parse(parser: Any, model: Any, path: str | None = None) -> bool:
    recorder, network = parser._recorder, parser._state["network"]
    # Before 10, only networks with an explicit batch dimension take ONNX files.
    flags = recorder.module.NetworkDefinitionCreationFlag
    if recorder.version.startswith("8.") and not network._state["creation_flags"] & (1 << int(flags.EXPLICIT_BATCH)):
        parser._state["errors"] = [_error(parser, -1, "This version of the ONNX parser only supports explicit batch")]
        return False
    proto = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(bytes(model)))
    if recorder.fakery.parse_error is not None:
        index, text = recorder.fakery.parse_error
        parser._state["errors"] = [_error(parser, index, text, proto.graph.node[index])]
        return False
    if recorder.version.startswith("8."):
        for index, text in complaints(proto, recorder.version):
            parser._state["errors"] = [_error(parser, index, text, proto.graph.node[index])]
            return False
    graph = proto.graph
    weights = {tensor.name for tensor in graph.initializer}
    network._state["inputs"] = [_tensor(recorder, v, is_input=True) for v in graph.input if v.name not in weights]
    network._state["outputs"] = [_tensor(recorder, v) for v in graph.output]
    network._state["layers"] = [_layer(recorder, node, proto) for node in graph.node]
    network._state["graph"] = _described(proto)
    return True


def parse_from_file(parser: Any, model: str) -> bool:
    with open(model, "rb") as stream:
        return parse(parser, stream.read())


def _error(parser: Any, index: int, text: str, node: onnx.NodeProto | None = None) -> Any:
    return parser._recorder.new(
        "ParserError", index=index, desc=text, node_name=node.name if node else "", op=node.op_type if node else ""
    )


def _dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def _tensor(recorder: Any, value: onnx.ValueInfoProto, is_input: bool = False) -> Any:
    dims = _dims(value)
    return recorder.new(
        "ITensor",
        name=value.name,
        shape=tuple(d if isinstance(d, int) else -1 for d in dims),
        dtype=getattr(recorder.module.DataType, _DTYPES[value.type.tensor_type.elem_type]),
        is_network_input=is_input,
    )


def _layer(recorder: Any, node: onnx.NodeProto, proto: onnx.ModelProto) -> Any:
    types = recorder.module.LayerType
    return recorder.new("ILayer", name=node.name, type=getattr(types, _LAYER_TYPES.get(node.op_type, "ELEMENTWISE")))


def _described(proto: onnx.ModelProto) -> dict[str, Any]:
    """What a plan keeps of the graph."""
    graph = proto.graph
    makers = {name: node for node in graph.node for name in node.output}
    types = {t.name: t.data_type for t in graph.initializer}
    types.update({v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)})
    shapes = {v.name: _dims(v) for v in (*graph.input, *graph.output, *graph.value_info)}
    layers = []
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear", "Constant", "Relu"):
            continue
        source = makers.get(node.input[0]) if node.input else None
        int8 = source is not None and source.op_type == "DequantizeLinear"
        half = bool(node.input) and types.get(node.input[0]) == TensorProto.FLOAT16
        layers.append(
            {
                "name": node.name,
                "op": node.op_type,
                "dtype": "int8" if int8 else "fp16" if half else "fp32",
                "input": node.input[0] if node.input else "",
                "output": node.output[0],
                "dimensions": [d if isinstance(d, int) else -1 for d in shapes.get(node.output[0], [])],
            }
        )
    tensors = [
        {"name": v.name, "mode": mode, "dtype": _DTYPES[v.type.tensor_type.elem_type], "dims": _dims(v)}
        for mode, values in (("INPUT", graph.input), ("OUTPUT", graph.output))
        for v in values
    ]
    return {"layers": layers, "tensors": tensors}


def create_builder_config(builder: Any) -> Any:
    recorder = builder._recorder
    config = recorder.new("IBuilderConfig", num_optimization_profiles=0, flag_set=set(), profiles=[], timing_cache=None)
    config._state["profiling_verbosity"] = recorder.module.ProfilingVerbosity.LAYER_NAMES_ONLY
    return config


def set_flag(config: Any, flag: Any) -> None:
    config._state["flag_set"].add(flag.name)


def add_optimization_profile(config: Any, profile: Any) -> int:
    config._state["profiles"].append(profile)
    config._state["num_optimization_profiles"] += 1
    return len(config._state["profiles"]) - 1


def set_shape(profile: Any, input: str, min: Any, opt: Any, max: Any) -> None:  # the binding's own names
    profile._state["shapes"][input] = [tuple(min), tuple(opt), tuple(max)]


def build_serialized_network(builder: Any, network: Any, config: Any) -> Any:
    recorder = builder._recorder
    fakery, logger, severity = recorder.fakery, builder._state["logger"], recorder.classes["Severity"]
    for name, text in fakery.messages:
        logger.log(getattr(severity, name), text)
    monitor = config._state.get("progress_monitor")
    if monitor is not None:
        monitor.phase_start("Building Engine", None, 3)
        for step in range(3):
            if not monitor.step_complete("Building Engine", step):
                return None
        monitor.phase_finish("Building Engine")
    timing = config._state["timing_cache"]
    if timing is not None:
        timing._state["kernels"] = sorted({*timing._state["kernels"], *fakery.kernels})
    calibrated = _calibrate(config, network)
    if fakery.build_error is not None:
        logger.log(severity.ERROR, fakery.build_error)
        return None
    described = json.loads(json.dumps(network._state["graph"]))
    flags = config._state["flag_set"]
    for layer in described["layers"]:
        if layer["dtype"] == "fp32" and layer["op"] in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            layer["dtype"] = "int8" if calibrated else "fp16" if "FP16" in flags else "fp32"
        layer["dtype"] = fakery.layer_dtype(layer["name"], layer["dtype"])
    plan = {
        **described,
        "version": recorder.version,
        "profiles": [p._state["shapes"] for p in config._state["profiles"]],
        "verbosity": config._state["profiling_verbosity"].name,
        "refittable": "REFIT" in flags,
        "flags": sorted(flags),
        "dynamic_formats": fakery.dynamic_formats,
    }
    return host_memory(recorder, PLAN_MARK + json.dumps(plan, sort_keys=True).encode())


def _calibrate(config: Any, network: Any) -> bool:
    calibrator = config._state.get("int8_calibrator")
    if calibrator is None:
        return False
    assert calibrator.get_batch_size() >= 1
    if calibrator.read_calibration_cache() is not None:
        return True
    names = [tensor.name for tensor in network._state["inputs"]]
    batches = 0
    while calibrator.get_batch(names):
        batches += 1
    calibrator.write_calibration_cache(f"TRT-8601-EntropyCalibration2\nimage: {batches:x}\n".encode())
    return True


def deserialize_cuda_engine(runtime: Any, serialized_engine: Any) -> Any:
    recorder = runtime._recorder
    content = bytes(serialized_engine)
    plan = json.loads(content[len(PLAN_MARK) :]) if content.startswith(PLAN_MARK) else {}
    if plan.get("version") != recorder.version:
        logger = runtime._state["logger"]
        logger.log(recorder.classes["Severity"].ERROR, "IRuntime::deserializeCudaEngine: Error Code 1: Serialization")
        return None
    return engine(recorder, plan)


def engine(recorder: Any, plan: dict[str, Any]) -> Any:
    """An ``ICudaEngine`` of a plan."""
    memory = recorder.fakery.device_memory_bytes
    return recorder.new(
        "ICudaEngine",
        plan=plan,
        name="",
        num_io_tensors=len(plan["tensors"]),
        num_layers=len(plan["layers"]),
        num_optimization_profiles=max(1, len(plan["profiles"])),
        refittable=plan["refittable"],
        device_memory_size=memory,
        device_memory_size_v2=memory,
    )


def tensor_of(engine_or_context: Any, name: str) -> dict[str, Any]:
    """The plan's entry of an input or output."""
    plan = engine_or_context._state.get("plan") or engine_or_context._state["engine"]._state["plan"]
    return next(t for t in plan["tensors"] if t["name"] == name)


def get_tensor_shape(engine_: Any, name: str) -> Any:
    return tuple(d if isinstance(d, int) else -1 for d in tensor_of(engine_, name)["dims"])


def get_tensor_profile_shape(engine_: Any, name: str, profile_index: int) -> Any:
    profiles = engine_._state["plan"]["profiles"]
    fixed = [get_tensor_shape(engine_, name)] * 3
    return [tuple(s) for s in profiles[profile_index][name]] if profiles else fixed


def engine_information(inspector: Any, format: Any) -> str:
    plan, version = inspector._state["plan"], inspector._recorder.version
    if plan["verbosity"] != "DETAILED":
        return json.dumps({"Layers": [layer["name"] for layer in plan["layers"]], "Bindings": []})
    layers = [layer_information(plan, layer, version) for layer in plan["layers"]]
    names = [t["name"] for t in plan["tensors"]]
    if version.startswith("11."):
        return json.dumps({"Layers": layers, "I/O Tensors": [{"Name": name} for name in names]})
    return json.dumps({"Layers": layers, "Bindings": names})


def layer_information(plan: dict[str, Any], layer: dict[str, Any], version: str) -> dict[str, Any]:
    """One layer as the inspector of ``version`` words it: from 11 on, format and type are fields of their own."""
    word = _FORMATS[layer["dtype"]]

    def tensor(name: str) -> dict[str, Any]:
        said: dict[str, Any] = {"Name": name, "Location": "Device", "Dimensions": layer["dimensions"]}
        if version.startswith("11."):
            return {**said, "Format": "Row major linear format (kLINEAR)", "DataType": word}
        text = "N/A due to dynamic shapes" if plan["dynamic_formats"] else f"Row major linear {word} format"
        return {**said, "Format/Datatype": text}

    information = {
        "Name": layer["name"],
        "LayerType": "CaskConvolution" if layer["op"] == "Conv" else "kgen",
        "Inputs": [tensor(layer["input"])],
        "Outputs": [tensor(layer["output"])],
        "Metadata": f"[ONNX Layer: {layer['name']}]",
    }
    if layer["op"] == "Conv":
        weights = {"int8": "Int8", "fp16": "Half", "fp32": "Float"}[layer["dtype"]]
        information |= {"ParameterType": "Convolution", "Weights": {"Type": weights, "Count": 1}}
    return information


def create_execution_context(engine_: Any, **_: Any) -> Any:
    return engine_._recorder.new("IExecutionContext", engine=engine_, shapes={}, addresses={}, name="", profile=0)


def set_input_shape(context: Any, name: str, shape: Any) -> bool:
    low, _, high = get_tensor_profile_shape(context._state["engine"], name, context._state["profile"])
    shape = tuple(shape)
    if len(shape) != len(low) or not all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
        return False
    context._state["shapes"][name] = shape
    return True


def context_shape(context: Any, name: str) -> Any:
    """Of an input: as set; of an output: its named dimensions as in the input."""
    sizes: dict[str, int] = {}
    for given, shape in context._state["shapes"].items():
        sizes |= {d: n for d, n in zip(tensor_of(context, given)["dims"], shape, strict=True) if isinstance(d, str)}
    if name in context._state["shapes"]:
        return context._state["shapes"][name]
    return tuple(sizes.get(d, -1) if isinstance(d, str) else d for d in tensor_of(context, name)["dims"])


def set_tensor_address(context: Any, name: str, memory: int) -> bool:
    context._state["addresses"][name] = int(memory)
    return True


def _dtype_of(engine_: Any, name: str) -> Any:
    return getattr(engine_._recorder.module.DataType, tensor_of(engine_, name)["dtype"])


def _mode_of(engine_: Any, name: str) -> Any:
    return getattr(engine_._recorder.module.TensorIOMode, tensor_of(engine_, name)["mode"])


DEFAULTS: dict[str, Callable[..., Any]] = {
    "init_libnvinfer_plugins": lambda _, logger, namespace: True,
    "Builder.create_network": create_network,
    "Builder.create_builder_config": create_builder_config,
    "Builder.create_optimization_profile": lambda b: b._recorder.new("IOptimizationProfile", shapes={}),
    "Builder.build_serialized_network": build_serialized_network,
    "Builder.num_DLA_cores": lambda b: 0,
    "Builder.platform_has_fast_fp16": lambda b: True,
    "Builder.platform_has_fast_int8": lambda b: True,
    "OnnxParser.parse": parse,
    "OnnxParser.parse_from_file": parse_from_file,
    "OnnxParser.num_errors": lambda p: len(p._state.get("errors", ())),
    "OnnxParser.get_error": lambda p, index: p._state["errors"][index],
    "OnnxParser.set_flag": lambda p, flag: None,
    "ParserError.desc": lambda e: e._state["desc"],
    "ParserError.node": lambda e: e._state["index"],
    "ParserError.node_name": lambda e: e._state["node_name"],
    "ParserError.node_operator": lambda e: e._state["op"],
    "INetworkDefinition.num_layers": lambda n: len(n._state["layers"]),
    "INetworkDefinition.get_layer": lambda n, index: n._state["layers"][index],
    "INetworkDefinition.num_inputs": lambda n: len(n._state["inputs"]),
    "INetworkDefinition.get_input": lambda n, index: n._state["inputs"][index],
    "INetworkDefinition.num_outputs": lambda n: len(n._state["outputs"]),
    "INetworkDefinition.get_output": lambda n, index: n._state["outputs"][index],
    "IBuilderConfig.set_flag": set_flag,
    "IBuilderConfig.get_flag": lambda c, flag: flag.name in c._state["flag_set"],
    "IBuilderConfig.add_optimization_profile": add_optimization_profile,
    "IBuilderConfig.set_calibration_profile": lambda c, profile: True,
    "IBuilderConfig.set_memory_pool_limit": lambda c, pool, pool_size: None,
    "IBuilderConfig.set_tactic_sources": lambda c, tactic_sources: True,
    "IBuilderConfig.create_timing_cache": create_timing_cache,
    "IBuilderConfig.set_timing_cache": set_timing_cache,
    "IBuilderConfig.get_timing_cache": lambda c: c._state["timing_cache"],
    "ITimingCache.combine": combine_timing_cache,
    "ITimingCache.serialize": serialize_timing_cache,
    "IOptimizationProfile.set_shape": set_shape,
    "Runtime.deserialize_cuda_engine": deserialize_cuda_engine,
    "ICudaEngine.get_tensor_name": lambda e, index: e._state["plan"]["tensors"][index]["name"],
    "ICudaEngine.get_tensor_mode": _mode_of,
    "ICudaEngine.get_tensor_dtype": _dtype_of,
    "ICudaEngine.get_tensor_shape": get_tensor_shape,
    "ICudaEngine.get_tensor_profile_shape": get_tensor_profile_shape,
    "ICudaEngine.create_engine_inspector": lambda e: e._recorder.new("EngineInspector", plan=e._state["plan"]),
    "ICudaEngine.create_execution_context": create_execution_context,
    "EngineInspector.get_engine_information": engine_information,
    "IExecutionContext.set_input_shape": set_input_shape,
    "IExecutionContext.get_tensor_shape": context_shape,
    "IExecutionContext.set_tensor_address": set_tensor_address,
    "IExecutionContext.get_tensor_address": lambda c, name: c._state["addresses"].get(name, 0),
    "IExecutionContext.infer_shapes": lambda c: [],
    "IExecutionContext.all_binding_shapes_specified": lambda c: bool(c._state["shapes"]),
    "IExecutionContext.set_optimization_profile_async": lambda c, profile_index, stream_handle: True,
    "IExecutionContext.execute_async_v3": lambda c, stream_handle: c._recorder.fakery.on_execute(c),
}
