"""TensorRT 8.5 to 11: the portable graph becomes a plan for this GPU.

The one place that knows how the versions differ, always by asking the module what it has, never by number:

- before strong typing existed (8.x), networks need the explicit-batch flag, precisions are allowed by builder flags, and the
  parser knows ONNX up to opset 17;
- 10 has both: the graph's types bind with the ``STRONGLY_TYPED`` flag (edgeseg's choice), the builder flags allow without it;
- 11 has the graph's types only: no precision flags, no calibrators.

A plan runs on the GPU and TensorRT it was built with; the manifest says which, and ``load`` refuses others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeseg.backends.base import ALONE, BackendStatus, BuildContext, BuiltEngine, NodeTime, Options, Progress
from edgeseg.backends.cuda.device import Cuda
from edgeseg.backends.cuda.driver import CudaDevice
from edgeseg.backends.tensorrt.device import check_built_for, find_gpu, on_gpu
from edgeseg.backends.tensorrt.log import LOG_NAME, keep_log
from edgeseg.backends.tensorrt.module import TENSORRT, Library
from edgeseg.backends.tensorrt.options import TensorRTOptions, parse_options, profile_shapes
from edgeseg.backends.tensorrt.progress import progress_monitor
from edgeseg.backends.tensorrt.session import TensorRTSession, open_session
from edgeseg.backends.tensorrt.times import LayerTimes, measure_layer_times
from edgeseg.errors import BuildError, DeviceError, EdgesegError, MissingDependencyError, SpecError
from edgeseg.spec import PipelineSpec, Precision
from edgeseg.store.engine import Engine
from edgeseg.store.manifest import OnnxGraph, PrecisionReport

if TYPE_CHECKING:
    # Objects of the library are typed as those of 10, where old and new exist side by side.
    from tensorrt import Builder, IBuilderConfig, INetworkDefinition, IOptimizationProfile
    from tensorrt_surface import TensorRT

    from edgeseg.backends.tensorrt.graph import ParsedGraph
    from edgeseg.backends.tensorrt.timing import TimingCache

ENGINE_NAME = "engine.plan"


def has_strong_typing(trt: TensorRT) -> bool:
    """Whether a network can be bound to the graph's types (10 on)."""
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def has_weak_typing(trt: TensorRT) -> bool:
    """Whether precisions can be allowed by builder flags, and ranges given by calibrators (up to 10)."""
    return hasattr(trt.BuilderFlag, "INT8")


@dataclass(frozen=True)
class TensorRTBackend:
    """Builds and loads TensorRT plans.

    Attributes:
        import_module: returns the ``tensorrt`` module.
        gpu: finds the GPU; raises ``EdgesegError`` without one.
        layer_times: runs a new engine with TensorRT's profiler.
    """

    name: str = "tensorrt"
    scheme: str = "tensorrt"
    profiler: str = "tensorrt IProfiler"
    import_module: Callable[[], Any] = TENSORRT.load
    gpu: Callable[[], CudaDevice] = find_gpu
    layer_times: Callable[..., LayerTimes] = measure_layer_times

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

    def build(self, graph: OnnxGraph, folder: Path, options: Options, context: BuildContext = ALONE) -> BuiltEngine:
        """Build a plan for this GPU; see :class:`~edgeseg.backends.tensorrt.options.TensorRTOptions`.

        Raises:
            SpecError: an option that is wrong, or that this version of TensorRT does not have.
            BuildError: TensorRT cannot parse or build the graph (names the node), or built it in another precision.
        """
        from edgeseg.backends.tensorrt.graph import ParsedGraph
        from edgeseg.backends.tensorrt.timing import TimingCache

        chosen = parse_options(TensorRTOptions, self.name, options)
        trt, gpu = self.import_module(), self.gpu()
        requested: Precision = "int8" if chosen.implicit_calibration else graph.precision
        strong = choose_typing(trt, chosen, requested)
        require_settings(trt, chosen)
        contexts, sharing_notes = choose_contexts(trt, chosen, graph.spec, asked=options.get("contexts") is not None)
        chosen = dataclasses.replace(chosen, contexts=contexts)
        parsed = ParsedGraph.read(graph, requested)
        parsed.require_fits(implicit=chosen.implicit_calibration)
        engines_folder = context.engines_folder or folder.parent
        timing = TimingCache.of_build(chosen.timing_cache, engines_folder, gpu, str(trt.__version__))
        with TENSORRT.heard(trt) as library, ExitStack() as cleanup:
            try:
                given = parsed.for_parser(
                    opset_17=not has_strong_typing(trt), has_normalization=hasattr(trt.LayerType, "NORMALIZATION")
                )
                build = _Build(library, chosen, strong, given, requested, cleanup, timing)
                plan = bytes(build.run(folder, context.progress))
                (folder / ENGINE_NAME).write_bytes(plan)
                precision, notes = build.prove(plan, self.layer_times)
            except BuildError as exc:
                raise BuildError(f"{exc}; TensorRT's log: {keep_log(library.log, graph.sha256)}") from exc
            library.log.write(folder / LOG_NAME)
        return BuiltEngine(
            path=folder / ENGINE_NAME,
            precision=precision,
            extra_files=(folder / LOG_NAME, *build.extra_files),
            options={**dataclasses.asdict(chosen), "typing": "strong" if strong else "weak"},
            versions={"tensorrt": str(trt.__version__)},
            device={"gpu": gpu.name, "compute_capability": gpu.capability_text},
            notes=(*sharing_notes, *(timing.notes if timing is not None else ()), *notes),
        )

    def load(self, engine: Engine) -> TensorRTSession:
        """Load an engine folder built on a GPU and with a TensorRT of the same kind.

        Raises:
            ArtifactError: built with another TensorRT or for another GPU, or the plan is damaged.
            MissingDependencyError, DeviceError: no TensorRT, no CUDA layer, no GPU.
        """
        manifest, path = engine.manifest, engine.engine_path
        trt = self.import_module()

        def opened(cuda: Cuda) -> TensorRTSession:
            check_built_for(engine, self.name, str(trt.__version__), cuda.device)
            with TENSORRT.heard(trt) as library, cuda.active():
                loaded = library.deserialize(path.read_bytes(), manifest.options, path, engine.graph_path)
            return open_session(trt, loaded, manifest.spec, cuda, manifest.options)

        return on_gpu(opened)

    def profile(self, engine: Engine, runs: int) -> list[NodeTime]:
        """Milliseconds of each layer in each run; see :meth:`~edgeseg.backends.tensorrt.session.TensorRTSession.layer_times`."""
        with self.load(engine) as session:
            return [(name, ms, None) for name, ms in session.layer_times(runs)]


