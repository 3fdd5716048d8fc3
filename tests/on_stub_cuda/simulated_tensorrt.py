"""A pytest plugin (``-p simulated_tensorrt``) that makes ``import tensorrt`` a recorded module which runs what was parsed.

For trying the tests of ``tests/gpu`` themselves on a machine without a GPU. ONNX Runtime does the engine's work on the stub's
memory: passing here shows that the suite is sound, and nothing about a device.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import numpy as np
import onnx
from recorded_tensorrt import Recorder, fake
from simulated import NUMPY, reference_session
from stub_cuda import Stub

# pycuda binds every function of the driver when loaded; the stub has those edgeseg calls.
sys.setdlopenflags(os.RTLD_LAZY)
stub = Stub()
parsed: list[Any] = []


def parse(parser: Any, model: Any, path: str | None = None) -> bool:
    nodes = onnx.load_model_from_string(bytes(model)).graph.node
    unknown = next((index for index, node in enumerate(nodes) if node.domain), None)
    recorder.fakery.parse_error = None if unknown is None else (unknown, "No importer registered for this operator")
    done = fake.parse(parser, model, path)
    if not done:
        return False
    # The plan is JSON: it says which of the graphs parsed so far it is of.
    parser._state["network"]._state["graph"]["number"] = len(parsed)
    parsed.append(reference_session(bytes(model)))
    return done


def execute(context: Any, stream_handle: int) -> bool:
    plan = context._state["engine"]._state["plan"]
    session, dtypes = parsed[plan["number"]], {t["name"]: NUMPY[t["dtype"]] for t in plan["tensors"]}
    shape, addresses = context._state["shapes"]["image"], dict(context._state["addresses"])

    def array(name: str, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape)) * np.dtype(dtypes[name]).itemsize
        assert stub.is_live(addresses[name], size)
        return (
            np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(addresses[name]))
            .view(dtypes[name])
            .reshape(shape)
        )

    def work() -> None:
        names = [output.name for output in session.get_outputs()]
        for name, result in zip(names, session.run(names, {"image": array("image", shape)}), strict=True):
            array(name, result.shape)[...] = result

    done = stub.enqueue(stream_handle, work) == 0
    profiler = context._state.get("profiler")
    if profiler is not None:
        for layer in plan["layers"]:
            profiler.report_layer_time(layer["name"], 0.25)
    return done


def pytest_collection_finish() -> None:
    sys.modules["device_engines"].ITERATIONS = 5  # type: ignore[attr-defined]  # times of the stub say nothing


def pytest_unconfigure() -> None:
    assert stub.errors == []
    assert stub.live() == {}, "the suite leaves something behind"


version = os.environ.get("STUB_TENSORRT_VERSION", "10.3.0")
recorder = Recorder(
    version,
    {
        "OnnxParser.parse": parse,
        "IExecutionContext.execute_async_v3": execute,
        "OnnxParserRefitter.refit_from_file": lambda refitter, model: True,
        "Refitter.refit_cuda_engine": lambda refitter: True,
        "Builder.num_DLA_cores": lambda builder: 2,
    },
)
sys.modules["tensorrt"] = recorder.module
