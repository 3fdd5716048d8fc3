"""TensorRT engines whose ``execute_async_v3`` runs the graph in ONNX Runtime, on the stub's memory, when a stream gets there."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from recorded_tensorrt import Recorder
from recorded_tensorrt.fake import _described
from recorded_tensorrt.fake import engine as recorded_engine
from recorded_tensorrt.graphs import SIDE, small_model
from stub_cuda import Stub

from edgeseg.backends.cuda.device import open_cuda
from edgeseg.backends.cuda.driver import DriverName
from edgeseg.backends.tensorrt.options import SessionOptions
from edgeseg.backends.tensorrt.session import TensorRTSession
from edgeseg.spec import BatchRange, InputSpec, ModelSpec, OutputSpec, PipelineSpec

NUMPY = {"FLOAT": np.float32, "UINT8": np.uint8, "INT32": np.int32, "HALF": np.float16}


def model(batch: int | str = 1, size: tuple[int | str, int | str] = (SIDE, SIDE), confidence: bool = False) -> Any:
    """A small network whose mask depends on the image: four classes, random weights."""
    made = small_model(batch=batch, size=size)
    rng = np.random.default_rng(3)
    for tensor in made.graph.initializer:
        shape = tuple(tensor.dims)
        if len(shape) == 4:
            weights = rng.standard_normal(shape).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(weights - weights.mean((1, 2, 3), keepdims=True), tensor.name))
    if confidence:
        node = onnx.helper.make_node("ReduceMax", ["decoder.block.r", "axis"], ["confidence"], "post/Max", keepdims=0)
        made.graph.node.append(node)
        made.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axis"))
        value = onnx.helper.make_tensor_value_info("confidence", onnx.TensorProto.FLOAT, (batch, *size))
        made.graph.output.append(value)
    return made


ONE, MASK = BatchRange(), OutputSpec()
RNG = np.random.default_rng(11)


def spec(batch: BatchRange = ONE, dynamic_size: bool = False) -> PipelineSpec:
    return PipelineSpec(
        ModelSpec("fpn", classes=4), InputSpec(SIDE, SIDE, batch=batch, stride=8, dynamic_size=dynamic_size)
    )


def reference_session(model: bytes) -> onnxruntime.InferenceSession:
    """ONNX Runtime on one thread: of a graph this small others would only spin."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def images(n: int = 1, height: int = SIDE, width: int = SIDE, seed: int | None = None) -> np.ndarray:
    """Noise, another at each call unless ``seed`` is given."""
    rng = RNG if seed is None else np.random.default_rng(seed)
    return rng.integers(0, 256, (n, height, width, 3), np.uint8)


an_image = images


class Simulation:
    """A recorded TensorRT of one version with an engine of one graph.

    Attributes:
        trt: the module.
        engine: the deserialized engine.
        reference: ONNX Runtime on the same graph.
        refuse: what ``execute_async_v3`` returns ``False`` for: the number of the call, from 1.
    """

    def __init__(self, stub: Stub, proto: Any, version: str = "10.3.0", profile: Any = None) -> None:
        self.recorder = Recorder(version, {"IExecutionContext.execute_async_v3": self._execute})
        self.trt = self.recorder.module
        described = _described(proto)
        plan = {
            **described,
            "version": version,
            "profiles": [{"image": profile}] if profile else [],
            "refittable": False,
        }
        self.engine = recorded_engine(self.recorder, plan)
        self.reference = reference_session(proto.SerializeToString())
        self.layers = [layer["name"] for layer in described["layers"]]
        self.refuse = 0
        self.executed = 0
        self._dtypes = {t["name"]: NUMPY[t["dtype"]] for t in described["tensors"]}
        self._stub = stub

    def masks(self, images: np.ndarray) -> np.ndarray:
        """The oracle."""
        mask: np.ndarray = self.reference.run(["mask"], {"image": images})[0]
        return mask

    def _execute(self, context: Any, stream_handle: int) -> bool:
        self.executed += 1
        if self.executed == self.refuse:
            return False
        shape = context._state["shapes"]["image"]
        addresses = dict(context._state["addresses"])  # as they are now: a later call may change them

        def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
            size = int(np.prod(shape)) * np.dtype(self._dtypes[name]).itemsize
            assert addresses[name] % 256 == 0
            assert self._stub.is_live(addresses[name], size), f"{name}: the engine would touch memory not allocated"
            bytes_ = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(addresses[name]))
            return bytes_.view(self._dtypes[name]).reshape(shape)

        def work() -> None:
            names = [output.name for output in self.reference.get_outputs()]
            results = self.reference.run(names, {"image": array("image", shape)})
            for name, result in zip(names, results, strict=True):
                array(name, result.shape)[...] = result

        done = self._stub.enqueue(stream_handle, work) == 0
        profiler = context._state.get("profiler")
        if profiler is not None:
            for number, name in enumerate(self.layers):
                profiler.report_layer_time(name, 0.25 * (number + 1))
        return done


def session(
    simulation: Simulation,
    driver: DriverName,
    options: SessionOptions | None = None,
    batch: BatchRange = ONE,
    output: OutputSpec = MASK,
) -> TensorRTSession:
    """The engine of a simulation, opened."""
    cuda, contract = open_cuda(driver), replace(spec(batch), output=output)
    try:
        return TensorRTSession(simulation.trt, simulation.engine, contract, cuda, options)
    except BaseException:
        cuda.close()
        raise
