"""TensorRT 8.6 to 11: the portable graph becomes a plan for this GPU.

The one place that knows how the versions differ, always by asking the module what it has, never by number:

- before strong typing existed (8.x), networks need the explicit-batch flag, and precisions are allowed by builder flags;
- 10 has both: the graph's types bind with the ``STRONGLY_TYPED`` flag (edgeseg's choice), the builder flags allow without it;
- 11 has the graph's types only: no precision flags, no calibrators.

A plan runs on the GPU and TensorRT it was built with; the manifest says which, and ``load`` refuses others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.artifacts import Engine, OnnxGraph, PrecisionReport
from edgeseg.backends.base import BackendStatus, BuiltEngine, Progress, Session
from edgeseg.backends.cuda import Cuda, open_cuda
from edgeseg.backends.tensorrt_device import Gpu, check_built_for, closed_on_failure, find_gpu, open_session
from edgeseg.backends.tensorrt_kept import keep_log, store_file, timing_cache_path
from edgeseg.backends.tensorrt_log import LogCapture, capture
from edgeseg.backends.tensorrt_options import TensorRTOptions, parse_options, profile_shapes
from edgeseg.backends.tensorrt_progress import progress_monitor
from edgeseg.errors import ArtifactError, BuildError, EdgesegError, MissingDependencyError, SpecError
from edgeseg.spec import PipelineSpec, Precision

if TYPE_CHECKING:
    # Objects of the library are typed as those of 10, where old and new exist side by side; the module itself is not.
    from tensorrt import Builder, IBuilderConfig, ICudaEngine, IOptimizationProfile, OnnxParser

    from edgeseg.backends.tensorrt_graph import ParsedGraph

ENGINE_NAME = "engine.plan"
LOG_NAME = "tensorrt.log"
MIB = 1 << 20


def import_tensorrt() -> Any:
    """The ``tensorrt`` module. Raises ``MissingDependencyError``; ``BuildError`` when it is there and does not load."""
    try:
        import tensorrt
    except ModuleNotFoundError as exc:
        raise MissingDependencyError("tensorrt", "tensorrt", "build and run TensorRT engines") from exc
    except (ImportError, OSError) as exc:
        raise BuildError(
            f"tensorrt is installed but does not load: {exc}; install the CUDA libraries it names"
        ) from exc
    if not hasattr(tensorrt, "Builder"):
        # A folder of that name is an empty package to Python: type stubs, or what a removed wheel left behind.
        raise MissingDependencyError("tensorrt", "tensorrt", "build and run TensorRT engines")
    return tensorrt


def has_strong_typing(trt: Any) -> bool:
    """Whether a network can be bound to the graph's types (10 on)."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def has_weak_typing(trt: Any) -> bool:
    """Whether precisions can be allowed by builder flags, and ranges given by calibrators (up to 10)."""
    return hasattr(trt.BuilderFlag, "INT8")


def device_memory_bytes(engine: ICudaEngine) -> int:
    """Scratch memory one execution context of an engine takes on the device."""
    name = "device_memory_size_v2" if hasattr(engine, "device_memory_size_v2") else "device_memory_size"
    return int(getattr(engine, name))


