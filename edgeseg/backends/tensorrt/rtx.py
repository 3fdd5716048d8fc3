"""TensorRT-RTX: engines for RTX GPUs, built ahead of time on any machine, without a GPU too.

One engine file serves several compute capabilities; kernels are chosen when it is loaded. Networks are strongly typed, so what
a layer computes in is what the parsed network says: there is no engine to inspect without a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.backends.base import ALONE, BackendStatus, BuildContext, BuiltEngine, NodeTime, Options
from edgeseg.backends.cuda.device import Cuda
from edgeseg.backends.cuda.driver import CudaDevice
from edgeseg.backends.tensorrt.device import find_gpu, on_gpu
from edgeseg.backends.tensorrt.log import LOG_NAME, keep_log
from edgeseg.backends.tensorrt.module import TENSORRT_RTX, Library
from edgeseg.backends.tensorrt.options import RTX_SMS, RtxOptions, parse_options, profile_shapes
from edgeseg.backends.tensorrt.progress import progress_monitor
from edgeseg.backends.tensorrt.rtx_cache import CachingEngine, runtime_cache_path
from edgeseg.backends.tensorrt.session import TensorRTSession, open_session
from edgeseg.errors import BuildError, EdgesegError, StaleEngineError, typed
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import OnnxGraph, PrecisionReport

if TYPE_CHECKING:
    from tensorrt import Builder, IBuilderConfig, INetworkDefinition
    from tensorrt_surface import TensorRT

    from edgeseg.backends.tensorrt.graph import ParsedGraph

ENGINE_NAME = "engine.rtx"


@dataclass(frozen=True)
class TensorRTRtxBackend:
    """Builds TensorRT-RTX engines anywhere; loads them where there is an RTX GPU.

    Attributes:
        import_module: returns the ``tensorrt_rtx`` module.
        gpu: finds the GPU; raises ``EdgesegError`` without one.
    """

    name: str = "tensorrt-rtx"
    scheme: str = "tensorrt"
    profiler: str = "tensorrt IProfiler"
    import_module: Callable[[], Any] = TENSORRT_RTX.load
    gpu: Callable[[], CudaDevice] = find_gpu

    def status(self) -> BackendStatus:
        """Say whether engines can be built and run here."""
        try:
            trt = self.import_module()
        except EdgesegError as exc:
            return BackendStatus(False, None, str(exc))
        version = str(trt.__version__)
        sms = ",".join(str(sm) for sm in RTX_SMS)
        try:
            gpu = self.gpu()
        except EdgesegError as exc:
            return BackendStatus(False, version, f"builds engines (--sm {sms}); running them: {exc}", can_build=True)
        return BackendStatus(True, version, f"{gpu.name}, compute capability {gpu.capability_text}", can_build=True)

    def build(self, graph: OnnxGraph, folder: Path, options: Options, context: BuildContext = ALONE) -> BuiltEngine:
        """Build one engine for all compute capabilities of option ``sm``.

        Without it the engine is for this machine's GPU, and without one for those TensorRT-RTX builds for by default.

        Without float32 matrix products for SM 75, an engine for it gets a graph that computes them otherwise
        (:mod:`edgeseg.backends.tensorrt.turing`); so do the others in the same engine file.

        Raises:
            SpecError: a wrong option.
            BuildError: TensorRT-RTX cannot parse or build the graph; names the node.
        """
        from edgeseg.backends.tensorrt.graph import ParsedGraph
        from edgeseg.backends.tensorrt.turing import TURING, for_turing

        chosen = parse_options(RtxOptions, self.name, options)
        if not chosen.sm:
            chosen = dataclasses.replace(chosen, sm=self.own_sm())
        trt = self.import_module()
        parsed = ParsedGraph.read(graph, graph.precision)
        parsed.require_fits(implicit=False)
        if TURING in chosen.sm:
            parsed = for_turing(parsed, keep_weights=chosen.strip_weights or chosen.refit)
        with TENSORRT_RTX.heard(trt) as library:
            builder = library.made(trt.Builder)
            try:
                network = parse_network(library, builder, parsed)
                config = builder.create_builder_config()
                configure(library, builder, config, chosen, parsed)
                with progress_monitor(trt, config, context.progress) as watch:
                    plan = builder.build_serialized_network(network, config)
                watch.raise_interrupt()
                if plan is None:
                    raise refused(library, parsed)
            except BuildError as exc:
                raise BuildError(f"{exc}; TensorRT-RTX's log: {keep_log(library.log, graph.sha256)}") from exc
            path = folder / ENGINE_NAME
            with path.open("wb") as stream:
                stream.write(plan)
            library.log.write(folder / LOG_NAME)
        return BuiltEngine(
            path=path,
            precision=network_precision(trt, network, parsed),
            extra_files=(folder / LOG_NAME,),
            options=dataclasses.asdict(chosen),
            versions={"tensorrt-rtx": str(trt.__version__)},
            device={"sm": ",".join(str(sm) for sm in chosen.sm) or "default"},
        )

    def own_sm(self) -> tuple[int, ...]:
        """This machine's compute capability, if there is a GPU engines can be built for."""
        try:
            major, minor = self.gpu().compute_capability
        except EdgesegError:
            return ()
        return (10 * major + minor,) if 10 * major + minor in RTX_SMS else ()

    def load(self, engine: Engine) -> TensorRTSession:
        """Load an engine folder on a GPU whose compute capability it was built for.

        Raises:
            ArtifactError: built with another version or for other compute capabilities, or the engine is damaged.
            MissingDependencyError, DeviceError: no TensorRT-RTX, no CUDA layer, no GPU.
        """
        manifest, path = engine.manifest, engine.engine_path
        trt = self.import_module()
        version = str(trt.__version__)

        def opened(cuda: Cuda) -> TensorRTSession:
            check_sm(engine, version, cuda.device)
            with TENSORRT_RTX.heard(trt) as library, cuda.active():
                loaded = library.deserialize(path.read_bytes(), manifest.options, path, engine.graph_path)
                if not manifest.options.get("runtime_cache") or manifest.engine is None:
                    return open_session(trt, loaded, manifest.spec, cuda, manifest.options)
                caching = CachingEngine(loaded, runtime_cache_path(manifest.engine.sha256, cuda.device, version))
                session = open_session(trt, caching, manifest.spec, cuda, manifest.options)
                try:
                    # The session made its first context, which is when kernels are compiled.
                    caching.store()
                except BaseException:
                    session.close()
                    raise
                return session

        return on_gpu(opened)

    def profile(self, engine: Engine, runs: int) -> list[NodeTime]:
        """Milliseconds of each layer in each run; see :meth:`~edgeseg.backends.tensorrt.session.TensorRTSession.layer_times`."""
        with self.load(engine) as session:
            return [(name, ms, None) for name, ms in session.layer_times(runs)]