def backend() -> TensorRTBackend:
    """Return the backend for the TensorRT installed here."""
    return TensorRTBackend()


def choose_typing(trt: TensorRT, options: TensorRTOptions, requested: Precision) -> bool:
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


def require_settings(trt: TensorRT, options: TensorRTOptions) -> None:
    """Raise ``SpecError`` for an option this version of TensorRT has no setting for."""
    for name, setting in (
        ("optimization_level", "builder_optimization_level"),
        ("aux_streams", "max_aux_streams"),
        ("hardware_compatibility", "hardware_compatibility_level"),
    ):
        asked = getattr(options, name)
        if asked not in (None, "none") and not hasattr(trt.IBuilderConfig, setting):
            raise SpecError(f"TensorRT {trt.__version__} has no {name} (8.6 and later have); leave it out")


def choose_contexts(
    trt: TensorRT, options: TensorRTOptions, spec: PipelineSpec, *, asked: bool
) -> tuple[int, tuple[str, ...]]:
    """How many batches the engine runs at a time, and a note where it is fewer than by default.

    Raises:
        SpecError: more than the engine can run were asked for.
    """
    shares = has_strong_typing(trt) or hasattr(trt.PreviewFeature, "PROFILE_SHARING_0806")
    if shares or options.contexts == 1 or not (spec.input.dynamic_size or spec.input.batch.is_dynamic):
        return options.contexts, ()
    said = (
        f"TensorRT {trt.__version__} runs one batch at a time of an engine of dynamic shapes (8.6 and later share them)"
    )
    if asked:
        raise SpecError(
            f"{said}, contexts is {options.contexts}; leave it out, or build with a fixed --size and --batch"
        )
    return 1, (said,)