@dataclass(frozen=True)
class TensorRTBackend:
    """Builds and loads TensorRT plans.

    Attributes:
        import_module: returns the ``tensorrt`` module.
        gpu: finds the GPU; raises ``EdgesegError`` without one.
    """

    name: str = "tensorrt"
    scheme: str = "tensorrt"
    import_module: Callable[[], Any] = import_tensorrt
    gpu: Callable[[], Gpu] = find_gpu

    def status(self) -> BackendStatus:
        """Say whether TensorRT and a GPU are here."""
        version = None
        try:
            trt = self.import_module()
            version = str(trt.__version__)
            gpu = self.gpu()
        except EdgesegError as exc:
            return BackendStatus(False, version, str(exc))
        typing = "the graph's types bind" if has_strong_typing(trt) else "precision by builder flags"
        return BackendStatus(True, version, f"{gpu.name}, compute capability {gpu.capability_text}; {typing}")

    def build(
        self, graph: OnnxGraph, folder: Path, options: Mapping[str, Any], progress: Progress | None = None
    ) -> BuiltEngine:
        """Build a plan for this GPU; see :class:`~edgeseg.backends.tensorrt_options.TensorRTOptions`.

        Raises:
            SpecError: an option that is wrong, or that this version of TensorRT does not have.
            BuildError: TensorRT cannot parse or build the graph (names the node), or built it in another precision.
        """
        from edgeseg.backends.tensorrt_graph import ParsedGraph

        chosen = parse_options(TensorRTOptions, self.name, options)
        trt, gpu = self.import_module(), self.gpu()
        requested: Precision = "int8" if chosen.implicit_calibration else graph.precision
        strong = choose_typing(trt, chosen, requested)
        parsed = ParsedGraph.read(graph, requested)
        parsed.require_fits(implicit=chosen.implicit_calibration)
        with capture(trt) as (logger, log), ExitStack() as cleanup:
            try:
                build = _Build(trt, logger, log, chosen, strong, parsed, requested, cleanup, gpu)
                plan = build.run(folder, progress)
            except EdgesegError:
                keep_log(log, graph)
                raise
            path = folder / ENGINE_NAME
            with path.open("wb") as stream:
                stream.write(plan)
            precision = self._prove(trt, logger, log, path.read_bytes(), parsed, requested, chosen)
            log.write(folder / LOG_NAME)
        return BuiltEngine(
            path=path,
            precision=precision,
            extra_files=(folder / LOG_NAME, *build.extra_files),
            options={**dataclasses.asdict(chosen), "typing": "strong" if strong else "weak"},
            versions={"tensorrt": str(trt.__version__)},
            device={"gpu": gpu.name, "compute_capability": gpu.capability_text},
        )

    def load(self, engine: Engine) -> Session:
        """Load an engine folder built on a GPU and with a TensorRT of the same kind.

        Raises:
            ArtifactError: built with another TensorRT or for another GPU, or the plan is damaged.
            MissingDependencyError, DeviceError: no TensorRT, no CUDA layer, no GPU.
        """
        path = engine.engine_path
        trt = self.import_module()
        cuda = open_cuda()
        with closed_on_failure(cuda):
            check_built_for(engine, self.name, str(trt.__version__), self.gpu())
            return self._opened(trt, cuda, engine, path)

    def _opened(self, trt: Any, cuda: Cuda, engine: Engine, path: Path) -> Session:
        options = engine.manifest.options
        with capture(trt) as (logger, log), cuda.active():
            loaded = deserialize(trt, logger, log, path.read_bytes(), options, path)
            if options.get("strip_weights"):
                refit(trt, logger, log, loaded, engine.graph_path)
        return open_session(trt, loaded, engine.manifest.spec, cuda, options)

    def _prove(
        self,
        trt: Any,
        logger: Any,
        log: LogCapture,
        plan: bytes,
        parsed: ParsedGraph,
        requested: Precision,
        options: TensorRTOptions,
    ) -> PrecisionReport:
        from edgeseg.backends.tensorrt_inspector import proven_precision, read_layers, require_delivered

        engine: ICudaEngine = deserialize(trt, logger, log, plan, dataclasses.asdict(options), Path(ENGINE_NAME))
        information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        if options.profiling_verbosity != "detailed":
            # Only fp32 comes here (choose_typing refuses the others): there is nothing lower to prove.
            return PrecisionReport(requested, {}, {}, sum(parsed.macs.values()))
        report = proven_precision(read_layers(information), requested, parsed.macs, tuple(parsed.nodes))
        if options.prove_precision:
            require_delivered(report, parsed.expected_share(options.implicit_calibration), str(trt.__version__))
        return report


def backend() -> TensorRTBackend:
    """Return the backend for the TensorRT installed here."""
    return TensorRTBackend()


