"""ONNX Runtime on the CPU: the embedded default.

``build`` lets ONNX Runtime optimize the portable graph once, on this machine, and saves the result: loading it again
with optimizations off takes a fraction of the time and runs the same kernels. The saved graph holds layouts and fusions
chosen for this CPU, so ``load`` refuses one made for another instruction set.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgeseg.backends.base import ALONE, BackendStatus, BuildContext, BuiltEngine, NodeTime, Options
from edgeseg.backends.cpu.inherited import keep_in_forks
from edgeseg.backends.cpu.options import (
    WITHOUT_VNNI,
    check_built_for,
    check_image_size,
    cpu_options,
    saved_options,
    threads_and_streams,
)
from edgeseg.backends.cpu.precision import executed_node, executed_precision, profiled_events
from edgeseg.backends.self_contained import require_self_contained
from edgeseg.backends.signature import ANY, TensorInfo, check_signature
from edgeseg.closing import Closing
from edgeseg.errors import ArtifactError, BuildError, InputError, MissingDependencyError, imported, one_line
from edgeseg.machine.cpu import Cpu, this_cpu
from edgeseg.spec import InputSpec
from edgeseg.store.engine import Engine
from edgeseg.store.files import require_utf8
from edgeseg.store.manifest import OnnxGraph

ENGINE_NAME = "engine.onnx"

_SESSION_ENTRIES = {
    # Denormals cost hundreds of cycles each; a segmentation logit that small decides nothing.
    "session.set_denormal_as_zero": "1",
    # One caller thread is the common case on an edge device: do not let pool threads burn a core between frames.
    "session.force_spinning_stop": "1",
}

_DISABLED_OPTIMIZERS = ("WeightBiasQuantization",)
"""Writes float biases as int32, which overflows for filters that are nearly zero. Schemes that want it have int32 biases."""

_DISABLED_FOR_INT8 = ("MatMulAddFusion",)
"""Makes a Gemm of MatMul and Add, whose integer kernel wants an int32 bias: with the float one that a float output leaves it
runs in fp32, a quarter of a segformer's work."""


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """Builds and loads engines for ONNX Runtime's CPU execution provider."""

    cpu: Cpu
    name: str = "onnxruntime"
    profiler: str = "onnxruntime profiler"

    @property
    def scheme(self) -> str:
        """The Q/DQ scheme that is fast with ONNX Runtime on this CPU."""
        if self.cpu.arch == "arm":
            return "onnxruntime-arm"
        return "onnxruntime-vnni" if self.cpu.has_vnni else "onnxruntime-avx2"

    def status(self) -> BackendStatus:
        """Say whether ONNX Runtime works here and what is fast on this CPU."""
        try:
            ort = _import_ort()
        except MissingDependencyError as exc:
            return BackendStatus(False, None, str(exc))
        return BackendStatus(True, str(ort.__version__), f"{self.cpu.name}: {_advice(self.cpu)}")

    def build(self, graph: OnnxGraph, folder: Path, options: Options, context: BuildContext = ALONE) -> BuiltEngine:
        """Optimize the graph for this CPU and save it in ``folder``."""
        from edgeseg.store.onnx_file import read_onnx

        chosen = cpu_options(self.name, options)
        ort = _import_ort()
        read_onnx(graph.path)  # refused here, not by a parser in native code
        path = folder / ENGINE_NAME
        settings = _session_options(ort, chosen, self.cpu)
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.optimized_model_filepath = str(path)
        _open(ort, graph.path, settings, BuildError, _DISABLED_FOR_INT8 if graph.precision == "int8" else ())
        # ONNX Runtime makes the file with a mode of its own; what edgeseg leaves follows the umask.
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
        settings = _session_options(ort, chosen, self.cpu)
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        executed = [executed_node(event) for event in profiled_events(ort, path, settings, graph.spec.input, runs=1)]
        return BuiltEngine(
            path=path,
            precision=executed_precision(path, graph.precision, executed, graph.spec.input.batch.minimum),
            options={**chosen, **_SESSION_ENTRIES},
            versions={"onnxruntime": str(ort.__version__)},
            device={"cpu": self.cpu.name, "isa": self.cpu.isa},
        )

    def load(self, engine: Engine) -> OnnxRuntimeSession:
        """Load an engine folder built by :meth:`build` on a CPU with the same instruction set."""
        ort, path = _import_ort(), engine.engine_path
        check_built_for(engine, self.cpu, "onnxruntime", str(ort.__version__))
        session = _open(ort, path, self.load_settings(ort, engine), ArtifactError)
        check_signature(_tensors(session.get_inputs()), _tensors(session.get_outputs()), engine.manifest.spec)
        return OnnxRuntimeSession(session, engine.manifest.spec.input)

    def profile(self, engine: Engine, runs: int) -> list[NodeTime]:
        """Milliseconds of each node in each run, in the order they run."""
        ort, path = _import_ort(), engine.engine_path
        check_built_for(engine, self.cpu, "onnxruntime", str(ort.__version__))
        require_self_contained(path)
        events = profiled_events(ort, path, self.load_settings(ort, engine), engine.manifest.spec.input, runs)
        nodes = ((executed_node(event), event["dur"] / 1000) for event in events)
        return [(node.name, ms, node.dtype) for node, ms in nodes]

    def load_settings(self, ort: Any, engine: Engine) -> Any:
        """The session options ``engine`` is run with."""
        settings = _session_options(ort, saved_options(engine, self.name), self.cpu)
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return settings