def backend() -> TensorRTRtxBackend:
    """Return the backend for the TensorRT-RTX installed here."""
    return TensorRTRtxBackend()


def parse_network(library: Library, builder: Builder, parsed: ParsedGraph) -> INetworkDefinition:
    """Parse the graph into a strongly typed network. Raises ``BuildError`` naming the node."""
    flags = 1 << int(library.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return library.parse(builder, flags, parsed.for_parser(opset_17=False))


def refused(library: Library, parsed: ParsedGraph) -> BuildError:
    """Why a build failed, at which node, and what to do where that is known."""
    # Measured with 1.7: it has no fp32 matrix products for SM 75, but fp16 ones. What is left of them is what
    # tensorrt_turing does not know.
    turing = any("Turing" in text for text in library.log.errors)
    advice = "; leave 75 out of sm, or build with precision fp16" if turing else ""
    return library.refused("build", parsed, advice)


def configure(
    library: Library, builder: Builder, config: IBuilderConfig, options: RtxOptions, parsed: ParsedGraph
) -> None:
    """Set what the options ask for."""
    trt = library.trt
    if options.sm:
        config.num_compute_capabilities = len(options.sm)
        for index, sm in enumerate(options.sm):
            if not config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), index):
                raise BuildError(f"{library.name} does not take SM {sm}; leave it out of sm")
    library.configure(config, options)
    shapes = profile_shapes(parsed.spec.input, options.min_size, options.max_size)
    if shapes is not None:
        library.add_profile(builder, config, shapes)


def network_precision(trt: TensorRT, network: INetworkDefinition, parsed: ParsedGraph) -> PrecisionReport:
    """What the layers of the parsed network compute in. Strong typing makes it what the engine does."""
    from edgeseg.graph.types import precision_report

    names = {trt.DataType.FLOAT: "fp32", trt.DataType.HALF: "fp16", trt.DataType.BF16: "bf16"}
    makers: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        inputs = [tensor for tensor in inputs if tensor is not None]
        from_integers = [makers.get(tensor.name) == trt.LayerType.DEQUANTIZE for tensor in inputs[:2]]
        if len(inputs) > 1 and all(from_integers):
            dtypes[layer.name] = "int8"
        else:
            dtypes[layer.name] = names.get(inputs[0].dtype, "other") if inputs else "other"
        for i in range(layer.num_outputs):
            makers[layer.get_output(i).name] = layer.type
    return precision_report(parsed.requested, dtypes, parsed.macs)


def check_sm(engine: Engine, version: str, gpu: CudaDevice) -> None:
    """Raise ``StaleEngineError`` unless the engine was built with this version and for this GPU's compute capability."""
    manifest = engine.manifest
    built_with, sms = manifest.versions.get("tensorrt-rtx", "?"), manifest.device.get("sm", "")
    here = f"{gpu.compute_capability[0]}{gpu.compute_capability[1]}"
    if built_with != version or (sms != "default" and here not in sms.split(",")):
        raise StaleEngineError(
            f"{engine.folder} was built with TensorRT-RTX {built_with} for SM {sms}, this is {version} on {gpu.name} "
            f"(SM {here}); run: {typed('compile', engine.folder, '--sm', str(here))}"
        )