def choose_typing(trt: Any, options: TensorRTOptions, requested: Precision) -> bool:
    """Whether the network is strongly typed. Raises ``SpecError`` for what this version or precision cannot."""
    version = str(trt.__version__)
    if options.typing == "strong" and not has_strong_typing(trt):
        raise SpecError(f"TensorRT {version} has no strong typing (10 has); leave typing out")
    if options.typing == "weak" and not has_weak_typing(trt):
        raise SpecError(f"TensorRT {version} has strong typing only; leave typing out")
    if options.implicit_calibration and not has_weak_typing(trt):
        raise SpecError(
            f"TensorRT {version} has no implicit calibration; leave it out: int8 comes from the graph's Q/DQ"
        )
    if options.profiling_verbosity != "detailed" and requested != "fp32":
        raise SpecError(
            f"profiling_verbosity {options.profiling_verbosity} would leave {requested} unproven; leave it out (detailed)"
        )
    if options.dla_core is not None and requested == "fp32":
        raise SpecError("a DLA computes in fp16 and int8 only; build with --precision fp16 or int8")
    if (
        options.dla_core is not None
        and has_weak_typing(trt)
        and requested == "int8"
        and not options.implicit_calibration
    ):
        raise SpecError(
            f"the DLA of TensorRT {version} takes no Q/DQ graph; build with --backend-option implicit_calibration=true"
        )
    if options.implicit_calibration or options.typing == "weak":
        return False
    # A DLA is only documented with builder flags where those exist.
    return has_strong_typing(trt) and not (options.dla_core is not None and has_weak_typing(trt))


def deserialize(trt: Any, logger: Any, log: LogCapture, plan: bytes, options: Mapping[str, Any], path: Path) -> Any:
    """Make an ``ICudaEngine`` of a plan whose hash was checked. Raises ``ArtifactError``."""
    runtime = trt.Runtime(logger)
    if options.get("version_compatible"):
        # Such a plan carries host code of its TensorRT; its hash is the manifest's, so it is ours.
        runtime.engine_host_code_allowed = True
    if options.get("dla_core") is not None:
        runtime.DLA_core = int(options["dla_core"])
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise ArtifactError(f"TensorRT {trt.__version__} cannot load {path}: {log.first_error()}; compile it again")
    return engine


def refit(trt: Any, logger: Any, log: LogCapture, engine: Any, graph: Path) -> None:
    """Put the weights of the portable graph into a stripped engine. Raises ``ArtifactError``."""
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(graph)) or not refitter.refit_cuda_engine():
        raise ArtifactError(f"TensorRT cannot put the weights of {graph} back: {log.first_error()}; compile it again")