@dataclass
class _Build:
    """One build: network, config and plan of one TensorRT module."""

    library: Library
    options: TensorRTOptions
    strong: bool
    parsed: ParsedGraph
    requested: Precision
    cleanup: ExitStack
    timing: TimingCache | None
    extra_files: tuple[Path, ...] = ()

    @property
    def trt(self) -> TensorRT:
        return self.library.trt

    def run(self, folder: Path, progress: Progress | None) -> Any:
        """Return the plan as TensorRT's ``IHostMemory``."""
        trt, parsed = self.trt, self.parsed
        builder = self.library.made(trt.Builder)
        network = self.library.parse(builder, self._network_flags(), parsed)
        config = builder.create_builder_config()
        self.library.configure(config, self.options)
        self._set_precision(config)
        self._keep_float32(network, config)
        self._set_limits(config, builder)
        profile = self._add_profile(builder, config, parsed.spec)
        calibrated = self._set_calibrator(config, profile, folder)
        if self.timing is None:
            config.set_flag(trt.BuilderFlag.DISABLE_TIMING_CACHE)
        else:
            self.timing.give_to(config)
        with progress_monitor(trt, config, progress) as watch:
            plan = builder.build_serialized_network(network, config)
        watch.raise_interrupt()
        calibrated()
        if plan is None:
            raise self.library.refused("build", parsed)
        if self.timing is not None:
            self.timing.keep_from(config)
        return plan

    def _network_flags(self) -> int:
        kinds = self.trt.NetworkDefinitionCreationFlag
        if not has_strong_typing(self.trt):
            return 1 << int(kinds.EXPLICIT_BATCH)
        return 1 << int(kinds.STRONGLY_TYPED) if self.strong else 0

    def _set_precision(self, config: IBuilderConfig) -> None:
        flags = self.trt.BuilderFlag
        if self.strong or self.requested == "fp32":
            return
        # Weak typing: a flag allows a precision; the graph's Q/DQ or types then say where.
        half = self.requested == "fp16" or self.options.allow_fp16 or self.options.dla_core is not None
        if half:
            config.set_flag(flags.FP16)
        if self.requested == "int8":
            config.set_flag(flags.INT8)

    def _keep_float32(self, network: INetworkDefinition, config: IBuilderConfig) -> None:
        """Where half precision is allowed and would overflow, or round an image's values: ask for float32."""
        if self.strong or not self.parsed.float32 or not config.get_flag(self.trt.BuilderFlag.FP16):
            return
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.name in self.parsed.float32:
                layer.precision = self.trt.float32
                layer.set_output_type(0, self.trt.float32)
        config.set_flag(self.trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)

    def _set_limits(self, config: IBuilderConfig, builder: Builder) -> None:
        trt, options = self.trt, self.options
        config.profiling_verbosity = getattr(trt.ProfilingVerbosity, options.profiling_verbosity.upper())
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        if options.aux_streams is not None:
            config.max_aux_streams = options.aux_streams
        if options.hardware_compatibility != "none":
            level = self.library.member("HardwareCompatibilityLevel", options.hardware_compatibility.upper())
            config.hardware_compatibility_level = level
        if options.version_compatible:
            config.set_flag(self.library.member("BuilderFlag", "VERSION_COMPATIBLE"))
        if options.tactic_sources is not None:
            sources = (self.library.member("TacticSource", name) for name in options.tactic_sources)
            if not config.set_tactic_sources(sum(1 << int(source) for source in sources)):
                listed = ", ".join(options.tactic_sources)
                raise SpecError(f"TensorRT {trt.__version__} refuses tactic_sources {listed}; leave one of them out")
        if options.dla_core is not None:
            if options.dla_core >= builder.num_DLA_cores:
                raise SpecError(
                    f"dla_core is {options.dla_core}, this device has {builder.num_DLA_cores} DLA cores; leave it out"
                )
            config.default_device_type = trt.DeviceType.DLA
            config.DLA_core = options.dla_core
            config.set_flag(trt.BuilderFlag.GPU_FALLBACK)

    def _add_profile(self, builder: Builder, config: IBuilderConfig, spec: PipelineSpec) -> IOptimizationProfile | None:
        shapes = profile_shapes(spec.input, self.options.min_size, self.options.max_size)
        if shapes is None:
            return None
        if self.options.dla_core is not None:
            raise SpecError(
                "a DLA takes images of one shape; build with a fixed --size and --batch, or leave dla_core out"
            )
        profile = self.library.add_profile(builder, config, shapes)
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
        from edgeseg.backends.tensorrt.calibration import Ranges

        ranges = Ranges.choose(self.trt, self.options, self.parsed, folder)
        self.cleanup.callback(ranges.close)
        config.int8_calibrator = ranges.calibrator
        if profile is not None:
            config.set_calibration_profile(profile)

        def after() -> None:
            self.extra_files = ranges.finish(folder)

        return after

    def prove(self, plan: bytes, layer_times: Callable[..., LayerTimes]) -> tuple[PrecisionReport, tuple[str, ...]]:
        """What the engine computes in, by its inspector, and notes. Raises ``BuildError`` when it is not what was asked for."""
        from edgeseg.backends.tensorrt.inspector import proven_precision, read_layers, require_delivered, time_share

        trt, options, parsed = self.trt, self.options, self.parsed
        settings = dataclasses.asdict(options)
        engine = self.library.deserialize(plan, settings, Path(ENGINE_NAME))
        if options.profiling_verbosity != "detailed":
            # Only fp32 comes here (choose_typing refuses the others): there is nothing lower to prove.
            return PrecisionReport(self.requested, {}, {}, sum(parsed.macs.values()), evidence="inspected"), ()
        information = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        layers = read_layers(information)
        report = proven_precision(layers, self.requested, parsed.macs, tuple(parsed.nodes))
        if options.prove_precision:
            require_delivered(report, parsed.expected_share(options.implicit_calibration), str(trt.__version__))
        if not options.layer_times:
            return report, ()
        del engine  # not twice in the device's memory
        try:
            times = layer_times(self.library, plan, settings, parsed)
        except (DeviceError, MissingDependencyError) as exc:
            return report, (f"time per dtype was not measured: {exc}",)
        return dataclasses.replace(report, time_share=time_share(layers, times)), ()