class OnnxRuntimeSession(Closing):
    """A loaded engine; ``run`` may be called from several threads at once."""

    def __init__(self, session: Any, spec: InputSpec | None = None) -> None:
        keep_in_forks(session)
        self._session = session
        self._spec = spec
        (self._image,) = _tensors(session.get_inputs())
        self._outputs = [output.name for output in session.get_outputs()]

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Run one batch: ``(N, H, W, C)`` of the engine's dtype in, arrays by output name out.

        Raises:
            InputError: dtype or shape the engine does not take, or a closed session.
        """
        if self._session is None:
            raise InputError("this session is closed; load the engine again")
        if self._spec is not None:
            check_image_size(images.shape, self._spec)
        try:
            return dict(zip(self._outputs, self._session.run(self._outputs, {self._image.name: images}), strict=True))
        except Exception as exc:
            # ONNX Runtime derives nothing useful from its exceptions; the shape is the one thing a caller gets wrong.
            if (refusal := self._image.refusal(images.dtype, images.shape)) is not None:
                raise refusal from exc
            raise BuildError(f"ONNX Runtime failed to run the engine: {one_line(exc)}") from exc

    def close(self) -> None:
        """Free the session's memory and threads."""
        self._session = None


def backend() -> OnnxRuntimeBackend:
    """Return the backend for the CPU at hand."""
    return OnnxRuntimeBackend(this_cpu())


def open_unoptimized(path: Path) -> OnnxRuntimeSession:
    """Run an ONNX file as it is, a portable graph of another target too. Raises ``ArtifactError``."""
    ort, cpu = _import_ort(), this_cpu()
    settings = _session_options(ort, cpu_options("onnxruntime", {}), cpu)
    # Optimizing writes another graph: float biases become int32, which overflows for filters that are nearly zero.
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return OnnxRuntimeSession(_open(ort, path, settings, ArtifactError))


def _import_ort() -> Any:
    return imported("onnxruntime", "onnxruntime", "run engines on this CPU")


def _session_options(ort: Any, options: Mapping[str, Any], cpu: Cpu) -> Any:
    settings = ort.SessionOptions()
    threads, streams = threads_and_streams(options, cpu.cores)
    settings.intra_op_num_threads = threads // streams
    settings.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    settings.log_severity_level = 3  # errors only: each is raised anyway
    for key, value in _SESSION_ENTRIES.items():
        settings.add_session_config_entry(key, value)
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options["spinning"] else "0")
    return settings


def _open(
    ort: Any,
    path: Path,
    settings: Any,
    error: type[BuildError] | type[ArtifactError],
    disabled_optimizers: tuple[str, ...] = (),
) -> Any:
    require_utf8(path, "ONNX Runtime", error)
    require_self_contained(path)
    make = partial(
        ort.InferenceSession,
        str(path),
        settings,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=(*_DISABLED_OPTIMIZERS, *disabled_optimizers),
        enable_fallback=0,  # it tries the same again, and prints lines to standard output
    )
    try:
        # The first session of a process lets the thread that makes it flush denormals for good, numpy's and PyTorch's as
        # well. A thread of its own takes that with it; those of the session's pool flush theirs in any case.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(make).result()
    except Exception as exc:  # pybind maps ORT's status codes to classes that share no base but Exception
        written = settings.optimized_model_filepath
        if written and "serialization failed" in str(exc):
            # ONNX Runtime does not say why; it was reading one file, which is whole, and writing another.
            free_mb = shutil.disk_usage(Path(written).parent).free / 1e6
            raise error(
                f"ONNX Runtime could not write {written}, with {free_mb:.1f} MB free there; free space or give another --output"
            ) from exc
        raise error(f"ONNX Runtime {ort.__version__} cannot load {path}: {one_line(exc)}") from exc


def _tensors(arguments: Sequence[Any]) -> list[TensorInfo]:
    """What ONNX Runtime says of a session's inputs or outputs: ``tensor(uint8)``, a number or a name per dimension."""
    tensors = []
    for argument in arguments:
        # A scalar and a shape nobody knows look alike.
        shape = [(size, size) if isinstance(size, int) else ANY for size in argument.shape] or None
        dtype = argument.type.removeprefix("tensor(").removesuffix(")")
        tensors.append(TensorInfo(argument.name, {"float": "float32"}.get(dtype, dtype), shape and tuple(shape)))
    return tensors


def _advice(cpu: Cpu) -> str:
    if cpu.arch == "arm":
        return (
            "INT8 (S8S8) is fast"
            if "asimddp" in cpu.flags or not cpu.flags
            else "no dot-product instructions; INT8 gains little"
        )
    if cpu.has_vnni:
        return "INT8 (U8 activations, S8 weights) is fast with VNNI"
    return WITHOUT_VNNI