@dataclass
class _Build:
    """One build: network, config and plan of one TensorRT module."""

    trt: Any
    logger: Any
    log: LogCapture
    options: TensorRTOptions
    strong: bool
    parsed: ParsedGraph
    requested: Precision
    cleanup: ExitStack
    gpu: Gpu
    extra_files: tuple[Path, ...] = ()

    def run(self, folder: Path, progress: Progress | None) -> Any:
        """Return the plan as TensorRT's ``IHostMemory``."""
        trt, spec = self.trt, self.parsed.spec
        builder: Builder = trt.Builder(self.logger)
        network = builder.create_network(self._network_flags())
        parser: OnnxParser = trt.OnnxParser(network, self.logger)
        if not parser.parse(self.parsed.for_parser(explicit_batch=not has_strong_typing(trt))):
            raise self._refused("cannot parse", self._parser_error(parser))
        config = builder.create_builder_config()
        self._set_precision(config)
        self._set_limits(config, builder)
        profile = self._add_profile(builder, config, spec)
        calibrated = self._set_calibrator(config, profile, folder)
        timing = self._load_timing_cache(config)
        with progress_monitor(trt, config, progress) as watch:
            plan = builder.build_serialized_network(network, config)
        watch.raise_interrupt()
        calibrated()
        if plan is None:
            raise self._refused("cannot build", self.log.first_error())
        if timing is not None:
            store_file(timing, bytes(config.get_timing_cache().serialize()))
        return plan

    def _network_flags(self) -> int:
        kinds = self.trt.NetworkDefinitionCreationFlag
        if not has_strong_typing(self.trt):
            return 1 << int(kinds.EXPLICIT_BATCH)
        return 1 << int(kinds.STRONGLY_TYPED) if self.strong else 0

    def _set_precision(self, config: IBuilderConfig) -> None:
        flags = self.trt.BuilderFlag
        if not self.options.tf32:
            config.clear_flag(flags.TF32)
        if self.strong or self.requested == "fp32":
            return
        # Weak typing: a flag allows a precision; the graph's Q/DQ or types then say where.
        half = self.requested == "fp16" or self.options.allow_fp16 or self.options.dla_core is not None
        if half:
            config.set_flag(flags.FP16)
        if self.requested == "int8":
            config.set_flag(flags.INT8)

    def _set_limits(self, config: IBuilderConfig, builder: Builder) -> None:
        trt, options = self.trt, self.options
        config.profiling_verbosity = getattr(trt.ProfilingVerbosity, options.profiling_verbosity.upper())
        if options.workspace_mb is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb * MIB)
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.aux_streams is not None:
            config.max_aux_streams = options.aux_streams
        if options.hardware_compatibility != "none":
            level = self._member("HardwareCompatibilityLevel", options.hardware_compatibility.upper())
            config.hardware_compatibility_level = level
        for wanted, flag in (
            (options.version_compatible, "VERSION_COMPATIBLE"),
            (options.strip_weights, "STRIP_PLAN"),
            (options.refit, "REFIT"),
        ):
            if wanted:
                config.set_flag(self._member("BuilderFlag", flag))
        if options.tactic_sources is not None:
            sources = (self._member("TacticSource", name) for name in options.tactic_sources)
            config.set_tactic_sources(sum(1 << int(source) for source in sources))
        if options.dla_core is not None:
            if options.dla_core >= builder.num_DLA_cores:
                raise SpecError(
                    f"dla_core is {options.dla_core}, this device has {builder.num_DLA_cores} DLA cores; leave it out"
                )
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = options.dla_core
            config.set_flag(trt.BuilderFlag.GPU_FALLBACK)

    def _member(self, enumeration: str, name: str) -> Any:
        kind = getattr(self.trt, enumeration)
        if not hasattr(kind, name):
            allowed = ", ".join(m for m in kind.__members__)
            raise SpecError(f"TensorRT {self.trt.__version__} has no {enumeration} {name} (it has {allowed})")
        return getattr(kind, name)

    def _add_profile(self, builder: Builder, config: IBuilderConfig, spec: PipelineSpec) -> IOptimizationProfile | None:
        shapes = profile_shapes(spec.input, self.options.min_size, self.options.max_size)
        if shapes is None:
            return None
        profile = builder.create_optimization_profile()
        profile.set_shape("image", *shapes)
        config.add_optimization_profile(profile)
        preview = self.trt.PreviewFeature
        if hasattr(preview, "PROFILE_SHARING_0806"):
            # Several contexts on one profile; before 10 each would need a profile of its own.
            config.set_preview_feature(preview.PROFILE_SHARING_0806, True)
        return profile

    def _set_calibrator(
        self, config: IBuilderConfig, profile: IOptimizationProfile | None, folder: Path
    ) -> Callable[[], None]:
        """Give the config its int8 ranges; what is returned checks, after the build, that they were used."""
        if not self.options.implicit_calibration:
            return lambda: None
        from edgeseg.backends.tensorrt_implicit import Ranges

        ranges = Ranges.choose(self.trt, self.options, self.parsed, folder)
        self.cleanup.callback(ranges.close)
        config.int8_calibrator = ranges.calibrator
        if profile is not None:
            config.set_calibration_profile(profile)

        def after() -> None:
            self.extra_files = ranges.finish(folder)

        return after

    def _load_timing_cache(self, config: IBuilderConfig) -> Path | None:
        if self.options.timing_cache is False:
            config.set_flag(self.trt.BuilderFlag.DISABLE_TIMING_CACHE)
            return None
        given = self.options.timing_cache
        path = Path(given) if isinstance(given, str) else timing_cache_path(self.gpu, str(self.trt.__version__))
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        # False: measured on another GPU or by another version. An empty one then takes its place.
        if not config.set_timing_cache(cache, False):
            config.set_timing_cache(config.create_timing_cache(b""), False)
        return path

    def _parser_error(self, parser: OnnxParser) -> str:
        if not parser.num_errors:
            return self.log.first_error()
        error = parser.get_error(0)
        node = error.node_name() if hasattr(error, "node_name") else ""
        index = int(error.node())
        names = self.parsed.nodes
        if not node and 0 <= index < len(names):
            node = names[index]
        return f"{' '.join(str(error.desc()).split())}{self.parsed.where(node)}"

    def _refused(self, what: str, text: str) -> BuildError:
        where = "" if "at node" in text else self.parsed.blame(" ".join([text, *self.log.errors]))
        return BuildError(f"TensorRT {self.trt.__version__} {what} {self.parsed.path.name}: {text}{where}")
