"""OpenVINO on the CPU: the same Q/DQ graphs, kernels compiled for this processor.

``build`` compiles the portable graph once and exports the compiled model; loading that takes a tenth of compiling again.
The export holds choices made for this CPU and this OpenVINO, so ``load`` refuses it elsewhere.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeseg.backends.base import ALONE, BackendStatus, BuildContext, BuiltEngine, NodeTime, Options, grey_batch
from edgeseg.backends.cpu.inherited import keep_in_forks
from edgeseg.backends.cpu.openvino_argmax import replace_argmax
from edgeseg.backends.cpu.openvino_group_norm import replace_group_norm
from edgeseg.backends.cpu.options import (
    WITHOUT_VNNI,
    check_built_for,
    check_image_size,
    cpu_options,
    saved_options,
    threads_and_streams,
)
from edgeseg.backends.signature import TensorInfo, check_signature
from edgeseg.closing import Closing
from edgeseg.errors import ArtifactError, BuildError, InputError, MissingDependencyError, imported, one_line
from edgeseg.machine.cpu import Cpu, this_cpu
from edgeseg.spec import InputSpec, Precision
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import OnnxGraph, PrecisionReport

if TYPE_CHECKING:
    import onnx

ENGINE_NAME = "engine.blob"


@dataclass(frozen=True)
class OpenVinoBackend:
    """Builds and loads engines for OpenVINO's CPU plugin."""

    cpu: Cpu
    name: str = "openvino"
    profiler: str = "openvino profiling_info"

    @property
    def scheme(self) -> str:
        """The Q/DQ scheme that is right, and fast, with OpenVINO on this CPU: without VNNI its sums saturate as well."""
        return "openvino" if self.cpu.computes("openvino") else "openvino-avx2"

    def status(self) -> BackendStatus:
        """Say whether OpenVINO works here."""
        try:
            ov = _import_openvino()
        except MissingDependencyError as exc:
            return BackendStatus(False, None, str(exc))
        version = _version(ov)
        if self.cpu.arch == "other":
            return BackendStatus(
                False, version, f"OpenVINO has no kernels for {self.cpu.name}; use --target onnxruntime"
            )
        fast = "INT8 is fast with VNNI" if self.cpu.has_vnni else WITHOUT_VNNI
        return BackendStatus(True, version, f"{self.cpu.name}: {fast}")

    def build(self, graph: OnnxGraph, folder: Path, options: Options, context: BuildContext = ALONE) -> BuiltEngine:
        """Compile the graph for this CPU and export it into ``folder``."""
        from edgeseg.store.onnx_file import read_onnx

        chosen = cpu_options(self.name, options)
        ov = _import_openvino()
        settings = self._settings(ov, chosen, graph.precision)
        path = folder / ENGINE_NAME
        source = read_onnx(graph.path)  # refused here, not by a parser in native code
        try:
            compiled = ov.Core().compile_model(_read(ov, graph.path), "CPU", settings)
            path.write_bytes(compiled.export_model().getvalue())
        except Exception as exc:  # OpenVINO raises RuntimeError subclasses and pybind's own alike
            raise BuildError(f"OpenVINO {_version(ov)} cannot compile {graph.path}: {one_line(exc)}") from exc
        return BuiltEngine(
            path=path,
            precision=_executed_precision(compiled, graph, source),
            options={**chosen, **{k: str(v) for k, v in settings.items()}},
            versions={"openvino": _version(ov)},
            device={"cpu": self.cpu.name, "isa": self.cpu.isa},
        )

    def load(self, engine: Engine) -> OpenVinoSession:
        """Load an engine folder built by :meth:`build` on a CPU with the same instruction set."""
        ov, path = _import_openvino(), engine.engine_path
        check_built_for(engine, self.cpu, "openvino", _version(ov))
        manifest = engine.manifest
        settings = self._settings(ov, saved_options(engine, self.name), manifest.precision.requested)
        try:
            compiled = ov.Core().import_model(path.read_bytes(), "CPU", settings)
        except Exception as exc:  # see build
            raise ArtifactError(f"OpenVINO cannot load {path}: {one_line(exc)}") from exc
        check_signature(_tensors(compiled.inputs), _tensors(compiled.outputs), manifest.spec)
        return OpenVinoSession(compiled, manifest.spec.input)

    def profile(self, engine: Engine, runs: int) -> list[NodeTime]:
        """Milliseconds of each executed layer in each run, from OpenVINO's performance counters.

        The portable graph is compiled again with counters on: an exported engine was made without them.

        Raises:
            BuildError: OpenVINO cannot compile or run it.
        """
        from edgeseg.store.onnx_file import read_onnx

        ov, manifest = _import_openvino(), engine.manifest
        read_onnx(engine.graph_path)
        settings = self._settings(ov, saved_options(engine, self.name), manifest.precision.requested)
        image = grey_batch(manifest.spec.input)
        layers: list[NodeTime] = []
        try:
            model = _read(ov, engine.graph_path)
            request = ov.Core().compile_model(model, "CPU", {**settings, "PERF_COUNT": True}).create_infer_request()
            request.infer([image], share_inputs=True)  # allocates; not counted
            for _ in range(runs):
                request.infer([image], share_inputs=True)
                for layer in request.profiling_info:
                    if "EXECUTED" in str(layer.status) and "NOT_RUN" not in str(layer.status):
                        kernel_dtype = str(layer.exec_type).rpartition("_")[2].lower()
                        dtype = _DTYPES.get(kernel_dtype, kernel_dtype)
                        layers.append((layer.node_name, layer.real_time.total_seconds() * 1000, dtype))
        except Exception as exc:  # see build
            raise BuildError(f"OpenVINO {_version(ov)} cannot profile {engine.graph_path}: {one_line(exc)}") from exc
        return layers

    def _settings(self, ov: Any, options: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
        hint = "f32"
        if precision == "fp16" and "FP16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            hint = "f16"
        threads, streams = threads_and_streams(options, self.cpu.cores)
        return {
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
            "NUM_STREAMS": streams,
            "INFERENCE_NUM_THREADS": threads,
            # Without this OpenVINO runs the float parts in bfloat16 where the CPU can: a precision nobody asked for.
            "INFERENCE_PRECISION_HINT": hint,
        }


class OpenVinoSession(Closing):
    """A loaded engine; ``run`` may be called from several threads at once."""

    def __init__(self, compiled: Any, spec: InputSpec) -> None:
        keep_in_forks(compiled)
        self._compiled = compiled
        self._spec = spec
        self._idle = [compiled.create_infer_request()]
        self._lock = threading.Lock()
        self._outputs = [output.get_any_name() for output in compiled.outputs]
        (self._image,) = _tensors(compiled.inputs)

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Run one batch: ``(N, H, W, C)`` of the engine's dtype in, arrays by output name out.

        Raises:
            InputError: dtype or shape the engine does not take, or a closed session.
            BuildError: OpenVINO failed to run the engine.
        """
        if self._compiled is None:
            raise InputError("this session is closed; load the engine again")
        # Asked first: OpenVINO would convert another dtype without a word.
        if (refusal := self._image.refusal(images.dtype, images.shape)) is not None:
            raise refusal
        check_image_size(images.shape, self._spec)
        with self._lock:
            request = self._idle.pop() if self._idle else self._compiled.create_infer_request()
        try:
            request.infer([images], share_inputs=True)
            # Copies: the request's own memory is written again by the next call.
            return {name: request.get_output_tensor(i).data.copy() for i, name in enumerate(self._outputs)}
        except Exception as exc:  # see OpenVinoBackend.build
            raise BuildError(f"OpenVINO failed to run the engine: {one_line(exc)}") from exc
        finally:
            with self._lock:
                self._idle.append(request)

    def close(self) -> None:
        """Free the engine's memory and threads."""
        self._idle.clear()
        self._compiled = None


def backend() -> OpenVinoBackend:
    """Return the backend for the CPU at hand."""
    return OpenVinoBackend(this_cpu())


def _read(ov: Any, path: Path) -> Any:
    """The graph as OpenVINO runs it fastest."""
    model = ov.Core().read_model(str(path))
    replace_argmax(ov, model)
    replace_group_norm(ov, model)
    return model


def _import_openvino() -> Any:
    # Importing it sends usage data, keeps a client id in the home folder, and warns where it cannot. There is no setting:
    # it does without where the package that does so is not installed.
    hidden = "openvino_telemetry" not in sys.modules
    if hidden:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return imported("openvino", "openvino", "run engines with OpenVINO")
    finally:
        if hidden:
            del sys.modules["openvino_telemetry"]


def _tensors(ports: Sequence[Any]) -> list[TensorInfo]:
    """What OpenVINO says of a compiled model's inputs or outputs."""
    tensors = []
    for port in ports:
        shape, name = port.get_partial_shape(), port.get_any_name() if port.get_names() else ""
        sizes = tuple((d.get_min_length(), d.get_max_length() if d.get_max_length() > 0 else None) for d in shape)
        dtype = np.dtype(port.get_element_type().to_dtype()).name
        tensors.append(TensorInfo(name, dtype, sizes))
    return tensors


def _version(ov: Any) -> str:
    return str(ov.__version__).split("-")[0]


def _executed_precision(compiled: Any, graph: OnnxGraph, model: onnx.ModelProto) -> PrecisionReport:
    """Join the runtime model's precision per layer with the portable graph's multiply-accumulates."""
    from edgeseg.graph.types import graph_macs, precision_report, shares

    macs = graph_macs(model, graph.spec.input)
    executed: dict[str, str] = {}
    nodes: list[str] = []
    for operation in compiled.get_runtime_model().get_ops():
        info = {
            key: operation.get_rt_info()[key].astype(str)
            for key in ("layerType", "runtimePrecision", "originalLayersNames")
        }
        if info["layerType"] in {"Input", "Output", "Const"}:
            continue
        dtype = _DTYPES.get(info["runtimePrecision"].lower(), info["runtimePrecision"].lower())
        nodes.append(dtype)
        executed.update(dict.fromkeys((n for n in info["originalLayersNames"].split(",") if n in macs), dtype))
    dtypes = {name: executed.get(name, "fp32") for name in macs}
    report = precision_report(graph.precision, dtypes, macs)
    return replace(
        report,
        node_share=shares(Counter(nodes)),
        evidence="inspected",
        float_layers={name: f"OpenVINO runs it in {dtypes[name]}" for name in report.float_layers},
    )


_DTYPES = {"u8": "int8", "i8": "int8", "f32": "fp32", "f16": "fp16", "fp32": "fp32", "fp16": "fp16"}
